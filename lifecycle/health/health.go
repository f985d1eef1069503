package health

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health/probe"
)

const (
	// defaultOpening is the agent's default lease TTL.
	defaultOpening = 15 * time.Second
	// lookEvery is how often first results are looked for, as long as they are waited for. A prober tells only what turns its
	// state, which a first failure doesn't.
	lookEvery = 100 * time.Millisecond
)

// Config of a Health.
type Config struct {
	Settings
	// Host that probes connect to if they name none. Default 127.0.0.1.
	Host string
	// Ports gives the number of a named port. nil knows none.
	Ports func(name string) (int, bool)
	// Wrap is put around the dialling of probes; nil: nothing is.
	Wrap func(probe.Dial) probe.Dial
	// Opening is the longest time after New in which the availability may be Undecided; default 15 s. The lease TTL: what an agent
	// before this one registered ends by then in any case.
	Opening time.Duration
	// OnChange is told of the availability from Run's goroutine: first when somebody says anything, then whenever it is
	// another. It must not block. It never hears of drains and holds.
	OnChange func(lifecycle.Availability)
	// Authorized says whether a caller on the hook listener sees what is shown when-authorized. nil: none does. On the control
	// listener everybody does.
	Authorized func(*http.Request) bool
	// Version of the program, for the User-Agent of probes.
	Version string
	// Logger; default none.
	Logger *zap.Logger
}

// Lifecycle is what is decided about the instance, for those who ask how it is.
type Lifecycle struct {
	State string // lifecycle.State's name
	Cause string
	// Draining is for the time in which the instance must get no requests because it ends: State is Draining, or it is Released
	// and the Pod is being deleted. A Released instance whose Pod stays is not draining: it has to turn ready to come back.
	Draining bool
	// Held: an operator keeps it offline. Cause says who and why.
	Held bool
}

// out says whether that keeps traffic away, and why.
func (l Lifecycle) out() (cause string, out bool) {
	switch {
	case l.Draining:
		return withCause("draining", l.Cause), true
	case l.Held && l.Cause == "":
		return "held", true
	case l.Held:
		return l.Cause, true
	}
	return "", false
}

func withCause(what, cause string) string {
	if cause == "" {
		return what
	}
	return what + ": " + cause
}

// Health aggregates. Its methods may be called from any goroutine, before Run and after it too.
type Health struct {
	cfg    Config
	log    *zap.Logger
	groups *groups
	wake   chan struct{} // Run has something to tell, or another time to wait for
	// probers are those of components and workers, never changed after New.
	probers []*probe.Prober

	mu         sync.Mutex
	liveness   word[lifecycle.LivenessState] // the application's own
	readiness  word[lifecycle.ReadinessState]
	components map[string]*component
	workers    workers
	lifecycle  Lifecycle
	opened     time.Time              // New's
	decided    bool                   // once and for all: never Undecided again
	said       lifecycle.Availability // what OnChange is to be told
	effective  lifecycle.Readiness    // with drains and holds
	changed    chan struct{}          // closed and replaced at every change of anything
}

// word of the application on one of its states; the zero value is none.
type word[S ~string] struct {
	state S
	cause string
	since time.Time // of the state
	last  time.Time // when it was said last
}

func (w *word[S]) say(state S, cause string, now time.Time) {
	since := now
	if w.state == state {
		since = w.since
	}
	*w = word[S]{state, cut(cause), since, now}
}

func (w *word[S]) status(bad S, as string) (status, cause string) {
	switch w.state {
	case "":
		return api.HealthUnknown, ""
	case bad:
		return as, withCause("application", w.cause)
	}
	return api.HealthUp, withCause("application", w.cause)
}

// component is one with its probes' last word.
type component struct {
	Component
	prober *probe.Prober
	state  probe.State // as of the last turn
	// everReady and everStarted are since the container's start: what hasn't come yet isn't down.
	everReady, everStarted bool
}

