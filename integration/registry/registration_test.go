package registry_test

import (
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

func TestRegistersInOneTransaction(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{ttl: 7 * time.Second})

	l, c := w.get(ledger), w.get(key)
	if l.rev != c.rev || l.lease != c.lease {
		t.Errorf("ledger %+v and consumer record %+v: want one revision and one lease", l, c)
	}
	if n := len(w.history("")); n != 2 {
		t.Errorf("%d changes, want the two records", n)
	}
	rec := w.record()
	if rec.State != "Online" || rec.Owner.PodUID != uid || rec.Owner.Lease.String() != l.lease ||
		!slices.Equal(rec.Keys, []string{key}) || !slices.Equal(rec.Formats, []string{"grpc"}) {
		t.Errorf("ledger: %+v", rec)
	}
	resp, err := w.cli.TimeToLive(t.Context(), clientv3.LeaseID(rec.Owner.Lease), clientv3.WithAttachedKeys())
	if err != nil || resp.GrantedTTL != 7 || len(resp.Keys) != 2 {
		t.Errorf("lease: %+v, %v; want 7 s and two keys", resp, err)
	}
	if st := a.status(); st.Err != "" || !slices.Equal(st.Keys, []string{ledger, key}) {
		t.Errorf("status: %+v", st)
	}
	m, err := endpoints.NewManager(w.cli, "shop/api")
	if err != nil {
		t.Fatal(err)
	}
	if eps, err := m.List(t.Context()); err != nil || len(eps) != 1 || eps[key].Addr != "10.0.0.1:8080" || eps[key].Metadata != nil {
		t.Errorf("etcd's own reader sees %v, %v", eps, err)
	}
}

func TestWithdrawDeletesConsumerRecordAndKeepsLedger(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	before := w.get(ledger)
	a.offline("not ready")
	a.sync()

	l := w.get(ledger)
	if w.get(key) != nil || l == nil || l.lease != before.lease {
		t.Fatalf("consumer record %+v, ledger %+v; want no record, and the ledger under lease %s", w.get(key), l, before.lease)
	}
	if rec := w.record(); rec.State != "Offline" || rec.Cause != "not ready" || len(rec.Keys) != 0 {
		t.Errorf("ledger: %+v", rec)
	}
	last := w.history("")
	if gone := last[len(last)-2:]; gone[0].Kv.ModRevision != gone[1].Kv.ModRevision {
		t.Errorf("the record went in revision %d and the ledger changed in %d: want one transaction", gone[0].Kv.ModRevision, gone[1].Kv.ModRevision)
	}
	if st := a.status(); st.Advertised || !st.InSync {
		t.Errorf("status: %+v", st)
	}
	a.online("ready again")
	a.sync()
	a.advertised()
}

func TestServiceThatIsNoLongerWantedLosesItsLedgerToo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{services: []string{"api", "web"}})
	d := a.desired(lifecycle.Online, "ready")
	d.Instances = d.Instances[:1]
	a.Set(d)
	a.sync()
	for _, k := range []string{"/usher/v1/test/instances/shop/web/api-0", "shop/web/" + uid} {
		if kv := w.get(k); kv != nil {
			t.Errorf("%s is still there: %+v", k, kv)
		}
	}
	a.advertised()
}

func TestRunRevokesLeaseAtEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	a.stop()
	if l, c := w.get(ledger), w.get(key); l != nil || c != nil {
		t.Errorf("left behind: ledger %+v, consumer record %+v", l, c)
	}
	if resp, err := w.cli.Leases(t.Context()); err != nil || len(resp.Leases) != 0 {
		t.Errorf("leases left behind: %+v, %v", resp, err)
	}
}

func TestPortThatServiceLacksIsReported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(spec{port: "grpc"})
	a.online("ready")
	a.sync()
	const want = `service api: format grpc: port "grpc": the Service has no such TCP port, only http (8080)`
	if st := a.status(); st.Err != want || st.InSync || st.Advertised {
		t.Errorf("status %+v, want the error %q", st, want)
	}
	if rec := w.record(); rec.State != "Online" || len(rec.Keys) != 0 || w.get(key) != nil {
		t.Errorf("ledger %+v, consumer record %+v; want a ledger that names no keys, and no record", rec, w.get(key))
	}
	if n := a.Counters.Conflicts.Load(); n != 0 {
		t.Errorf("%d conflicts, and nobody else has a record", n)
	}
}

func TestOverlappingTargetsAreRefused(t *testing.T) {
	t.Parallel()
	formats := map[string][]registry.NamedFormat{}
	for svc, target := range map[string]string{"api": "shop", "web": "shop/web"} {
		f, err := format.New(format.Spec{Type: "grpc", Target: target})
		if err != nil {
			t.Fatal(err)
		}
		formats[svc] = []registry.NamedFormat{{Name: "grpc", Format: f}}
	}
	dial := func() (*clientv3.Client, error) { panic("dialled") }
	cfg := registry.Config{Cluster: cluster, Namespace: namespace, Pod: pod, PodUID: uid, Formats: formats, Dial: dial}
	if _, err := registry.New(cfg); err == nil {
		t.Error("targets shop and shop/web: want an error, since readers of shop would read both")
	}
	delete(formats, "web")
	if _, err := registry.New(cfg); err != nil {
		t.Errorf("one target: %v", err)
	}
}
