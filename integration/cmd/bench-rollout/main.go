// Command bench-rollout compares ways of ending pods by what rolling updates lose, on a real Kubernetes, and prints a table:
//
//	go run ./cmd/bench-rollout
//	go run ./cmd/bench-rollout --rollouts 1 --only usher,no-hook
//	go run ./cmd/bench-rollout -o markdown --svg ../docs/rollout.svg
//
// See package rollout for how it measures.
package main

import (
	"bytes"
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

const usage = `Compares ways of ending pods, on a real Kubernetes: what rolling updates lose under load, and how long pods linger. Needs
root. It uses the cluster that is up, or brings one up and takes it down again. The whole takes about a quarter of an hour.

Usage: bench-rollout [flags]

  -o FORMAT     table or markdown (default table)
  --only WAYS   some of ttl,no-hook,sleep-5,sleep-15,connections,usher (default all)
  --rollouts N  of each way, 1 to 100 (default 5)
  --svg FILE    write a chart, too

Exit codes: 0 done; 1 failed, or Usher lost a request or let a pod linger, or the load would not have shown it; 2 used wrongly.
`

type options struct {
	rollout.Config
	format, svg string
}

func main() {
	o, err := parse(os.Args[1:])
	program.Main("bench-rollout", usage, err, func(ctx context.Context) error { return run(ctx, o, os.Stdout, os.Stderr) })
}

func parse(args []string) (options, error) {
	var o options
	var only string
	fs := flag.NewFlagSet("bench-rollout", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.format, "o", "table", "")
	fs.StringVar(&only, "only", "", "")
	fs.IntVar(&o.Rollouts, "rollouts", 5, "")
	fs.StringVar(&o.svg, "svg", "", "")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	var names []string
	if only != "" {
		names = strings.Split(only, ",")
	}
	var err error
	if o.Ways, err = rollout.Select(names); err != nil {
		return o, fmt.Errorf("--only: %w", err)
	}
	switch {
	case fs.NArg() > 0:
		return o, fmt.Errorf("argument %q: want flags only", fs.Arg(0))
	case o.format != "table" && o.format != "markdown":
		return o, fmt.Errorf("-o is %q: want table or markdown", o.format)
	case o.Rollouts < 1 || o.Rollouts > 100:
		return o, fmt.Errorf("--rollouts is %d: want 1 to 100", o.Rollouts)
	}
	return o, nil
}

// run prints the report to out. An error that says what was missed comes after the report.
func run(ctx context.Context, o options, out, progress io.Writer) (err error) {
	o.Progress = progress
	if o.Stack, err = stack.Up(ctx, stack.Config{Progress: progress}); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.Stack.Down(context.WithoutCancel(ctx))) }()
	report, err := rollout.Bench(ctx, o.Config)
	if err != nil {
		return err
	}
	print := report.Table
	if o.format == "markdown" {
		print = report.Markdown
	}
	if err := print(out); err != nil {
		return fmt.Errorf("printing the table: %w", err)
	}
	if o.svg != "" {
		var b bytes.Buffer
		if err := report.SVG(&b); err != nil {
			return fmt.Errorf("drawing the chart: %w", err)
		}
		if err := os.WriteFile(o.svg, b.Bytes(), 0o644); err != nil {
			return fmt.Errorf("writing the chart: %w", err)
		}
	}
	if missed := report.Missed(); len(missed) > 0 {
		return errors.New(strings.Join(missed, "; "))
	}
	return nil
}
