// Package load sends requests to the instances that a registry names, through clients that real consumers use, and
// counts every single one: what was sent was answered or it failed, and nothing is retried in secret.
//
//	etcd  <target>/<id> = {"Op":0,"Addr":"ip:port"}
//	  |                         |
//	  |  naming/endpoints watch |  naming/resolver
//	  v                         v
//	HTTP/1.1, keep-alive      gRPC, round_robin, several connections
//	  ^                         ^
//	  |    open loop: Rate requests a second, on schedule, whatever the answers do
//	  +--- closed loop: Workers, each sends when its last answer is in
//	  |
//	  v
//	Result for each request -> Report: sent = answered + failed
//
// No losses are hidden:
//   - HTTP requests are POSTs with a body that cannot be sent twice. net/http (Go 1.26, transport.go,
//     shouldRetryRequest) sends a request again on another connection when a kept-alive one turns out dead: if nothing
//     was written and the body is empty or has GetBody, or if the request isReplayable (GET, HEAD, OPTIONS, TRACE or
//     an Idempotency-Key, with no body or with GetBody). A POST with a body and no GetBody fits none of these.
//   - gRPC has no retry policy, and retries are switched off with grpc.WithDisableRetry. What gRPC always does
//     (stream.go, shouldRetry) is the transparent retry of a call that no server has begun to process: one that found no
//     connection to be written to, and, once, one that the server refused by its HTTP/2 frames (RST_STREAM with
//     REFUSED_STREAM, or a GOAWAY whose last stream id is smaller). Nothing is lost there, and every gRPC consumer
//     behaves so. A call on a connection that dies fails.
//   - An empty registry is a failure of every request sent meanwhile, but for the time before the first instance was seen.
package load

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	defaultTimeout       = 30 * time.Second
	defaultFirstInstance = 30 * time.Second
	defaultGRPCConns     = 4
	// maxRate keeps a slip of the keyboard from taking the machine down.
	maxRate = 100_000
	// afterFailure keeps a closed-loop worker that fails at once (nothing listens, empty registry) from spinning.
	afterFailure = 50 * time.Millisecond
)

// Config says what to send where. At least one target, and a Rate or Workers or both, must be set.
type Config struct {
	// Endpoints are etcd's client URLs.
	Endpoints []string
	// HTTPTarget and GRPCTarget are the keys under which etcd's naming package finds the instances, without the last
	// slash. When both are set, each gets every other request of the open loop, and every other worker.
	HTTPTarget string
	GRPCTarget string

	// Rate is the open loop's rate in requests a second, over all targets; 0: no open loop.
	Rate float64
	// Workers is the number of the closed loop's workers, over all targets; 0: no closed loop. An HTTP worker has one
	// connection of its own, on which it stays for some dozens of requests or until the instance leaves the registry.
	Workers int
	// Mix is what to send; nil: DefaultMix.
	Mix []Share

	// Duration is how long to send, from the moment when the first instances are there; 0: until the context ends.
	Duration time.Duration
	// Timeout bounds each request, counted from when it is sent; 0: 30 s.
	Timeout time.Duration
	// FirstInstance bounds the wait for the first instance of every target; 0: 30 s.
	FirstInstance time.Duration
	// GRPCConns is the number of gRPC client connections (each to all instances); 0: 4.
	GRPCConns int

	// OnResult, if set, is called for every request when it has ended, one call at a time. The requests wait for it.
	OnResult func(Result)
	// Logger gets the registry clients' trouble; nil: nobody does.
	Logger *zap.Logger
}

// Protocol is how a request is sent.
type Protocol string

// The protocols.
const (
	HTTP Protocol = "http"
	GRPC Protocol = "grpc"
)

// Result is the end of one request.
type Result struct {
	Protocol Protocol `json:"protocol"`
	Kind     Kind     `json:"kind"`
	// Instance is the address that the request was for; empty when there was none, or when gRPC found no connection.
	Instance string `json:"instance,omitempty"`
	// Pod is the name that the answer gave; empty when there was no answer.
	Pod string `json:"pod,omitempty"`
	// Scheduled is when the request was due. A closed-loop request is due when it is sent.
	Scheduled time.Time `json:"scheduled"`
	// Latency runs from Scheduled to the last byte of the answer, or to the failure.
	Latency time.Duration `json:"latency_ns"`
	// Class is empty for a request that was answered; else it says how it failed, and Err in which words.
	Class Class  `json:"class,omitempty"`
	Err   string `json:"error,omitempty"`
}

// Generator sends the load, once.
type Generator struct {
	cfg     Config
	pick    func() Share
	tally   *tally
	results chan Result
	started atomic.Bool
}

