package probe

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

const (
	// maxOutput of a probe that is kept, in bytes (probe/http/http.go: maxRespBodyLength, probe/exec/exec.go: maxReadLength).
	maxOutput = 10 << 10
	// maxLogged of it goes into a line of the log, in bytes.
	maxLogged = 256
	// maxJitter of the first run.
	maxJitter = time.Second
	// slot of the jitter, in whose middle a first run falls. The probes of an application's components start together, and those
	// of the same slot share a wake-up of this process, which costs more than most probes: without slots, twenty probes a
	// second took two to three times the CPU time. Other processes start at other times: a node's are spread all the same.
	slot = 250 * time.Millisecond
	// attempts of a run that can't be carried out (kubelet/prober/prober.go: maxProbeRetries).
	attempts = 3
)

// Config of a Prober.
type Config struct {
	// Name of the component that is probed, for logs and errors.
	Name string
	// Startup, Liveness and Readiness probes: at least one.
	Startup, Liveness, Readiness *Spec
	// Host that probes connect to if they name none, such as the pod's IP; default 127.0.0.1, since this process shares the
	// application's network namespace. The kubelet takes the pod's IP: an application that listens on that alone needs it here.
	Host string
	// Ports gives the number of a named port. It is asked at each run; nil knows none.
	Ports func(name string) (int, bool)
	// Wrap is put around the dialling of http, tcp and grpc probes, for whoever wants to know their connections; nil: nothing is.
	Wrap func(Dial) Dial
	// OnChange is called from Run's goroutine with the initial values and whenever Started, Live or Ready turns. It must
	// not block. Results that turn nothing are in Prober.State only.
	OnChange func(State)
	// Version of the program, for the User-Agent of http and grpc probes: usher-probe/VERSION.
	Version string
	// Logger; default none.
	Logger *zap.Logger
}

// Dial is how a connection is made.
type Dial = func(ctx context.Context, network, address string) (net.Conn, error)

// State is what the probes say together.
type State struct {
	// Started is true if there is no startup probe, or it has succeeded since the container's start.
	Started bool
	// Live is false once the liveness probe or the startup probe has failed failureThreshold times in a row, until it succeeds.
	Live bool
	// Ready is true if Started, and the readiness probe has succeeded successThreshold times in a row since it last failed
	// failureThreshold times, or there is none.
	Ready bool
	// Results are the newest, of the probes that have run since the container's start.
	Results map[Kind]Result
}

// Result of one run.
type Result struct {
	OK bool
	// Output for people: of an http probe that succeeded the body, of an exec probe what it wrote, else the error. At most 10 KiB.
	Output string
	// Time when the result was there, and how long it took.
	Time time.Time
	Took time.Duration
	// Streak is how many runs in a row had this result. 0: the probe could not be carried out, which counts neither as success
	// nor as failure, and changes no state (kubelet/prober/worker.go: "Prober error, throw away the result").
	Streak int
}

// handler carries out a probe. It is never called twice at once. An error means that there is no result.
type handler interface {
	probe(ctx context.Context) (verdict, string, error)
}

type verdict int

const (
	unknown verdict = iota
	failure
	success
	// warning is a success that people should hear of (probe/probe.go: Warning).
	warning
)

// probe is one of the three. Run's goroutine has it to itself.
type probe struct {
	kind    Kind
	spec    Spec
	handler handler

	ticker *time.Ticker
	// due is the jittered start's timer, then the ticker's channel.
	due <-chan time.Time
	// runs go to the probe's worker, which is there once there was one.
	runs      chan finished
	running   bool
	triggered bool

	// value that its threshold was last reached for.
	value verdict
	// last result and how many in a row.
	last   verdict
	streak int
	// heard is the last verdict that was logged, unknown for runs that could not be carried out.
	heard verdict
	ran   bool
}

// next yields when the probe is to run. While it runs, its ticker keeps the tick that it misses, one at most, as the
// kubelet's does: a probe slower than its period runs again at once, and no runs pile up.
func (pr *probe) next() <-chan time.Time {
	if pr == nil || pr.running {
		return nil
	}
	return pr.due
}

