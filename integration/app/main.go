// Command app is the sample application of the end-to-end tests and the demo: a server that is fast, slow, streaming,
// ready or not, on demand, and that by default treats a SIGTERM as badly as a process can.
//
//	SIGTERM --on-term=die   (default) exits at once, status 143: nothing is answered, closed or flushed. The kernel
//	                        ends the connections, with a reset where bytes were left unread or still arrive.
//	        --on-term=drain is not ready any more, stops listening, answers what is in flight, exits with status 0.
//
// The harshest behaviour is the default because an application that waits for its own requests would hide the losses
// which Usher is there to prevent. A container's first process ignores a signal that it has no handler for, so even
// dying needs one.
//
// With --register it writes itself into etcd once it is ready, as an application without a sidecar does: under a lease, which
// is all that ends its records.
//
// With --workers it is several processes, as servers of single-threaded runtimes are: they report themselves to the agent.
//
// With --flood it serves nobody, and is a stranger that calls an agent's hook without end.
//
// Paths and methods are in package wire.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"usher.dev/usher/integration/app/wire"
)

// statusSIGTERM is what a shell reports for a process that SIGTERM ended: 128 + 15.
const statusSIGTERM = 128 + 15

type config struct {
	httpAddr     string
	grpcAddr     string
	pod          string
	onTerm       string
	drainTimeout time.Duration
	readyAfter   time.Duration
	maxFor       time.Duration
	register     []record
	registerTTL  time.Duration
	etcd         []string
	agent        string
	workers      int
	replaceAfter time.Duration
	worker       bool
	flood        string
	floodCalls   int
}

