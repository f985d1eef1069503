// Command bench measures what Usher costs and how fast it is, on a real Kubernetes and a real etcd, and prints a table:
//
//	go run ./cmd/bench
//	go run ./cmd/bench -o markdown
//
// See package bench for what is compared with what.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"usher.dev/usher/integration/bench"
	"usher.dev/usher/integration/cluster"
	"usher.dev/usher/integration/internal/program"
	"usher.dev/usher/integration/stack"
)

const usage = `Measures Usher on a real Kubernetes and a real etcd, next to what the bare API server and etcd take, what registrations
cost an etcd of their own, and what a drain costs and misses, and prints a table. Needs root. It uses the cluster that is
up, or brings one up and takes it down again. Other load on the machine shows in the figures.

Usage: bench [flags]

  -o FORMAT        table or markdown (default table)
  --only PART      latency, sidecars, registry (what it costs etcd) or drain (cost and misses of socket samples); default all.
                   The last two need neither root nor a cluster
  --rounds N       how many times each transition is measured, at least 200 (default 250)
  --agents N       how many pods with a sidecar are looked at (default 5)
  --idle DURATION  how long their CPU time is counted, at least 10s (default 1m)
  --strict         exit 1 when a target is missed

Exit codes: 0 done, 1 failed, or a target is missed with --strict, 2 used wrongly.
`

type options struct {
	bench.Config
	format string
	strict bool
}

func main() {
	o, err := parse(os.Args[1:])
	program.Main("bench", usage, err, func(ctx context.Context) error {
		missed, err := run(ctx, o, os.Stdout, os.Stderr)
		if err == nil && missed > 0 && o.strict {
			err = fmt.Errorf("%d targets are missed", missed)
		}
		return err
	})
}

func parse(args []string) (options, error) {
	var o options
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.format, "o", "table", "")
	fs.StringVar(&o.Only, "only", "", "")
	fs.IntVar(&o.Rounds, "rounds", 250, "")
	fs.IntVar(&o.Agents, "agents", 5, "")
	fs.DurationVar(&o.Idle, "idle", time.Minute, "")
	fs.BoolVar(&o.strict, "strict", false, "")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("argument %q: want flags only", fs.Arg(0))
	case o.format != "table" && o.format != "markdown":
		return o, fmt.Errorf("-o is %q: want table or markdown", o.format)
	case !slices.Contains([]string{"", bench.Latency, bench.Sidecars, bench.Registry, bench.Drain}, o.Only):
		return o, fmt.Errorf("--only is %q: want latency, sidecars, registry or drain", o.Only)
	case o.Rounds < 200:
		return o, fmt.Errorf("--rounds is %d: want at least 200, or the p99 says little", o.Rounds)
	case o.Agents < 1 || o.Agents > 20:
		return o, fmt.Errorf("--agents is %d: want 1 to 20, which one machine can run", o.Agents)
	case o.Idle < 10*time.Second:
		return o, fmt.Errorf("--idle is %s: want at least 10s, which is one period of the agent's slowest regular work", o.Idle)
	}
	return o, nil
}

// run prints the report to out, and returns how many targets are missed.
func run(ctx context.Context, o options, out, progress io.Writer) (missed int, err error) {
	o.Progress = progress
	if o.Only != bench.Drain {
		binaries, err := cluster.Build(ctx, progress)
		if err != nil {
			return 0, err
		}
		o.Etcd = filepath.Join(binaries.Dir, cluster.Etcd)
	}
	if o.Wants(bench.Latency) || o.Wants(bench.Sidecars) {
		if o.Stack, err = stack.Up(ctx, stack.Config{Progress: progress}); err != nil {
			return 0, err
		}
		defer func() {
			if derr := o.Stack.Down(context.WithoutCancel(ctx)); derr != nil && err == nil {
				err = derr
			}
		}()
	}
	report, err := bench.Run(ctx, o.Config)
	if err != nil {
		return 0, err
	}
	print := report.Table
	if o.format == "markdown" {
		print = report.Markdown
	}
	if err := print(out); err != nil {
		return 0, fmt.Errorf("printing the table: %w", err)
	}
	return len(report.Missed()), nil
}
