package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

const (
	lives    = 200 // registrations that the database's growth is shared out among
	together = 20  // of them at a time

	// commitInterval is how often etcd's backend commits (--backend-batch-interval's default): its size is that of the last
	// commit.
	commitInterval = 100 * time.Millisecond

	leasesPerConnection = 100
	renewEvery          = registry.DefaultTTL / 3
	withoutLeases       = 10 * time.Second // how long CPU time is counted
	withLeases          = 20 * time.Second

	returning   = 1000 // agents
	returnTTL   = 5 * time.Second
	returnAfter = returnTTL + 2*time.Second
	// returnLimit is far more than the return takes, and than starting all takes.
	returnLimit = time.Minute
	peakWindow  = 100 * time.Millisecond

	benchService = "api"
	benchTarget  = "usher-bench/" + benchService
)

// etcdCosts measures what registrations cost an etcd that has nothing else to do, and how they come back to it.
func etcdCosts(ctx context.Context, binary string, say func(string, ...any), r *Report) error {
	for _, part := range []struct {
		says    string
		measure func(context.Context, *etcd, *Report) error
	}{
		{"measuring what a registration writes", registrationCost},
		{"measuring what renewals of 1,000 and 10,000 leases take", keepaliveCost},
		{fmt.Sprintf("measuring how the records of %d agents come back to an etcd that was killed", returning), returnTimes},
	} {
		say("%s", part.says)
		err := func() (err error) {
			e, err := startEtcd(ctx, binary)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, e.remove()) }()
			return part.measure(ctx, e, r)
		}()
		if err != nil {
			return fmt.Errorf("%s: %w", part.says, err)
		}
	}
	return nil
}

// tap sees what a client asks of etcd, and when it is answered.
type tap struct {
	mu       sync.Mutex
	answered []time.Time // transactions
	written  int         // bytes of keys put or deleted and of values put
	grants   int
	revokes  int
}

func (t *tap) on(c *clientv3.Client) { c.KV, c.Lease = tapKV{c.KV, t}, tapLease{c.Lease, t} }

func (t *tap) bytes() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.written
}

type tapKV struct {
	clientv3.KV
	tap *tap
}

func (k tapKV) Txn(ctx context.Context) clientv3.Txn { return &tapTxn{Txn: k.KV.Txn(ctx), tap: k.tap} }

type tapTxn struct {
	clientv3.Txn
	tap *tap
	ops []clientv3.Op
}

func (x *tapTxn) If(cs ...clientv3.Cmp) clientv3.Txn { x.Txn = x.Txn.If(cs...); return x }

func (x *tapTxn) Then(ops ...clientv3.Op) clientv3.Txn {
	x.Txn, x.ops = x.Txn.Then(ops...), ops
	return x
}

func (x *tapTxn) Else(ops ...clientv3.Op) clientv3.Txn { x.Txn = x.Txn.Else(ops...); return x }

func (x *tapTxn) Commit() (*clientv3.TxnResponse, error) {
	resp, err := x.Txn.Commit()
	if err != nil {
		return resp, err
	}
	x.tap.mu.Lock()
	defer x.tap.mu.Unlock()
	x.tap.answered = append(x.tap.answered, time.Now())
	if resp.Succeeded {
		x.tap.written += written(x.ops)
	}
	return resp, nil
}

// written is how many bytes of keys and values ops change.
func written(ops []clientv3.Op) (n int) {
	for _, op := range ops {
		if op.IsPut() || op.IsDelete() {
			n += len(op.KeyBytes()) + len(op.ValueBytes())
		}
	}
	return n
}

type tapLease struct {
	clientv3.Lease
	tap *tap
}

func (l tapLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	resp, err := l.Lease.Grant(ctx, ttl)
	if err == nil {
		l.tap.mu.Lock()
		l.tap.grants++
		l.tap.mu.Unlock()
	}
	return resp, err
}

func (l tapLease) Revoke(ctx context.Context, id clientv3.LeaseID) (*clientv3.LeaseRevokeResponse, error) {
	resp, err := l.Lease.Revoke(ctx, id)
	if err == nil {
		l.tap.mu.Lock()
		l.tap.revokes++
		l.tap.mu.Unlock()
	}
	return resp, err
}

// registrant is a registrar that runs, of one instance with one record of format grpc.
type registrant struct {
	*registry.Registrar
	pod  lifecycle.Pod
	stop context.CancelFunc
	done chan error
}

