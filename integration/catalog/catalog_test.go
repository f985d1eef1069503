// Package catalog_test holds registry.Catalog against a real etcd.
package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

// dial is the connection that operators' programs have: what it makes of a cut link is part of what is tested.
func dial(t *testing.T, endpoint string) *clientv3.Client {
	t.Helper()
	cli, err := registry.Connection{Endpoints: []string{endpoint}}.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cli.Close() })
	return cli
}

func put(t *testing.T, cli *clientv3.Client, cluster, namespace, service, pod, state string, opts ...clientv3.OpOption) {
	t.Helper()
	r := registry.Record{Owner: registry.Owner{Cluster: cluster, PodUID: "uid-" + pod, Agent: "a"},
		Namespace: namespace, Service: service, Pod: pod, State: state}
	value, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(t.Context(), registry.InstanceKey(cluster, namespace, service, pod), string(value), opts...); err != nil {
		t.Fatal(err)
	}
}

func del(t *testing.T, cli *clientv3.Client, key string) {
	t.Helper()
	if _, err := cli.Delete(t.Context(), key); err != nil {
		t.Fatal(err)
	}
}

func names(entries []registry.Entry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, strings.TrimPrefix(e.Key, registry.Root))
	}
	return out
}

func TestListSelectsByClusterNamespaceAndService(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	for _, k := range []string{"c1/ns1/a/p", "c1/ns1/ab/p", "c1/ns2/a/p", "c2/ns1/a/p"} {
		f := strings.Split(k, "/")
		put(t, cli, f[0], f[1], f[2], f[3], "Online")
	}
	if _, err := cli.Put(t.Context(), "/usher/v1/c1/holds/ns1/uid", "{}"); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cluster, namespace, service string
		want                        []string
	}{
		{"c1", "ns1", "a", []string{"c1/instances/ns1/a/p"}},
		{"c1", "ns1", "", []string{"c1/instances/ns1/a/p", "c1/instances/ns1/ab/p"}},
		{"c1", "", "a", []string{"c1/instances/ns1/a/p", "c1/instances/ns2/a/p"}},
		{"", "ns1", "a", []string{"c1/instances/ns1/a/p", "c2/instances/ns1/a/p"}},
		{"c3", "", "", nil},
	} {
		entries, err := registry.NewCatalog(cli, tc.cluster).List(t.Context(), tc.namespace, tc.service)
		if err != nil || !slices.Equal(names(entries), tc.want) {
			t.Errorf("cluster %q namespace %q service %q: got %v, %v, want %v", tc.cluster, tc.namespace, tc.service, names(entries), err, tc.want)
		}
	}
}

func TestValueThatIsNoRecordHidesNoOther(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	put(t, cli, "c", "ns", "svc", "a", "Online")
	if _, err := cli.Put(t.Context(), registry.InstanceKey("c", "ns", "svc", "b"), "by hand"); err != nil {
		t.Fatal(err)
	}
	put(t, cli, "c", "ns", "svc", "c", "Online")
	entries, err := registry.NewCatalog(cli, "c").List(t.Context(), "ns", "svc")
	if err != nil || len(entries) != 3 {
		t.Fatalf("got %v, %v", names(entries), err)
	}
	if entries[0].Err != nil || entries[2].Err != nil {
		t.Errorf("a good record has an error: %v, %v", entries[0].Err, entries[2].Err)
	}
	if !errors.Is(entries[1].Err, registry.ErrNotARecord) || entries[1].Pod != "b" {
		t.Errorf("got %+v", entries[1])
	}
}

func TestListOfAnEtcdThatIsDownFailsInTime(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	s.Stop()
	if _, err := registry.NewCatalog(cli, "c").List(t.Context(), "ns", ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error %v", err)
	}
}

