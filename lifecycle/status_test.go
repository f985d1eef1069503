package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"usher.dev/usher/lifecycle"
)

func trail(m *lifecycle.Machine) string {
	var b strings.Builder
	for _, tr := range m.Status().Trail {
		fmt.Fprintf(&b, "%s: %s\n", tr.State, tr.Cause)
	}
	return b.String()
}

func TestTrailTellsTheWholeStory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.RegistryChanged(lifecycle.RegistryStatus{Lease: "7", Err: "the lease was lost", Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Lease: "8", Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{Advertised: true, Lease: "8", Err: "no answer", Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{Advertised: true, Lease: "8", Err: "no answer", Keys: []string{"k"}, Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Lease: "8", Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Lease: "9", Updated: time.Now()})
		synctest.Wait()
		r.RegistryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Lease: "9", Keys: []string{"k"}, Updated: time.Now()})
		r.deleted(30 * time.Second)
		r.await(r.hook())

		want := `Pending: endpoint not ready in service web
Online: endpoint ready in service web
Online: registered under lease 7
Online: no longer registered: the lease was lost
Online: registered under lease 8
Online: registry: no answer
Online: registry is as desired again
Online: registered under lease 9
Draining: pod terminating
Draining: no longer registered
Released: pod terminating: drained in 1s, nothing in flight
`
		if got := trail(r.Machine); got != want {
			t.Errorf("got:\n%s\nwant:\n%s", got, want)
		}
		for i, tr := range r.Status().Trail {
			if (tr.Verdict != nil) != (tr.State == lifecycle.Released) {
				t.Errorf("entry %d, %s: verdict %v", i, tr.State, tr.Verdict)
			}
		}
		if got := r.Status().Registry; got.Lease != "7" || got.Advertised {
			t.Errorf("registry %+v", got)
		}
	})
}

func TestTrailIsBoundedAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for i := range 200 {
			time.Sleep(time.Second)
			r.ready(i%2 == 0)
		}
		first := r.Status().Trail
		if len(first) != 64 {
			t.Fatalf("%d entries, want 64", len(first))
		}
		for i, tr := range first {
			if tr.Cause == "" || i > 0 && tr.Time.Before(first[i-1].Time) {
				t.Errorf("entry %d, %s at %s: no cause, or before the one ahead of it", i, tr.Cause, tr.Time)
			}
		}
		last := first[63].Time
		r.ready(true)
		if !first[63].Time.Equal(last) {
			t.Error("a status that was handed out changed")
		}
	})
}

func TestRegistryTimeDoesNotDisturbTheTrailsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		before := time.Now()
		time.Sleep(time.Second)
		r.ready(true)
		r.RegistryChanged(lifecycle.RegistryStatus{Err: "no answer", Advertised: true, Lease: "7", Updated: before})
		synctest.Wait()
		tr := r.Status().Trail
		if a, b := tr[len(tr)-2], tr[len(tr)-1]; b.Time.Before(a.Time) {
			t.Errorf("%q at %s comes after %q at %s", b.Cause, b.Time, a.Cause, a.Time)
		}
	})
}

func TestTransitionsAreInTheStatusWhenTheyAreTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		told := 0
		r := newRig(t, func(r *rig, c *lifecycle.Config) {
			c.OnTransition = func(tr lifecycle.Transition) {
				told++
				if got := r.Status(); got.State != tr.State || !got.Since.Equal(tr.Time) {
					t.Errorf("told of %s, the status has %s", tr.State, got.State)
				}
				if got := r.reg.desired.State; got != tr.State {
					t.Errorf("told of %s before the registry, which has %s", tr.State, got)
				}
			}
		})
		r.ready(true)
		r.await(r.hook())
		if told != 3 {
			t.Errorf("told of %d transitions, want 3", told)
		}
	})
}

func TestAwait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		online := func(s lifecycle.Status) bool { return s.State == lifecycle.Online }
		result := make(chan bool, 2)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		go func() { result <- r.Await(ctx, online) }()
		if <-result {
			t.Error("said yes to an instance that wasn't online")
		}
		go func() { result <- r.Await(t.Context(), online) }()
		synctest.Wait()
		r.ready(true)
		if !<-result || !r.Await(t.Context(), online) {
			t.Error("said no to an instance that was online")
		}
	})
}

func TestEverybodyMayCallAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		var wg sync.WaitGroup
		verdicts := make(chan lifecycle.Verdict, 8)
		for range cap(verdicts) {
			wg.Go(func() {
				for range 100 {
					r.Observe(r.obs)
					r.RegistryChanged(lifecycle.RegistryStatus{Updated: time.Now()})
					_ = r.Status().Trail
				}
				v, err := r.Stop(t.Context(), lifecycle.CauseHook)
				if err != nil {
					t.Error(err)
				}
				if !r.Await(t.Context(), func(s lifecycle.Status) bool { return s.State == lifecycle.Released }) {
					t.Error("never released")
				}
				verdicts <- v
			})
		}
		wg.Wait()
		first := <-verdicts
		for range cap(verdicts) - 1 {
			wantVerdict(t, <-verdicts, first)
		}
	})
}

func TestStatusBeforeRun(t *testing.T) {
	m, err := lifecycle.New(lifecycle.Config{Registrar: &fakeRegistrar{}, Drainer: &fakeDrainer{}, Budget: lifecycle.DefaultBudget()})
	if err != nil {
		t.Fatal(err)
	}
	if st := m.Status(); st.State != lifecycle.Pending || st.Cause != "agent started" || st.Since.IsZero() {
		t.Errorf("status %+v", st)
	}
}

func TestLogSaysWarnOnlyOfReleasesThatLostSomething(t *testing.T) {
	for name, tc := range map[string]struct {
		spoil func(*rig)
		want  zapcore.Level
	}{
		"clean":         {func(*rig) {}, zap.InfoLevel},
		"timed out":     {func(r *rig) { r.app.busy = time.Hour }, zap.WarnLevel},
		"unmeasured":    {func(r *rig) { r.app.result.Outcome = lifecycle.Unmeasured }, zap.WarnLevel},
		"not withdrawn": {func(r *rig) { r.reg.hang(nil) }, zap.WarnLevel},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				core, logs := observer.New(zap.DebugLevel)
				r := newRig(t, func(_ *rig, c *lifecycle.Config) { c.Logger = zap.New(core) })
				r.ready(true)
				tc.spoil(r)
				r.await(r.hook())
				entries := logs.FilterMessage("state").All()
				if last := entries[len(entries)-1]; last.Level != tc.want || last.ContextMap()["to"] != "Released" {
					t.Errorf("%s: %v", last.Level, last.ContextMap())
				}
			})
		})
	}
}

func TestNewRefusesWhatCannotWork(t *testing.T) {
	reg, app := &fakeRegistrar{}, &fakeDrainer{}
	for name, tc := range map[string]struct {
		cfg  lifecycle.Config
		want string
	}{
		"no Registrar": {lifecycle.Config{Drainer: app, Budget: lifecycle.DefaultBudget()}, "lifecycle: a Registrar and a Drainer are needed"},
		"no Drainer":   {lifecycle.Config{Registrar: reg, Budget: lifecycle.DefaultBudget()}, "lifecycle: a Registrar and a Drainer are needed"},
		"no budget":    {lifecycle.Config{Registrar: reg, Drainer: app}, "withdraw 0s: want a duration above zero, such as 1s"},
	} {
		if _, err := lifecycle.New(tc.cfg); err == nil || err.Error() != tc.want {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

func TestStatesHaveNames(t *testing.T) {
	want := "Pending Online Offline Draining Released Stopped"
	if got := strings.Trim(fmt.Sprint(lifecycle.States()), "[]"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if got := lifecycle.State(9).String(); got != "State(9)" {
		t.Error(got)
	}
}

func TestBudgetThatDoesNotFitEndsRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.app.busy = time.Hour
		hook := r.hook()
		r.see(func(o *lifecycle.Observation) { o.Pod = lifecycle.Pod{Known: true, Grace: time.Second} })
		err := <-r.runErr
		if !errors.Is(err, lifecycle.ErrBudget) || !strings.Contains(err.Error(), "raise terminationGracePeriodSeconds to at least 2") {
			t.Errorf("Run: %v", err)
		}
		if a := <-hook; a.err == nil {
			t.Error("a hook call got a verdict from a Machine that gave up")
		}
		r.calls.want(t, "0s synced", "0s drain, settled in 1s", "0s drain ended: the agent has stopped")
	})
}
