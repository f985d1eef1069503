package registry_test

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/registry"
)

func leaseOf(ev *clientv3.Event) string { return registry.LeaseID(ev.Kv.Lease).String() }

// revoke ends the agent's lease by hand.
func (w *world) revoke(a *agent) {
	w.t.Helper()
	id, err := strconv.ParseInt(a.status().Lease, 16, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.cli.Revoke(w.t.Context(), clientv3.LeaseID(id)); err != nil {
		w.t.Fatal(err)
	}
}

func TestReregistersAfterLeaseRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	old := a.status().Lease
	w.revoke(a)
	eventuallyWithin(t, time.Second, "it is back", func() bool { return w.get(key) != nil })
	a.advertised()
	if a.status().Lease == old {
		t.Error("still the lease that was revoked")
	}
	if l, c := w.get(ledger), w.get(key); l.rev != c.rev {
		t.Errorf("ledger %+v and consumer record %+v: want one revision", l, c)
	}
	if n := a.Counters.LeasesLost.Load(); n != 1 {
		t.Errorf("%d leases counted as lost, want 1", n)
	}
}

func TestReregistersAfterKeyDeletedByHand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	for _, k := range []string{key, ledger, key, ledger} {
		lease := a.status().Lease
		w.remove(k)
		eventuallyWithin(t, time.Second, k+" is back", func() bool { return w.get(k) != nil })
		if got := w.get(k).lease; got != lease {
			t.Errorf("%s is back under lease %s, want %s", k, got, lease)
		}
	}
	a.advertised()
}

func TestChangeByHandIsPutRight(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	before := w.get(ledger)
	rec := w.record()
	rec.State = "Draining"
	v, err := rec.Encode()
	if err != nil {
		t.Fatal(err)
	}
	w.put(ledger, string(v), clientv3.WithLease(clientv3.LeaseID(rec.Owner.Lease)))
	eventually(t, "the ledger is as it was", func() bool { return w.get(ledger).value == before.value })
	a.advertised()
}

func TestReregistersAfterEtcdRestart(t *testing.T) {
	t.Run("inside the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		a := w.registered(spec{ttl: time.Minute})
		before := w.get(key)
		w.etcd.Restart()
		a.sync()
		if got := w.get(key); got == nil || *got != *before {
			t.Errorf("%+v became %+v, want it untouched", before, got)
		}
		// The watch goes on too.
		w.remove(key)
		eventually(t, "a key deleted after the restart is back", func() bool { return w.get(key) != nil })
		if got := w.get(key); got.lease != before.lease {
			t.Errorf("back under lease %s, want %s", got.lease, before.lease)
		}
		a.advertised()
	})
	t.Run("past the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		a := w.registered(spec{ttl: 3 * time.Second})
		old := a.status().Lease
		w.etcd.Stop()
		eventually(t, "the lease counts as lost", func() bool { return a.said("lease was lost") })
		if st := a.status(); st.Advertised || st.InSync {
			t.Errorf("status with etcd away for a TTL: %+v", st)
		}
		w.etcd.Restart()
		a.advertised()
		if a.status().Lease == old {
			t.Error("still the lease that was lost")
		}
		// etcd renews leases when it starts, so the record was there all along and must be taken over as it is.
		if n := w.count(key, "DELETE"); n != 0 {
			t.Errorf("the record was deleted %d times, want none", n)
		}
	})
	t.Run("without its data", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		for range 20 { // revisions that the new etcd won't reach for a while
			w.put("elsewhere", "x")
		}
		a := w.registered(spec{})
		w.etcd.RestartEmpty()
		clear(w.byHand)
		eventually(t, "it is back", func() bool { return w.get(key) != nil })
		a.advertised()
		w.remove(key)
		eventuallyWithin(t, 5*time.Second, "a key deleted by hand is back", func() bool { return w.get(key) != nil })
	})
}

func TestWaitsForEtcdThatIsNotThereAtStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.etcd.Stop()
	a := w.start(spec{})
	a.online("ready")
	eventually(t, "it says that etcd can't be reached", func() bool { return a.status().Err != "" })
	if st := a.status(); st.InSync || !strings.Contains(st.Err, "getting a lease: no answer within 5s from etcd at "+w.etcd.Endpoint()) ||
		strings.Contains(st.Err, "READY") {
		t.Errorf("status: %+v", st)
	}
	w.etcd.Restart()
	a.sync()
	a.advertised()
}

func TestSyncReportsWhatKeptIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link, ttl: time.Minute})
	sync := func(d time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), d)
		defer cancel()
		t0 := time.Now()
		err := a.Sync(ctx)
		if took := time.Since(t0); took < d || took > d+5*time.Second {
			t.Errorf("Sync took %s with a deadline of %s", took, d)
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Sync: %v, want one that is a DeadlineExceeded too", err)
		}
		return err
	}
	link.Set(etcdtest.Hold)
	a.offline("not ready")
	if err := sync(300 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "etcd has not answered") {
		t.Errorf("nothing has failed yet: %v", err)
	}
	eventually(t, "an attempt fails", func() bool { return a.status().Err != "" })
	if err := sync(300 * time.Millisecond); err == nil || !strings.Contains(err.Error(), "writing to etcd: no answer within 5s") && !strings.Contains(err.Error(), "reading from etcd: no answer within 5s") {
		t.Errorf("Sync: %v, want what was being done", err)
	}
	link.Set(etcdtest.Pass)
	a.sync()
	if w.get(key) != nil {
		t.Error("Sync says that it is done, and the record is still there")
	}
}

// What was left alone is no answer to what keeps a later change from being carried out.
func TestSyncDoesNotBlameAnOldProblem(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	w.put(key, "by hand")
	a := w.start(spec{link: link, ttl: time.Minute})
	a.online("ready")
	a.sync()
	link.Set(etcdtest.Hold)
	a.offline("not ready")
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := a.Sync(ctx); err == nil || strings.Contains(err.Error(), notOurs) {
		t.Errorf("Sync: %v, want that etcd has not answered", err)
	}
	link.Set(etcdtest.Pass)
	a.sync()
}

// SIGTERM has a budget: an etcd that doesn't answer must not hold the agent's end.
func TestRunEndsInTimeWhileEtcdIsSilent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link})
	link.Set(etcdtest.Hold)
	a.offline("not ready") // a transaction is under way when the end comes
	before := a.Counters.Transactions.Load()
	eventually(t, "the transaction is under way", func() bool { return a.Counters.Transactions.Load() > before })
	t0 := time.Now()
	a.stop()
	if took := time.Since(t0); took > 4*time.Second {
		t.Errorf("Run took %s to end, want the 2 s that a revocation may take", took)
	}
}

func TestDesiredChangesWhileEtcdIsDown(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(spec{})
	a.offline("not ready")
	a.sync()
	w.etcd.Stop()
	a.online("ready")
	a.offline("not ready again")
	w.etcd.Restart()
	a.sync()
	if ev := w.history("shop/"); len(ev) != 0 {
		t.Errorf("the consumer record was there for a moment: %v", ev)
	}
	if rec := w.record(); rec.State != "Offline" || rec.Cause != "not ready again" {
		t.Errorf("ledger: %+v", rec)
	}
}

// The transaction was carried out, and the answer was lost: the agent must know its own writing again, and not write twice.
func TestLostAnswerIsNoConflict(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.start(spec{link: link, ttl: time.Minute})
	a.offline("not ready")
	a.sync()
	link.Set(etcdtest.DropAnswers)
	a.online("ready")
	eventually(t, "the transaction is carried out", func() bool { return w.get(key) != nil })
	rev := w.get(key).rev
	link.Set(etcdtest.Pass)
	a.sync()
	a.advertised()
	if got := w.get(key); got.rev != rev {
		t.Errorf("the record was written again, in revision %d after %d", got.rev, rev)
	}
	if a.said(superseded) || a.said(notOurs) {
		t.Errorf("the agent took its own records for another's: %+v", a.statuses)
	}
}

func TestWrongPasswordIsReportedAndHeals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enableAuth("right")
	a := w.start(spec{conn: registry.Connection{User: "usher", Password: "wrong"}})
	a.online("ready")
	eventually(t, "the login's failure is reported", func() bool { return a.status().Err != "" })
	if st := a.status(); !strings.Contains(st.Err, `logging in as "usher"`) || !strings.Contains(st.Err, "invalid user ID or password") || strings.Contains(st.Err, "wrong") {
		t.Errorf("status: %+v", st)
	}
	if _, err := w.cli.UserChangePassword(t.Context(), "usher", "wrong"); err != nil {
		t.Fatal(err)
	}
	a.sync()
	a.advertised()
}

// With auth on, a restart of etcd forgets all tokens.
func TestLossOfAuthTokenHeals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enableAuth("right")
	a := w.registered(spec{ttl: 4 * time.Second, conn: registry.Connection{User: "usher:right"}})
	before := w.get(key)
	w.etcd.Restart()
	a.online("ready after the restart")
	a.sync()
	w.remove(key)
	eventually(t, "a key deleted by hand is back: the watch goes on", func() bool { return w.get(key) != nil })
	id, _ := strconv.ParseInt(before.lease, 16, 64)
	resp, err := w.cli.TimeToLive(t.Context(), clientv3.LeaseID(id))
	if err != nil {
		t.Fatal(err)
	}
	low := resp.TTL
	eventually(t, "the lease is renewed", func() bool {
		resp, err := w.cli.TimeToLive(t.Context(), clientv3.LeaseID(id))
		if err != nil || resp.TTL > low {
			return true
		}
		low = resp.TTL
		return false
	})
	a.advertised()
	if n := a.Counters.LeasesLost.Load(); n != 0 {
		t.Errorf("%d leases lost", n)
	}
}