func startRegistrant(ctx context.Context, e *etcd, t *tap, number int, ttl time.Duration) (*registrant, error) {
	f, err := format.New(format.Spec{Type: "grpc", Target: benchTarget, Port: "http"})
	if err != nil {
		return nil, err
	}
	// Names of the usual length: they are most of what is written.
	pod := lifecycle.Pod{
		Known: true, Namespace: "usher-bench", Name: fmt.Sprintf("%s-7c9d8f6b5-%05d", benchService, number),
		UID:  fmt.Sprintf("6f1e2d3c-4b5a-4978-8695-%012d", number),
		Node: "node-1", Created: time.Now().UTC().Truncate(time.Second),
	}
	r, err := registry.New(registry.Config{
		Cluster: "default", Namespace: pod.Namespace, Pod: pod.Name, PodUID: pod.UID, TTL: ttl,
		Formats: map[string][]registry.NamedFormat{benchService: {{Name: "grpc", Format: f}}},
		Dial: func() (*clientv3.Client, error) {
			c, err := e.dial()
			if err == nil {
				t.on(c)
			}
			return c, err
		},
	})
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(ctx)
	g := &registrant{r, pod, stop, make(chan error, 1)}
	go func() { g.done <- r.Run(ctx) }()
	return g, nil
}

// reach sets a state and waits until etcd has it.
func (g *registrant) reach(ctx context.Context, state lifecycle.State, cause string, v *lifecycle.Verdict) error {
	g.Set(lifecycle.Desired{
		State: state, Cause: cause, Since: time.Now().UTC().Truncate(time.Second), Pod: g.pod, Verdict: v,
		Instances: []lifecycle.Instance{{
			Service: benchService, Advertise: state == lifecycle.Online, Addresses: []netip.Addr{netip.MustParseAddr(address)},
			Ports: []lifecycle.Port{{Name: "http", Number: port, Protocol: "TCP"}},
		}},
	})
	if err := g.Sync(ctx); err != nil {
		return fmt.Errorf("registering pod %s as %s: %w", g.pod.Name, state, err)
	}
	return nil
}

func (g *registrant) end() error {
	g.stop()
	return <-g.done
}

// step is what one part of an instance's life costs.
type step struct {
	name                string
	transactions, bytes int
}

// live runs an instance through its life.
func live(ctx context.Context, e *etcd, t *tap, number int) ([]step, error) {
	ctx, cancel := context.WithTimeout(ctx, returnLimit)
	defer cancel()
	g, err := startRegistrant(ctx, e, t, number, registry.DefaultTTL)
	if err != nil {
		return nil, err
	}
	defer g.stop()
	var steps []step
	for _, s := range []struct {
		name    string
		state   lifecycle.State
		cause   string
		verdict *lifecycle.Verdict
	}{
		{"start (Pending)", lifecycle.Pending, "no endpoint seen yet", nil},
		{"online", lifecycle.Online, "endpoint ready in service " + benchService, nil},
		{"withdrawn (Draining)", lifecycle.Draining, "preStop hook called", nil},
		{"end (verdict, lease revoked)", lifecycle.Released, "drained", &lifecycle.Verdict{Cause: "preStop hook called", Withdrawn: true}},
	} {
		transactions, bytes := g.Counters.Transactions.Load(), t.bytes()
		if err := g.reach(ctx, s.state, s.cause, s.verdict); err != nil {
			return nil, err
		}
		if s.state == lifecycle.Released {
			if err := g.end(); err != nil {
				return nil, err
			}
		}
		steps = append(steps, step{s.name, int(g.Counters.Transactions.Load() - transactions), t.bytes() - bytes})
	}
	return steps, nil
}

func registrationCost(ctx context.Context, e *etcd, r *Report) error {
	var t tap
	steps, err := live(ctx, e, &t, 0)
	if err != nil {
		return err
	}
	grew, err := growth(ctx, e)
	if err != nil {
		return err
	}
	r.Rows = append(r.Rows, stepRows(steps)...)
	r.Rows = append(r.Rows, Row{Figure: "  growth of the database", Unit: Octets, Ours: one(grew)})
	r.Notes = append(r.Notes, fmt.Sprintf("A registration is the ledger record and one record of format grpc. Bytes are those of keys and values that its transactions put, and of keys "+
		"that they delete, without what gRPC, Raft and the B-tree add. Beside the transactions it takes %d lease grant and %d revoke. "+
		"The growth is that of dbSizeInUse over %d whole registrations, by instance, without compaction.", t.grants, t.revokes, lives))
	return nil
}

