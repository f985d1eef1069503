// Package bench measures what Usher costs, and how much later than the bare API server and etcd its consumers learn.
//
//	        update                watch                   txn             watch
//	bench ---------> API server --------> usher-agent ---------> etcd ---------> bench      ours
//	bench ---------> API server --------> bench                                             raw: Kubernetes
//	                                      bench ---------------> etcd ---------> bench      raw: etcd
//
// Raw and ours are taken in turns, against the same processes, so that whatever disturbs the machine disturbs both. The
// API server, etcd (with fsync), the agent and usher-prestop are the real programs; an EndpointSlice and a Pod's status are
// written by the bench itself, since it has to know when. What a sidecar costs is measured in pods that the kubelet runs
// from the example manifest. What registrations cost etcd is measured on one more etcd, which has nothing else to do:
//
//	bench (registrars, renewals) ---------> etcd (CPU, RSS, size; killed and started again)
//
// What a drain costs and whether it misses requests is measured inside the bench, on loopback connections of its own.
package bench

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"usher.dev/usher/integration/stack"
)

// Parts of the report, for Config.Only.
const (
	Latency  = "latency"  // from an endpoint's change, or a hook call, until a watcher of etcd knows
	Sidecars = "sidecars" // programs and processes
	Registry = "registry" // what it costs etcd; needs no Kubernetes
	Drain    = "drain"    // what samples of sockets cost, and whether they miss requests; needs neither Kubernetes nor etcd
)

// Config of Run.
type Config struct {
	// Only measures one part; empty: all.
	Only string
	// Stack may be nil when Only is Registry or Drain.
	Stack *stack.Stack
	// Etcd is the path of the program.
	Etcd string
	// Rounds is how many times each transition is measured.
	Rounds int
	// Agents is how many pods with a sidecar are looked at.
	Agents int
	// Idle is how long their CPU time is counted.
	Idle time.Duration
	// Progress gets a line for each step.
	Progress io.Writer
}

// Wants says whether a part is measured.
func (c Config) Wants(part string) bool { return c.Only == "" || c.Only == part }

// Run measures what cfg wants.
func Run(ctx context.Context, cfg Config) (Report, error) {
	say := func(format string, args ...any) { fmt.Fprintf(cfg.Progress, format+"\n", args...) }
	var r Report
	if cfg.Wants(Latency) || cfg.Wants(Sidecars) {
		if err := onKubernetes(ctx, cfg, say, &r); err != nil {
			return Report{}, err
		}
	}
	if cfg.Wants(Registry) {
		if err := etcdCosts(ctx, cfg.Etcd, say, &r); err != nil {
			return Report{}, err
		}
	}
	if cfg.Wants(Drain) {
		if err := drains(ctx, say, &r); err != nil {
			return Report{}, err
		}
	}
	r.Notes = append(r.Notes, machine())
	return r, nil
}

// onKubernetes measures latencies and sidecars, in a namespace of its own that it removes.
func onKubernetes(ctx context.Context, cfg Config, say func(string, ...any), r *Report) (err error) {
	namespace := fmt.Sprintf("usher-bench-%d", os.Getpid())
	if err := cfg.Stack.Namespace(ctx, namespace); err != nil {
		return err
	}
	defer func() {
		if rerr := removeNamespace(context.WithoutCancel(ctx), cfg.Stack, namespace); rerr != nil && err == nil {
			err = rerr
		}
	}()

	var pods []int
	started := time.Now()
	if cfg.Wants(Sidecars) {
		say("starting %d pods with a sidecar", cfg.Agents)
		if pods, err = startSidecars(ctx, cfg.Stack, namespace, cfg.Agents); err != nil {
			return err
		}
		started = time.Now()
	}
	l, err := newLatency(ctx, cfg.Stack, namespace)
	if err != nil {
		return err
	}
	defer l.close()
	if cfg.Wants(Latency) {
		if err := latencies(ctx, cfg, l, say, r); err != nil {
			return err
		}
	}
	if cfg.Wants(Sidecars) {
		if err := sidecars(ctx, cfg, pods, started, l, say, r); err != nil {
			return err
		}
	}
	return l.close()
}

