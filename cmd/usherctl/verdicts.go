package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

func (a *app) getVerdicts() *cobra.Command {
	return &cobra.Command{
		Use:     "verdicts [POD]",
		Aliases: []string{"verdict"},
		Short:   "Show how the last shutdowns ended, also of pods that are gone",
		Long: `Show how the last shutdowns ended, the newest first, also of pods that are gone. A verdict is kept for a while after the
release, 10 minutes unless the agent is told otherwise.

IN FLIGHT is what was left at the release, TOOK the time from the first sign of the shutdown to the release, AGE the time
since then.`,
		Args:              arguments(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: a.reading("POD", func(ctx context.Context, c *registry.Catalog, explain func(error) error, pod string) error {
			entries, err := c.Verdicts(ctx, a.namespace, pod)
			if err != nil {
				return explain(err)
			}
			return a.printVerdicts(entries)
		}),
	}
}

// verdictItem is a verdict as JSON and YAML show it.
type verdictItem struct {
	Key     string            `json:"key"`
	Lease   registry.LeaseID  `json:"lease"`             // the one that the key is under
	Error   string            `json:"error,omitempty"`   // why there is no verdict
	Verdict *registry.Verdict `json:"verdict,omitempty"` // as it is in etcd
}

func newVerdictItem(e registry.VerdictEntry) verdictItem {
	i := verdictItem{Key: e.Key, Lease: e.Lease}
	if e.Err != nil {
		i.Error = e.Err.Error()
	} else {
		i.Verdict = &e.Verdict
	}
	return i
}

func (a *app) printVerdicts(entries []registry.VerdictEntry) error {
	if a.output == "json" || a.output == "yaml" {
		items := make([]verdictItem, len(entries))
		for i, e := range entries {
			items[i] = newVerdictItem(e)
		}
		return encode(a.stdout, a.output, struct {
			Items []verdictItem `json:"items"`
		}{items})
	}
	if len(entries) == 0 {
		a.nothingFound("verdicts", "")
		return nil
	}
	age := a.ages()
	var rows [][]string
	row := func(namespace string, narrow, more []string) {
		var r []string
		if a.allNamespaces {
			r = append(r, namespace)
		}
		if r = append(r, narrow...); a.output == "wide" {
			r = append(r, more...)
		}
		rows = append(rows, r)
	}
	if !a.noHeaders {
		row("NAMESPACE", []string{"POD", "OUTCOME", "IN FLIGHT", "TOOK", "AGE", "CAUSE"},
			[]string{"GUARD", "WITHDRAW", "SETTLE", "DRAIN", "SERVICES", "NODE", "ZONE", "UID"})
	}
	for _, e := range entries {
		v, none := e.Verdict, "<unknown>"
		if e.Err != nil {
			row(orNone(e.Namespace), []string{orNone(e.Pod), "Unreadable", none, none, none, none},
				[]string{none, none, none, none, none, none, none, orNone(e.PodUID)})
			continue
		}
		row(v.Namespace, []string{v.Pod, v.Outcome, inFlight(v), millis(v.TotalMs), age(v.Released), orNone(v.Cause)},
			[]string{millis(v.GuardMs), millis(v.WithdrawMs), millis(v.SettleMs), millis(v.DrainMs), orNone(strings.Join(v.Services, ",")),
				orNone(v.Node), orNone(v.Zone), v.Owner.PodUID})
	}
	if err := table(a.stdout, rows); err != nil {
		return fmt.Errorf("writing the table: %w", err)
	}
	for _, e := range entries {
		if e.Err != nil {
			fmt.Fprintf(a.stderr, "Warning: %v\n", e.Err)
		}
	}
	return nil
}

// inFlight is what was left at the release.
func inFlight(v registry.Verdict) string {
	switch {
	case v.Outcome == string(lifecycle.Unmeasured):
		return "<unknown>"
	case v.Unsure > 0:
		return fmt.Sprintf("%d (%d unsure)", v.InFlight, v.Unsure)
	}
	return strconv.Itoa(v.InFlight)
}

func millis(ms int64) string { return (time.Duration(ms) * time.Millisecond).String() }

const instantFormat = "2006-01-02T15:04:05.000Z07:00"

// describe shows a verdict in full.
func (i verdictItem) describe(w *tabwriter.Writer, age func(time.Time) string) {
	line := func(name, value string) { fmt.Fprintf(w, "  %s:\t%s\n", name, orNone(value)) }
	if i.Verdict == nil {
		fmt.Fprintf(w, "Last shutdown:\tUnreadable\n")
		line("Error", i.Error)
		return
	}
	v := *i.Verdict
	fmt.Fprintf(w, "Last shutdown:\t%s\n", v.Outcome)
	line("Verdict", v.Message)
	line("Cause", v.Cause)
	line("Namespace", v.Namespace)
	line("Services", strings.Join(v.Services, ", "))
	line("Node", v.Node)
	line("Zone", v.Zone)
	line("Pod UID", v.Owner.PodUID)
	line("Started", v.Started.UTC().Format(instantFormat))
	line("Released", fmt.Sprintf("%s (%s ago)", v.Released.UTC().Format(instantFormat), age(v.Released)))
	if !v.Deadline.IsZero() {
		line("Deadline", v.Deadline.UTC().Format(instantFormat))
	}
	if v.ForcedBy != "" {
		line("Forced by", v.ForcedBy)
	}
	if v.AnnounceError != "" {
		line("Not told", v.AnnounceError)
	}
	line("In flight", inFlight(v))
	line("Took", millis(v.TotalMs))
	withdrawn := v.WithdrawError
	if !v.Withdrawn && withdrawn == "" {
		withdrawn = "the registry could not be told"
	}
	for _, s := range []struct {
		name string
		ms   int64
		note string
	}{
		{"guard", v.GuardMs, v.GuardError}, {"withdraw", v.WithdrawMs, withdrawn}, {"settle", v.SettleMs, ""}, {"drain", v.DrainMs, ""},
	} {
		note := ""
		if s.note != "" {
			note = ": " + s.note
		}
		fmt.Fprintf(w, "    %s\t%s%s\n", s.name, millis(s.ms), note)
	}
	if len(v.Sources) == 0 {
		line("Sources", "")
		return
	}
	fmt.Fprintf(w, "  Sources:\n")
	for _, s := range v.Sources {
		what := fmt.Sprintf("%d in flight, %d unsure, %d connections, at most %d in flight", s.InFlight, s.Unsure, s.Connections, s.Peak)
		if s.Error != "" {
			what = s.Error
		}
		fmt.Fprintf(w, "    %s\t%s\n", s.Name, what)
	}
}