func TestMissingPermissionIsReportedAndHeals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.enableAuth("right")
	if _, err := w.cli.RoleRevokePermission(t.Context(), "usher", "shop/", clientv3.GetPrefixRangeEnd("shop/")); err != nil {
		t.Fatal(err)
	}
	a := w.start(spec{conn: registry.Connection{User: "usher", Password: "right"}})
	a.online("ready")
	eventually(t, "the refusal is reported", func() bool { return strings.Contains(a.status().Err, "permission denied") })
	w.quietly(a, 3*time.Second, 15)
	w.grant("shop/")
	a.sync()
	a.advertised()
}

// enableAuth makes a user usher who may read and write the ledger and the consumer records only, and turns w.cli into root.
func (w *world) enableAuth(password string) {
	w.t.Helper()
	ctx := w.t.Context()
	must := func(_ any, err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	for user, pw := range map[string]string{"root": "root", "usher": password} {
		must(w.cli.UserAdd(ctx, user, pw))
		must(w.cli.RoleAdd(ctx, user))
		must(w.cli.UserGrantRole(ctx, user, user))
	}
	w.grant(registry.Root)
	w.grant("shop/")
	must(w.cli.AuthEnable(ctx))
	w.cli, w.auth = w.etcd.ClientAs("root", "root"), true
}

func (w *world) grant(prefix string) {
	w.t.Helper()
	if _, err := w.cli.RoleGrantPermission(w.t.Context(), "usher", prefix, clientv3.GetPrefixRangeEnd(prefix),
		clientv3.PermissionType(clientv3.PermReadWrite)); err != nil {
		w.t.Fatal(err)
	}
}

// quietly says that the agent makes at most so many transactions in d.
func (w *world) quietly(a *agent, d time.Duration, atMost int64) {
	w.t.Helper()
	before := a.Counters.Transactions.Load()
	time.Sleep(d)
	n := a.Counters.Transactions.Load() - before
	w.t.Logf("%d transactions in %s", n, d)
	if n > atMost {
		w.t.Errorf("%d transactions in %s, want at most %d", n, d, atMost)
	}
}

func TestSteadyStateCostsNoTransactions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{ttl: 3 * time.Second})
	a.offline("not ready")
	a.sync()
	a.online("ready")
	a.sync()
	rev := w.get(ledger).rev
	for range 10 {
		a.online("ready") // the same again
	}
	a.sync()
	w.quietly(a, 4*time.Second, 0) // longer than a TTL, so the lease was renewed
	a.advertised()
	if got := w.get(ledger).rev; got != rev {
		t.Errorf("revision %d became %d", rev, got)
	}
	if n := a.Counters.Transactions.Load(); n != 3 {
		t.Errorf("%d transactions in all, want one for each of three changes: its own writing is no news to an agent", n)
	}
}

func TestLastingProblemIsNoTightLoop(t *testing.T) {
	t.Run("foreign key", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.put(key, "by hand")
		a := w.start(spec{})
		a.online("ready")
		a.sync()
		w.quietly(a, 3*time.Second, 15)
	})
	t.Run("watch refused", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		var watches atomic.Int64
		a := w.registered(spec{wrap: func(c *clientv3.Client) { c.Watcher = deafWatcher{c.Watcher, &watches} }})
		w.quietly(a, 3*time.Second, 15)
		if watches.Load() == 0 {
			t.Error("nothing was watched")
		}
	})
	t.Run("foreign key that changes all the time", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t)
		w.put(key, "by hand")
		a := w.start(spec{})
		a.online("ready")
		a.sync()
		stop := time.After(2 * time.Second)
		before, puts := a.Counters.Transactions.Load(), 0
		for {
			select {
			case <-stop:
				n := a.Counters.Transactions.Load() - before
				t.Logf("%d transactions beside %d changes by somebody else", n, puts)
				if n > 60 {
					t.Errorf("%d transactions in 2 s beside %d changes by somebody else, want at most 60", n, puts)
				}
				return
			default:
				w.put(key, "by hand "+strconv.Itoa(puts))
				puts++
			}
		}
	})
}

// deafWatcher is a Watcher whose watches end at once, as they do for a server or proxy that refuses them.
type deafWatcher struct {
	clientv3.Watcher
	watches *atomic.Int64
}

func (d deafWatcher) Watch(context.Context, string, ...clientv3.OpOption) clientv3.WatchChan {
	d.watches.Add(1)
	ch := make(chan clientv3.WatchResponse, 1)
	ch <- clientv3.WatchResponse{Canceled: true}
	close(ch)
	return ch
}
