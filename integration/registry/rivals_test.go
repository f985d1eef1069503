package registry_test

import (
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/lifecycle"
)

const (
	superseded = "superseded"
	notOurs    = "not ours"
)

// putsUnder counts what was ever put under a lease.
func (w *world) putsUnder(lease string) (n int) {
	w.t.Helper()
	for _, ev := range w.history("") {
		if ev.Type == clientv3.EventTypePut && leaseOf(ev) == lease {
			n++
		}
	}
	return n
}

func TestRestartedAgentTakesOverWithoutGap(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.registered(spec{ttl: 3 * time.Second})
	old := first.status().Lease
	first.kill()
	second := w.registered(spec{})
	eventually(t, "the first one's lease ends", func() bool {
		resp, err := w.cli.Leases(t.Context())
		return err == nil && len(resp.Leases) == 1
	})
	second.advertised()
	if second.status().Lease == old {
		t.Fatal("one lease for both")
	}
	if n := w.count(key, "DELETE"); n != 0 {
		t.Errorf("the consumer record was deleted %d times, want none", n)
	}
	if n := w.count(key, "PUT"); n != 2 {
		t.Errorf("the consumer record was put %d times, want once by each agent", n)
	}
}

// What the predecessor advertised goes in the same transaction, if the instance is not ready any more.
func TestRestartedAgentWithdrawsWhatItsPredecessorLeft(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.registered(spec{}).kill()
	second := w.start(spec{})
	second.offline("not ready")
	second.sync()
	if kv := w.get(key); kv != nil {
		t.Errorf("left by the predecessor: %+v", kv)
	}
	if st := second.status(); st.Err != "" || w.record().State != "Offline" {
		t.Errorf("status %+v, ledger %+v", st, w.record())
	}
}

func TestNewerPodOfSameNameTakesOver(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	older := w.registered(spec{})
	oldLease := older.status().Lease
	newer := w.registered(spec{uid: "uid-2", created: created.Add(time.Second)})

	eventually(t, "the older Pod takes out its own record", func() bool { return w.get(key) == nil })
	eventually(t, "the older Pod says why", func() bool { return strings.Contains(older.status().Err, superseded) })
	puts := w.putsUnder(oldLease)
	older.online("ready once more")
	older.sync()
	older.offline("not ready")
	older.sync()
	older.stop()
	if n := w.putsUnder(oldLease); n != puts {
		t.Errorf("the older Pod put %d values after it was superseded", n-puts)
	}
	if rec := w.record(); rec.Owner.PodUID != "uid-2" {
		t.Errorf("ledger: %+v", rec)
	}
	newer.advertised()
	if n := w.count("shop/api/uid-2", "DELETE"); n != 0 {
		t.Errorf("the newer Pod's record was deleted %d times", n)
	}
}

func TestOlderPodNeverOverwritesNewer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	newer := w.registered(spec{uid: "uid-2", created: created.Add(time.Second)})
	rev := w.get(ledger).rev
	older := w.start(spec{})
	older.online("ready")
	older.sync()
	if st := older.status(); !strings.Contains(st.Err, superseded) || !strings.Contains(st.Err, "uid-2") || st.Advertised || len(st.Keys) != 0 {
		t.Errorf("status: %+v", st)
	}
	if got := w.get(ledger); got.rev != rev || w.get(key) != nil || w.putsUnder(older.status().Lease) != 0 {
		t.Errorf("the older Pod wrote: ledger %+v, consumer record %+v", got, w.get(key))
	}
	newer.stop()
	older.advertised()
}

func TestSecondAgentOfSamePodSupersedesFirst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	first := w.registered(spec{})
	firstLease := first.status().Lease
	second := w.start(spec{})
	second.online("ready")
	second.sync()
	second.advertised()
	eventually(t, "the first one says that it was superseded", func() bool { return strings.Contains(first.status().Err, superseded) })

	puts := w.putsUnder(firstLease)
	for _, cause := range []string{"one", "two"} {
		first.online(cause)
		first.sync()
		first.offline(cause)
		first.sync()
	}
	if n := w.putsUnder(firstLease); n != puts {
		t.Errorf("the first one put %d values after it was superseded", n-puts)
	}
	second.advertised()
	if n := w.count(key, "DELETE"); n != 0 {
		t.Errorf("the record was deleted %d times beside a second agent", n)
	}

	first.online("ready")
	first.sync()
	second.stop()
	first.advertised()
	if st := first.status(); st.Lease != firstLease {
		t.Errorf("back under lease %s, want the one it kept, %s", st.Lease, firstLease)
	}
}

