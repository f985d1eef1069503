package faults_test

import (
	"strings"
	"testing"
)

// Two clusters share an etcd and a service that consumers read from both, with pods of the same name.
func TestTwoClustersOneEtcd(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	a := w.register(pod{cluster: "a", uid: "uid-a"})
	b := w.register(pod{cluster: "b", uid: "uid-b", created: 10})
	f := w.fault(170, "another cluster on the same etcd, its pod of the same name killed", soon, 0)
	f.note = "of the other one"
	before := w.revisions(a)
	b.kill()
	f.over()
	f.healed(a)
	w.untouched(a, before)
	if a.said("superseded") || a.said("not ours") {
		t.Errorf("it took the other cluster's records for rivals:\n%s", a.saidAll())
	}
}

// Traefik's key is made of the address, so two pods that have the same one, one after the other, want the same key.
func TestSameAddressNewPod(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	older := w.register(pod{uid: "uid-1", name: "api-1", formats: "traefik"})
	newer := w.launch(pod{uid: "uid-2", name: "api-2", formats: "traefik", created: 10})
	eventually(t, patience, "the newer one says that the key is taken", func() bool { return newer.said("not ours") })
	if !older.advertised() {
		t.Fatalf("the newer one took the key away: %+v", older.status())
	}

	f := w.fault(180, "a new pod has the address, and the key, of one that drains", atOnce, atOnce)
	older.say("offline not ready")
	f.healed(newer, older)

	before := w.revisions(newer)
	older.say("online by mistake")
	eventually(t, patience, "the older one says that the key is taken", func() bool { return older.said("not ours") })
	older.say("offline not ready")
	eventually(t, patience, "the older one is offline", func() bool {
		return strings.Contains(w.seen.key("/usher/v1/test/instances/shop/api/api-1").value, `"state":"Offline"`) && older.status().InSync
	})
	w.untouched(newer, before)

	f = w.fault(190, "a new pod has the address, and the key, of one that was killed", ghostAfter+soon, ghostAfter+soon)
	f.note = "the killed one's TTL"
	newer.kill()
	last := w.launch(pod{uid: "uid-3", name: "api-3", formats: "traefik", created: 20})
	f.over()
	f.healed(last, older)
}

// revisions are those of r's keys.
func (w *world) revisions(r *registrant) map[string]int64 {
	revs := map[string]int64{}
	for _, name := range w.seen.under(r.status().Lease) {
		revs[name] = w.seen.key(name).rev
	}
	return revs
}

// untouched says that r's keys have not been changed, deleted or put anew since.
func (w *world) untouched(r *registrant, before map[string]int64) {
	w.t.Helper()
	if len(before) == 0 {
		w.t.Error("there were no keys")
	}
	for name, rev := range before {
		if k := w.seen.key(name); k.rev != rev || k.lease != r.status().Lease {
			w.t.Errorf("%s was revision %d, and is %+v", name, rev, k)
		}
	}
}
