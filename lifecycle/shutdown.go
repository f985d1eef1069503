package lifecycle

import (
	"context"
	"errors"
	"math"
	"time"

	"go.uber.org/zap"
)

// killFloor is what the kubelet gives a container between SIGTERM and SIGKILL, even when the hook has used up the grace
// period (minimumGracePeriodInSeconds in pkg/kubelet/kuberuntime/kuberuntime_container.go).
const killFloor = 2 * time.Second

// begin starts a shutdown. What it needs of the state is read here, in Run's goroutine.
func (m *Machine) begin(cause string) {
	now := time.Now()
	s := &shutdown{cause: cause, started: now}
	if d := m.obs.Pod.DeletionStarted; m.firstLook && m.obs.Pod.Terminating && d.Before(now) && !d.IsZero() {
		s.started = d // by an agent before this one
	}
	s.deadline = m.deadline(now)
	s.release = m.cfg.Budget.releaseBy(now, s.deadline)

	ctx, cancel := context.WithCancelCause(m.ctx)
	s.cancel = cancel
	s.timer = time.AfterFunc(s.release.Sub(now), func() { cancel(errDeadline) })
	m.current = s

	withdrawn := make(chan struct{})
	s.withdrawn = withdrawn
	var guarding context.Context
	// Where no hook holds SIGTERM back, the application is gone while others would still send it requests.
	if hooked := cause == CauseHook || cause == CauseTerminating && len(m.obs.Pod.Hooked) > 0; m.cfg.Guard != nil && hooked &&
		m.registry.Advertised && m.servingDecision().advertised() {
		s.guarded = true
		guarding, s.unguard = context.WithCancelCause(ctx)
	}
	advertised := m.registry.Advertised || m.desired.Advertised() || !m.registrySeen
	unadvertised := m.unadvertised
	go func() {
		v := m.shutdown(ctx, shutdownInputs{
			cause: s.cause, started: s.started, guarding: guarding, left: s.release.Sub(now),
			unguarded: func() { m.post(func(in *inbox) { in.unguarded = s }) },
			withdrawn: withdrawn, advertised: advertised, unadvertised: unadvertised,
		})
		m.post(func(in *inbox) { in.finished = &v })
	}()
	m.log.Info("shutdown begins", zap.String("cause", cause), zap.Time("deadline", s.deadline), zap.Duration("at most", s.release.Sub(now)),
		zap.Bool("guarded", s.guarded))
}

// shutdownInputs are what a shutdown needs of the state, as it was when it began.
type shutdownInputs struct {
	cause   string
	started time.Time
	left    time.Duration // until the latest moment of the release

	guarding  context.Context // of the guard's wait; nil: nothing is guarded
	unguarded func()          // says that the instance may be withdrawn
	withdrawn <-chan struct{} // closed once the registry has been told so

	advertised   bool      // consumers may know the instance
	unadvertised time.Time // since when they don't, otherwise
}

