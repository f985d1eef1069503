package main

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"usher.dev/usher/registry"
)

func (a *app) watch() *cobra.Command {
	return &cobra.Command{
		Use:   "watch [SERVICE]",
		Short: "Show the instances, then a line for each change, until interrupted",
		Long: `Show the instances of a Service, or of all Services of the namespace, then a line for each change, until interrupted.

TIME is when the state began, for what is there at first, and when the change was seen, for the rest. With -o json there
is one object a line, with -o yaml one document for each change.`,
		Args:              arguments(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: a.reading("SERVICE", func(ctx context.Context, c *registry.Catalog, explain func(error) error, service string) error {
			p := changePrinter{app: a}
			var trouble string
			for event, err := range c.Watch(ctx, a.namespace, service) {
				if err != nil {
					if !p.synced {
						return explain(err)
					}
					if s := explain(err).Error(); s != trouble {
						trouble = s
						fmt.Fprintf(a.stderr, "%s: %s; trying again\n", a.name, s)
					}
					continue
				}
				trouble = ""
				if err := p.print(event, time.Now()); err != nil {
					return fmt.Errorf("writing a change: %w", err)
				}
			}
			return nil
		}),
	}
}

const timeFormat = "2006-01-02 15:04:05.000"

type changePrinter struct {
	*app
	synced, any bool
	first       [][]string // the table's rows until synced, so that its columns fit
	widths      []int
}

// change is an event as JSON and YAML show it.
type change struct {
	Time    time.Time `json:"time"`
	Type    string    `json:"type"` // as in a Kubernetes watch: ADDED, MODIFIED, DELETED
	Initial bool      `json:"initial,omitempty"`
	Change  string    `json:"change"`
	From    string    `json:"from,omitempty"` // the state before
	Item    item      `json:"instance"`
}

func (p *changePrinter) print(e registry.Event, now time.Time) error {
	if e.Type == registry.Synced {
		p.synced = true
		if !p.any {
			p.nothingFound("instances", "; waiting for changes")
		}
		return p.flush()
	}
	first := !p.any
	p.any = true
	c := change{Time: now.UTC(), Type: "MODIFIED", Initial: !p.synced, Item: newItem(e.Entry)}
	if e.Old != nil {
		c.From = e.Old.Record.State
	}
	var detail string
	c.Change, detail = describe(e, p.synced)
	switch {
	case e.Type == registry.Delete:
		c.Type = "DELETED"
	case e.Old == nil:
		c.Type = "ADDED"
	}
	switch p.output {
	case "json":
		b, err := json.Marshal(c)
		if err == nil {
			_, err = fmt.Fprintf(p.stdout, "%s\n", b)
		}
		return err
	case "yaml":
		b, err := yaml.Marshal(c)
		if err == nil {
			_, err = fmt.Fprintf(p.stdout, "---\n%s", b)
		}
		return err
	}
	at := now
	if c.Initial && !e.Entry.Record.Since.IsZero() {
		at = e.Entry.Record.Since
	}
	r := e.Entry.Record
	row := func(time, namespace, name, service, change, address, node, detail string) error {
		cells := []string{time}
		if p.allNamespaces {
			cells = append(cells, namespace)
		}
		cells = append(cells, name, service, change)
		if p.output == "wide" {
			cells = append(cells, address, node)
		}
		return p.line(append(cells, detail))
	}
	if first && !p.noHeaders {
		if err := row("TIME", "NAMESPACE", "NAME", "SERVICE", "CHANGE", "ADDRESS", "NODE", "DETAIL"); err != nil {
			return err
		}
	}
	return row(at.Local().Format(timeFormat), orNone(e.Entry.Namespace), orNone(e.Entry.Pod), orNone(e.Entry.Service),
		c.Change, addresses(r, 0), orNone(r.Node), orNone(detail))
}

// line pads each column to the widest cell so far, since what comes can't be known.
func (p *changePrinter) line(cells []string) error {
	if p.widths == nil {
		p.widths = make([]int, len(cells)-1)
		p.widths[0] = len(timeFormat)
	}
	for i := range p.widths {
		p.widths[i] = max(p.widths[i], len(cells[i]))
		if cells[i] == "CHANGE" {
			p.widths[i] = len("Draining -> Released") // the longest that is usual
		}
	}
	p.first = append(p.first, cells)
	if !p.synced {
		return nil
	}
	return p.flush()
}

func (p *changePrinter) flush() error {
	var b strings.Builder
	for _, cells := range p.first {
		for i, width := range p.widths {
			fmt.Fprintf(&b, "%-*s   ", width, cells[i])
		}
		b.WriteString(cells[len(cells)-1] + "\n")
	}
	p.first = nil
	_, err := fmt.Fprint(p.stdout, b.String())
	return err
}

// describe says what changed, and why.
func describe(e registry.Event, synced bool) (change, detail string) {
	r := e.Entry.Record
	state := r.State
	if e.Entry.Err != nil {
		state = "Unreadable"
	}
	var old registry.Record
	oldState := ""
	if e.Old != nil {
		if old, oldState = e.Old.Record, e.Old.Record.State; e.Old.Err != nil {
			oldState = "Unreadable"
		}
	}
	switch {
	case e.Entry.Err != nil:
		detail = e.Entry.Err.Error()
	case r.Verdict != "" && r.Verdict != old.Verdict:
		detail = r.Verdict
	default:
		detail = r.Cause
	}
	switch {
	case e.Type == registry.Delete:
		return oldState + " -> gone", "" // its last cause was about something else
	case e.Old == nil && synced:
		return "new -> " + state, detail
	case e.Old == nil:
		return state, detail
	case r.Owner.PodUID != old.Owner.PodUID && e.Entry.Err == nil && e.Old.Err == nil:
		return fmt.Sprintf("%s -> %s (another pod)", oldState, state), detail
	case oldState != state:
		return oldState + " -> " + state, detail
	}
	var fields []string
	for _, f := range []struct {
		name     string
		old, now any
	}{
		{"addresses", old.Addresses, r.Addresses}, {"ports", old.Ports, r.Ports}, {"keys", old.Keys, r.Keys},
		{"formats", old.Formats, r.Formats}, {"lease", e.Old.Lease, e.Entry.Lease}, {"agent", old.Owner.Agent, r.Owner.Agent},
		{"node", old.Node, r.Node}, {"zone", old.Zone, r.Zone}, {"verdict", old.Verdict, r.Verdict}, {"cause", old.Cause, r.Cause},
	} {
		if !reflect.DeepEqual(f.old, f.now) {
			fields = append(fields, f.name)
		}
	}
	if len(fields) == 0 {
		return state + ": written again", detail
	}
	return fmt.Sprintf("%s: %s changed", state, strings.Join(fields, ", ")), detail
}