func stepRows(steps []step) (rows []Row) {
	all := step{name: "all of them"}
	add := func(s step) {
		rows = append(rows,
			Row{Figure: "a registration, " + s.name + ": transactions", Unit: Count, Ours: one(float64(s.transactions))},
			Row{Figure: "  keys and values written", Unit: Octets, Ours: one(float64(s.bytes))})
	}
	for _, s := range steps {
		add(s)
		all.transactions += s.transactions
		all.bytes += s.bytes
	}
	add(all)
	return rows
}

// growth is by how many bytes the database grows with each registration.
func growth(ctx context.Context, e *etcd) (float64, error) {
	cli, err := e.dial()
	if err != nil {
		return 0, err
	}
	defer cli.Close()
	size := func() (int64, error) {
		if err := pause(ctx, 3*commitInterval); err != nil {
			return 0, err
		}
		s, err := cli.Status(ctx, cli.Endpoints()[0])
		if err != nil {
			return 0, fmt.Errorf("asking for the database's size: %w", err)
		}
		return s.DbSizeInUse, nil
	}
	before, err := size()
	if err != nil {
		return 0, err
	}
	err = parallel(together, func(i int) error {
		for n := i; n < lives; n += together {
			if _, err := live(ctx, e, new(tap), 1+n); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	after, err := size()
	return float64(after-before) / lives, err
}

// parallel runs n of do at once.
func parallel(n int, do func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err // the others are mostly the same
		}
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// keepers renew leases as the registrar does: one stream for each, a third of the TTL after the last one was
// sent.
type keepers struct {
	ctx      context.Context
	stop     context.CancelCauseFunc
	wg       sync.WaitGroup
	clients  []*clientv3.Client
	renewals atomic.Int64
}

func newKeepers(ctx context.Context) *keepers {
	k := new(keepers)
	k.ctx, k.stop = context.WithCancelCause(ctx)
	return k
}

func (k *keepers) close() {
	k.stop(nil)
	k.wg.Wait()
	for _, c := range k.clients {
		c.Close()
	}
}

// add grants n leases and opens their streams, before it returns; then it renews them.
func (k *keepers) add(e *etcd, n int) error {
	clients := make([]*clientv3.Client, n/leasesPerConnection)
	for i := range clients {
		c, err := e.dial()
		if err != nil {
			return err
		}
		clients[i] = c
		k.clients = append(k.clients, c)
	}
	return parallel(len(clients), func(i int) error {
		for range leasesPerConnection {
			lease, err := clients[i].Grant(k.ctx, int64(registry.DefaultTTL/time.Second))
			if err != nil {
				return fmt.Errorf("getting a lease: %w", err)
			}
			stream, err := etcdserverpb.NewLeaseClient(clients[i].ActiveConnection()).
				LeaseKeepAlive(clientv3.WithRequireLeader(k.ctx), grpc.WaitForReady(true))
			if err != nil {
				return fmt.Errorf("opening a stream of renewals: %w", err)
			}
			k.wg.Go(func() {
				// Agents start at any time.
				for next := rand.N(renewEvery); pause(k.ctx, next) == nil; {
					sent := time.Now()
					if err := renew(stream, int64(lease.ID)); err != nil {
						k.stop(err) // of no consequence when k was stopped before
						return
					}
					k.renewals.Add(1)
					next = renewEvery - time.Since(sent)
				}
			})
		}
		return nil
	})
}

func renew(stream grpc.BidiStreamingClient[etcdserverpb.LeaseKeepAliveRequest, etcdserverpb.LeaseKeepAliveResponse], lease int64) error {
	if err := stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: lease}); err != nil {
		return fmt.Errorf("renewing a lease: %w", err)
	}
	resp, err := stream.Recv()
	if err != nil {
		return fmt.Errorf("renewing a lease: %w", err)
	}
	if resp.TTL <= 0 {
		return errors.New("renewing a lease: it had ended")
	}
	return nil
}

func keepaliveCost(ctx context.Context, e *etcd, r *Report) error {
	k := newKeepers(ctx)
	defer k.close()
	leases := 0
	var rates []string
	for _, p := range []struct {
		name   string
		leases int
		during time.Duration
	}{{"no leases", 0, withoutLeases}, {"1,000 leases", 1000, withLeases}, {"10,000 leases", 10000, withLeases}} {
		if err := k.add(e, p.leases-leases); err != nil {
			return err
		}
		leases = p.leases
		before, begun := k.renewals.Load(), time.Now()
		c, err := idle(k.ctx, []int{e.cmd.Process.Pid}, p.during)
		if err != nil {
			return err
		}
		rates = append(rates, fmt.Sprintf("%.0f", float64(k.renewals.Load()-before)/time.Since(begun).Seconds()))
		r.Rows = append(r.Rows,
			Row{Figure: "etcd, " + p.name + ": CPU of one core", Unit: Share, Ours: shares(c)},
			Row{Figure: "  RSS", Unit: Bytes, Ours: rss(c)})
	}
	r.Notes = append(r.Notes, fmt.Sprintf("Leases: TTL %s, renewed after a third of it, on a stream each, as the registrar does; but %d of them share a connection, where each agent has its own. "+
		"CPU of the etcd process, all threads, over %s (%s without leases); %s renewals a second.",
		registry.DefaultTTL, leasesPerConnection, withLeases, withoutLeases, strings.Join(rates, ", ")))
	return nil
}

func returnTimes(ctx context.Context, e *etcd, r *Report) error {
	var t tap
	agents := make([]*registrant, returning)
	defer func() {
		for _, g := range agents {
			if g != nil {
				g.stop()
			}
		}
		for _, g := range agents {
			if g != nil {
				<-g.done
			}
		}
	}()
	for i := range agents {
		g, err := startRegistrant(ctx, e, &t, i, returnTTL)
		if err != nil {
			return err
		}
		agents[i] = g
	}
	starting, cancel := context.WithTimeout(ctx, returnLimit)
	defer cancel()
	err := parallel(returning, func(i int) error {
		return agents[i].reach(starting, lifecycle.Online, "endpoint ready in service "+benchService, nil)
	})
	if err != nil {
		return err
	}

	revision, err := e.revision(ctx)
	if err != nil {
		return err
	}
	e.kill()
	if err := pause(ctx, returnAfter); err != nil {
		return err
	}
	t.mu.Lock()
	t.answered = nil
	t.mu.Unlock()
	begun, err := e.start(ctx)
	if err != nil {
		return err
	}
	back, gone, err := returns(ctx, e, begun, revision)
	if err != nil {
		return err
	}
	t.mu.Lock()
	answered := slices.Clone(t.answered)
	t.mu.Unlock()
	d := durations(back)
	r.Rows = append(r.Rows,
		Row{Figure: fmt.Sprintf("etcd back after an outage past the TTL -> record of each of %d agents", returning), Unit: Seconds, Ours: d},
		Row{Figure: "  the last one", Unit: Seconds, Ours: one(slices.Max(back).Seconds())},
		Row{Figure: "  most transactions in 100 ms", Unit: Count, Ours: one(float64(peak(answered, peakWindow)))})
	r.Notes = append(r.Notes, fmt.Sprintf("Return: %d registrars in the bench's process, each with its own connection, TTL %s; etcd gets SIGKILL and is started again %s later. From its first answer until a "+
		"watch has each record under a new lease; %d transactions in all. etcd gives old leases their whole TTL again when it starts, so the old records stay "+
		"meanwhile: the watch saw %d deleted.", returning, returnTTL, returnAfter, len(answered), gone))
	return nil
}

// returns waits until every record was put again after revision, and says how long after begun, and how many deletions
// there were meanwhile.
func returns(ctx context.Context, e *etcd, begun time.Time, revision int64) (back []time.Duration, gone int, err error) {
	ctx, cancel := context.WithTimeout(ctx, returnLimit)
	defer cancel()
	cli, err := e.dial()
	if err != nil {
		return nil, 0, err
	}
	defer cli.Close()
	// The watch may begin after the first records: it tells of those at once.
	seen := map[string]bool{}
	for ev := range cli.Watch(ctx, benchTarget+"/", clientv3.WithPrefix(), clientv3.WithRev(revision+1)) {
		at := time.Now()
		if err := ev.Err(); err != nil {
			return nil, 0, fmt.Errorf("watching the records: %w", err)
		}
		for _, x := range ev.Events {
			switch key := string(x.Kv.Key); {
			case x.Type == mvccpb.DELETE:
				gone++
			case !seen[key]:
				seen[key] = true
				back = append(back, at.Sub(begun))
			}
		}
		if len(seen) == returning {
			return back, gone, nil
		}
	}
	return nil, 0, fmt.Errorf("%d of %d records are back %s after etcd was: %w", len(seen), returning, returnLimit, context.Cause(ctx))
}

// peak is the most of times that lie within any window.
func peak(times []time.Time, window time.Duration) (most int) {
	s := slices.SortedFunc(slices.Values(times), time.Time.Compare)
	first := 0
	for i, t := range s {
		for t.Sub(s[first]) >= window {
			first++
		}
		most = max(most, i-first+1)
	}
	return most
}