// New checks cfg. The error names each field that is wrong, on a line of its own.
func New(cfg Config) (*Health, error) {
	gs, err := cfg.resolve()
	if err != nil {
		return nil, err
	}
	if cfg.OnChange == nil {
		cfg.OnChange = func(lifecycle.Availability) {}
	}
	if cfg.Authorized == nil {
		cfg.Authorized = func(*http.Request) bool { return false }
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.Opening == 0 {
		cfg.Opening = defaultOpening
	}
	h := &Health{
		cfg: cfg, log: cfg.Logger, groups: gs, wake: make(chan struct{}, 1), changed: make(chan struct{}),
		components: map[string]*component{}, workers: newWorkers(cfg.Workers), opened: time.Now(),
	}
	for name, c := range cfg.Components {
		own := &component{Component: c}
		own.reset()
		own.prober, err = h.prober(probe.Config{
			Name: name, Startup: c.StartupProbe, Liveness: c.LivenessProbe, Readiness: c.ReadinessProbe,
			OnChange: func(s probe.State) { h.probed(own, s) },
		})
		if err != nil {
			return nil, fmt.Errorf("health.components.%s: %w", name, err)
		}
		h.components[name] = own
	}
	if cfg.Workers != nil {
		for id, spec := range cfg.Workers.Probes {
			w := &worker{role: api.RoleWorker, state: api.WorkerNotReady, cause: notYet(probe.Readiness), since: time.Now()}
			w.prober, err = h.prober(probe.Config{
				Name: workersName + "/" + id, Readiness: &spec,
				OnChange: func(s probe.State) { h.workerProbed(w, s) },
			})
			if err != nil {
				return nil, fmt.Errorf("health.workers.probes.%s: %w", id, err)
			}
			h.workers.known[id] = w
		}
	}
	h.evaluate(time.Now())
	return h, nil
}

func (h *Health) prober(c probe.Config) (*probe.Prober, error) {
	c.Host, c.Ports, c.Wrap, c.Version, c.Logger = h.cfg.Host, h.cfg.Ports, h.cfg.Wrap, h.cfg.Version, h.log.Named("probe")
	p, err := probe.New(c)
	h.probers = append(h.probers, p)
	return p, err
}

// Run probes, tells OnChange, and notices workers that fall silent, until ctx ends. It is called once, and returns nil or a
// probe's error.
func (h *Health) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	failed := make(chan error, len(h.probers))
	for _, p := range h.probers {
		wg.Go(func() {
			if err := p.Run(ctx); err != nil {
				failed <- err
			}
		})
	}
	timer := time.NewTimer(0)
	timer.Stop()
	var told lifecycle.Availability
	for {
		h.mu.Lock()
		now := time.Now()
		h.expire(now)
		h.look(now)
		said, next := h.said, h.workers.next
		if look := now.Add(lookEvery); said.Undecided && (next.IsZero() || look.Before(next)) {
			next = look
		}
		h.mu.Unlock()
		if said != told {
			told = said
			h.cfg.OnChange(said)
		}
		timer.Stop()
		if !next.IsZero() {
			timer.Reset(time.Until(next))
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-h.wake:
		case <-timer.C:
		}
	}
}

// Availability is what OnChange is told: what the application, its probes and its workers say. The zero value means that
// nobody says anything.
func (h *Health) Availability() lifecycle.Availability {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire(time.Now())
	return h.said
}

// Effective is Availability with drains and holds, as HTTP and gRPC show it.
func (h *Health) Effective() lifecycle.Availability {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire(time.Now())
	return lifecycle.Availability{Liveness: h.said.Liveness, Readiness: h.effective}
}

// SetLifecycle says what is decided about the instance. It has to hear of every change, not of State's alone: where the
// kubelet asks for the group readiness, an instance whose hold is over stays Offline until that is known here. It never
// blocks.
func (h *Health) SetLifecycle(l Lifecycle) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.lifecycle != l {
		h.lifecycle = l
		h.evaluate(time.Now())
	}
}

// setLiveness is the application's own word.
func (h *Health) setLiveness(s lifecycle.LivenessState, cause string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.liveness.say(s, cause, now)
	h.evaluate(now)
}

// setReadiness is the application's own word.
func (h *Health) setReadiness(s lifecycle.ReadinessState, cause string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.readiness.say(s, cause, now)
	h.evaluate(now)
}