func TestListReadsEveryPageAndKeepsOrder(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	var ops []clientv3.Op
	const n = 1203 // three pages
	for i := range n {
		r := registry.Record{Owner: registry.Owner{Cluster: "c", PodUID: "u", Agent: "a"},
			Namespace: "ns", Service: "svc", Pod: fmt.Sprintf("pod-%04d", i), State: "Online"}
		value, _ := r.Encode()
		ops = append(ops, clientv3.OpPut(registry.InstanceKey("c", "ns", "svc", r.Pod), string(value)))
	}
	for chunk := range slices.Chunk(ops, 100) {
		if _, err := cli.Txn(t.Context()).Then(chunk...).Commit(); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := registry.NewCatalog(cli, "c").List(t.Context(), "ns", "svc")
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != n {
		t.Fatalf("%d entries, want %d", len(entries), n)
	}
	for i, e := range entries {
		if e.Err != nil || e.Record.Pod != fmt.Sprintf("pod-%04d", i) {
			t.Fatalf("entry %d is %s (%v)", i, e.Key, e.Err)
		}
	}
}

// follower keeps what a watch yields.
type follower struct {
	t      *testing.T
	events chan string
}

func follow(t *testing.T, cli *clientv3.Client, namespace, service string) *follower {
	ctx, cancel := context.WithCancel(t.Context())
	f := &follower{t: t, events: make(chan string, 1000)}
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	go func() {
		defer close(done)
		for e, err := range registry.NewCatalog(cli, "c").Watch(ctx, namespace, service) {
			old, now := "-", e.Entry.Record.State
			if e.Old != nil {
				old = e.Old.Record.State
			}
			switch {
			case err != nil:
				f.events <- "error"
			case e.Type == registry.Synced:
				f.events <- "synced"
			case e.Type == registry.Delete:
				f.events <- fmt.Sprintf("delete %s %s", e.Entry.Pod, now)
			case e.Entry.Err != nil:
				f.events <- fmt.Sprintf("put %s unreadable", e.Entry.Pod)
			default:
				f.events <- fmt.Sprintf("put %s %s->%s", e.Entry.Pod, old, now)
			}
		}
	}()
	return f
}

// want takes exactly these events, in this order. Errors in between are what an outage looks like.
func (f *follower) want(events ...string) {
	f.t.Helper()
	for _, want := range events {
		for {
			select {
			case got := <-f.events:
				if got == "error" && want != "error" {
					continue
				}
				if got != want {
					f.t.Fatalf("got event %q, want %q", got, want)
				}
			case <-time.After(30 * time.Second):
				f.t.Fatalf("no event, want %q", want)
			}
			break
		}
	}
}

func TestWatchYieldsInitialStateThenEachChange(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	put(t, cli, "c", "ns", "svc", "a", "Online")
	put(t, cli, "c", "ns", "other", "x", "Online")
	f := follow(t, cli, "ns", "svc")
	f.want("put a -->Online", "synced")
	put(t, cli, "c", "ns", "svc", "b", "Pending")
	put(t, cli, "c", "ns", "svc", "b", "Online")
	put(t, cli, "c", "ns", "other", "x", "Draining")
	del(t, cli, registry.InstanceKey("c", "ns", "svc", "a"))
	f.want("put b -->Pending", "put b Pending->Online", "delete a Online")
	if _, err := cli.Put(t.Context(), registry.InstanceKey("c", "ns", "svc", "z"), "by hand"); err != nil {
		t.Fatal(err)
	}
	put(t, cli, "c", "ns", "svc", "b", "Draining")
	f.want("put z unreadable", "put b Online->Draining")
}

func TestWatchSeesALeaseEnd(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	lease, err := cli.Grant(t.Context(), 600)
	if err != nil {
		t.Fatal(err)
	}
	put(t, cli, "c", "ns", "svc", "a", "Online", clientv3.WithLease(lease.ID))
	f := follow(t, cli, "", "")
	f.want("put a -->Online", "synced")
	if _, err := cli.Revoke(t.Context(), lease.ID); err != nil {
		t.Fatal(err)
	}
	f.want("delete a Online")
}

func TestWatchResumesAfterTheLinkWasCut(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	link := s.Link()
	direct := dial(t, s.Endpoint())
	put(t, direct, "c", "ns", "svc", "a", "Online")
	f := follow(t, dial(t, link.Endpoint()), "ns", "svc")
	f.want("put a -->Online", "synced")
	link.Set(etcdtest.Refuse)
	put(t, direct, "c", "ns", "svc", "a", "Draining")
	put(t, direct, "c", "ns", "svc", "b", "Online")
	link.Set(etcdtest.Pass)
	f.want("put a Online->Draining", "put b -->Online")
	put(t, direct, "c", "ns", "svc", "b", "Draining")
	f.want("put b Online->Draining")
}

func TestWatchResumesAfterCompaction(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	link := s.Link()
	direct := dial(t, s.Endpoint())
	for _, pod := range []string{"a", "b", "c"} {
		put(t, direct, "c", "ns", "svc", pod, "Online")
	}
	f := follow(t, dial(t, link.Endpoint()), "ns", "svc")
	f.want("put a -->Online", "put b -->Online", "put c -->Online", "synced")
	link.Set(etcdtest.Refuse)
	put(t, direct, "c", "ns", "svc", "a", "Draining")
	put(t, direct, "c", "ns", "svc", "a", "Released")
	del(t, direct, registry.InstanceKey("c", "ns", "svc", "b"))
	put(t, direct, "c", "ns", "svc", "d", "Online")
	resp, err := direct.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := direct.Compact(t.Context(), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	link.Set(etcdtest.Pass)
	f.want("put a Online->Released", "put d -->Online", "delete b Online")
	put(t, direct, "c", "ns", "svc", "c", "Draining")
	f.want("put c Online->Draining")
}

func TestWatchResumesAfterEtcdRestarted(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	put(t, cli, "c", "ns", "svc", "a", "Online")
	f := follow(t, cli, "ns", "svc")
	f.want("put a -->Online", "synced")
	s.Restart()
	put(t, cli, "c", "ns", "svc", "a", "Draining")
	f.want("put a Online->Draining")
}

// The new etcd is at a lower revision, so that a watch that was only resumed would wait there for a long time.
func TestWatchFindsAnEtcdThatLostItsData(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	for i := range 50 {
		put(t, cli, "c", "ns", "svc", "a", fmt.Sprint("Online", i))
	}
	f := follow(t, cli, "ns", "svc")
	f.want("put a -->Online49", "synced")
	s.RestartEmpty()
	put(t, cli, "c", "ns", "svc", "b", "Online")
	f.want("put b -->Online", "delete a Online49")
}

func TestWatchTellsThatEtcdIsGone(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	f := follow(t, dial(t, s.Endpoint()), "ns", "svc")
	f.want("synced")
	s.Stop()
	f.want("error")
	s.Restart()
	put(t, dial(t, s.Endpoint()), "c", "ns", "svc", "a", "Online")
	f.want("put a -->Online")
}

func TestStandingTellsWhatIsReallyThere(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	ctx := t.Context()
	mine, err := cli.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	other, err := cli.Grant(ctx, 600)
	if err != nil {
		t.Fatal(err)
	}
	for key, lease := range map[string]clientv3.LeaseID{"/svc/own": mine.ID, "/svc/foreign": other.ID, "/svc/forever": 0} {
		if _, err := cli.Put(ctx, key, "v", clientv3.WithLease(lease)); err != nil {
			t.Fatal(err)
		}
	}
	r := registry.Record{Owner: registry.Owner{Cluster: "c", PodUID: "u", Agent: "a", Lease: registry.LeaseID(mine.ID)},
		Namespace: "ns", Service: "svc", Pod: "p", State: "Online", Keys: []string{"/svc/own", "/svc/foreign", "/svc/forever", "/svc/gone"}}
	value, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(ctx, registry.InstanceKey("c", "ns", "svc", "p"), string(value), clientv3.WithLease(mine.ID)); err != nil {
		t.Fatal(err)
	}
	c := registry.NewCatalog(cli, "c")
	entries, err := c.List(ctx, "ns", "svc")
	if err != nil || len(entries) != 1 {
		t.Fatalf("%v, %v", entries, err)
	}
	got, err := c.Standing(ctx, entries[0])
	if err != nil {
		t.Fatal(err)
	}
	if got.GrantedTTL != 600*time.Second || got.TTL <= 0 || got.TTL > 600*time.Second {
		t.Errorf("TTL %s of %s", got.TTL, got.GrantedTTL)
	}
	want := []registry.KeyStanding{{Key: "/svc/own", Exists: true, Lease: registry.LeaseID(mine.ID)},
		{Key: "/svc/foreign", Exists: true, Lease: registry.LeaseID(other.ID)}, {Key: "/svc/forever", Exists: true}, {Key: "/svc/gone"}}
	if !slices.Equal(got.Keys, want) {
		t.Errorf("keys %+v, want %+v", got.Keys, want)
	}
	if _, err := cli.Revoke(ctx, mine.ID); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Standing(ctx, entries[0]); err != nil || got.TTL != 0 || got.GrantedTTL != 0 || got.Keys[0].Exists {
		t.Errorf("after the lease ended: %+v, %v", got, err)
	}
}

// putVerdict writes a verdict on a shutdown that ended at released.
func putVerdict(t *testing.T, cli *clientv3.Client, cluster, namespace, pod, uid string, released time.Time) {
	t.Helper()
	v := registry.Verdict{Owner: registry.Owner{Cluster: cluster, PodUID: uid, Agent: "a"}, Namespace: namespace, Pod: pod,
		Outcome: "drained", Started: released.Add(-time.Second), Released: released, TotalMs: 1000}
	value, err := v.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cli.Put(t.Context(), registry.VerdictKey(cluster, namespace, pod, uid), string(value)); err != nil {
		t.Fatal(err)
	}
}

func verdictNames(entries []registry.VerdictEntry) []string {
	var out []string
	for _, e := range entries {
		out = append(out, strings.TrimPrefix(e.Key, registry.Root))
	}
	return out
}

func TestVerdictsSelectsAndTellsTheNewestFirst(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	put(t, cli, "c1", "ns1", "a", "p-0", "Online")
	for i, k := range []string{"c1/ns1/p-0/u1", "c1/ns1/p-0/u2", "c1/ns1/p-01/u3", "c1/ns2/p-0/u4", "c2/ns1/p-0/u5"} {
		f := strings.Split(k, "/")
		putVerdict(t, cli, f[0], f[1], f[2], f[3], at.Add(time.Duration(i)*time.Minute))
	}
	bad := registry.VerdictKey("c1", "ns1", "p-0", "u0")
	if _, err := cli.Put(t.Context(), bad, `{"outcome":"drained"}`); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		cluster, namespace, pod string
		want                    []string
	}{
		{"c1", "ns1", "p-0", []string{"c1/verdicts/ns1/p-0/u2", "c1/verdicts/ns1/p-0/u1", "c1/verdicts/ns1/p-0/u0"}},
		{"c1", "ns1", "", []string{"c1/verdicts/ns1/p-01/u3", "c1/verdicts/ns1/p-0/u2", "c1/verdicts/ns1/p-0/u1", "c1/verdicts/ns1/p-0/u0"}},
		{"c1", "ns2", "p-0", []string{"c1/verdicts/ns2/p-0/u4"}},
		{"c1", "", "p-01", []string{"c1/verdicts/ns1/p-01/u3"}},
		{"", "", "p-01", []string{"c1/verdicts/ns1/p-01/u3"}},
		{"", "ns1", "", []string{"c2/verdicts/ns1/p-0/u5", "c1/verdicts/ns1/p-01/u3", "c1/verdicts/ns1/p-0/u2", "c1/verdicts/ns1/p-0/u1", "c1/verdicts/ns1/p-0/u0"}},
		{"c1", "ns1", "p", nil},
	} {
		entries, err := registry.NewCatalog(cli, tc.cluster).Verdicts(t.Context(), tc.namespace, tc.pod)
		if err != nil || !slices.Equal(verdictNames(entries), tc.want) {
			t.Errorf("cluster %q namespace %q pod %q: got %v, %v, want %v", tc.cluster, tc.namespace, tc.pod, verdictNames(entries), err, tc.want)
		}
		for _, e := range entries {
			if (e.Key == bad) != errors.Is(e.Err, registry.ErrNotARecord) || (e.Err == nil && e.Verdict.TotalMs != 1000) || e.PodUID == "" {
				t.Errorf("entry %+v", e)
			}
		}
	}
	entries, err := registry.NewCatalog(cli, "c1").List(t.Context(), "", "")
	if err != nil || len(entries) != 1 {
		t.Errorf("instances beside verdicts: %v, %v; want one", names(entries), err)
	}
}

func TestVerdictsReadsEveryPage(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	const n = 1001 // two pages and one
	for i := range n {
		putVerdict(t, cli, "c", "ns", fmt.Sprintf("p-%04d", i), "u", time.Unix(int64(i), 0))
	}
	entries, err := registry.NewCatalog(cli, "c").Verdicts(t.Context(), "ns", "")
	if err != nil || len(entries) != n || entries[0].Pod != "p-1000" || entries[n-1].Pod != "p-0000" {
		t.Errorf("%d verdicts, %v; want %d from p-1000 to p-0000", len(entries), err, n)
	}
}

func TestCatalogReadsAHold(t *testing.T) {
	t.Parallel()
	s := etcdtest.Start(t)
	cli := dial(t, s.Endpoint())
	c := registry.NewCatalog(cli, "c")
	if h, err := c.Hold(t.Context(), "ns", "u"); h != nil || err != nil {
		t.Errorf("without a hold: %+v, %v", h, err)
	}
	want, err := registry.PutHold(t.Context(), cli, "c", "ns", "u", lifecycle.Hold{Reason: "disk", Actor: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	if h, err := c.Hold(t.Context(), "ns", "u"); err != nil || h == nil || *h != want {
		t.Errorf("got %+v, %v; want %+v", h, err, want)
	}
	if _, err := cli.Put(t.Context(), registry.HoldKey("c", "ns", "u"), "by hand"); err != nil {
		t.Fatal(err)
	}
	if h, err := c.Hold(t.Context(), "ns", "u"); !errors.Is(err, registry.ErrNotARecord) || h != nil {
		t.Errorf("a value that is none: %+v, %v", h, err)
	}
	if _, err := registry.NewCatalog(cli, "").Hold(t.Context(), "ns", "u"); err == nil || !strings.Contains(err.Error(), "cluster") {
		t.Errorf("without a cluster: %v", err)
	}
}