// reset gives the initial values (kubelet/prober/worker.go: newWorker).
func (pr *probe) reset() {
	*pr = probe{kind: pr.kind, spec: pr.spec, handler: pr.handler, ticker: pr.ticker, due: pr.due, runs: pr.runs, running: pr.running}
	switch pr.kind {
	case Liveness:
		pr.value = success
	case Readiness:
		pr.value = failure
	}
}

// finished is a run that has come to its end.
type finished struct {
	pr      *probe
	life    *life
	verdict verdict
	output  string
	err     error
	at      time.Time
	took    time.Duration
}

// Prober probes one application.
type Prober struct {
	cfg    Config
	log    *zap.Logger
	probes [kinds]*probe

	restarted chan struct{}
	finished  chan finished
	// life is Run's goroutine's, as are the probes.
	life *life

	// Only Run's goroutine writes state.
	mu    sync.Mutex
	state State
}

// New checks cfg; the application isn't contacted. The error names everything that is wrong.
func New(cfg Config) (*Prober, error) {
	p := &Prober{cfg: cfg, log: cfg.Logger, restarted: make(chan struct{}, 1), finished: make(chan finished)}
	if p.log == nil {
		p.log = zap.NewNop()
	}
	p.log = p.log.With(zap.String("component", cfg.Name))
	var problems []error
	add := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }
	host := cfg.Host
	if host == "" {
		host = "127.0.0.1"
	}
	hostProblems("Host", host, add)
	agent := "usher-probe"
	if cfg.Version != "" {
		agent += "/" + cfg.Version
	}
	for kind, spec := range [kinds]*Spec{Startup: cfg.Startup, Liveness: cfg.Liveness, Readiness: cfg.Readiness} {
		if spec == nil {
			continue
		}
		wrong := spec.problems(Kind(kind))
		problems = append(problems, wrong...)
		if len(wrong) > 0 {
			continue
		}
		pr := &probe{kind: Kind(kind), spec: spec.defaulted()}
		pr.reset()
		port := pr.spec.port()
		if port.Name != "" && cfg.Ports == nil {
			add("%v: port is %v, must be a number: no named ports are known here", pr.kind, port)
			continue
		}
		pr.handler = pr.spec.handler(host, agent, func() (int, error) { return port.resolve(cfg.Ports) }, cfg.Wrap)
		p.probes[kind] = pr
	}
	if cfg.Startup == nil && cfg.Liveness == nil && cfg.Readiness == nil {
		add("there is no probe, must be at least one of startup, liveness and readiness")
	}
	if len(problems) > 0 {
		for i, err := range problems {
			problems[i] = fmt.Errorf("probes of %q: %w", cfg.Name, err)
		}
		return nil, errors.Join(problems...)
	}
	p.state = State{Results: map[Kind]Result{}}
	p.state.Started, p.state.Live, p.state.Ready = p.verdicts()
	return p, nil
}

// port of the probe; a zero one for exec.
func (s Spec) port() Port {
	switch {
	case s.HTTPGet != nil:
		return s.HTTPGet.Port
	case s.TCPSocket != nil:
		return s.TCPSocket.Port
	case s.GRPC != nil:
		return Port{Number: int(s.GRPC.Port)}
	}
	return Port{}
}

// resolve is probe/util.go's ResolveContainerPort. That a name is unknown may change, so it is no failure but an error.
func (p Port) resolve(ports func(string) (int, bool)) (int, error) {
	number := p.Number
	if p.Name != "" {
		var ok bool
		if number, ok = ports(p.Name); !ok {
			return 0, fmt.Errorf("port %v not found", p)
		}
	}
	if number < 1 || number > 65535 {
		return 0, fmt.Errorf("invalid port number: %d", number)
	}
	return number, nil
}

// handler of a spec that was validated and defaulted.
func (s Spec) handler(host, agent string, port func() (int, error), wrap func(Dial) Dial) handler {
	timeout := time.Duration(s.TimeoutSeconds) * time.Second
	dial := dialer().DialContext
	if wrap != nil {
		dial = wrap(dial)
	}
	switch {
	case s.HTTPGet != nil:
		return newHTTPHandler(*s.HTTPGet, host, agent, port, timeout, dial)
	case s.TCPSocket != nil:
		if s.TCPSocket.Host != "" {
			host = s.TCPSocket.Host
		}
		return &tcpHandler{host: host, port: port, timeout: timeout, dial: dial}
	case s.GRPC != nil:
		return newGRPCHandler(host, int(s.GRPC.Port), s.GRPC.Service, agent, timeout, dial)
	}
	return &execHandler{command: s.Exec.Command, timeout: timeout}
}

