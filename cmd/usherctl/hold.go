package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

func (a *app) hold() *cobra.Command {
	var reason, actor string
	var lasting time.Duration
	cmd := &cobra.Command{
		Use:   "hold POD --reason TEXT",
		Short: "Take a pod out of the registry until it is resumed or the hold expires",
		Long: `Take a pod out of the registry until it is resumed or the hold expires. The pod goes on running, ready for Kubernetes;
consumers that discover it through etcd no longer find it. A second hold replaces the first. The hold is the pod's: the
one that takes its place is not held.`,
		Args:              arguments(1, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case reason == "":
				return errors.New("--reason is empty: want why, for whoever finds the pod held")
			case lasting <= 0 || lasting > registry.MaxHold:
				return fmt.Errorf("--for is %s: want more than 0s, at most %s", lasting, registry.MaxHold)
			}
			if actor == "" {
				actor = a.getenv("USER")
			}
			return a.changeHold(cmd, args[0], func(ctx context.Context, e etcd, r registry.Record) error {
				h, err := registry.PutHold(ctx, e.cli, r.Owner.Cluster, r.Namespace, r.Owner.PodUID,
					lifecycle.Hold{Reason: reason, Actor: actor, Expires: time.Now().Add(lasting)})
				if err != nil {
					return e.explain(err)
				}
				if a.output == "json" || a.output == "yaml" {
					return encode(a.stdout, a.output, struct {
						Namespace string     `json:"namespace"`
						Pod       string     `json:"pod"`
						PodUID    string     `json:"podUID"`
						Hold      holdStatus `json:"hold"`
					}{r.Namespace, r.Pod, r.Owner.PodUID, *newHoldStatus(&h)})
				}
				fmt.Fprintf(a.stdout, "pod %q held until %s\n", r.Pod, h.Expires.UTC().Format(time.RFC3339))
				return nil
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&reason, "reason", "", "why, for whoever finds the pod held")
	f.StringVar(&actor, "actor", "", "who holds it (default: env USER)")
	f.DurationVar(&lasting, "for", registry.DefaultHold, fmt.Sprintf("how long at most; not longer than %s", registry.MaxHold))
	return cmd
}

func (a *app) resume() *cobra.Command {
	return &cobra.Command{
		Use:               "resume POD",
		Short:             "End the hold on a pod: it may come back into the registry",
		Args:              arguments(1, 1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.changeHold(cmd, args[0], func(ctx context.Context, e etcd, r registry.Record) error {
				was, err := registry.DeleteHold(ctx, e.cli, r.Owner.Cluster, r.Namespace, r.Owner.PodUID)
				switch {
				case err != nil:
					return e.explain(err)
				case was:
					fmt.Fprintf(a.stdout, "pod %q resumed\n", r.Pod)
				default:
					fmt.Fprintf(a.stdout, "pod %q was not held\n", r.Pod)
				}
				return nil
			})
		},
	}
}

// changeHold finds the pod in the ledger, of two of one name the one created last.
func (a *app) changeHold(cmd *cobra.Command, pod string, change func(context.Context, etcd, registry.Record) error) error {
	if a.allNamespaces {
		return errors.New("--all-namespaces: want the pod's own namespace, by --namespace")
	}
	e, err := a.connect(cmd)
	if err != nil {
		return err
	}
	defer e.stop()
	entries, err := registry.NewCatalog(e.cli, a.cluster).List(cmd.Context(), a.namespace, "")
	if err != nil {
		return e.explain(err)
	}
	var found *registry.Record
	for _, entry := range entries {
		if r := entry.Record; entry.Pod == pod && entry.Err == nil && (found == nil || r.Owner.PodCreated.After(found.Owner.PodCreated)) {
			found = &r
		}
	}
	if found == nil {
		return a.noRecord(pod)
	}
	return change(cmd.Context(), e, *found)
}

// holdStatus is a hold as JSON and YAML show it.
type holdStatus struct {
	Reason  string    `json:"reason"`
	Actor   string    `json:"actor,omitempty"`
	Since   time.Time `json:"since"`
	Expires time.Time `json:"expires"`
}

func newHoldStatus(h *lifecycle.Hold) *holdStatus {
	if h == nil {
		return nil
	}
	return &holdStatus{h.Reason, h.Actor, h.Since, h.Expires}
}

func (h holdStatus) text() string {
	by := ""
	if h.Actor != "" {
		by = " by " + h.Actor
	}
	return fmt.Sprintf("%s (since %s%s, until %s)", h.Reason, h.Since.Format(time.RFC3339), by, h.Expires.Format(time.RFC3339))
}
