package faults_test

import (
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
)

// Limits. The registrar retries at most every 7.5 s (5 s and half as much of jitter), but a healed connection ends a
// request that waits for one at once, and it reconnects at most every 0.96 s.
const (
	atOnce = 2 * time.Second  // what a watch or a lost lease tells of
	soon   = 5 * time.Second  // a reconnect, and what waits for it
	retry  = 10 * time.Second // the longest pause between two attempts
)

func TestEtcdNotThereAtStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	w.etcd.kill(0)
	f := w.fault(10, "etcd not there when the agent starts", soon, 0)
	r := w.launch(pod{})
	eventually(t, patience, "it says that etcd can't be reached", func() bool { return r.said("no answer within") })
	w.etcd.start(0)
	w.answers()
	f.over()
	f.healed(r)
}

func TestEtcdKilled(t *testing.T) {
	t.Run("inside the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		r := w.register(pod{ttl: 15 * time.Second})
		lease := r.status().Lease
		f := w.fault(20, "etcd killed, back inside the TTL", soon, 0)
		w.etcd.kill(0)
		w.etcd.start(0)
		w.answers()
		f.over()
		r.say("online after the restart") // its records were there all along, so this is what proves that it is in touch
		r.wrote("after the restart")
		f.healed(r)
		if got := r.status().Lease; got != lease {
			t.Errorf("under lease %s, want the same as before, %s", got, lease)
		}
	})
	t.Run("past the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		r := w.register(pod{})
		f := w.fault(30, "etcd killed, back past the TTL", soon, 0)
		w.etcd.kill(0)
		eventually(t, patience, "the lease counts as lost", func() bool { return r.said("lease was lost") })
		w.etcd.start(0)
		w.answers()
		f.over()
		f.healed(r) // etcd renews all leases when it starts, so there is no gap
	})
}

func TestLeaseAndKeysTakenAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	r := w.register(pod{})

	f := w.fault(40, "lease revoked", atOnce, atOnce)
	w.revoke(r)
	f.healed(r)

	f = w.fault(50, "keys deleted by hand", atOnce, atOnce)
	for _, name := range r.status().Keys {
		if _, err := w.cli.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, patience, "the deletion is seen", func() bool { return w.seen.longestNow() > 0 })
	f.healed(r)
}

func (o *observer) longestNow() time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.longest
}

func (w *world) revoke(r *registrant) {
	w.t.Helper()
	lease := r.status().Lease
	id, err := strconv.ParseInt(lease, 16, 64)
	if err != nil {
		w.t.Fatal(err)
	}
	if _, err := w.cli.Revoke(w.t.Context(), clientv3.LeaseID(id)); err != nil {
		w.t.Fatal(err)
	}
	eventually(w.t, patience, "the revocation is seen", func() bool { return len(w.seen.under(lease)) == 0 })
}

// The agent's connection is cut, its key deleted, and what the watch would have told of it compacted away.
func TestCompactionUnderWatcher(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	r := w.register(pod{ttl: 15 * time.Second})
	name := r.status().Keys[1]
	f := w.fault(60, "compaction under a watcher that was cut off, key deleted meanwhile", soon, soon)
	w.etcd.agents(etcdtest.Refuse)
	var rev int64
	w.seen.ignore("filler")
	for _, op := range []clientv3.Op{clientv3.OpDelete(name), clientv3.OpPut("filler", "1"), clientv3.OpPut("filler", "2")} {
		resp, err := w.cli.Do(t.Context(), op)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case resp.Put() != nil:
			rev = resp.Put().Header.Revision
		case resp.Del() != nil:
			rev = resp.Del().Header.Revision
		}
	}
	if _, err := w.cli.Compact(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, "the deletion is seen", func() bool { return w.seen.key(name).lease == "" })
	w.etcd.agents(etcdtest.Pass)
	f.over()
	f.healed(r)
}

func (o *observer) ignore(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.byHand[name] = true
}

