package lifecycle_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

// fakeGuard has others after a while, or never.
type fakeGuard struct {
	rig   *rig
	after time.Duration // negative: never
}

func (f *fakeGuard) Wait(ctx context.Context) error {
	if f.after < 0 {
		<-ctx.Done()
		return errors.New("only 1 of 2 others are registered")
	}
	select {
	case <-time.After(f.after):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func guarded(after time.Duration) func(*rig, *lifecycle.Config) {
	return func(r *rig, c *lifecycle.Config) { c.Guard = &fakeGuard{r, after} }
}

// terminating is the endpoint of a pod that is being deleted: not ready, and serving as before.
func (r *rig) terminating() {
	r.see(func(o *lifecycle.Observation) {
		o.Endpoints[0].Ready, o.Endpoints[0].Serving, o.Endpoints[0].Terminating = false, true, true
	})
}

func TestGuardKeepsTheInstanceAdvertisedUntilOthersAreThere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, guarded(3*time.Second))
		r.ready(true)
		c := r.hook()
		r.deleted(30 * time.Second)
		r.terminating()
		r.wantState(lifecycle.Online)
		a := r.await(c)
		if a.at != 4*time.Second || a.Guard != 3*time.Second || a.GuardError != "" || a.Withdraw != 0 || a.Settle != time.Second {
			t.Errorf("released after %s: %+v", a.at, a.Verdict)
		}
		r.calls.want(t, "0s set Pending", "0s set Online advertised", "0s set Online advertised", "0s set Online advertised",
			"3s set Draining", "3s synced", "3s drain, settled in 1s", "4s quiet", "4s set Released")
		if s := r.changes.String(); !strings.Contains(s, "Online -> Draining: prestop hook") || strings.Contains(s, "Offline") {
			t.Errorf("transitions:\n%s", s)
		}
	})
}

func TestGuardThatWaitsInVainGivesUp(t *testing.T) {
	for _, tc := range []struct {
		name  string
		grace time.Duration
		after time.Duration
	}{
		{"its own time", 60 * time.Second, 10 * time.Second},
		{"half of the time until the release", 15 * time.Second, 5 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, guarded(-1))
				r.see(func(o *lifecycle.Observation) { o.Pod.Grace = tc.grace })
				r.ready(true)
				a := r.await(r.hook())
				if a.Guard != tc.after || a.Outcome != lifecycle.Drained {
					t.Errorf("guarded for %s: %+v", a.Guard, a.Verdict)
				}
				if want := "; withdrawn after " + tc.after.String() + " although only 1 of 2 others are registered"; !strings.Contains(a.Message(), want) {
					t.Errorf("message %q, want %q in it", a.Message(), want)
				}
			})
		})
	}
}

func TestGuardGivesWay(t *testing.T) {
	for _, tc := range []struct {
		name string
		to   func(*rig)
	}{
		{"to SIGTERM", func(r *rig) { r.stop(r.t.Context(), lifecycle.CauseSignal) }},
		{"to an application that no longer serves", func(r *rig) { r.ready(false) }},
		{"to a hold", func(r *rig) { r.SetHold(&lifecycle.Hold{Reason: "x"}) }},
		{"to an application that refuses traffic", func(r *rig) {
			r.SetAvailability(lifecycle.Availability{Readiness: lifecycle.Readiness{State: lifecycle.RefusingTraffic}})
		}},
		{"to force", func(r *rig) { r.Force("an operator") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, guarded(-1))
				r.ready(true)
				c := r.hook()
				time.Sleep(2 * time.Second)
				r.wantState(lifecycle.Online)
				tc.to(r)
				synctest.Wait()
				if r.Status().State == lifecycle.Online {
					t.Error("still online")
				}
				if a := r.await(c); a.Guard != 2*time.Second {
					t.Errorf("guarded for %s", a.Guard)
				}
			})
		})
	}
}

func TestNothingIsGuardedWhereThatWouldLoseRequestsOrIsOfNoUse(t *testing.T) {
	for _, tc := range []struct {
		name   string
		before func(*rig)
		cause  func(*rig) <-chan answer
	}{
		{"deletion without a hook that would hold SIGTERM back", func(r *rig) { r.ready(true) }, func(r *rig) <-chan answer {
			r.deleted(30 * time.Second)
			return r.hook()
		}},
		{"SIGTERM", func(r *rig) { r.ready(true) }, func(r *rig) <-chan answer { return r.stop(r.t.Context(), lifecycle.CauseSignal) }},
		{"an instance that isn't advertised", func(*rig) {}, (*rig).hook},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, guarded(-1))
				tc.before(r)
				if a := r.await(tc.cause(r)); a.Guard != 0 {
					t.Errorf("guarded for %s", a.Guard)
				}
			})
		})
	}
}

func TestHookedPodIsGuardedFromItsDeletionOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, guarded(time.Second))
		r.see(func(o *lifecycle.Observation) { o.Pod.Hooked = []string{"web"} })
		r.ready(true)
		r.deleted(30 * time.Second)
		r.terminating()
		r.wantState(lifecycle.Online)
		if a := r.await(r.hook()); a.Guard != time.Second || a.Cause != lifecycle.CauseTerminating {
			t.Errorf("%+v", a.Verdict)
		}
	})
}
