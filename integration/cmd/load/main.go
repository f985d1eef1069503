// Command load sends requests to the instances that an etcd registry names and counts every one.
//
//	go run ./cmd/load --etcd http://127.0.0.1:2379 --http services/shop/http --grpc services/shop/grpc --rate 300 --for 60s
//
// It prints a line a second and a report at the end. SIGINT or SIGTERM ends it early, with the report.
// Exit status: 0 when every request was answered, 1 when any failed or nothing could be sent, 2 for wrong usage.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"usher.dev/usher/integration/load"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

type options struct {
	load.Config
	json bool
}

func main() {
	o, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "load:", strings.TrimPrefix(err.Error(), "load: "))
		os.Exit(exitUsage)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends it the usual way.
	context.AfterFunc(ctx, stop)
	failed, err := run(ctx, o, os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if err != nil || failed > 0 {
		os.Exit(exitFailed)
	}
}

func parse(args []string, out io.Writer) (options, error) {
	var o options
	var etcd, mix string
	fs := flag.NewFlagSet("load", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&etcd, "etcd", "", "etcd's client `URLs`, comma-separated")
	fs.StringVar(&o.HTTPTarget, "http", "", "registry `key` of the HTTP instances, without the last slash")
	fs.StringVar(&o.GRPCTarget, "grpc", "", "registry `key` of the gRPC instances, without the last slash")
	fs.Float64Var(&o.Rate, "rate", 0, "open loop: `requests` a second, over all targets")
	fs.IntVar(&o.Workers, "workers", 0, "closed loop: `number` of workers, over all targets")
	fs.StringVar(&mix, "mix", "fast=94,slow=4,very-slow=1,stream=1", "`kinds` and their weights; a kind may say how long its answer takes, as in slow:3s=4")
	fs.DurationVar(&o.Duration, "for", 0, "how long to send (default until a signal)")
	fs.DurationVar(&o.Timeout, "timeout", 30*time.Second, "longest wait for an answer")
	fs.DurationVar(&o.FirstInstance, "first-instance", 30*time.Second, "longest wait for the first instance")
	fs.IntVar(&o.GRPCConns, "grpc-conns", 4, "`number` of gRPC client connections")
	fs.BoolVar(&o.json, "json", false, "print the report as JSON")
	fs.Usage = func() {
		fmt.Fprint(out, "Usage: load --etcd URLS [--http KEY] [--grpc KEY] [--rate N] [--workers N] [flags]\n\n"+
			"Sends requests to the instances that an etcd registry names and counts every one.\n"+
			"Exit status: 0 all answered, 1 some failed or nothing could be sent, 2 wrong usage.\n\n")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return options{}, err
	}
	if fs.NArg() > 0 {
		return options{}, fmt.Errorf("unexpected argument %q: load takes flags only", fs.Arg(0))
	}
	if etcd == "" {
		return options{}, errors.New("--etcd is not set: give etcd's client URLs, such as http://127.0.0.1:2379")
	}
	o.Endpoints = strings.Split(etcd, ",")
	var err error
	if o.Mix, err = load.ParseMix(mix); err != nil {
		return options{}, fmt.Errorf("--mix: %w", err)
	}
	if _, err := load.New(o.Config); err != nil {
		return options{}, err
	}
	return o, nil
}

// run prints progress to progress, the report to out, and returns how many requests failed.
func run(ctx context.Context, o options, out, progress io.Writer) (int64, error) {
	g, err := load.New(o.Config)
	if err != nil {
		return 0, err
	}
	type end struct {
		report load.Report
		err    error
	}
	ended := make(chan end, 1)
	go func() {
		r, err := g.Run(ctx)
		ended <- end{r, err}
	}()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s := g.Snapshot()
			if s.Started.IsZero() {
				fmt.Fprintln(progress, "waiting for the first instance")
				continue
			}
			fmt.Fprintf(progress, "%6.1fs  sent %d  answered %d  in flight %d  failed %d\n",
				s.Elapsed.Seconds(), s.Sent, s.Answered, s.InFlight, s.Failed)
		case e := <-ended:
			if e.err != nil {
				return 0, e.err
			}
			if !o.json {
				fmt.Fprint(out, e.report)
				return e.report.Failed, nil
			}
			enc := json.NewEncoder(out)
			enc.SetIndent("", "  ")
			if err := enc.Encode(e.report); err != nil {
				return e.report.Failed, fmt.Errorf("write the report: %w", err)
			}
			return e.report.Failed, nil
		}
	}
}