// Keepalives and deletes still work without space, puts and new leases don't: what is there stays, and an instance that is
// not ready any more must go.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, "--quota-backend-bytes", strconv.Itoa(4<<20))
	r := w.register(pod{})
	other := w.register(pod{uid: "uid-1", ip: "10.0.0.2", name: "api-1"})
	w.seen.ignore("filler")
	ballast := strings.Repeat("x", 1<<20)
	for {
		if _, err := w.cli.Put(t.Context(), "filler", ballast); err != nil {
			if !strings.Contains(err.Error(), "space exceeded") {
				t.Fatal(err)
			}
			break
		}
	}
	f := w.fault(70, "NOSPACE alarm, and cleared; keys deleted meanwhile", retry, time.Minute)
	f.note = "until cleared"

	other.say("offline not ready")
	eventually(t, atOnce, "an instance that is not ready goes, space or not", func() bool {
		return w.seen.key("shop/api/uid-1").lease == ""
	})
	for end := time.Now().Add(ghostAfter); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !r.advertised() {
			t.Fatalf("an instance that nothing happened to is gone: %+v", r.status())
		}
	}
	name := r.status().Keys[1]
	if _, err := w.cli.Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	eventually(t, patience, "it says what is wrong", func() bool { return r.said("space exceeded") })

	now, err := w.cli.Get(t.Context(), "filler")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.cli.Delete(t.Context(), "filler"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cli.Compact(t.Context(), now.Header.Revision); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cli.Defragment(t.Context(), w.cli.Endpoints()[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cli.AlarmDisarm(t.Context(), &clientv3.AlarmMember{}); err != nil {
		t.Fatal(err)
	}
	f.over()
	f.healed(r, other)
	eventually(t, retry, "the other one's ledger record says that it is offline", func() bool {
		return strings.Contains(w.seen.key("/usher/v1/test/instances/shop/api/api-1").value, `"state":"Offline"`)
	})
}

// Each request takes 2 s. The TTL must leave room for a renewal that takes as long: two thirds of it.
func TestSlowEtcd(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	r := w.register(pod{ttl: 6 * time.Second})
	f := w.fault(80, "etcd slow, 2 s a request: lease revoked meanwhile", 15*time.Second, 15*time.Second)
	f.note = "1 s until it hears of it, and five requests"
	w.etcd.members[0].agents.SetDelay(time.Second)
	for end := time.Now().Add(2 * ttl); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !r.advertised() {
			t.Fatalf("slowness alone took it out: %+v", r.status())
		}
	}
	w.revoke(r)
	f.over()
	f.healed(r)
}

func TestAgentKilled(t *testing.T) {
	t.Run("inside the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		r := w.register(pod{})
		old := r.status().Lease
		f := w.fault(90, "agent killed with SIGKILL, restarted inside the TTL", soon, 0)
		r.kill()
		again := w.launch(pod{})
		f.over()
		f.healed(again)
		eventually(t, ghostAfter, "the first one's lease ends", func() bool {
			resp, err := w.cli.Leases(t.Context())
			return err == nil && len(resp.Leases) == 1
		})
		if again.status().Lease == old || !again.advertised() {
			t.Errorf("under lease %s after %s: %+v", again.status().Lease, old, again.status())
		}
	})
	t.Run("past the TTL", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		r := w.register(pod{})
		f := w.fault(100, "agent killed with SIGKILL, restarted past the TTL", soon, time.Minute)
		f.note = "until restarted"
		killed := time.Now()
		r.kill()
		eventually(t, patience, "its records go", func() bool { return len(w.seen.under()) == 0 })
		if took := time.Since(killed); took > ghostAfter {
			t.Errorf("a ghost for %s, want at most %s", took, ghostAfter)
		}
		again := w.launch(pod{})
		f.over()
		f.healed(again)
	})
}

func TestAgentStoppedPastTheTTL(t *testing.T) {
	stop := func(w *world, r *registrant) {
		w.t.Helper()
		stopped := time.Now()
		r.signal(syscall.SIGSTOP)
		eventually(w.t, patience, "its records go", func() bool { return len(w.seen.under(r.status().Lease)) == 0 })
		if took := time.Since(stopped); took > ghostAfter {
			w.t.Errorf("a ghost for %s, want at most %s", took, ghostAfter)
		}
	}
	t.Run("alone", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		r := w.register(pod{})
		f := w.fault(110, "agent stopped with SIGSTOP past the TTL, then SIGCONT", soon, time.Minute)
		f.note = "until continued"
		stop(w, r)
		r.signal(syscall.SIGCONT)
		f.over()
		f.healed(r)
	})
	t.Run("a newer pod of the same name has come", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1)
		older := w.register(pod{uid: "uid-1"})
		f := w.fault(120, "agent stopped likewise, and a newer pod of its name has come meanwhile", soon, 0)
		f.note = "of the newer one"
		stop(w, older)
		newer := w.register(pod{uid: "uid-2", created: 10})
		w.seen.mark()
		before := w.revisions(newer)
		f.over()
		older.signal(syscall.SIGCONT)
		eventually(t, soon, "the older one says why it doesn't write", func() bool { return older.said("superseded") })
		older.say("offline once more")
		older.say("online once more")
		f.healed(newer) // the older one is not alive: any record of its own is a ghost
		w.untouched(newer, before)
		if st := older.status(); st.Advertised || len(st.Keys) > 0 {
			t.Errorf("the older one holds records: %+v", st)
		}
		for name := range w.seen.all() {
			if strings.Contains(name, "uid-1") && w.seen.key(name).lease != "" {
				t.Errorf("a record of the older one: %s", name)
			}
		}
	})
}

func (o *observer) all() map[string]bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	names := map[string]bool{}
	for name := range o.keys {
		names[name] = true
	}
	return names
}

// The wall clock of the agent steps; its timers and etcd's leases go by the monotonic clock, so nothing may come of it.
func TestClockStepped(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("left out: the registrant's clock can be stepped on amd64 only")
	}
	t.Parallel()
	w := newWorld(t, 1)
	r := w.register(pod{})
	lease := r.status().Lease
	for i, step := range []time.Duration{time.Hour, -2 * time.Hour} {
		way := "forward"
		if step < 0 {
			way = "back"
		}
		f := w.fault(125+i, fmt.Sprintf("agent's wall clock steps %s by %g h", way, step.Abs().Hours()), atOnce, atOnce)
		f.note = "by the deleted key alone"
		r.say(fmt.Sprintf("step %d", int(step.Seconds())))
		for end := time.Now().Add(ghostAfter); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if !r.advertised() || r.status().Lease != lease {
				t.Fatalf("a step of the clock by %s took it out: %+v", step, r.status())
			}
		}
		f.over()
		w.touched(r, atOnce)
		f.healed(r)
		r.mu.Lock()
		off := time.Until(r.asked[len(r.asked)-1].At)
		r.mu.Unlock()
		if want := []time.Duration{time.Hour, -time.Hour}[i]; (off - want).Abs() > time.Minute {
			t.Errorf("its clock is off by %s, want %s: this test steps nothing", off, want)
		}
	}
}
