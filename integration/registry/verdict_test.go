package registry_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

const verdictKey = "/usher/v1/test/verdicts/shop/api-0/" + uid

// released is what a shutdown ends with, 1.5 s after started.
func (a *agent) released(started time.Time) lifecycle.Desired {
	d := a.desired(lifecycle.Released, "prestop hook")
	d.Verdict = &lifecycle.Verdict{
		Outcome: lifecycle.TimedOut, Cause: "prestop hook", Started: started, Released: started.Add(1500 * time.Millisecond),
		Deadline: started.Add(2 * time.Second), Guard: 100 * time.Millisecond, GuardError: "alone", Withdraw: 200 * time.Millisecond,
		Settle: 300 * time.Millisecond, Drain: 900 * time.Millisecond, Withdrawn: true, InFlight: 3, Unsure: 1,
		Sources: []lifecycle.SourceResult{{Name: "sockdiag", InFlight: 3, Unsure: 1, Connections: 9, Peak: 7}, {Name: "http", Err: "no answer"}},
	}
	return d
}

// verdict reads the ledger's; nil when it isn't there.
func (w *world) verdict() *registry.Verdict {
	w.t.Helper()
	kv := w.get(verdictKey)
	if kv == nil {
		return nil
	}
	v, err := registry.DecodeVerdict(verdictKey, []byte(kv.value))
	if err != nil {
		w.t.Fatal(err)
	}
	return &v
}

func (w *world) ttl(lease registry.LeaseID) *clientv3.LeaseTimeToLiveResponse {
	w.t.Helper()
	resp, err := w.cli.TimeToLive(w.t.Context(), clientv3.LeaseID(lease), clientv3.WithAttachedKeys())
	if err != nil {
		w.t.Fatal(err)
	}
	return resp
}

func TestVerdictOutlivesTheAgentUnderALeaseOfItsOwn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	a.Set(a.released(created))
	a.sync()
	own := w.record().Owner.Lease
	a.stop()

	if w.get(ledger) != nil {
		t.Error("the ledger record is still there after the agent's end")
	}
	v := w.verdict()
	if v == nil {
		t.Fatal("no verdict after the agent's end")
	}
	want := registry.Verdict{
		Owner:     registry.Owner{Cluster: cluster, PodUID: uid, PodCreated: created, Lease: v.Owner.Lease, Agent: v.Owner.Agent},
		Namespace: namespace, Pod: pod, Services: []string{service}, Node: "node-1", Zone: "zone-1", Outcome: "timed-out",
		Message: "timed out after 1.5s with 3 in flight (1 of them unsure); withdrawn after 100ms although alone; source http: no answer",
		Cause:   "prestop hook", Started: created, Deadline: created.Add(2 * time.Second), Released: created.Add(1500 * time.Millisecond),
		TotalMs: 1500, GuardMs: 100, WithdrawMs: 200, SettleMs: 300, DrainMs: 900, GuardError: "alone", Withdrawn: true, InFlight: 3, Unsure: 1,
		Sources: []registry.SourceVerdict{{Name: "sockdiag", InFlight: 3, Unsure: 1, Connections: 9, Peak: 7}, {Name: "http", Error: "no answer"}},
	}
	if got, want := encoded(t, *v), encoded(t, want); got != want {
		t.Errorf("verdict\n%s\nwant\n%s", got, want)
	}
	if v.Owner.Lease == own {
		t.Error("the verdict is under the agent's lease")
	}
	if l := w.ttl(v.Owner.Lease); l.GrantedTTL != 600 || l.TTL <= 0 || len(l.Keys) != 1 {
		t.Errorf("lease of the verdict: %+v; want 600 s and one key", l)
	}
}

func encoded(t *testing.T, v registry.Verdict) string {
	t.Helper()
	b, err := v.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestVerdictIsWrittenOnceAndLeftAloneThen(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{verdictTTL: 2 * time.Second})
	d := a.released(created)
	a.Set(d)
	a.sync()
	d.Cause = "prestop hook, and news"
	a.Set(d)
	a.sync()
	eventually(t, "the verdict is gone with its lease", func() bool { return w.get(verdictKey) == nil })
	d.State = lifecycle.Stopped
	a.Set(d)
	a.sync()
	if n := w.count(verdictKey, "PUT"); n != 1 {
		t.Errorf("written %d times, want 1", n)
	}
	if w.get(ledger) == nil {
		t.Error("the ledger record has gone with the verdict's lease")
	}
}

func TestSecondShutdownsVerdictReplacesTheFirst(t *testing.T) {
	for name, restarted := range map[string]bool{"of the same agent": false, "of the agent's next process": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			a := w.registered(spec{})
			a.Set(a.released(created))
			a.sync()
			first := w.verdict().Owner.Lease
			if restarted {
				a.kill()
				a = w.start(spec{})
			}
			a.online("ready again")
			a.sync()
			if w.verdict() == nil {
				t.Error("the verdict is gone as the instance is back")
			}
			a.Set(a.released(created.Add(time.Hour)))
			a.sync()
			v := w.verdict()
			if v == nil || !v.Started.Equal(created.Add(time.Hour)) || v.Owner.Lease == first {
				t.Fatalf("verdict %+v; want the second one, under a new lease", v)
			}
			if l := w.ttl(first); l.TTL != -1 {
				t.Errorf("lease of the first verdict: %+v; want it revoked", l)
			}
		})
	}
}

