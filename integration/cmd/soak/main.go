// Command soak replaces pods again and again under load, on a real Kubernetes, and ends with an error when a single request
// was lost, a pod lingered, or an agent leaked:
//
//	go run ./cmd/soak [--rollouts 30]
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"usher.dev/usher/integration/internal/program"
	"usher.dev/usher/integration/rollout"
	"usher.dev/usher/integration/stack"
)

const usage = `Replaces all pods of the example again and again under a load that never stops, on a real Kubernetes, and prints each
request that was lost, with all that was seen of its pod. Needs root. It uses the cluster that is up, or brings one up and
takes it down again. A rollout takes about half a minute.

Usage: soak [flags]

  --rollouts N  1 to 10000 (default 30)

Exit codes: 0 no request was lost, no pod lingered, no agent leaked; 1 otherwise; 2 used wrongly.
`

func main() {
	rollouts, err := parse(os.Args[1:])
	program.Main("soak", usage, err, func(ctx context.Context) error { return run(ctx, rollouts, os.Stdout) })
}

func parse(args []string) (rollouts int, err error) {
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.IntVar(&rollouts, "rollouts", 30, "")
	if err := fs.Parse(args); err != nil {
		return 0, err
	}
	switch {
	case fs.NArg() > 0:
		return 0, fmt.Errorf("argument %q: want flags only", fs.Arg(0))
	case rollouts < 1 || rollouts > 10_000:
		return 0, fmt.Errorf("--rollouts is %d: want 1 to 10000", rollouts)
	}
	return rollouts, nil
}

func run(ctx context.Context, rollouts int, out io.Writer) (err error) {
	st, err := stack.Up(ctx, stack.Config{Progress: out})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Down(context.WithoutCancel(ctx))) }()
	e, err := rollout.Soak(ctx, rollout.Config{Stack: st, Rollouts: rollouts, Progress: out})
	if err != nil {
		return err
	}
	fmt.Fprintln(out, e)
	if missed := e.Missed(); len(missed) > 0 {
		return errors.New(strings.Join(missed, "; "))
	}
	return nil
}
