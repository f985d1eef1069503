package lifecycle_test

import (
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

func TestInstanceFollowsItsEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		time.Sleep(time.Second)
		r.ready(true)
		time.Sleep(time.Second)
		r.ready(false)
		time.Sleep(time.Second)
		r.ready(true)

		r.calls.want(t,
			"0s set Pending",
			"1s set Online advertised",
			"2s set Offline",
			"3s set Online advertised",
		)
		r.changes.want(t,
			"1s Pending -> Online: endpoint ready in service web",
			"2s Online -> Offline: endpoint not ready in service web",
			"3s Offline -> Online: endpoint ready in service web",
		)
		if got := r.Status().Since; !got.Equal(r.start.Add(3 * time.Second)) {
			t.Errorf("online since %s after the start, want 3s", got.Sub(r.start))
		}
	})
}

func TestSinceIsOfTheStateNotOfItsCause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.ready(false)
		time.Sleep(time.Second)
		r.see(func(o *lifecycle.Observation) { o.Endpoints[0].Found = false })

		st := r.Status()
		if st.Cause != "no endpoint in service web" || !st.Since.Equal(r.start) {
			t.Errorf("cause %q since %s after the start, want the new cause and 0s", st.Cause, st.Since.Sub(r.start))
		}
		if last := r.reg.desired; last.Cause != st.Cause || !last.Since.Equal(st.Since) {
			t.Errorf("the registry was told of %q since %s", last.Cause, last.Since)
		}
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Offline: endpoint not ready in service web",
		)
	})
}

func TestNothingIsSetUntilThePodIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.see(func(o *lifecycle.Observation) {
			o.Endpoints = []lifecycle.Endpoint{{Service: "web", Found: true, Ready: true}}
			o.Problems = []string{`pods "web-0" is forbidden`}
		})
		r.calls.want(t)
		r.wantState(lifecycle.Pending)
		if got := r.Status(); got.Cause != "own Pod not seen yet" || len(got.Observation.Problems) != 1 {
			t.Errorf("cause %q, problems %q", got.Cause, got.Observation.Problems)
		}

		r.see(func(o *lifecycle.Observation) { o.Pod.Known, o.Pod.Grace = true, 30*time.Second })
		r.calls.want(t, "0s set Online advertised")
	})
}

func TestEachServiceIsAdvertisedByItsOwnEndpoint(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		v6 := netip.MustParseAddr("fd00::1")
		r.see(func(o *lifecycle.Observation) {
			o.Endpoints = []lifecycle.Endpoint{
				{Service: "a", Found: true},
				{Service: "b", Found: true, Ready: true, Addresses: []netip.Addr{v6}, Ports: []lifecycle.Port{{Name: "http", Number: 80, Protocol: "TCP"}}, Zone: "z1"},
				{Service: "c"},
			}
		})
		d := r.reg.desired
		if len(d.Instances) != 3 || d.Instances[0].Advertise || !d.Instances[1].Advertise || d.Instances[2].Advertise {
			t.Fatalf("desired: %+v", d.Instances)
		}
		if b := d.Instances[1]; b.Service != "b" || !slices.Equal(b.Addresses, []netip.Addr{v6}) || b.Ports[0].Number != 80 || b.Zone != "z1" {
			t.Errorf("b: %+v", b)
		}
		if c := d.Instances[2]; !slices.Equal(c.Addresses, r.obs.Pod.IPs) {
			t.Errorf("without an endpoint the ledger has the Pod's addresses, got %v", c.Addresses)
		}
		const want = "endpoint ready in service b, endpoint not ready in service a, no endpoint in service c"
		if got := r.Status(); got.State != lifecycle.Online || got.Cause != want {
			t.Errorf("%s: %s", got.State, got.Cause)
		}
	})
}

func TestTerminatingEndpointIsNotAdvertisedEvenIfPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		// With publishNotReadyAddresses ready stays true.
		r.see(func(o *lifecycle.Observation) { o.Endpoints[0].Terminating = true })
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Offline: endpoint terminating in service web",
		)
	})
}

func TestInstanceGoesWithItsPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.see(func(o *lifecycle.Observation) { o.Pod.Gone = true })
		r.calls.want(t, "0s set Pending", "0s set Online advertised", "0s set Offline")
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Offline: own Pod is gone",
		)
	})
}

func TestWhatDidNotChangeIsNotSetAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		time.Sleep(time.Second)
		r.see(func(o *lifecycle.Observation) { o.Problems = []string{"the API server can't be reached"} })
		r.calls.want(t, "0s set Pending", "0s set Online advertised")
		r.wantState(lifecycle.Online)
		if got := r.Status().Observation.Problems; len(got) != 1 {
			t.Errorf("problems %q", got)
		}
	})
}