func TestLeaseThatIsNotAVerdictsIsNotRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	lease := w.lease(600)
	w.put("elsewhere", "precious", clientv3.WithLease(lease))
	w.put(verdictKey, "by hand", clientv3.WithLease(lease))
	a := w.registered(spec{})
	a.Set(a.released(created))
	a.sync()
	if w.verdict() == nil || w.get("elsewhere") == nil {
		t.Errorf("verdict %+v, a stranger's key %+v; want both", w.verdict(), w.get("elsewhere"))
	}
}

func TestNoVerdictIsKeptWhenToldSo(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{verdictTTL: -1})
	a.Set(a.released(created))
	a.sync()
	if n := len(w.history(registry.VerdictPrefix(cluster, "", ""))); n != 0 {
		t.Errorf("%d changes, want none", n)
	}
	if w.record().Verdict == "" {
		t.Error("the ledger record says nothing of the verdict")
	}
}

// failingLease is a client whose leases can't be had while refused is open.
type failingLease struct {
	clientv3.Lease
	refused <-chan struct{}
}

func (f failingLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	if ttl == 600 {
		select {
		case <-f.refused:
		default:
			return nil, errors.New("no leases today")
		}
	}
	return f.Lease.Grant(ctx, ttl)
}

func TestVerdictIsRetriedAndTheWithdrawalDoesNotWaitForIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	again := make(chan struct{})
	a := w.registered(spec{wrap: func(c *clientv3.Client) { c.Lease = failingLease{c.Lease, again} }})
	a.Set(a.released(created))
	eventually(t, "it is withdrawn, and said that the verdict is not kept", func() bool {
		return w.get(key) == nil && w.record().State == "Released" && a.said("keeping the verdict") && !a.status().Advertised
	})
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.Sync(short); err == nil || !strings.Contains(err.Error(), "no leases today") {
		t.Errorf("Sync without the verdict: %v; want what keeps it", err)
	}
	close(again)
	a.sync()
	if w.verdict() == nil || a.status().Err != "" {
		t.Errorf("verdict %+v, status %+v; want it kept, and no error", w.verdict(), a.status())
	}
}

// hangingLease is a client whose verdict's lease never comes.
type hangingLease struct {
	clientv3.Lease
	asked chan struct{}
}

func (h hangingLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	if ttl != 600 {
		return h.Lease.Grant(ctx, ttl)
	}
	select {
	case h.asked <- struct{}{}:
	default:
	}
	<-ctx.Done()
	return nil, rpctypes.ErrNoLeader
}

func TestVerdictThatHangsKeepsNeitherAReturnNorTheEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	asked := make(chan struct{}, 1)
	a := w.registered(spec{wrap: func(c *clientv3.Client) { c.Lease = hangingLease{c.Lease, asked} }})
	a.Set(a.released(created))
	<-asked
	start := time.Now()
	a.online("ready again")
	a.sync()
	if took := time.Since(start); took > 3*time.Second || w.get(key) == nil { // a request would hang for 5 s
		t.Errorf("back after %s: %+v", took, w.get(key))
	}
	a.Set(a.released(created))
	<-asked
	start = time.Now()
	a.stop()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("ended after %s", took)
	}
	if w.get(ledger) != nil {
		t.Error("the lease was not revoked")
	}
}

// countedLease answers a request for a verdict's lease when it may.
type countedLease struct {
	clientv3.Lease
	asked chan struct{}
	may   chan struct{}
}

func (c countedLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	if ttl == 600 {
		c.asked <- struct{}{}
		select {
		case <-c.may:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return c.Lease.Grant(ctx, ttl)
}

// SIGTERM often comes within milliseconds of the release.
func TestStopLeavesTheVerdictThatIsUnderWayAlone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	asked, may := make(chan struct{}, 9), make(chan struct{})
	a := w.registered(spec{wrap: func(c *clientv3.Client) { c.Lease = countedLease{c.Lease, asked, may} }})
	d := a.released(created)
	a.Set(d)
	<-asked
	d.State, d.Cause = lifecycle.Stopped, "SIGTERM"
	a.Set(d)
	close(may)
	a.sync()
	if v := w.verdict(); v == nil {
		t.Error("no verdict")
	}
	if n := len(asked); n != 0 {
		t.Errorf("the verdict's lease was asked for %d times more", n)
	}
}

func TestEndWithAVerdictIsNotHeldUpByAnEtcdThatIsAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link})
	a.Set(a.desired(lifecycle.Draining, "prestop hook"))
	a.sync()
	link.Set(etcdtest.Hold)
	a.Set(a.released(created))
	word, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := a.Sync(word); err == nil {
		t.Error("Sync says that etcd matches")
	}
	start := time.Now()
	a.stop()
	if took := time.Since(start); took > 4*time.Second { // revoking has 2 s
		t.Errorf("ended after %s", took)
	}
}