// State is the newest. Before Run it has the initial values.
func (p *Prober) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.state
	s.Results = maps.Clone(s.Results)
	return s
}

// Restarted says that the application's container was restarted: initial values and initial delays again, as soon as Run
// comes to it, and runs under way don't count.
func (p *Prober) Restarted() {
	select {
	case p.restarted <- struct{}{}:
	default: // one is waiting already
	}
}

// Run probes until ctx ends, and returns nil then, once no run is under way any more. It is called once. Its start counts as
// the container's; each probe starts in the middle of a random quarter of the first second (see slot). The kubelet starts at a
// random moment of the period when it has been restarted itself, and has all its node's pods to probe; a container that is
// new it probes at once (kubelet/prober/worker.go: run). Here there are few probes, and who waits for them is a new instance.
func (p *Prober) Run(ctx context.Context) error {
	for _, pr := range p.probes {
		if pr != nil {
			jitter := time.NewTimer(rand.N(min(pr.period(), maxJitter)).Truncate(slot) + slot/2)
			defer jitter.Stop()
			pr.due = jitter.C
			defer pr.stop()
		}
	}
	p.life = newLife(ctx)
	p.notify()
	for {
		select {
		case <-ctx.Done(): // and with it the runs' context
			for range p.running() {
				<-p.finished
			}
			return nil
		case <-p.restarted:
			p.life.end()
			p.life = newLife(ctx)
			p.reset()
			p.trigger()
		case f := <-p.finished:
			again := f.pr.triggered
			f.pr.running, f.pr.triggered = false, false
			if f.life == p.life && ctx.Err() == nil && p.observe(f) || again {
				p.trigger()
			}
		case <-p.probes[Startup].next():
			p.tick(p.probes[Startup])
		case <-p.probes[Liveness].next():
			p.tick(p.probes[Liveness])
		case <-p.probes[Readiness].next():
			p.tick(p.probes[Readiness])
		}
	}
}

// life of one container, as far as is known here.
type life struct {
	ctx   context.Context
	end   context.CancelFunc
	start time.Time
}

func newLife(ctx context.Context) *life {
	l := &life{start: time.Now()}
	l.ctx, l.end = context.WithCancel(ctx)
	return l
}

// tick is for a probe whose period has begun.
func (p *Prober) tick(pr *probe) {
	if pr.ticker == nil {
		pr.ticker = time.NewTicker(pr.period())
		pr.due = pr.ticker.C
	}
	p.attempt(pr)
}

// attempt runs a probe unless something holds it back (kubelet/prober/worker.go: doProbe).
func (p *Prober) attempt(pr *probe) {
	if time.Since(p.life.start) < time.Duration(pr.spec.InitialDelaySeconds)*time.Second {
		return
	}
	if started, _, _ := p.verdicts(); started == (pr.kind == Startup) {
		return
	}
	if pr.runs == nil {
		pr.runs = make(chan finished)
		go p.work(pr.handler, pr.runs)
	}
	pr.running = true
	pr.runs <- finished{pr: pr, life: p.life}
}

// work carries out a probe's runs, one after the other. It is one goroutine for all of them, since a new one's stack would
// have to grow each time.
func (p *Prober) work(h handler, runs <-chan finished) {
	for f := range runs {
		began := time.Now()
		f.verdict, f.output, f.err = run(f.life.ctx, h)
		f.at = time.Now()
		f.took = f.at.Sub(began)
		p.finished <- f
	}
}

// trigger probes readiness at once where it may turn to true (kubelet/prober/prober_manager.go: UpdatePodStatus). During the
// jittered start it would only double the first run.
func (p *Prober) trigger() {
	pr := p.probes[Readiness]
	if started, _, ready := p.verdicts(); pr == nil || pr.ticker == nil || !started || ready {
		return
	}
	if pr.running {
		pr.triggered = true
		return
	}
	pr.ticker.Reset(pr.period())
	p.attempt(pr)
}

