package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
)

// What begins a shutdown.
const (
	CauseHook        = "prestop hook"
	CauseTerminating = "pod terminating"
	CauseSignal      = "SIGTERM"
)

// trailLength bounds the decision trail: the last day of a flapping instance isn't worth the agent's memory.
const trailLength = 64

var (
	// ErrBudget says that the settings don't fit the pod's grace period. Run returns it.
	ErrBudget = errors.New("budget does not fit the pod")
	errEnded  = errors.New("the agent has stopped")
	// errNothingToGuard ends a guard's wait for an instance that consumers should not find anyway.
	errNothingToGuard = errors.New("the instance no longer serves")
)

// forced is the cause of a shutdown's context that somebody ended.
type forced string

func (f forced) Error() string { return "forced: " + string(f) }

// errDeadline ends a drain that is out of time. It is context.DeadlineExceeded to whoever asks: the timer behind it can be
// moved, which a context's own deadline can't.
const errDeadline = outOfTime("out of time")

type outOfTime string

func (e outOfTime) Error() string        { return string(e) }
func (e outOfTime) Is(target error) bool { return target == context.DeadlineExceeded }

// Config is what a Machine needs. Every callback is called from Run's goroutine and must not block.
type Config struct {
	Registrar Registrar
	Drainer   Drainer
	Budget    Budget
	// Quiet is the Drainer's quiet period, which the pod's grace has to have room for.
	Quiet time.Duration
	// Guard holds a shutdown's withdrawal back while the others are too few; nil: nothing does.
	Guard Guard
	// Announcer tells the application what is decided; nil: nobody is told. A release waits for it, at most as long as
	// for the registry.
	Announcer Announcer
	// OnHold is told of every hold, and with nil of its end.
	OnHold func(*Hold)
	// OnTransition is told of every change of state.
	OnTransition func(Transition)
	Logger       *zap.Logger
}

// Transition is one entry of the decision trail: a change of state, or of its cause.
type Transition struct {
	Time  time.Time
	From  State
	State State
	Cause string
	// Verdict is set when State is Released.
	Verdict *Verdict
}

// Status is the Machine's account of itself.
type Status struct {
	State       State
	Since       time.Time
	Cause       string
	Deadline    time.Time // of the release under way; zero without one
	Observation Observation
	// Availability is what the application and its probes say of it.
	Availability Availability
	Hold         *Hold // nil without one
	Registry     RegistryStatus
	Verdict      *Verdict // the last shutdown's
	Trail        []Transition
}

// Machine is the state machine of one instance.
type Machine struct {
	cfg Config
	log *zap.Logger

	mu      sync.Mutex
	inbox   inbox
	status  Status
	changed chan struct{} // closed and replaced whenever status changes
	wake    chan struct{}
	ended   chan struct{} // closed when Run returns

	// Of Run's goroutine only.
	ctx          context.Context
	obs          Observation
	availability Availability
	hold         *Hold
	registry     RegistryStatus
	state        State
	cause        string
	since        time.Time
	wasOnline    bool
	firstLook    bool // the newest observation is the first that knows the Pod
	registrySeen bool // in sync, once
	final        bool // SIGTERM came: no way back online
	unadvertised time.Time
	current      *shutdown // under way, or the last one while it isn't undone
	desired      Desired
	waiting      []waiter
	verdict      *Verdict
	trail        []Transition
}

// inbox is what others have said since Run looked last. Of an observation only the newest counts.
type inbox struct {
	observation *Observation
	registry    *RegistryStatus
	available   *Availability
	hold        **Hold
	stops       []stop
	forced      string // the cause; "" when nobody forces anything
	unguarded   *shutdown
	finished    *Verdict
}

type stop struct {
	cause string
	reply chan<- Verdict
}

// waiter is a call of Stop. Its reply has room for one verdict, so nobody minds if the caller has gone.
type waiter struct {
	shutdown *shutdown
	reply    chan<- Verdict
}

// shutdown is one end of the instance. Only Run's goroutine touches it.
type shutdown struct {
	cause    string
	started  time.Time
	deadline time.Time // the kubelet's SIGKILL
	release  time.Time // deadline less the application's reserve
	timer    *time.Timer
	cancel   context.CancelCauseFunc

	guarded   bool                    // the guard still holds the withdrawal back
	unguard   context.CancelCauseFunc // ends the guard's wait; nil without one
	withdrawn chan struct{}           // closed once the registry knows that the instance isn't wanted any more

	verdict *Verdict // nil until the release

	// What tells, after the release, that the instance began a new life.
	restarts int       // of the Pod's containers, at the release
	over     time.Time // by when the kubelet has ended what it wanted to end
}

