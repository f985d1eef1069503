package registry_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

const holdKey = "/usher/v1/test/holds/shop/" + uid

func (w *world) hold(h lifecycle.Hold) lifecycle.Hold {
	w.t.Helper()
	h, err := registry.PutHold(w.t.Context(), w.cli, cluster, namespace, uid, h)
	if err != nil {
		w.t.Fatal(err)
	}
	return h
}

func (w *world) resume() {
	w.t.Helper()
	if was, err := registry.DeleteHold(w.t.Context(), w.cli, cluster, namespace, uid); err != nil || !was {
		w.t.Fatalf("there was a hold: %v, %v", was, err)
	}
}

// told is how often OnHold was called, and with what last.
func (a *agent) told() (n int, last *lifecycle.Hold) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if n = len(a.holds); n > 0 {
		last = a.holds[n-1]
	}
	return n, last
}

// isTold waits for the nth call of OnHold, which is about the hold of that reason, "" for none.
func (a *agent) isTold(nth int, reason string) {
	a.w.t.Helper()
	eventually(a.w.t, fmt.Sprintf("call %d of OnHold, about %q", nth, reason), func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.holds) < nth {
			return false
		}
		h := a.holds[nth-1]
		return reason == "" && h == nil || h != nil && h.Reason == reason
	})
}

func TestHoldTakesTheInstanceOutUntilItIsTakenBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	want := w.hold(lifecycle.Hold{Reason: "look at its heap", Actor: "ann"})
	if left := time.Until(want.Expires); left > time.Hour || left < 59*time.Minute {
		t.Errorf("expires in %s, want an hour", left)
	}
	a.isTold(1, "look at its heap")
	if _, h := a.told(); *h != want {
		t.Errorf("told of %+v, want %+v", *h, want)
	}
	// Whatever is desired: nobody has said Offline here.
	eventually(t, "it is withdrawn", func() bool { return w.get(key) == nil && !a.status().Advertised })
	a.offline("held")
	a.sync()
	if rec := w.record(); rec.State != "Offline" || len(rec.Keys) != 0 {
		t.Errorf("ledger %+v; want it there, and no keys", rec)
	}
	l := w.ttl(registry.LeaseID(w.leaseOf(holdKey)))
	if l.GrantedTTL != 3600 || len(l.Keys) != 1 {
		t.Errorf("lease of the hold: %+v; want 3600 s and one key", l)
	}
	a.online("ready")
	w.resume()
	a.isTold(2, "")
	a.advertised()
	if l := w.ttl(registry.LeaseID(l.ID)); l.TTL != -1 {
		t.Errorf("lease of the hold: %+v; want it revoked", l)
	}
}

func (w *world) leaseOf(k string) clientv3.LeaseID {
	w.t.Helper()
	resp, err := w.cli.Get(w.t.Context(), k)
	if err != nil || len(resp.Kvs) != 1 {
		w.t.Fatalf("read %s: %v, %v", k, resp, err)
	}
	return clientv3.LeaseID(resp.Kvs[0].Lease)
}

// Not even for a moment: a new agent process doesn't know of the hold when it is told to bring the instance online.
func TestHoldStandsWhenTheAgentRestarts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	w.hold(lifecycle.Hold{Reason: "broken disk"})
	eventually(t, "it is withdrawn", func() bool { return w.get(key) == nil })
	a.kill()
	puts := w.count(key, "PUT")
	a = w.start(spec{})
	a.online("ready")
	a.sync()
	a.isTold(1, "broken disk")
	if n := w.count(key, "PUT"); n != puts {
		t.Errorf("advertised %d times more under a hold", n-puts)
	}
	w.resume()
	a.isTold(2, "")
	a.advertised()
}

func TestHoldThatWasThereBeforeAllElseIsSeen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.hold(lifecycle.Hold{Reason: "broken disk"})
	a := w.start(spec{})
	a.online("ready")
	a.sync()
	a.isTold(1, "broken disk")
	if n := w.count(key, "PUT"); n != 0 {
		t.Errorf("advertised %d times under a hold", n)
	}
	w.resume()
	a.isTold(2, "")
	a.advertised()
}

func TestHoldAndItsEndAreSeenAfterEtcdWasAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link})
	link.Set(etcdtest.Refuse)
	w.hold(lifecycle.Hold{Reason: "behind its back"})
	if n, _ := a.told(); n != 0 {
		t.Fatal("told of a hold without a connection")
	}
	link.Set(etcdtest.Pass)
	a.isTold(1, "behind its back")
	eventually(t, "it is withdrawn", func() bool { return w.get(key) == nil })
	link.Set(etcdtest.Refuse)
	w.resume()
	link.Set(etcdtest.Pass)
	a.isTold(2, "")
	a.advertised()
}

