package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"usher.dev/usher/registry"
)

func (a *app) getInstances() *cobra.Command {
	return &cobra.Command{
		Use:     "instances [SERVICE]",
		Aliases: []string{"instance"},
		Short:   "Show the instances of a Service, or of all Services",
		Long: `Show the instances of a Service, or of all Services of the namespace.

  Pending   not in the registry: it was never ready yet
  Online    in the registry: consumers send it requests
  Offline   out of the registry, and it may come back: not ready, or held
  Draining  out of the registry; it answers the requests that it still has
  Released  owes no answer any more, or is out of time: SIGTERM may come
  Stopped   its agent has ended

AGE is how long the instance has been in its state. A value in etcd that is no record shows as Unreadable.`,
		Args:              arguments(0, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: a.reading("SERVICE", func(ctx context.Context, c *registry.Catalog, explain func(error) error, service string) error {
			entries, err := c.List(ctx, a.namespace, service)
			if err != nil {
				return explain(err)
			}
			return a.printInstances(entries)
		}),
	}
}

// reading is a command that reads the catalog, of one thing if its only argument names one.
func (a *app) reading(what string, read func(ctx context.Context, c *registry.Catalog, explain func(error) error, name string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		name, err := optionalArg(what, args)
		if err != nil {
			return err
		}
		c, explain, stop, err := a.catalog(cmd)
		if err != nil {
			return err
		}
		defer stop()
		return read(cmd.Context(), c, explain, name)
	}
}

// optionalArg is the only argument, or empty.
func optionalArg(name string, args []string) (string, error) {
	if len(args) == 0 {
		return "", nil
	}
	if args[0] == "" || strings.Contains(args[0], "/") {
		return "", fmt.Errorf("%s is %q: want a name without '/'", name, args[0])
	}
	return args[0], nil
}

func (a *app) printInstances(entries []registry.Entry) error {
	if a.output == "json" || a.output == "yaml" {
		items := make([]item, len(entries))
		for i, e := range entries {
			items[i] = newItem(e)
		}
		return encode(a.stdout, a.output, struct {
			Items []item `json:"items"`
		}{items})
	}
	if len(entries) == 0 {
		a.nothingFound("instances", "")
		return nil
	}
	wide, age := a.output == "wide", a.ages()
	row := func(namespace string, narrow, more []string) []string {
		var r []string
		if a.allNamespaces {
			r = append(r, namespace)
		}
		if r = append(r, narrow...); wide {
			r = append(r, more...)
		}
		return r
	}
	var rows [][]string
	if !a.noHeaders {
		rows = append(rows, row("NAMESPACE", []string{"NAME", "SERVICE", "STATE", "ADDRESS", "AGE"},
			[]string{"NODE", "ZONE", "LEASE", "FORMATS", "CAUSE", "UID"}))
	}
	limit := 2
	if wide {
		limit = 0
	}
	for _, e := range entries {
		r, none := e.Record, "<unknown>"
		if e.Err != nil {
			rows = append(rows, row(orNone(e.Namespace), []string{orNone(e.Pod), orNone(e.Service), "Unreadable", none, none},
				[]string{none, none, lease(e.Lease), none, none, none}))
			continue
		}
		rows = append(rows, row(r.Namespace, []string{r.Pod, r.Service, r.State, addresses(r, limit), age(r.Since)},
			[]string{orNone(r.Node), orNone(r.Zone), lease(e.Lease), orNone(strings.Join(r.Formats, ",")), orNone(r.Cause), r.Owner.PodUID}))
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

func lease(id registry.LeaseID) string {
	if id == 0 {
		return "<none>"
	}
	return id.String()
}