// Restarted says that the application's container was restarted: probes begin anew, and what its processes said is void.
// since is when the new container started, which may be long before the news is here: what was said of readiness and by
// workers after it is the new container's word and stays. The API gives it in whole seconds, so BROKEN, which
// would have the container restarted again, is dropped in any case. The zero time voids everything.
func (h *Health) Restarted(cause string, since time.Time) {
	h.mu.Lock()
	h.decided = true // it is known how the instance is: it has just begun
	void := func(said time.Time) bool { return since.IsZero() || said.Before(since) }
	if h.liveness.state == lifecycle.Broken || void(h.liveness.last) {
		h.liveness = word[lifecycle.LivenessState]{}
	}
	if void(h.readiness.last) {
		h.readiness = word[lifecycle.ReadinessState]{}
	}
	for _, c := range h.components {
		c.reset()
	}
	h.workers.restarted(void)
	h.evaluate(time.Now())
	h.mu.Unlock()
	h.log.Info("container restarted: what was said of the application is void", zap.String("cause", cause))
	for _, p := range h.probers {
		p.Restarted()
	}
}

// reset gives the initial values: the prober's own come a moment later.
func (c *component) reset() {
	c.state = probe.State{Started: c.StartupProbe == nil, Live: true}
	c.state.Ready = c.state.Started && c.ReadinessProbe == nil
	c.everReady, c.everStarted = false, false
}

func (h *Health) probed(c *component, s probe.State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.state = s
	c.everReady = c.everReady || s.Ready
	c.everStarted = c.everStarted || s.Started
	h.evaluate(time.Now())
}

// expire evaluates if a worker's word is over. The caller has the lock, as for all below.
func (h *Health) expire(now time.Time) {
	if !h.workers.next.IsZero() && !now.Before(h.workers.next) {
		silent, changed := h.workers.expire(now)
		for _, id := range silent {
			h.log.Warn("worker is silent", zap.String("worker", id))
		}
		if changed {
			h.evaluate(now)
		}
	}
}

// look notices that what was open is decided, where nobody tells of it.
func (h *Health) look(now time.Time) {
	if !h.said.Undecided {
		return
	}
	h.workers.summarize()
	if !h.open(now) {
		h.evaluate(now)
	}
}

// open says whether the availability refuses for nothing but what may still be said for the first time.
func (h *Health) open(now time.Time) bool {
	since := now.Sub(h.opened)
	if _, refusing := h.said.Refusing(); !refusing || h.decided || since >= h.cfg.Opening {
		return false
	}
	v := view{withoutLifecycle: true, hopeful: true, since: since}
	for _, g := range []*group{h.groups.named[liveness], h.groups.named[readiness]} {
		if status, _ := h.groupStatus(g, v); failing(status) {
			return false
		}
	}
	return true
}

// silent says whether nothing is known against what a prober asks: no run has had a result, or all have succeeded, if less often
// than the threshold.
func silent(p *probe.Prober) bool {
	for _, r := range p.State().Results {
		if !r.OK && r.Streak > 0 {
			return false
		}
	}
	return true
}

// evaluate makes the availability anew, and wakes whoever waits for a change.
func (h *Health) evaluate(now time.Time) {
	h.workers.summarize()

	status, cause := h.groupStatus(h.groups.named[liveness], view{aspect: asLiveness, withoutLifecycle: true})
	live := lifecycle.Liveness{State: lifecycle.Correct, Cause: cause, Since: now}
	switch {
	case status == api.HealthUnknown:
		live = lifecycle.Liveness{}
	case status != api.HealthUp:
		live.State = lifecycle.Broken
	}
	if live.State == h.said.Liveness.State {
		live.Since = h.said.Liveness.Since
	}

	before := h.said
	h.said = lifecycle.Availability{Liveness: live, Readiness: h.ready(true, h.said.Readiness, now)}
	h.said.Undecided = h.open(now)
	h.decided = h.decided || !h.said.Undecided
	h.effective = h.ready(false, h.effective, now)
	if h.said != before {
		level := zapcore.InfoLevel
		if _, was := before.Refusing(); !was && before != (lifecycle.Availability{}) {
			if _, is := h.said.Refusing(); is {
				level = zapcore.WarnLevel
			}
		}
		word := func(state string) string { return cmp.Or(state, api.HealthUnknown) }
		h.log.Log(level, "availability", zap.Bool("undecided", h.said.Undecided),
			zap.String("liveness", word(string(h.said.Liveness.State))), zap.String("livenessCause", h.said.Liveness.Cause),
			zap.String("readiness", word(string(h.said.Readiness.State))), zap.String("readinessCause", h.said.Readiness.Cause))
	}
	close(h.changed)
	h.changed = make(chan struct{})
	h.poke()
}

func (h *Health) poke() {
	select {
	case h.wake <- struct{}{}:
	default:
	}
}

