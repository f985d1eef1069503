package lifecycle

import (
	"context"
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
	s.deadline = m.deadline(now)
	s.release = m.cfg.Budget.releaseBy(now, s.deadline)

	ctx, cancel := context.WithCancelCause(m.ctx)
	s.cancel = cancel
	s.timer = time.AfterFunc(s.release.Sub(now), func() { cancel(errDeadline) })
	m.current = s

	advertised := m.registry.Advertised || m.desired.Advertised() || !m.registrySeen
	unadvertised := m.unadvertised
	s.carryOut = func() {
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
	if Decide(Inputs{Observation: m.obs}).State != Online {
		return false
	}
	return p.Ready && p.Restarts > s.restarts || !time.Now().Before(s.over)
}

func (s *shutdown) released() bool { return s.verdict != nil }
