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

func TestApplicationThatRefusesTrafficIsOfflineUntilItAccepts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		say := func(s lifecycle.ReadinessState, l lifecycle.LivenessState) {
			r.SetAvailability(lifecycle.Availability{Readiness: lifecycle.Readiness{State: s, Cause: "because"}, Liveness: lifecycle.Liveness{State: l, Cause: "broke"}})
			synctest.Wait()
		}
		say(lifecycle.RefusingTraffic, lifecycle.Correct)
		r.wantState(lifecycle.Offline)
		say(lifecycle.AcceptingTraffic, lifecycle.Correct)
		r.wantState(lifecycle.Online)
		say(lifecycle.AcceptingTraffic, lifecycle.Broken)
		r.wantState(lifecycle.Offline)
		r.changes.want(t, "0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Offline: readiness REFUSING_TRAFFIC: because",
			"0s Offline -> Online: endpoint ready in service web",
			"0s Online -> Offline: liveness BROKEN: broke")
	})
}

func TestAvailabilityAloneAdvertisesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.SetAvailability(lifecycle.Availability{Readiness: lifecycle.Readiness{State: lifecycle.AcceptingTraffic}})
		r.wantState(lifecycle.Pending)
	})
}

func TestHoldKeepsAnInstanceOffline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var told []string
		r := newRig(t, func(_ *rig, c *lifecycle.Config) {
			c.OnHold = func(h *lifecycle.Hold) {
				if h == nil {
					told = append(told, "resumed")
				} else {
					told = append(told, h.String())
				}
			}
		})
		r.ready(true)
		hold := lifecycle.Hold{Reason: "look at its heap", Actor: "ann"}
		r.SetHold(&hold)
		r.wantState(lifecycle.Offline)
		same := hold
		r.SetHold(&same)
		r.wantState(lifecycle.Offline)
		r.SetHold(nil)
		r.wantState(lifecycle.Online)
		if got := strings.Join(told, "; "); got != "held by ann: look at its heap; resumed" {
			t.Errorf("told of %q", got)
		}
		if s := r.changes.String(); !strings.Contains(s, "Online -> Offline: held by ann: look at its heap") {
			t.Errorf("transitions:\n%s", s)
		}
	})
}

func TestHeldInstanceIsNotBackAfterItsShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.await(r.hook())
		r.SetHold(&lifecycle.Hold{Reason: "x"})
		r.restarted()
		r.wantState(lifecycle.Released)
		r.SetHold(nil)
		r.wantState(lifecycle.Online)
	})
}

func TestForceReleasesAtOnceAndSaysWho(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 20 * time.Second
		r.ready(true)
		c := r.hook()
		time.Sleep(3 * time.Second)
		r.Force("ann")
		a := r.await(c)
		if a.at != 3*time.Second || a.Outcome != lifecycle.Forced || a.ForcedBy != "ann" || a.InFlight != 3 {
			t.Errorf("after %s: %+v", a.at, a.Verdict)
		}
		if want := "forced by ann after 3s with 3 in flight"; a.Message() != want {
			t.Errorf("message %q, want %q", a.Message(), want)
		}
	})
}

func TestForceWithoutAShutdownDoesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.Force("ann")
		r.wantState(lifecycle.Online)
		if a := r.await(r.hook()); a.Outcome != lifecycle.Drained {
			t.Errorf("%+v", a.Verdict)
		}
	})
}

// fakeAnnouncer takes a while to tell.
type fakeAnnouncer struct {
	rig   *rig
	takes time.Duration
}

func (f *fakeAnnouncer) Announced(ctx context.Context) error {
	f.rig.calls.add("announcing")
	select {
	case <-time.After(f.takes):
		f.rig.calls.add("announced")
		return nil
	case <-ctx.Done():
		return errors.New("webhook http://127.0.0.1:9/ has not answered")
	}
}

func TestReleaseWaitsForAnnouncementsWithinTheirShare(t *testing.T) {
	for _, tc := range []struct {
		name         string
		takes, until time.Duration
		message      string
	}{
		{"quick", 100 * time.Millisecond, time.Second, "drained in 1s, nothing in flight"},
		{"slower than settling", 1500 * time.Millisecond, 1500 * time.Millisecond, "drained in 1.5s, nothing in flight"},
		{"too slow", time.Hour, 2 * time.Second, "drained in 2s, nothing in flight; not all could be told: webhook http://127.0.0.1:9/ has not answered"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(r *rig, c *lifecycle.Config) { c.Announcer = &fakeAnnouncer{r, tc.takes} })
				r.ready(true)
				a := r.await(r.hook())
				if a.at != tc.until || a.Message() != tc.message {
					t.Errorf("after %s: %s", a.at, a.Message())
				}
				// The registry never waits for the application.
				if s := r.calls.String(); strings.Index(s, "synced") > strings.Index(s, "announcing") {
					t.Errorf("calls:\n%s", s)
				}
			})
		})
	}
}

func TestAgentThatStartsInATerminatingPodCountsFromTheDeletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		time.Sleep(time.Minute)
		deleted := time.Now().Add(-10 * time.Second)
		r.app.busy = time.Hour
		r.see(func(o *lifecycle.Observation) {
			o.Pod = lifecycle.Pod{Known: true, UID: "u1", Grace: 30 * time.Second, Terminating: true, Deadline: deleted.Add(30 * time.Second), DeletionStarted: deleted}
			o.Endpoints = []lifecycle.Endpoint{{Service: "web", Found: true, Serving: true, Terminating: true}}
		})
		a := r.await(r.hook())
		if !a.Started.Equal(deleted) || a.Total() != 25*time.Second || a.Outcome != lifecycle.TimedOut {
			t.Errorf("started %s after the deletion, %s in all: %+v", a.Started.Sub(deleted), a.Total(), a.Verdict)
		}
	})
}