func TestForeignConsumerKeyIsLeftAlone(t *testing.T) {
	for name, leased := range map[string]bool{"no lease": false, "another lease": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			var opts []clientv3.OpOption
			if leased {
				opts = append(opts, clientv3.WithLease(w.lease(600)))
			}
			w.put(key, "by hand", opts...)
			rev := w.get(key).rev

			a := w.start(spec{services: []string{"api", "web"}})
			a.online("ready")
			a.sync()
			st := a.status()
			if st.InSync || !strings.Contains(st.Err, notOurs) || !strings.Contains(st.Err, key) {
				t.Errorf("status %+v, want one that names %s", st, key)
			}
			if got := w.get("shop/web/" + uid); got == nil || got.value != value || !st.Advertised {
				t.Errorf("the other service's record: %+v, status %+v", got, st)
			}
			if rec := w.record(); rec.State != "Online" || len(rec.Keys) != 0 {
				t.Errorf("ledger: %+v", rec)
			}
			a.offline("not ready")
			a.sync()
			a.online("ready")
			a.sync()
			if got := w.get(key); got.rev != rev {
				t.Fatalf("the value was touched: %+v", got)
			}
			w.remove(key)
			eventuallyWithin(t, time.Second, "the key is taken once it is free", func() bool { return w.get(key) != nil })
			a.advertised()
		})
	}
}

func TestForeignLedgerValueIsLeftAlone(t *testing.T) {
	for name, v := range map[string]string{
		"not JSON": "by hand", "JSON of another shape": `{"a":1}`, "a record of another key": `{"owner":{"cluster":"other",` +
			`"podUID":"x","agent":"y"},"namespace":"shop","service":"api","pod":"api-0","state":"Online"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.put(ledger, v)
			rev := w.get(ledger).rev
			a := w.start(spec{})
			a.online("ready")
			a.sync()
			if st := a.status(); !strings.Contains(st.Err, notOurs) || !strings.Contains(st.Err, ledger) || st.Advertised {
				t.Errorf("status: %+v", st)
			}
			if got := w.get(ledger); got.rev != rev || w.get(key) != nil {
				t.Errorf("ledger %+v, consumer record %+v; want the one untouched and no other", got, w.get(key))
			}
			w.remove(ledger)
			eventuallyWithin(t, time.Second, "the ledger is taken once it is free", func() bool { return w.get(ledger) != nil })
			a.advertised()
		})
	}
}

// Somebody's slip in the ledger is no reason to take a ready instance from its consumers; a withdrawal still happens.
func TestScribbledLedgerTakesNoReadyInstanceOffline(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	rev := w.get(key).rev
	w.put(ledger, "scribble")
	eventually(t, "it is reported", func() bool { return strings.Contains(a.status().Err, notOurs) })
	if got := w.get(key); got == nil || got.rev != rev || !a.status().Advertised {
		t.Fatalf("the consumer record is %+v, status %+v; want it untouched", got, a.status())
	}
	a.offline("not ready")
	a.sync()
	if got := w.get(key); got != nil {
		t.Errorf("not withdrawn beside a scribbled ledger: %+v", got)
	}
	a.online("ready")
	w.remove(ledger)
	a.advertised()
}

func TestNothingIsPutWithoutLease(t *testing.T) {
	t.Parallel()
	w := newWorld(t) // its last look is the assertion
	a := w.registered(spec{})
	for _, state := range lifecycle.States() {
		a.Set(a.desired(state, "test"))
		a.sync()
	}
	a.online("ready")
	a.advertised()
	w.revoke(a)
	a.advertised()
	w.remove(key)
	w.remove(ledger)
	a.advertised()
	w.etcd.Restart()
	a.offline("not ready")
	a.sync()
	if len(w.history("")) < 10 {
		t.Error("nothing much was written")
	}
}
