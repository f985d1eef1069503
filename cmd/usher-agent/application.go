package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health"
	"usher.dev/usher/lifecycle/health/probe"
	"usher.dev/usher/notify"
	"usher.dev/usher/registry"
)

// holdTimeout is how long an order to hold or to resume waits for etcd.
const holdTimeout = 5 * time.Second

// newHealth makes what asks the application how it is, and what tells it how it stands.
func (a *agent) newHealth() (err error) {
	a.health, err = health.New(health.Config{
		Settings: a.cfg.Health, Ports: a.namedPort, Wrap: func(d probe.Dial) probe.Dial { return a.own.Dial(d) }, OnChange: a.available, Authorized: a.carriesToken,
		Opening: a.cfg.LeaseTTL, Version: buildVersion(), Logger: a.log.Named("health"),
	})
	if err != nil {
		return err
	}
	a.hub = notify.NewHub()
	a.receivers, err = notify.New(notify.Config{
		Settings: a.cfg.Notify, Hub: a.hub, Dial: a.own.Dial(new(net.Dialer).DialContext), Logger: a.log.Named("notify"),
	})
	if err != nil {
		return err
	}
	if a.cfg.HealthGRPCAddress == "" {
		return nil
	}
	ln, err := net.Listen("tcp", a.cfg.HealthGRPCAddress)
	if err != nil {
		return fmt.Errorf("--health-grpc-address %q: %w", a.cfg.HealthGRPCAddress, err)
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, a.health.GRPC())
	a.healthGRPC = func(ctx context.Context) error {
		go func() {
			<-ctx.Done()
			s.Stop() // whoever watches asks again
		}()
		return s.Serve(ln)
	}
	return nil
}

// available is called from the health's goroutine.
func (a *agent) available(v lifecycle.Availability) {
	if a.alone != nil {
		a.observed(a.alone.observe(v))
	}
	a.machine.SetAvailability(v)
}

// namedPort is a port of the endpoint, by its name.
func (a *agent) namedPort(name string) (int, bool) {
	for _, e := range a.machine.Status().Observation.Endpoints {
		for _, p := range e.Ports {
			if p.Name == name {
				return int(p.Number), true
			}
		}
	}
	return 0, false
}

// restarted tells the health of a container that began a new life. It is called from the watcher's goroutine.
func (a *agent) restarted(p lifecycle.Pod) {
	if !p.Known {
		return
	}
	if a.restartsSeen && p.Restarts > a.restarts {
		a.health.Restarted("the container was restarted", p.Restarted)
	}
	a.restartsSeen, a.restarts = true, p.Restarts
}

// decided tells the health how the instance stands.
func (a *agent) decided(state lifecycle.State, cause string, held, terminating bool) {
	a.health.SetLifecycle(health.Lifecycle{
		State: state.String(), Cause: cause, Held: held,
		Draining: state == lifecycle.Draining || state == lifecycle.Stopped || state == lifecycle.Released && terminating,
	})
}

// tell publishes what was decided. It is called from the machine's goroutine.
func (a *agent) tell(t lifecycle.Transition) {
	st := a.machine.Status()
	a.decided(t.State, t.Cause, st.Hold != nil, st.Observation.Pod.Terminating)
	e := api.Event{Time: t.Time, State: t.State.String(), Cause: t.Cause}
	switch {
	case t.State == lifecycle.Online:
		e.Type = api.EventOnline
	case t.State == lifecycle.Offline:
		e.Type = api.EventOffline
	case t.State == lifecycle.Draining:
		e.Type = api.EventDraining
		if !st.Deadline.IsZero() {
			e.Deadline = &st.Deadline
		}
	case t.State == lifecycle.Released:
		if !st.Observation.Pod.Terminating && t.Verdict.Cause == lifecycle.CauseHook {
			// The kubelet restarts the container, and asks the new one's liveness before anybody may have heard of it: BROKEN
			// would be the end of that one too.
			a.health.Restarted("the container is about to be restarted", time.Time{})
		}
		e.Type = api.EventReleased
		v := verdict(*t.Verdict)
		e.Verdict = &v
	default:
		return // Pending is how it begins, and Stopped how the agent ends
	}
	a.hub.Publish(e)
}

// held is called from the machine's goroutine.
func (a *agent) held(h *lifecycle.Hold) {
	e := api.Event{Type: api.EventResumed, Cause: "the hold is over"}
	if h != nil {
		e.Type, e.Cause = api.EventHeld, h.String()
	}
	st := a.machine.Status()
	e.State = st.State.String()
	a.decided(st.State, e.Cause, h != nil, st.Observation.Pod.Terminating)
	a.hub.Publish(e)
}

// orderHold keeps the instance offline, or lets it back. The order goes through etcd, so that it outlives this agent.
func (a *agent) orderHold(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), holdTimeout)
	defer cancel()
	fail := func(code int, err error) { answer(w, code, api.Error{Error: err.Error()}) }
	switch r.Method {
	case http.MethodGet:
		h := a.machine.Status().Hold
		if h == nil {
			fail(http.StatusNotFound, errors.New("nobody holds the instance"))
			return
		}
		answer(w, http.StatusOK, api.Hold{Reason: h.Reason, Actor: h.Actor, Since: h.Since, Expires: h.Expires})
	case http.MethodPut:
		var order api.Hold
		// Since is passed over, so that what a GET has answered may be PUT again.
		body := api.Fields{"reason": &order.Reason, "actor": &order.Actor, "since": &order.Since, "expires": &order.Expires}
		if err := body.Read(w, r); err != nil {
			badBody(w, err)
			return
		}
		h, err := a.registrar.Hold(ctx, lifecycle.Hold{Reason: order.Reason, Actor: order.Actor, Expires: order.Expires})
		if err != nil {
			code := http.StatusServiceUnavailable
			if errors.Is(err, registry.ErrBadHold) {
				code = http.StatusBadRequest
			}
			fail(code, err)
			return
		}
		answer(w, http.StatusOK, api.Hold{Reason: h.Reason, Actor: h.Actor, Since: h.Since, Expires: h.Expires})
	case http.MethodDelete:
		there, err := a.registrar.Resume(ctx)
		switch {
		case err != nil:
			fail(http.StatusServiceUnavailable, err)
		case !there:
			fail(http.StatusNotFound, errors.New("nobody holds the instance"))
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	default:
		w.Header().Set("Allow", "GET, PUT, DELETE")
		fail(http.StatusMethodNotAllowed, fmt.Errorf("method %s: want GET, PUT or DELETE", r.Method))
	}
}
