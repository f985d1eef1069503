package faults_test

import (
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/registry"
)

// An election takes a second, and another one if votes split.
const election = 3 * time.Second

// three is a world of three members, seen through those that a fault leaves alone.
func three(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, etcd: startEtcd(t, 3, false)}
	w.use(w.etcd.client(nil))
	return w
}

// through makes the test see etcd through some members only.
func (w *world) through(members ...int) {
	w.t.Helper()
	w.use(w.etcd.client(nil, members...))
}

func (w *world) others(one int) (others []int) {
	for i := range w.etcd.members {
		if i != one {
			others = append(others, i)
		}
	}
	return others
}

func (w *world) leader(without int) (leader int) {
	w.t.Helper()
	eventually(w.t, patience, "the members have a leader", func() (ok bool) {
		leader, ok = w.etcd.leader(w.cli, without)
		return ok
	})
	return leader
}

// touched deletes the agent's consumer keys and waits until they are back, which shows that it watches and writes.
func (w *world) touched(r *registrant, within time.Duration) {
	w.t.Helper()
	name := r.status().Keys[1]
	resp, err := w.cli.Delete(w.t.Context(), name)
	if err != nil || resp.Deleted != 1 {
		w.t.Fatalf("delete %s: %v, %v", name, resp, err)
	}
	eventually(w.t, within, name+" is back", func() bool { return w.seen.key(name).rev > resp.Header.Revision })
}

func TestLeaderKilled(t *testing.T) {
	t.Parallel()
	w := three(t)
	r := w.register(pod{})
	leader := w.leader(-1)
	w.through(w.others(leader)...)
	f := w.fault(200, "three members, leader killed", election+soon, 0)
	w.etcd.kill(leader)
	w.leader(leader)
	r.say("online after the election")
	r.wrote("after the election")
	f.healed(r)
	f = w.fault(201, "three members, leader killed: a key deleted meanwhile", soon, soon)
	w.touched(r, soon)
	f.healed(r)
}

// The agent reaches all members; one of them has lost the others, and doesn't know what goes on. A request or a renewal may
// be stuck there for 5 s before the next one goes elsewhere, which the usual TTL survives.
func TestMemberIsolated(t *testing.T) {
	for name, isLeader := range map[string]bool{"a follower": false, "the leader": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := three(t)
			r := w.register(pod{ttl: registry.DefaultTTL})
			one := w.leader(-1)
			number := 210
			if isLeader {
				number = 220
			} else {
				one = w.others(one)[0]
			}
			w.through(w.others(one)...)
			f := w.fault(number, "three members, "+name+" cut off from the others: a change is written", election+retry, 0)
			w.etcd.isolate(one, etcdtest.Hold)
			w.leader(one)
			f.healedWriting(r)
			f = w.fault(number+1, "three members, "+name+" cut off from the others: a key deleted", retry, retry)
			w.touched(r, retry) // its watch is with a member that knows
			f.healed(r)
		})
	}
}

// healedWriting is healed, with a change to write.
func (f *fault) healedWriting(r *registrant) {
	f.w.t.Helper()
	r.say("online after " + f.fault)
	r.wrote("after " + f.fault)
	f.healed(r)
}

// The agent is on the side of the one member that is cut off: it can't keep its lease, and consumers on the other side
// must not find it any longer than the TTL.
func TestAgentOnTheMinoritysSide(t *testing.T) {
	t.Parallel()
	w := three(t)
	r := w.register(pod{})
	one := w.others(w.leader(-1))[0]
	w.through(w.others(one)...)
	f := w.fault(230, "three members, the agent is on the side of one that is cut off, past the TTL", retry, time.Minute)
	f.note = "until together again"
	cut := time.Now()
	w.etcd.isolate(one, etcdtest.Hold)
	for _, i := range w.others(one) {
		w.etcd.members[i].agents.Set(etcdtest.Hold)
	}
	eventually(t, patience, "its records go", func() bool { return len(w.seen.under()) == 0 })
	if took := time.Since(cut); took > ghostAfter {
		t.Errorf("a ghost for %s on the majority's side, want at most %s", took, ghostAfter)
	}
	eventually(t, patience, "it says so", func() bool { return r.said("lease was lost") })
	w.etcd.isolate(one, etcdtest.Pass)
	for _, i := range w.others(one) {
		w.etcd.members[i].agents.Set(etcdtest.Pass)
	}
	f.over()
	f.healed(r)
}

// No two members reach one another, so nothing can be written, and no lease ends either: what consumers see stays.
func TestQuorumLost(t *testing.T) {
	t.Parallel()
	w := three(t)
	r := w.register(pod{})
	f := w.fault(240, "three members, all cut off from one another past the TTL", election+retry, 0)
	for i := range w.etcd.members {
		w.etcd.isolate(i, etcdtest.Hold)
	}
	eventually(t, patience, "the lease counts as lost", func() bool { return r.said("lease was lost") })
	for end := time.Now().Add(ttl); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		resp, err := w.cli.Get(t.Context(), "shop/api/uid-0", clientv3.WithSerializable())
		if err != nil || len(resp.Kvs) != 1 {
			t.Fatalf("what consumers see without a quorum: %v, %v", resp, err)
		}
	}
	for i := range w.etcd.members {
		w.etcd.isolate(i, etcdtest.Pass)
	}
	f.over()
	w.leader(-1)
	f.healed(r)
}