// ready is the group readiness as a state, after before.
func (h *Health) ready(withoutLifecycle bool, before lifecycle.Readiness, now time.Time) lifecycle.Readiness {
	status, cause := h.groupStatus(h.groups.named[readiness], view{aspect: asReadiness, withoutLifecycle: withoutLifecycle})
	r := lifecycle.Readiness{State: lifecycle.AcceptingTraffic, Cause: cause, Since: now}
	switch {
	case status == api.HealthUnknown:
		return lifecycle.Readiness{}
	case status != api.HealthUp:
		r.State = lifecycle.RefusingTraffic
	}
	if r.State == before.State {
		r.Since = before.Since
	}
	return r
}

// view is how members are looked at.
type view struct {
	aspect           aspect
	withoutLifecycle bool
	// hopeful takes what has not been heard for UP, that long after the start.
	hopeful bool
	since   time.Duration
}

// groupStatus aggregates, and gives the cause of the first member that fails; of one that is UP, the application's own.
func (h *Health) groupStatus(g *group, v view) (status, cause string) {
	if g.aspect != overall {
		v.aspect = g.aspect
	}
	status = api.HealthUnknown
	for _, m := range g.members {
		s, c := h.memberStatus(m, v)
		if s == api.HealthDegraded {
			s, c = api.HealthUp, ""
		}
		if failing(s) && !failing(status) || cause == "" && failing(s) == failing(status) {
			cause = c
		}
		if rank(s) < rank(status) {
			status = s
		}
	}
	return status, cause
}

func failing(status string) bool { return status == api.HealthDown || status == api.HealthOutOfService }

// rank is Spring Boot's order (SimpleStatusAggregator).
func rank(status string) int {
	return slices.Index([]string{api.HealthDown, api.HealthOutOfService, api.HealthUp, api.HealthUnknown}, status)
}

func (h *Health) memberStatus(m member, v view) (status, cause string) {
	switch m.kind {
	case ofLiveness:
		return h.liveness.status(lifecycle.Broken, api.HealthDown)
	case ofReadiness:
		return h.readiness.status(lifecycle.RefusingTraffic, api.HealthOutOfService)
	case ofLifecycle:
		if v.withoutLifecycle {
			return api.HealthUnknown, ""
		}
		if cause, out := h.lifecycle.out(); out {
			return api.HealthOutOfService, cause
		}
		return api.HealthUp, ""
	case ofComponent:
		c := h.components[m.name]
		if v.hopeful && !c.everReady && silent(c.prober) {
			return api.HealthUp, ""
		}
		status, cause = c.status(v.aspect)
		if cause != "" {
			cause = "component " + m.name + ": " + cause
		}
		return status, cause
	case ofWorkers:
		if v.hopeful && h.workers.open(v.since) {
			return api.HealthUp, ""
		}
		return h.workers.status(v.aspect)
	}
	return h.groupStatus(m.group, v)
}

func notYet(k probe.Kind) string { return k.String() + " probe has not succeeded yet" }

func (c *component) status(a aspect) (status, cause string) {
	fails := func(k probe.Kind) string {
		r, ok := c.state.Results[k]
		if !ok || r.OK {
			return k.String() + " probe failed"
		}
		return k.String() + " probe failed: " + cut(r.Output)
	}
	live := func() (string, string) {
		switch {
		case c.state.Live:
			return api.HealthUp, ""
		case !c.state.Started:
			return api.HealthDown, fails(probe.Startup)
		}
		return api.HealthDown, fails(probe.Liveness)
	}
	started := func() (string, string) {
		if c.state.Started {
			return api.HealthUp, ""
		}
		return api.HealthOutOfService, notYet(probe.Startup)
	}
	ready := func() (string, string) {
		switch {
		case c.state.Ready:
			return api.HealthUp, ""
		case !c.state.Started:
			return started()
		case !c.everReady:
			return api.HealthOutOfService, notYet(probe.Readiness)
		}
		return api.HealthDown, fails(probe.Readiness)
	}
	switch a {
	case asStartup:
		status, cause = started()
	case asLiveness:
		status, cause = live()
	case asReadiness:
		status, cause = ready()
	default:
		if status, cause = live(); status == api.HealthUp {
			status, cause = ready()
		}
	}
	if failing(status) && !c.critical() {
		status = api.HealthDegraded
	}
	return status, cause
}
