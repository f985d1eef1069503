package main

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"usher.dev/usher/registry"
)

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status POD",
		Short: "Show all about one pod, held against what etcd really has",
		Long: `Show the ledger's records of one pod, one for each of its Services, and hold them against what etcd really has: what is
left of the lease, and whether each consumer key is there under that same lease. How its last shutdown ended comes last;
that is there for a while after the pod is gone.`,
		Args:              arguments(1, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, explain, stop, err := a.catalog(cmd)
			if err != nil {
				return err
			}
			defer stop()
			entries, err := c.List(cmd.Context(), a.namespace, "")
			if err != nil {
				return explain(err)
			}
			found := []instanceStatus{}
			for _, e := range entries {
				if e.Pod != args[0] {
					continue
				}
				s, err := c.Standing(cmd.Context(), e)
				if err != nil {
					return explain(err)
				}
				i := newInstanceStatus(e, s)
				if e.Err == nil {
					h, err := c.Hold(cmd.Context(), e.Namespace, e.Record.Owner.PodUID)
					if err != nil && !errors.Is(err, registry.ErrNotARecord) {
						return explain(err)
					}
					if i.Hold = newHoldStatus(h); err != nil {
						i.HoldError = err.Error()
					}
				}
				found = append(found, i)
			}
			verdicts, err := c.Verdicts(cmd.Context(), a.namespace, args[0])
			if err != nil {
				return explain(err)
			}
			last := []verdictItem{}
			seen := map[string]bool{}
			for _, e := range verdicts { // the newest is first
				if !seen[e.Namespace] {
					seen[e.Namespace] = true
					last = append(last, newVerdictItem(e))
				}
			}
			if len(found) == 0 && len(last) == 0 {
				return a.noRecord(args[0])
			}
			return a.printStatus(args[0], found, last)
		},
	}
}

// instanceStatus is a pod as an instance of one Service.
type instanceStatus struct {
	item
	Namespace string      `json:"namespace"`
	Service   string      `json:"service"`
	TTL       int64       `json:"ttlSeconds"`
	Granted   int64       `json:"grantedTTLSeconds"`
	Keys      []keyStatus `json:"keys"`
	Hold      *holdStatus `json:"hold,omitempty"`
	HoldError string      `json:"holdError,omitempty"` // what stands in place of a hold
}

type keyStatus struct {
	Key    string           `json:"key"`
	Exists bool             `json:"exists"`
	Lease  registry.LeaseID `json:"lease"`
	OK     bool             `json:"ok"` // it exists, under the record's own lease
}

func newInstanceStatus(e registry.Entry, s registry.Standing) instanceStatus {
	i := instanceStatus{item: newItem(e), Namespace: e.Namespace, Service: e.Service,
		TTL: int64(s.TTL / time.Second), Granted: int64(s.GrantedTTL / time.Second), Keys: []keyStatus{}}
	for _, k := range s.Keys {
		i.Keys = append(i.Keys, keyStatus{k.Key, k.Exists, k.Lease, k.Exists && k.Lease == e.Lease && e.Lease != 0})
	}
	return i
}

func (a *app) printStatus(pod string, found []instanceStatus, last []verdictItem) error {
	if a.output == "json" || a.output == "yaml" {
		return encode(a.stdout, a.output, struct {
			Pod       string           `json:"pod"`
			Cluster   string           `json:"cluster"`
			Instances []instanceStatus `json:"instances"`
			Verdicts  []verdictItem    `json:"verdicts"` // the last one; of each namespace
		}{pod, a.cluster, found, last})
	}
	w := tabwriter.NewWriter(a.stdout, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "Name:\t%s\n", pod)
	fmt.Fprintf(w, "Cluster:\t%s\n", a.cluster)
	if len(found) == 0 {
		fmt.Fprintln(w, "State:\tgone")
	}
	age := a.ages()
	blocks := make([]func(), 0, len(found)+len(last))
	for _, i := range found {
		blocks = append(blocks, func() { i.describe(w, age) })
	}
	for _, i := range last {
		blocks = append(blocks, func() { i.describe(w, age) })
	}
	for _, block := range blocks {
		// Each has columns of its own.
		if err := w.Flush(); err != nil {
			return fmt.Errorf("writing the status: %w", err)
		}
		fmt.Fprintln(w)
		block()
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing the status: %w", err)
	}
	return nil
}

func (i instanceStatus) describe(w io.Writer, age func(time.Time) string) {
	line := func(name, value string) { fmt.Fprintf(w, "  %s:\t%s\n", name, orNone(value)) }
	fmt.Fprintf(w, "Service:\t%s\n", i.Service)
	line("Namespace", i.Namespace)
	if i.Record == nil {
		line("State", "Unreadable")
		line("Error", i.Error)
		line("Lease", i.leaseText())
		return
	}
	r := *i.Record
	line("State", r.State)
	line("Since", fmt.Sprintf("%s (%s ago)", r.Since.UTC().Format(time.RFC3339), age(r.Since)))
	line("Cause", r.Cause)
	if i.Hold != nil {
		line("Held", i.Hold.text())
	}
	if i.HoldError != "" {
		line("Held", "no: "+i.HoldError)
	}
	line("Verdict", r.Verdict)
	line("Addresses", strings.Join(r.Addresses, ", "))
	var ports []string
	for _, p := range r.Ports {
		s := fmt.Sprintf("%d/%s", p.Port, p.Protocol)
		if p.Protocol == "" {
			s = fmt.Sprint(p.Port)
		}
		if p.Name != "" {
			s = p.Name + " " + s
		}
		if p.AppProtocol != "" {
			s += " (" + p.AppProtocol + ")"
		}
		ports = append(ports, s)
	}
	line("Ports", strings.Join(ports, ", "))
	line("Node", r.Node)
	line("Zone", r.Zone)
	line("Pod UID", r.Owner.PodUID)
	line("Agent", r.Owner.Agent)
	line("Lease", i.leaseText())
	line("Formats", strings.Join(r.Formats, ", "))
	if len(i.Keys) == 0 {
		line("Keys", "")
		return
	}
	fmt.Fprintf(w, "  Keys:\n") // without a tab, so that long keys don't widen the column above
	for _, k := range i.Keys {
		var what string
		switch {
		case k.OK:
			what = "present"
		case !k.Exists:
			what = "MISSING"
		case k.Lease == 0:
			what = "WITHOUT A LEASE: it stays when the agent dies"
		default:
			what = "UNDER ANOTHER LEASE: " + k.Lease.String()
		}
		fmt.Fprintf(w, "    %s\t%s\n", k.Key, what)
	}
}

func (i instanceStatus) leaseText() string {
	if i.Lease == 0 {
		return "none: the record stays when the agent dies"
	}
	s := fmt.Sprintf("%s (%ds left of %ds)", i.Lease, i.TTL, i.Granted)
	if i.Granted == 0 {
		s = fmt.Sprintf("%s (gone)", i.Lease)
	}
	if i.Record != nil && i.Record.Owner.Lease != i.Lease {
		s += fmt.Sprintf("; the record says %s", i.Record.Owner.Lease)
	}
	return s
}
