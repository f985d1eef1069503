package lifecycle_test

import (
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

func TestRestartedContainerComesBackAndCanBeDrainedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		first := r.await(r.hook())
		r.ready(true) // the endpoint still looks it, for a moment
		r.wantState(lifecycle.Released)
		time.Sleep(time.Second)
		r.ready(false)
		time.Sleep(time.Second)
		r.restarted()
		time.Sleep(time.Second)
		r.app.busy = 2 * time.Second
		second := r.await(r.hook())

		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Draining: prestop hook",
			"1s Draining -> Released: prestop hook: drained in 1s, nothing in flight",
			"3s Released -> Online: endpoint ready in service web",
			"4s Online -> Draining: prestop hook",
			"6.5s Draining -> Released: prestop hook: drained in 2.5s, nothing in flight",
		)
		if first.at != time.Second || second.at != 6*time.Second+quiet || !second.Started.Equal(r.after(4*time.Second)) {
			t.Errorf("verdicts:\n%+v\n%+v", first.Verdict, second.Verdict)
		}
	})
}

func TestRestartIsEnoughWithoutHavingBeenSeenNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		time.Sleep(time.Second)
		r.see(func(o *lifecycle.Observation) { o.Pod.Restarts++ })
		r.wantState(lifecycle.Online)
	})
}

func TestRestartedPodIsNotBackBeforeItIsReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		r.see(func(o *lifecycle.Observation) { o.Pod.Restarts++; o.Pod.Ready = false }) // the slice lags behind the Pod
		r.wantState(lifecycle.Released)
		r.see(func(o *lifecycle.Observation) { o.Pod.Ready = true })
		r.wantState(lifecycle.Online)
	})
}

func TestReadinessAloneDoesNotBringAnInstanceBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		// Overloaded, without load it recovers; and it was sent SIGTERM.
		r.ready(false)
		time.Sleep(time.Second)
		r.ready(true)
		r.wantState(lifecycle.Released)
	})
}

func TestNeighboursRestartDuringTheDrainDoesNotBringAnInstanceBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 3 * time.Second
		r.ready(true)
		hook := r.hook()
		time.Sleep(time.Second)
		r.see(func(o *lifecycle.Observation) { o.Pod.Restarts++ })
		r.await(hook)
		r.wantState(lifecycle.Released)
	})
}

func TestInstanceThatNobodyRestartedIsBackWhenTheGraceIsOver(t *testing.T) {
	for _, tc := range []struct {
		name   string
		budget lifecycle.Budget
		busy   time.Duration
		want   time.Duration
	}{
		{name: "quickly drained", budget: lifecycle.DefaultBudget(), want: 30 * time.Second},
		{name: "out of time", budget: lifecycle.DefaultBudget(), busy: time.Hour, want: 30 * time.Second},
		// The kubelet waits 2 s between SIGTERM and SIGKILL even then.
		{name: "no reserve", budget: lifecycle.Budget{Withdraw: time.Second}, busy: time.Hour, want: 32 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(_ *rig, c *lifecycle.Config) { c.Budget = tc.budget })
				r.app.busy = tc.busy
				r.ready(true)
				r.await(r.hook())
				time.Sleep(time.Until(r.after(tc.want)) - 1)
				r.wantState(lifecycle.Released)
				time.Sleep(time.Nanosecond)
				r.wantState(lifecycle.Online)
			})
		})
	}
}

func TestInstanceThatIsNotReadyWhenTheGraceIsOverIsBackOnceItIs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		r.ready(false)
		time.Sleep(time.Hour)
		r.wantState(lifecycle.Released)
		r.ready(true)
		r.wantState(lifecycle.Online)
	})
}

func TestGraceThatIsSeenDuringTheShutdownCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.app.busy = time.Second
		hook := r.hook()
		r.see(func(o *lifecycle.Observation) {
			o.Pod = lifecycle.Pod{Known: true, Ready: true, Grace: time.Minute}
			o.Endpoints = []lifecycle.Endpoint{{Service: "web", Found: true, Ready: true}}
		})
		if a := r.await(hook); !a.Deadline.Equal(r.after(25 * time.Second)) {
			t.Errorf("the deadline of the release moved to %s after the start", a.Deadline.Sub(r.start))
		}
		time.Sleep(59*time.Second - quiet - 1)
		r.wantState(lifecycle.Released)
		time.Sleep(time.Nanosecond)
		r.wantState(lifecycle.Online)
	})
}

func TestPodFirstSeenAfterTheReleaseHasNotRestarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.await(r.hook())
		r.see(func(o *lifecycle.Observation) {
			o.Pod = lifecycle.Pod{Known: true, Ready: true, Restarts: 3, Grace: 30 * time.Second}
			o.Endpoints = []lifecycle.Endpoint{{Service: "web", Found: true, Ready: true}}
		})
		r.wantState(lifecycle.Released)
	})
}

func TestHookOfARestartedInstanceBeginsAnewEvenIfSeenTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		time.Sleep(time.Second)
		r.obs.Pod.Restarts++
		r.Observe(r.obs) // not taken in before the next hook call comes
		a := r.await(r.hook())
		if !a.Started.Equal(r.after(2 * time.Second)) {
			t.Errorf("the verdict is of the shutdown that started %s after the start, want 2s", a.Started.Sub(r.start))
		}
	})
}

func TestTerminatingPodNeverComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.deleted(30 * time.Second)
		r.await(r.hook())
		r.restarted()
		time.Sleep(time.Hour)
		r.ready(true)
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Draining: pod terminating",
			"1s Draining -> Released: pod terminating: drained in 1s, nothing in flight",
		)
	})
}

func TestPodDeletedAfterTheReleaseNeverComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		first := r.await(r.hook())
		r.deleted(30 * time.Second)
		wantVerdict(t, r.await(r.hook()).Verdict, first.Verdict)
		time.Sleep(time.Hour)
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Draining: prestop hook",
			"1s Draining -> Released: prestop hook: drained in 1s, nothing in flight",
		)
	})
}
