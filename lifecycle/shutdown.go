package lifecycle

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// begin starts a shutdown. What it needs of the state is read here, in Run's goroutine.
func (m *Machine) begin(cause string) {
	now := time.Now()
	s := &shutdown{cause: cause, started: now, done: make(chan struct{}), restarts: m.obs.Pod.Restarts}
	grace := m.obs.Pod.Grace
	if !m.obs.Pod.Known {
		grace = DefaultGrace
	}
	s.deadline = now.Add(grace)
	if m.obs.Pod.Terminating {
		s.deadline = m.obs.Pod.Deadline
	}
	s.release = m.cfg.Budget.releaseBy(now, s.deadline)

	ctx, cancel := context.WithCancelCause(m.ctx)
	s.cancel = cancel
	s.timer = time.AfterFunc(s.release.Sub(now), func() { cancel(errDeadline) })
	m.current = s

	advertised := m.registry.Advertised || m.desired.Advertised()
	unadvertised := m.unadvertised
	s.begin = func() {
		v := m.shutdown(ctx, s.cause, s.started, advertised, unadvertised)
		m.post(func(in *inbox) { in.finished = &v })
	}
	m.log.Info("shutdown begins", zap.String("cause", cause), zap.Time("deadline", s.deadline), zap.Duration("at most", s.release.Sub(now)))
}

// shutdown is the end of an instance from top to bottom. ctx ends at the latest moment of the release. The records are
// not wanted any more when it is called.
func (m *Machine) shutdown(ctx context.Context, cause string, started time.Time, advertised bool, unadvertised time.Time) Verdict {
	v := Verdict{Cause: cause, Started: started}

	withdraw, cancel := context.WithTimeoutCause(ctx, m.cfg.Budget.Withdraw, errDeadline)
	err := m.cfg.Registrar.Sync(withdraw)
	cancel()
	if advertised {
		unadvertised = time.Now()
	}
	v.Withdraw = time.Since(started)

	// An instance that left the registry a while ago has nothing to settle any more.
	settled := unadvertised.Add(m.cfg.Budget.Settle)
	v.Settle = max(0, min(m.cfg.Budget.Settle, time.Until(settled)))
	waiting := time.Now()
	res := m.cfg.Drainer.Wait(ctx, settled)
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
	if v.Withdrawn = err == nil; err != nil {
		v.WithdrawError = err.Error()
	}
	v.Released = time.Now()
	return v
}

// shorten brings the release closer, when a second delete gave the pod less time.
func (m *Machine) shorten(deadline time.Time) {
	s := m.current
	if s.finished() || deadline.IsZero() || !deadline.Before(s.deadline) {
		return
	}
	now := time.Now()
	s.deadline = deadline
	if release := m.cfg.Budget.releaseBy(now, deadline); release.Before(s.release) {
		s.release = release
		s.timer.Reset(release.Sub(now))
		m.log.Info("grace period shortened", zap.Time("deadline", deadline), zap.Duration("at most", release.Sub(now)))
	}
}

// undone says whether an instance that was released is back: the kubelet restarted its container (a failed liveness
// probe runs preStop too), and it is ready again. Its endpoint may still look ready for a moment after the release, so
// being ready counts only after a sign of the restart; or when the grace is over, by which time whatever the hook
// announced has happened.
func (m *Machine) undone() bool {
	s, p := m.current, m.obs.Pod
	if !s.finished() || m.final || p.Terminating || p.Gone || !p.Known {
		return false
	}
	ready := Decide(Inputs{Observation: m.obs, WasOnline: true}).State == Online
	if !ready || !p.Ready {
		s.notReadySince = true
	}
	if !ready {
		return false
	}
	restarted := p.Ready && (s.notReadySince || p.Restarts > s.restarts)
	return restarted || !time.Now().Before(s.deadline)
}

func (s *shutdown) end() {
	s.timer.Stop()
	s.cancel(nil)
	close(s.done)
}

func (s *shutdown) finished() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}
