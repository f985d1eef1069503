package main

import (
	"fmt"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

func verdict(v lifecycle.Verdict) api.Verdict {
	out := api.Verdict{
		Outcome: api.Outcome(v.Outcome), Message: v.Message(), Cause: v.Cause, Started: v.Started, Deadline: v.Deadline,
		TotalMs: v.Total().Milliseconds(), GuardMs: v.Guard.Milliseconds(), WithdrawMs: v.Withdraw.Milliseconds(), SettleMs: v.Settle.Milliseconds(), DrainMs: v.Drain.Milliseconds(),
		Withdrawn: v.Withdrawn, WithdrawError: v.WithdrawError, GuardError: v.GuardError, AnnounceError: v.AnnounceError, ForcedBy: v.ForcedBy,
		InFlight: v.InFlight, Unsure: v.Unsure,
	}
	for _, s := range v.Sources {
		out.Sources = append(out.Sources, api.SourceVerdict{
			Name: s.Name, InFlight: s.InFlight, Unsure: s.Unsure, Connections: s.Connections, Peak: s.Peak, Error: s.Err,
		})
	}
	return out
}

func (a *agent) status() api.Status {
	s := a.machine.Status()
	out := api.Status{
		Version: buildVersion(), Cluster: a.cfg.Cluster, Namespace: a.cfg.Namespace, Pod: a.cfg.Pod, PodUID: a.cfg.PodUID,
		Node: s.Observation.Pod.Node, State: s.State.String(), Since: s.Since, Cause: s.Cause,
		Endpoints: []api.Endpoint{}, Trail: []api.Decision{},
		Registry: api.Registry{InSync: s.Registry.InSync, Lease: s.Registry.Lease, Keys: s.Registry.Keys, Error: s.Registry.Err, Updated: s.Registry.Updated},
		Problems: s.Observation.Problems, Refused: a.hook.refused.Load(),
	}
	for _, e := range s.Observation.Endpoints {
		ae := api.Endpoint{Service: e.Service, Found: e.Found, Ready: e.Ready, Serving: e.Serving, Terminating: e.Terminating}
		for _, ip := range e.Addresses {
			ae.Addresses = append(ae.Addresses, ip.String())
		}
		for _, p := range e.Ports {
			ae.Ports = append(ae.Ports, fmt.Sprintf("%s:%d/%s", p.Name, p.Number, p.Protocol))
		}
		out.Endpoints = append(out.Endpoints, ae)
	}
	for _, t := range s.Trail {
		out.Trail = append(out.Trail, api.Decision{Time: t.Time, State: t.State.String(), Cause: t.Cause})
	}
	if l := s.Availability.Liveness; l.State != "" {
		out.Liveness = &api.Availability{State: string(l.State), Cause: l.Cause, Since: l.Since}
	}
	if r := s.Availability.Readiness; r.State != "" {
		out.Readiness = &api.Availability{State: string(r.State), Cause: r.Cause, Since: r.Since}
	}
	if h := s.Hold; h != nil {
		out.Hold = &api.Hold{Reason: h.Reason, Actor: h.Actor, Since: h.Since, Expires: h.Expires}
	}
	if !s.Deadline.IsZero() {
		out.Deadline = &s.Deadline
	}
	if p := a.progress.Load(); s.State == lifecycle.Draining && p != nil {
		out.Draining = &api.Draining{InFlight: p.InFlight, Unsure: p.Unsure, ElapsedMs: p.Elapsed.Milliseconds()}
	}
	if s.Verdict != nil {
		v := verdict(*s.Verdict)
		out.Verdict = &v
	}
	return out
}