func latencies(ctx context.Context, cfg Config, l *latency, say func(string, ...any), r *Report) error {
	say("measuring %d changes of readiness each way", cfg.Rounds)
	ready, err := l.readiness(ctx, cfg.Rounds)
	if err != nil {
		return err
	}
	say("measuring %d hook calls", cfg.Rounds)
	hook, err := l.hook(ctx, cfg.Rounds)
	if err != nil {
		return err
	}
	r.Rows = append(r.Rows, ready.rows()...)
	r.Rows = append(r.Rows, hook.rows()...)
	r.Notes = append(r.Notes,
		fmt.Sprintf("Latencies: %d transitions each, raw and ours in turns. Raw, ready: an EndpointSlice update until a client-go watch (protobuf) has it, plus a bare etcd put "+
			"until an etcd watch has it; ours: the same update until an etcd watch has the record that the agent wrote. Raw, hook: a bare etcd delete until the watch has it; "+
			"ours: from before the HTTP call, on a new connection, until the watch has the deletion. Rounds are quick because that agent's settle time, quiet period and "+
			"sample interval are 10, 20 and 10 ms; all of these come after the deletion.", cfg.Rounds),
		"The put and the delete of the targets are the simplest that etcd has. Usher's write is a transaction: it compares two revisions (the fence), puts or deletes the record and "+
			"puts the ledger record, under a lease. The rows \"beside Usher's own transaction as raw\" have that one, sent by the bench, in the place of the put or delete.",
	)
	return nil
}

// sidecars looks at the agents of pods, and at that of l, which no kubelet probes.
func sidecars(ctx context.Context, cfg Config, pods []int, started time.Time, l *latency, say func(string, ...any), r *Report) error {
	say("measuring %d starts of usher-prestop", cfg.Rounds)
	prestop, err := prestopStart(ctx, cfg.Stack.Programs.Prestop, cfg.Rounds)
	if err != nil {
		return err
	}

	say("leaving %d sidecars idle for %s", cfg.Agents, cfg.Idle)
	costs, err := idle(ctx, append(pods, l.agent.Process.Pid), cfg.Idle)
	if err != nil {
		return err
	}
	age := time.Since(started)
	cost, unprobed := costs[:len(pods)], costs[len(pods)]

	agentSize, err := size(cfg.Stack.Programs.Agent)
	if err != nil {
		return err
	}
	prestopSize, err := size(cfg.Stack.Programs.Prestop)
	if err != nil {
		return err
	}
	r.Rows = append(r.Rows,
		Row{Figure: "usher-agent: binary", Unit: Bytes, Ours: one(agentSize), Target: 30e6},
		Row{Figure: "usher-agent: RSS, idle and registered", Unit: Bytes, Ours: rss(cost), Target: 28e6},
		Row{Figure: "usher-agent: anonymous RSS, the same", Unit: Bytes, Ours: anon(cost), Target: 8e6},
		Row{Figure: "usher-agent: CPU of one core, the same", Unit: Share, Ours: shares(cost), Target: 0.001},
		Row{Figure: "  without the kubelet's probes", Unit: Share, Ours: one(unprobed.cpu)},
		Row{Figure: "usher-prestop: binary", Unit: Bytes, Ours: one(prestopSize), Target: 7e6},
		Row{Figure: "usher-prestop: start to request arrived", Unit: Seconds, Ours: durations(prestop), Target: 0.010},
	)
	r.Notes = append(r.Notes,
		fmt.Sprintf("Sidecars: %d pods of the example manifest, probed by the kubelet, without traffic, %s after their start; CPU over the last %s, all threads. "+
			"Only anonymous memory is each pod's own: the rest of the RSS is the binary in the page cache, shared by all pods of a node. MB are 10^6 bytes.",
			cfg.Agents, age.Round(time.Second), cfg.Idle),
	)
	return nil
}

func size(path string) (float64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("measuring a binary: %w", err)
	}
	return float64(info.Size()), nil
}

// machine says where the figures come from.
func machine() string {
	first := func(path, prefix string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			return "unknown"
		}
		for line := range strings.Lines(string(b)) {
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				return strings.Trim(rest, "\t :\n")
			}
		}
		return "unknown"
	}
	load, _, _ := strings.Cut(first("/proc/loadavg", ""), " ")
	return fmt.Sprintf("Machine: %d cores (%s), Linux %s, %s; all that takes part runs on it, etcd with fsync. Load average at the end: %s.",
		runtime.NumCPU(), first("/proc/cpuinfo", "model name"), first("/proc/sys/kernel/osrelease", ""), runtime.Version(), load)
}

// removeNamespace waits until the pods have ended, so that the cluster can go down without leaving their containers behind.
func removeNamespace(ctx context.Context, s *stack.Stack, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := s.Client.CoreV1().Namespaces().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		return fmt.Errorf("removing namespace %s: %w", name, err)
	}
	err := wait.PollUntilContextCancel(ctx, 200*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		pods, err := s.Client.CoreV1().Pods(name).List(ctx, metav1.ListOptions{})
		return err == nil && len(pods.Items) == 0, nil
	})
	if err != nil {
		return fmt.Errorf("removing namespace %s: its pods are still there: %w", name, err)
	}
	return nil
}