func parse(args []string, out io.Writer) (config, error) {
	var cfg config
	fs := flag.NewFlagSet("app", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.StringVar(&cfg.httpAddr, "http", ":8080", "`address` of the HTTP server")
	fs.StringVar(&cfg.grpcAddr, "grpc", ":9090", "`address` of the gRPC server")
	fs.StringVar(&cfg.pod, "pod", "", "`name` that the answers give (default: the host name)")
	fs.StringVar(&cfg.onTerm, "on-term", "die", "`what` to do at SIGTERM: die or drain")
	fs.DurationVar(&cfg.drainTimeout, "drain-timeout", 30*time.Second, "longest wait for requests in flight with --on-term=drain")
	fs.DurationVar(&cfg.readyAfter, "ready-after", 0, "delay from the start until ready")
	fs.DurationVar(&cfg.maxFor, "max-for", time.Minute, "longest answer that a request may ask for")
	fs.Func("register", "`TARGET=HOST:PORT` to write into etcd, under the key TARGET/POD, when ready; may be given several times", func(text string) error {
		r, err := parseRecord(text)
		cfg.register = append(cfg.register, r)
		return err
	})
	fs.DurationVar(&cfg.registerTTL, "register-ttl", 15*time.Second, "how long those records outlive the process, in whole seconds")
	etcd := fs.String("etcd", os.Getenv("ETCDCTL_ENDPOINTS"), "etcd's client `URLs`, comma-separated (default $ETCDCTL_ENDPOINTS)")
	fs.StringVar(&cfg.agent, "agent", "", "`URL` of the Usher agent that workers report to (default the agent's own default)")
	fs.IntVar(&cfg.workers, "workers", 0, "`number` of worker processes, which report to the agent, as this process does as their master")
	fs.DurationVar(&cfg.replaceAfter, "replace-after", 10*time.Second, "how long after its end a worker gets a successor")
	fs.BoolVar(&cfg.worker, "worker", false, "be a worker, until the standard input ends")
	fs.StringVar(&cfg.flood, "flood", "", "`HOST:PORT` of an agent's hook, to call without a right until the standard input ends, and do nothing else")
	fs.IntVar(&cfg.floodCalls, "flood-calls", 10_000, "`number` of calls after which --flood says for the first time what became of them")
	fs.Usage = func() {
		fmt.Fprint(out, "Usage: app [flags]\n\nA sample server: fast, slow and streaming answers over HTTP/1.1 and gRPC, with knobs for readiness and liveness.\n\n")
		fs.PrintDefaults()
	}
	if err := fs.Parse(args); err != nil {
		return config{}, err
	}
	if fs.NArg() > 0 {
		return config{}, fmt.Errorf("unexpected argument %q: app takes flags only", fs.Arg(0))
	}
	for _, a := range []struct{ flag, addr string }{{"http", cfg.httpAddr}, {"grpc", cfg.grpcAddr}} {
		if _, err := net.ResolveTCPAddr("tcp", a.addr); err != nil || a.addr == "" {
			return config{}, fmt.Errorf("--%s=%q is no listening address: give host:port or :port", a.flag, a.addr)
		}
	}
	if cfg.onTerm != "die" && cfg.onTerm != "drain" {
		return config{}, fmt.Errorf("--on-term=%q: give die or drain", cfg.onTerm)
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
		least time.Duration
	}{
		{"drain-timeout", cfg.drainTimeout, time.Millisecond},
		{"ready-after", cfg.readyAfter, 0},
		{"max-for", cfg.maxFor, time.Millisecond},
		{"register-ttl", cfg.registerTTL, time.Second},
		{"replace-after", cfg.replaceAfter, 0},
	} {
		if d.value < d.least {
			return config{}, fmt.Errorf("--%s=%v: give at least %v", d.flag, d.value, d.least)
		}
	}
	if cfg.registerTTL%time.Second != 0 {
		return config{}, fmt.Errorf("--register-ttl=%v: give whole seconds, as etcd's leases have", cfg.registerTTL)
	}
	if _, _, err := net.SplitHostPort(cfg.flood); cfg.flood != "" && err != nil {
		return config{}, fmt.Errorf("--flood=%q is no address: give host:port", cfg.flood)
	}
	if cfg.floodCalls < 1 {
		return config{}, fmt.Errorf("--flood-calls=%d: give at least 1", cfg.floodCalls)
	}
	if cfg.workers < 0 {
		return config{}, fmt.Errorf("--workers=%d: give at least 0", cfg.workers)
	}
	if *etcd != "" {
		cfg.etcd = strings.Split(*etcd, ",")
	}
	if len(cfg.register) > 0 && len(cfg.etcd) == 0 {
		return config{}, errors.New("--register is set, but neither --etcd nor ETCDCTL_ENDPOINTS: give etcd's client URLs")
	}
	if cfg.pod == "" {
		host, err := os.Hostname()
		if err != nil {
			return config{}, fmt.Errorf("--pod is not set and the host name is not known: %w", err)
		}
		cfg.pod = host
	}
	return cfg, nil
}

func main() {
	cfg, err := parse(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(2)
	}
	status, err := run(cfg, slog.New(slog.NewJSONHandler(os.Stdout, nil)))
	if err != nil {
		fmt.Fprintln(os.Stderr, "app:", err)
		os.Exit(1)
	}
	os.Exit(status)
}

// run serves until SIGTERM or SIGINT and returns the status to exit with.
func run(cfg config, log *slog.Logger) (int, error) {
	if cfg.worker {
		return 0, work(cfg)
	}
	if cfg.flood != "" {
		ctx, cancel := untilInputEnds()
		defer cancel()
		return 0, flood(ctx, cfg, os.Stdout)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)

	hl, err := net.Listen("tcp", cfg.httpAddr)
	if err != nil {
		return 1, fmt.Errorf("listen for HTTP: %w", err)
	}
	gl, err := net.Listen("tcp", cfg.grpcAddr)
	if err != nil {
		return 1, fmt.Errorf("listen for gRPC: %w", err)
	}
	srv := newServer(cfg.pod, cfg.maxFor, log)
	// No time limits: whether a connection lives is for the client and the kernel to say, never for this server.
	hs := &http.Server{Handler: srv.handler()}
	gs := srv.grpcServer()

	failed := make(chan error, 4)
	go func() { failed <- fmt.Errorf("serve HTTP: %w", hs.Serve(hl)) }()
	go func() {
		if err := gs.Serve(gl); err != nil {
			failed <- fmt.Errorf("serve gRPC: %w", err)
		}
	}()
	if cfg.workers > 0 {
		go func() { failed <- fmt.Errorf("workers: %w", manage(cfg, log)) }()
	}
	log.Info("listening", "pod", cfg.pod, "http", hl.Addr().String(), "grpc", gl.Addr().String(), "onTerm", cfg.onTerm)

	ready := time.NewTimer(cfg.readyAfter)
	defer ready.Stop()
	for {
		select {
		case <-ready.C:
			srv.setReady(true)
			if len(cfg.register) > 0 {
				go func() {
					if err := register(context.Background(), cfg); err != nil {
						failed <- err
						return
					}
					log.Info("registered", "ttl", cfg.registerTTL.String())
				}()
			}
		case err := <-failed:
			return 1, err
		case sig := <-signals:
			if cfg.onTerm == "die" {
				log.Info("dying at once", "signal", sig.String(), "inFlight", srv.inFlight.Load())
				return statusSIGTERM, nil
			}
			log.Info("draining", "signal", sig.String(), "inFlight", srv.inFlight.Load())
			srv.setReady(false)
			time.AfterFunc(wire.LetGoAfter, srv.letGo) // nobody can ask for it any more
			ctx, cancel := context.WithTimeout(context.Background(), cfg.drainTimeout)
			defer cancel()
			var wg sync.WaitGroup
			wg.Go(gs.GracefulStop)
			context.AfterFunc(ctx, gs.Stop)
			err := hs.Shutdown(ctx)
			wg.Wait()
			log.Info("drained", "inFlight", srv.inFlight.Load())
			if err != nil || ctx.Err() != nil {
				return 1, fmt.Errorf("requests still in flight after --drain-timeout=%v", cfg.drainTimeout)
			}
			return 0, nil
		}
	}
}
