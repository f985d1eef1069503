package lifecycle_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

// undecided is what the application's probes say before any of them has run.
func undecided() lifecycle.Availability {
	return lifecycle.Availability{Readiness: lifecycle.Readiness{State: lifecycle.RefusingTraffic, Cause: "not probed yet"}, Undecided: true}
}

// restartedRig is an agent that was restarted: the instance is ready for Kubernetes, its probes have not been heard, and the
// agent before it left its records.
func restartedRig(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.SetAvailability(undecided())
	r.ready(true)
	r.RegistryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Inherited: true, Lease: "6", Updated: time.Now()})
	synctest.Wait()
	return r
}

func (r *rig) keeps() bool {
	r.t.Helper()
	synctest.Wait()
	in := r.reg.desired.Instances[0]
	if in.Keep && in.Advertise {
		r.t.Error("advertised, and kept as it is too")
	}
	return in.Keep
}

func TestInstanceIsNeitherPutNorTakenOutUntilItsProbesAreHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := restartedRig(t)
		if st := r.Status(); !r.keeps() || st.State != lifecycle.Pending || !strings.Contains(st.Cause, "not probed yet") {
			t.Errorf("keeps %t, %s: %s", r.keeps(), st.State, st.Cause)
		}
		r.SetAvailability(lifecycle.Availability{Readiness: lifecycle.Readiness{State: lifecycle.AcceptingTraffic}})
		r.wantState(lifecycle.Online)
		if r.keeps() {
			t.Error("still kept as it is")
		}
		r.changes.want(t, "0s Pending -> Online: endpoint ready in service web")
		if s := trail(r.Machine); !strings.Contains(s, "found registered under lease 6 of the agent before this one") {
			t.Errorf("trail:\n%s", s)
		}
	})
}

// What is known counts at once, although the probes have not been heard.
func TestUndecidedInstanceIsTakenOutFor(t *testing.T) {
	for name, tc := range map[string]struct {
		happens func(*rig)
		state   lifecycle.State
	}{
		"a word against it":  {func(r *rig) { a := undecided(); a.Undecided = false; r.SetAvailability(a) }, lifecycle.Offline},
		"its endpoint":       {func(r *rig) { r.ready(false) }, lifecycle.Offline},
		"a hold":             {func(r *rig) { r.SetHold(&lifecycle.Hold{Reason: "x"}) }, lifecycle.Offline},
		"the pod's deletion": {func(r *rig) { r.deleted(30 * time.Second) }, lifecycle.Draining},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := restartedRig(t)
				tc.happens(r)
				if r.keeps() || r.reg.desired.Advertised() {
					t.Errorf("desired %+v", r.reg.desired.Instances)
				}
				r.wantState(tc.state)
			})
		})
	}
}

// Consumers have the records of the agent before, so a shutdown gives them time to learn of their end.
func TestShutdownOfAnUndecidedInstanceSettles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := restartedRig(t)
		time.Sleep(10 * time.Second)
		if a := r.await(r.hook()); a.Settle != time.Second {
			t.Errorf("settled for %s, want 1s", a.Settle)
		}
	})
}

func TestEachServiceIsKeptByItsOwnEndpoint(t *testing.T) {
	ep := func(ready bool) lifecycle.Endpoint {
		return lifecycle.Endpoint{Service: "s", Found: true, Ready: ready}
	}
	d := lifecycle.Decide(lifecycle.Inputs{
		Observation:  lifecycle.Observation{Pod: lifecycle.Pod{Known: true}, Endpoints: []lifecycle.Endpoint{ep(true), ep(false)}},
		Availability: undecided(),
	})
	if !d.Keep[0] || d.Keep[1] || d.Advertise[0] || d.Advertise[1] || d.State != lifecycle.Pending {
		t.Errorf("%+v", d)
	}
}

// An agent that was restarted, or that came after its pod was held, says that it is held, not that it was never ready.
func TestHeldInstanceIsOfflineWhoeverSawItOnline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.SetHold(&lifecycle.Hold{Reason: "heap dump", Actor: "ann"})
		r.wantState(lifecycle.Offline)
		if d := r.reg.desired; d.State != lifecycle.Offline || d.Cause != "held by ann: heap dump" {
			t.Errorf("the registry is told %s: %s", d.State, d.Cause)
		}
		r.SetHold(nil)
		r.wantState(lifecycle.Offline) // Pending is how it begins
		r.ready(true)
		r.wantState(lifecycle.Online)
	})
}