// ErrStarted is returned by a second Run.
var ErrStarted = errors.New("load: a generator runs once")

// New checks cfg; it connects to nothing.
func New(cfg Config) (*Generator, error) {
	switch {
	case len(cfg.Endpoints) == 0:
		return nil, errors.New("load: Endpoints is empty: give etcd's client URLs, such as http://127.0.0.1:2379")
	case cfg.HTTPTarget == "" && cfg.GRPCTarget == "":
		return nil, errors.New("load: neither HTTPTarget nor GRPCTarget is set: give the registry key of at least one")
	case !(cfg.Rate >= 0 && cfg.Rate <= maxRate):
		return nil, fmt.Errorf("load: Rate is %v: give 0 to %d requests a second", cfg.Rate, maxRate)
	case cfg.Workers < 0:
		return nil, fmt.Errorf("load: Workers is %d: give 0 or more", cfg.Workers)
	case cfg.Rate == 0 && cfg.Workers == 0:
		return nil, errors.New("load: neither Rate nor Workers is set: nothing would be sent")
	case cfg.Rate == 0 && cfg.Workers == 1 && cfg.HTTPTarget != "" && cfg.GRPCTarget != "":
		return nil, errors.New("load: Workers is 1 for two targets: give at least 2")
	case cfg.GRPCConns < 0:
		return nil, fmt.Errorf("load: GRPCConns is %d: give 0 (means %d) or more", cfg.GRPCConns, defaultGRPCConns)
	}
	for _, t := range []struct{ field, target string }{{"HTTPTarget", cfg.HTTPTarget}, {"GRPCTarget", cfg.GRPCTarget}} {
		if err := checkTarget(t.target); err != nil {
			return nil, fmt.Errorf("load: %s %q %w", t.field, t.target, err)
		}
	}
	for _, d := range []struct {
		field string
		value *time.Duration
		usual time.Duration
	}{
		{"Duration", &cfg.Duration, 0},
		{"Timeout", &cfg.Timeout, defaultTimeout},
		{"FirstInstance", &cfg.FirstInstance, defaultFirstInstance},
	} {
		if *d.value < 0 {
			return nil, fmt.Errorf("load: %s is %v: give a positive duration, or 0 for the default", d.field, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.usual
		}
	}
	if cfg.GRPCConns == 0 {
		cfg.GRPCConns = defaultGRPCConns
	}
	if cfg.Mix == nil {
		cfg.Mix = DefaultMix()
	}
	mix, total, err := checkMix(cfg.Mix, cfg.Timeout)
	if err != nil {
		return nil, fmt.Errorf("load: Mix: %w", err)
	}
	cfg.Mix = mix
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	return &Generator{
		cfg:     cfg,
		pick:    func() Share { return choose(mix, rand.IntN(total)) },
		tally:   newTally(cfg.Timeout),
		results: make(chan Result, 256),
	}, nil
}

// outcome is how one exchange went; err is nil when the whole answer came.
type outcome struct {
	instance string
	pod      string
	err      error
}

// sender sends one request and reads its whole answer.
type sender interface {
	send(ctx context.Context, s Share) outcome
}

// route is one target's way out: a sender that everybody shares, and one for each worker.
type route struct {
	protocol Protocol
	shared   sender
	worker   func() (s sender, done func())
}

// Run waits for the first instances, sends until ctx or Duration ends, waits for the outstanding answers (each of
// them at most Timeout) and reports. The end of ctx is no error; never having had anywhere to send to is.
func (g *Generator) Run(ctx context.Context) (Report, error) {
	if g.started.Swap(true) {
		return Report{}, ErrStarted
	}
	cli, err := clientv3.New(clientv3.Config{
		Endpoints:   g.cfg.Endpoints,
		DialTimeout: 5 * time.Second,
		Logger:      g.cfg.Logger,
	})
	if err != nil {
		return Report{}, fmt.Errorf("load: connect to etcd at %v: %w", g.cfg.Endpoints, err)
	}
	defer cli.Close()
	routes, done, err := g.routes(ctx, cli)
	defer done()
	if err != nil {
		return Report{}, fmt.Errorf("load: %w", err)
	}
	return g.generate(ctx, routes), nil
}

// routes opens the ways to all targets. They outlive ctx, since answers are awaited after its end, until done.
func (g *Generator) routes(ctx context.Context, cli *clientv3.Client) (routes []route, done func(), err error) {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	var clients []*grpcClient
	done = func() {
		end()
		for _, c := range clients {
			c.close()
		}
		wg.Wait()
	}
	first, cancel := context.WithTimeout(ctx, g.cfg.FirstInstance)
	defer cancel()
	// follow follows a target until stop, once its first instance is there.
	follow := func(target string) (f *follower, stop func(), err error) {
		if _, err := cli.Get(first, target+"/", clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil {
			return nil, nil, fmt.Errorf("read %s/ from etcd at %v: %w", target, g.cfg.Endpoints, err)
		}
		if f, err = newFollower(cli, target, g.cfg.Logger); err != nil {
			return nil, nil, err
		}
		following, stop := context.WithCancel(life)
		wg.Go(func() { f.run(following) })
		select {
		case <-f.seen:
			return f, stop, nil
		case <-first.Done():
			stop()
			return nil, nil, g.noFirst(ctx, target)
		}
	}
	if target := g.cfg.HTTPTarget; target != "" {
		f, _, err := follow(target)
		if err != nil {
			return nil, done, err
		}
		routes = append(routes, httpRoute(f))
	}
	if target := g.cfg.GRPCTarget; target != "" {
		// Only to see the first instance: afterwards gRPC's own resolver follows the target.
		_, stop, err := follow(target)
		if err != nil {
			return nil, done, err
		}
		stop()
		c, err := dialGRPC(cli, target, g.cfg.GRPCConns)
		if err != nil {
			return nil, done, err
		}
		clients = append(clients, c)
		if c.connected(first) != nil {
			return nil, done, g.noFirst(ctx, target)
		}
		routes = append(routes, grpcRoute(c))
	}
	return routes, done, nil
}

func (g *Generator) noFirst(ctx context.Context, target string) error {
	if ctx.Err() != nil {
		return fmt.Errorf("wait for the first instance under %s/: %w", target, context.Cause(ctx))
	}
	return fmt.Errorf("no instance under %s/ within %v: is the target right, and is anything registered?", target, g.cfg.FirstInstance)
}

// generate runs both loops over the routes until ctx or the duration ends.
func (g *Generator) generate(ctx context.Context, routes []route) Report {
	if g.cfg.Duration > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, g.cfg.Duration)
		defer cancel()
	}
	g.tally.begin(time.Now())
	collected := make(chan struct{})
	go func() {
		defer close(collected)
		for r := range g.results {
			g.tally.add(r)
			if g.cfg.OnResult != nil {
				g.cfg.OnResult(r)
			}
		}
	}()
	var wg sync.WaitGroup
	if g.cfg.Rate > 0 {
		wg.Go(func() { g.openLoop(ctx, routes) })
	}
	for i := range g.cfg.Workers {
		wg.Go(func() { g.worker(ctx, routes[i%len(routes)]) })
	}
	wg.Wait()
	close(g.results)
	<-collected
	g.tally.end(time.Now())
	return g.tally.report()
}