// New validates cfg.
func New(cfg Config) (*Machine, error) {
	if cfg.Registrar == nil || cfg.Drainer == nil {
		return nil, errors.New("lifecycle: a Registrar and a Drainer are needed")
	}
	if err := cfg.Budget.Validate(); err != nil {
		return nil, err
	}
	if cfg.OnTransition == nil {
		cfg.OnTransition = func(Transition) {}
	}
	if cfg.OnHold == nil {
		cfg.OnHold = func(*Hold) {}
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	m := &Machine{cfg: cfg, log: cfg.Logger, changed: make(chan struct{}), wake: make(chan struct{}, 1), ended: make(chan struct{})}
	m.since = time.Now()
	m.cause = "agent started"
	m.status = Status{Since: m.since, Cause: m.cause}
	return m, nil
}

// Observe hands over what Kubernetes says now. It never blocks.
func (m *Machine) Observe(o Observation) { m.post(func(in *inbox) { in.observation = &o }) }

// RegistryChanged hands over how the registry stands now. It never blocks.
func (m *Machine) RegistryChanged(s RegistryStatus) { m.post(func(in *inbox) { in.registry = &s }) }

// SetAvailability hands over what the application and its probes say now. It never blocks.
func (m *Machine) SetAvailability(a Availability) { m.post(func(in *inbox) { in.available = &a }) }

// SetHold hands over the hold that an operator has on the instance, nil for none. It never blocks.
func (m *Machine) SetHold(h *Hold) { m.post(func(in *inbox) { in.hold = &h }) }

// Force ends the waiting of the shutdown under way, if there is one: it releases at once, and its verdict says Forced. It never
// blocks.
func (m *Machine) Force(cause string) { m.post(func(in *inbox) { in.forced = cause }) }

func (m *Machine) post(put func(*inbox)) {
	m.mu.Lock()
	put(&m.inbox)
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// Stop begins a shutdown, or joins the one under way or just finished, and waits for its verdict. When ctx ends first
// only the waiting ends, as it does when Run returns. With CauseSignal there is no way back online.
func (m *Machine) Stop(ctx context.Context, cause string) (Verdict, error) {
	reply := make(chan Verdict, 1)
	m.post(func(in *inbox) { in.stops = append(in.stops, stop{cause, reply}) })
	var err error
	select {
	case v := <-reply:
		return v, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-m.ended:
		err = errEnded
	}
	select {
	case v := <-reply: // came at the same moment
		return v, nil
	default:
		return Verdict{}, fmt.Errorf("waiting for the shutdown: %w", err)
	}
}

// Status is the newest account.
func (m *Machine) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

// Await waits until ok says yes to a status, or ctx ends, and reports which.
func (m *Machine) Await(ctx context.Context, ok func(Status) bool) bool {
	for {
		m.mu.Lock()
		st, changed := m.status, m.changed
		m.mu.Unlock()
		if ok(st) {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// Run is the one goroutine that writes the state; it is called once. It ends with ctx, or with ErrBudget, and takes a drain
// that is under way with it: so end ctx after Stop has returned, not upon SIGTERM.
func (m *Machine) Run(ctx context.Context) error {
	defer close(m.ended)
	live, cancel := context.WithCancelCause(ctx)
	defer cancel(errEnded)
	m.ctx = live
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-m.wake:
		}
		m.mu.Lock()
		in := m.inbox
		m.inbox = inbox{}
		m.mu.Unlock()
		if err := m.step(in); err != nil {
			return err
		}
	}
}

// step takes in what came, and makes of it what should be.
func (m *Machine) step(in inbox) error {
	if in.observation != nil {
		m.firstLook = !m.obs.Pod.Known && in.observation.Pod.Known
		m.obs = *in.observation
		if m.firstLook {
			if err := m.cfg.Budget.Fit(m.obs.Pod.Grace, m.cfg.Quiet); err != nil {
				return fmt.Errorf("%w: %w", ErrBudget, err)
			}
		}
	}
	if in.registry != nil {
		m.registryChanged(*in.registry)
	}
	if in.available != nil {
		m.availability = *in.available
	}
	if in.hold != nil && !reflect.DeepEqual(*in.hold, m.hold) {
		m.hold = *in.hold
		m.cfg.OnHold(m.hold)
	}
	if in.unguarded != nil {
		in.unguarded.guarded = false
	}
	if in.finished != nil {
		m.release(in.finished)
		m.settle() // Released is a state of its own, however soon it is left
	}
	for _, s := range in.stops {
		m.final = m.final || s.cause == CauseSignal
		if m.current == nil || m.undone() {
			m.begin(s.cause)
		} else {
			m.log.Info("joining the shutdown", zap.String("cause", s.cause), zap.String("begun by", m.current.cause))
		}
		m.waiting = append(m.waiting, waiter{m.current, s.reply})
	}
	switch {
	case m.current == nil:
		if m.obs.Pod.Terminating {
			m.begin(CauseTerminating)
		}
	case m.undone():
		m.log.Info("instance is back after its shutdown", zap.String("cause", m.current.cause))
		m.current = nil
	case !m.current.released():
		m.shorten()
		if in.forced != "" {
			m.log.Warn("shutdown forced", zap.String("cause", in.forced))
			m.current.cancel(forced(in.forced))
		}
	}
	if s := m.current; s != nil && s.guarded && (m.final || !m.servingDecision().advertised()) {
		s.guarded = false // there is nothing left to keep up
		s.unguard(errNothingToGuard)
	}
	m.settle()
	m.waiting = slices.DeleteFunc(m.waiting, func(w waiter) bool {
		if w.shutdown.released() {
			w.reply <- *w.shutdown.verdict
		}
		return w.shutdown.released()
	})
	return nil
}

// settle decides, and tells the registry and whoever listens.
func (m *Machine) settle() {
	d := m.decide(m.phase())
	t := Transition{Time: time.Now(), From: m.state, State: d.State, Cause: d.Cause}
	if d.State != m.state {
		m.since = t.Time
	}
	if d.State == Released {
		t.Verdict = m.verdict
		t.Cause += ": " + m.verdict.Message()
	}
	if d.State != m.state || d.Cause != m.cause {
		m.record(t)
	}
	m.state, m.cause = d.State, d.Cause
	m.wasOnline = m.wasOnline || d.State == Online || d.State == Offline

	// The registry comes first: what follows can wait, a withdrawal can't.
	want := desire(m.obs, d)
	want.Since = m.since
	if d.State == Released || d.State == Stopped {
		want.Verdict = m.verdict
	}
	if len(want.Instances) > 0 && !reflect.DeepEqual(want, m.desired) {
		if m.desired.Advertised() && !want.Advertised() {
			m.unadvertised = t.Time
		}
		m.desired = want
		m.cfg.Registrar.Set(want)
	}

	m.publish()
	if t.From != t.State {
		m.logTransition(t)
		m.cfg.OnTransition(t)
	}
	if s := m.current; s != nil && !s.guarded && s.withdrawn != nil {
		close(s.withdrawn) // whoever was told by then is waited for
		s.withdrawn = nil
	}
}

func (m *Machine) decide(p Phase) Decision {
	in := Inputs{Observation: m.obs, Availability: m.availability, Hold: m.hold, Phase: p, WasOnline: m.wasOnline}
	if m.current != nil {
		in.StopCause = m.current.cause
	}
	return Decide(in)
}

// servingDecision is what is decided while a guard holds the withdrawal back.
func (m *Machine) servingDecision() Decision { return m.decide(StopGuarded) }

func (m *Machine) logTransition(t Transition) {
	level := zap.InfoLevel
	if v := t.Verdict; v != nil && (v.Outcome == TimedOut || v.Outcome == Forced || v.Outcome == Unmeasured || !v.Withdrawn) {
		level = zap.WarnLevel
	}
	m.log.Log(level, "state", zap.Stringer("from", t.From), zap.Stringer("to", t.State), zap.String("cause", t.Cause))
}

func (m *Machine) phase() Phase {
	switch {
	case m.current == nil:
		return NotStopping
	case m.current.guarded:
		return StopGuarded
	case !m.current.released():
		return StopUnderWay
	case m.final && m.state >= Released:
		return StopForGood
	}
	return StopReleased
}

// registryChanged keeps the trail and the moment from which consumers learn of a withdrawal.
func (m *Machine) registryChanged(now RegistryStatus) {
	was := m.registry
	m.registry = now
	m.wasOnline = m.wasOnline || now.Advertised // as an agent before this one saw it
	if now.InSync && !m.registrySeen {
		m.registrySeen = true
		m.unadvertised = now.Updated // until then there may have been records of an agent before this one
	}
	t := Transition{Time: time.Now(), From: m.state, State: m.state}
	switch {
	case now.Inherited && !was.Inherited:
		t.Cause = "found registered under lease " + now.Lease + " of the agent before this one"
	case now.Advertised && (!was.Advertised || now.Lease != was.Lease):
		t.Cause = "registered under lease " + now.Lease
	case was.Advertised && !now.Advertised:
		t.Cause = "no longer registered"
		if now.Err != "" {
			t.Cause += ": " + now.Err
		}
		m.unadvertised = now.Updated
	case now.Err != "" && now.Err != was.Err:
		t.Cause = "registry: " + now.Err
	case was.Err != "" && now.Err == "":
		t.Cause = "registry is as desired again"
	default:
		return
	}
	m.record(t)
}

func (m *Machine) record(t Transition) {
	if len(m.trail) == trailLength {
		m.trail = m.trail[1:]
	}
	m.trail = append(m.trail, t)
}

func (m *Machine) publish() {
	st := Status{
		State: m.state, Since: m.since, Cause: m.cause, Observation: m.obs, Registry: m.registry, Verdict: m.verdict,
		Availability: m.availability, Hold: m.hold,
		Trail: slices.Clip(m.trail), // of which no entry is ever changed
	}
	if m.current != nil && !m.current.released() {
		st.Deadline = m.current.release
	}
	m.mu.Lock()
	m.status = st
	close(m.changed)
	m.changed = make(chan struct{})
	m.mu.Unlock()
}