// shutdown is the end of an instance from top to bottom. ctx ends at the latest moment of the release.
func (m *Machine) shutdown(ctx context.Context, in shutdownInputs) Verdict {
	v := Verdict{Cause: in.cause, Started: in.started}

	if in.guarding != nil {
		began := time.Now()
		wait, cancel := context.WithTimeoutCause(in.guarding, min(m.cfg.Budget.Guard, in.left/2), errDeadline)
		if err := m.cfg.Guard.Wait(wait); err != nil {
			v.GuardError = err.Error()
		}
		cancel()
		v.Guard = time.Since(began)
		in.unguarded()
	}
	<-in.withdrawn

	began := time.Now()
	withdraw, cancel := context.WithTimeoutCause(ctx, m.cfg.Budget.Withdraw, errDeadline)
	err := m.cfg.Registrar.Sync(withdraw)
	unadvertised := in.unadvertised
	if in.advertised {
		unadvertised = time.Now()
	}
	v.Withdraw = time.Since(began)

	// What the application is told may take its time beside the settling.
	announced := make(chan error, 1)
	go func() {
		defer cancel()
		announced <- m.announced(withdraw)
	}()

	// An instance that left the registry a while ago has nothing to settle any more.
	settled := unadvertised.Add(m.cfg.Budget.Settle)
	v.Settle = max(0, min(m.cfg.Budget.Settle, time.Until(settled)))
	waiting := time.Now()
	res := m.cfg.Drainer.Wait(ctx, settled)
	if aerr := <-announced; aerr != nil {
		v.AnnounceError = aerr.Error()
	}
	v.Settle = min(v.Settle, time.Since(waiting))
	v.Drain = time.Since(waiting) - v.Settle

	if err != nil {
		// Converging went on behind the drain.
		now, cancel := context.WithCancel(ctx)
		cancel()
		if m.cfg.Registrar.Sync(now) == nil {
			err = nil
		}
	}
	v.Outcome, v.InFlight, v.Unsure, v.Sources = res.Outcome, res.InFlight, res.Unsure, res.Sources
	var by forced
	if errors.As(context.Cause(ctx), &by) {
		v.Outcome, v.ForcedBy = Forced, string(by)
	}
	if v.Withdrawn = err == nil; err != nil {
		v.WithdrawError = err.Error()
	}
	v.Released = time.Now()
	return v
}

func (m *Machine) announced(ctx context.Context) error {
	if m.cfg.Announcer == nil {
		return nil
	}
	return m.cfg.Announcer.Announced(ctx)
}

// deadline is the kubelet's SIGKILL, for a shutdown that started then.
func (m *Machine) deadline(started time.Time) time.Time {
	switch p := m.obs.Pod; {
	case p.Terminating && !p.Deadline.IsZero():
		return p.Deadline
	case p.Known:
		return started.Add(p.Grace)
	}
	return started.Add(DefaultGrace)
}

// shorten brings the release closer when the pod has less time than was thought: a second delete, or the Pod is seen only
// now. When it has more, the release stays where it is.
func (m *Machine) shorten() {
	s := m.current
	s.deadline = m.deadline(s.started)
	now, was := time.Now(), s.release
	if release := m.cfg.Budget.releaseBy(now, s.deadline); release.Before(was) {
		s.release = release
		s.timer.Reset(release.Sub(now))
		if was.Sub(release) > time.Second { // less is the blur of the API's whole seconds
			m.log.Info("grace period shortened", zap.Time("deadline", s.deadline), zap.Duration("at most", release.Sub(now)))
		}
	}
}

// release takes in the verdict of the shutdown under way.
func (m *Machine) release(v *Verdict) {
	s := m.current
	s.timer.Stop()
	s.cancel(nil)
	v.Deadline = s.release
	s.verdict, m.verdict = v, v

	s.restarts = math.MaxInt // nothing to compare with
	if m.obs.Pod.Known {
		s.restarts = m.obs.Pod.Restarts
	}
	s.over = v.Released.Add(killFloor)
	if s.over.Before(s.deadline) {
		s.over = s.deadline
	}
	// Without any news an instance that nobody restarted is to come back then.
	time.AfterFunc(time.Until(s.over), func() { m.post(func(*inbox) {}) })
}

// undone says whether an instance that was released is back: the kubelet restarted its container (a failed liveness
// probe runs preStop too), and it is ready again. Readiness alone says nothing: the endpoint of an application that was
// just sent SIGTERM looks ready for a moment longer, and one that was overloaded may turn ready while it shuts down. So
// it takes a restart; or the end of the grace period, by which whatever the hook announced has happened.
func (m *Machine) undone() bool {
	s, p := m.current, m.obs.Pod
	if !s.released() || m.final || p.Terminating {
		return false
	}
	if Decide(Inputs{Observation: m.obs, Availability: m.availability, Hold: m.hold}).State != Online {
		return false
	}
	return p.Ready && p.Restarts > s.restarts || !time.Now().Before(s.over)
}

func (s *shutdown) released() bool { return s.verdict != nil }