// openLoop launches request n at start + n/Rate and waits for the answers only at its end. One that is late is launched
// at once, and its latency counts from when it was due.
func (g *Generator) openLoop(ctx context.Context, routes []route) {
	var wg sync.WaitGroup
	defer wg.Wait()
	start := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for n := 0; ; n++ {
		due := start.Add(time.Duration(float64(n) / g.cfg.Rate * float64(time.Second)))
		timer.Reset(time.Until(due))
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		if ctx.Err() != nil {
			return
		}
		r, s := routes[n%len(routes)], g.pick()
		g.tally.sent(r.protocol, s.Kind)
		wg.Go(func() { g.one(ctx, r.protocol, r.shared, s, due) })
	}
}

// worker sends the next request as soon as the last one was answered.
func (g *Generator) worker(ctx context.Context, r route) {
	snd, done := r.worker()
	defer done()
	for ctx.Err() == nil {
		s := g.pick()
		g.tally.sent(r.protocol, s.Kind)
		if g.one(ctx, r.protocol, snd, s, time.Now()) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(afterFailure):
		}
	}
}

// one sends a request that was already counted as sent, delivers its result and says whether it was answered. The end of
// ctx does not cut it off.
func (g *Generator) one(ctx context.Context, p Protocol, snd sender, s Share, due time.Time) bool {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), g.cfg.Timeout)
	defer cancel()
	o := snd.send(ctx, s)
	r := Result{Protocol: p, Kind: s.Kind, Instance: o.instance, Pod: o.pod, Scheduled: due, Latency: time.Since(due)}
	if o.err != nil {
		r.Class, r.Err = classify(o.err), o.err.Error()
	}
	g.results <- r
	return o.err == nil
}

// Snapshot reports what there is so far; requests in flight are sent, and neither answered nor failed. It may be called at any time.
func (g *Generator) Snapshot() Report { return g.tally.report() }