func TestHoldExpires(t *testing.T) {
	t.Run("by its lease", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		a := w.registered(spec{})
		w.hold(lifecycle.Hold{Reason: "shortly", Expires: time.Now().Add(5 * time.Second)})
		a.isTold(1, "shortly")
		a.isTold(2, "")
		a.advertised()
		eventually(t, "the key is gone", func() bool { return w.get(holdKey) == nil })
	})
	t.Run("by the agent's clock while the key is still there", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		a := w.registered(spec{})
		now := time.Now().UTC()
		w.put(holdKey, `{"reason":"shortly","since":"`+now.Format(time.RFC3339)+`","expires":"`+now.Add(5*time.Second).Format(time.RFC3339Nano)+`"}`,
			clientv3.WithLease(w.lease(600)))
		a.isTold(1, "shortly")
		a.isTold(2, "")
		a.advertised()
		if w.get(holdKey) == nil {
			t.Error("the agent has deleted the key")
		}
	})
}

func TestSecondHoldReplacesTheFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	w.hold(lifecycle.Hold{Reason: "one"})
	a.isTold(1, "one")
	first := w.leaseOf(holdKey)
	w.hold(lifecycle.Hold{Reason: "two"})
	a.isTold(2, "two")
	if l := w.ttl(registry.LeaseID(first)); l.TTL != -1 {
		t.Errorf("lease of the first hold: %+v; want it revoked", l)
	}
	if w.get(holdKey) == nil {
		t.Error("the second hold has gone with the first one's lease")
	}
}

func TestHoldOfAnotherPodIsNotTheOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	for _, other := range []string{"uid-10", "uid"} {
		if _, err := registry.PutHold(t.Context(), w.cli, cluster, namespace, other, lifecycle.Hold{Reason: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	w.hold(lifecycle.Hold{Reason: "mine"})
	a.isTold(1, "mine")
}

func TestValueThatIsNoHoldIsReportedAndHoldsNobody(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	w.put(holdKey, `{"actor":"ann"}`, clientv3.WithLease(w.lease(600)))
	eventually(t, "it is reported", func() bool { return a.said("field reason is missing") && a.said(holdKey) })
	if w.get(key) == nil || w.get(holdKey) == nil {
		t.Error("it was withdrawn, or the value was deleted")
	}
	w.resume()
	a.advertised()
	if n, h := a.told(); n != 0 {
		t.Errorf("told of %+v", h)
	}
}

func TestRegistrarHoldsItsOwnPod(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(spec{})
	if _, err := a.Hold(t.Context(), lifecycle.Hold{Reason: "x"}); !errors.Is(err, registry.ErrNotConnected) {
		t.Errorf("before anything was desired: %v", err)
	}
	if _, err := a.Resume(t.Context()); !errors.Is(err, registry.ErrNotConnected) {
		t.Errorf("before anything was desired: %v", err)
	}
	a.online("ready")
	a.sync()
	for _, tc := range []struct {
		hold lifecycle.Hold
		want string
	}{
		{lifecycle.Hold{}, "field reason is missing or empty"},
		{lifecycle.Hold{Reason: "a\nb"}, `field reason is "a\nb": want UTF-8 without control characters`},
		{lifecycle.Hold{Reason: "x", Actor: strings.Repeat("x", 1025)}, "field actor has 1025 bytes: want at most 1024"},
		{lifecycle.Hold{Reason: "x", Expires: time.Now().Add(-time.Second)}, "want a time after"},
		{lifecycle.Hold{Reason: "x", Expires: time.Now().Add(200 * time.Hour)}, "want at most 168h0m0s after"},
	} {
		if _, err := a.Hold(t.Context(), tc.hold); !errors.Is(err, registry.ErrBadHold) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q", tc.hold, err, tc.want)
		}
	}
	if n := len(w.history(holdKey)); n != 0 {
		t.Errorf("%d changes by holds that were refused", n)
	}
	h, err := a.Hold(t.Context(), lifecycle.Hold{Reason: "its own", Expires: time.Now().Add(time.Minute)})
	if err != nil || time.Until(h.Expires) > time.Minute {
		t.Fatalf("%+v, %v", h, err)
	}
	a.isTold(1, "its own")
	if was, err := a.Resume(t.Context()); err != nil || !was {
		t.Errorf("resume: %v, %v", was, err)
	}
	a.isTold(2, "")
	if was, err := a.Resume(t.Context()); err != nil || was {
		t.Errorf("second resume: %v, %v", was, err)
	}
}

func TestHoldOnAnEtcdThatIsAwayFailsInTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link})
	link.Set(etcdtest.Hold)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := a.Hold(ctx, lifecycle.Hold{Reason: "x"}); err == nil || ctx.Err() != nil {
		t.Errorf("error %v, after %v", err, ctx.Err())
	}
}