func (p *Prober) running() (n int) {
	for _, pr := range p.probes {
		if pr != nil && pr.running {
			n++
		}
	}
	return n
}

func (pr *probe) period() time.Duration { return time.Duration(pr.spec.PeriodSeconds) * time.Second }

func (pr *probe) stop() {
	if pr.ticker != nil {
		pr.ticker.Stop()
	}
	if pr.runs != nil {
		close(pr.runs)
	}
}

// run is one, tried again at once while it can't be carried out (kubelet/prober/prober.go: runProbeWithRetries).
func run(ctx context.Context, h handler) (v verdict, output string, err error) {
	for range attempts {
		if v, output, err = h.probe(ctx); err == nil || ctx.Err() != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return unknown, "", ctx.Err()
	}
	return v, output, err
}

// verdicts are started, live and ready.
func (p *Prober) verdicts() (started, live, ready bool) {
	is := func(kind Kind, v verdict) bool { return p.probes[kind] != nil && p.probes[kind].value == v }
	started = p.probes[Startup] == nil || is(Startup, success)
	live = !is(Startup, failure) && !is(Liveness, failure)
	ready = started && !is(Readiness, failure)
	return started, live, ready
}

// reset is for a new container.
func (p *Prober) reset() {
	for _, pr := range p.probes {
		if pr != nil {
			pr.reset()
		}
	}
	p.log.Info("probes start anew: the container was restarted")
	p.mu.Lock()
	clear(p.state.Results)
	p.mu.Unlock()
	p.publish()
}

// observe counts a result (the end of doProbe in kubelet/prober/worker.go), and says whether it turned the state.
func (p *Prober) observe(f finished) (changed bool) {
	pr := f.pr
	p.report(f)
	result := Result{OK: f.err == nil && f.verdict != failure, Output: f.output, Time: f.at, Took: f.took}
	if f.err != nil {
		result.Output = f.err.Error()
	} else {
		counted := success
		if !result.OK {
			counted = failure
		}
		if counted != pr.last {
			pr.last, pr.streak = counted, 0
		}
		pr.streak++
		result.Streak = pr.streak
		if counted == success && pr.streak >= int(pr.spec.SuccessThreshold) || counted == failure && pr.streak >= int(pr.spec.FailureThreshold) {
			pr.value = counted
		}
	}
	p.mu.Lock()
	p.state.Results[pr.kind] = result
	p.mu.Unlock()
	return p.publish()
}

// report logs a result that differs from the one before.
func (p *Prober) report(f finished) {
	heard := f.verdict
	level, message := zapcore.InfoLevel, "probe succeeds"
	switch {
	case f.err != nil:
		heard, level, message = unknown, zapcore.WarnLevel, "probe can't be carried out: it counts neither as success nor as failure"
	case f.verdict == failure:
		level, message = zapcore.WarnLevel, "probe fails"
	case f.verdict == warning:
		level, message = zapcore.WarnLevel, "probe succeeds with a warning"
	}
	if f.pr.ran && heard == f.pr.heard {
		level = zapcore.DebugLevel
	}
	f.pr.ran, f.pr.heard = true, heard
	if line := p.log.Check(level, message); line != nil {
		line.Write(zap.Stringer("probe", f.pr.kind), zap.Duration("took", f.took),
			zap.String("output", f.output[:min(len(f.output), maxLogged)]), zap.Error(f.err))
	}
}

// publish makes the state what the probes' values give, and says whether that turned it.
func (p *Prober) publish() (changed bool) {
	before := p.state
	p.mu.Lock()
	p.state.Started, p.state.Live, p.state.Ready = p.verdicts()
	p.mu.Unlock()
	now := p.state
	if now.Started == before.Started && now.Live == before.Live && now.Ready == before.Ready {
		return false
	}
	level := zapcore.InfoLevel
	if before.Live && !now.Live || before.Ready && !now.Ready {
		level = zapcore.WarnLevel
	}
	p.log.Log(level, "probes turn the state", zap.Bool("started", now.Started), zap.Bool("live", now.Live), zap.Bool("ready", now.Ready))
	p.notify()
	return true
}

func (p *Prober) notify() {
	if p.cfg.OnChange != nil {
		p.cfg.OnChange(p.State())
	}
}
