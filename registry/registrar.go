package registry

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc/connectivity"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry/format"
)

const (
	// DefaultTTL is the lease's: how long a record outlives an agent that was killed.
	DefaultTTL = 15 * time.Second
	// MinTTL leaves the client, which renews at a third of the TTL, time for one renewal that fails.
	MinTTL = 3 * time.Second

	requestTimeout = 5 * time.Second
	revokeTimeout  = 2 * time.Second
	firstBackoff   = 50 * time.Millisecond
	maxBackoff     = 5 * time.Second
	// lostLeaseSpread spreads the return of agents that all lost their leases in one etcd outage. Each waits once.
	lostLeaseSpread = time.Second
	// minPause keeps somebody who changes a watched key all the time from being answered at his own pace.
	minPause = 50 * time.Millisecond
	// verifyEvery bounds how long a change goes unseen that the watch missed.
	verifyEvery = time.Minute
)

// Config is what a Registrar needs.
type Config struct {
	Cluster, Namespace, Pod, PodUID string
	// Dial connects to etcd. It is called again after it failed.
	Dial func() (*clientv3.Client, error)
	// Formats are the consumer records of each Service.
	Formats map[string][]NamedFormat
	// Attributes are what records say of the instance unless the Pod's annotations say otherwise.
	Attributes Attributes
	// TTL of the lease in whole seconds; 0 means DefaultTTL.
	TTL time.Duration
	// VerdictTTL, in whole seconds, is how long the verdict of a shutdown stays in the ledger; 0 means DefaultVerdictTTL,
	// less than 0 that none is written.
	VerdictTTL time.Duration
	// OnHold is called from the registrar's goroutine with the hold that is found on the Pod, and with nil when it is over;
	// it must not block. Until the first call there is none.
	OnHold func(*lifecycle.Hold)
	// OnChange is called from the registrar's goroutine whenever the status changes; it must not block.
	OnChange func(lifecycle.RegistryStatus)
	Logger   *zap.Logger
}

// NamedFormat is a format and what it is called in the ledger.
type NamedFormat struct {
	Name string
	format.Format
}

// Counters are running totals since the agent's start.
type Counters struct {
	Transactions, Failures, Conflicts, LeasesGranted, LeasesLost, Renewals atomic.Int64
}

// ErrSuperseded says that another agent owns the ledger record: a newer Pod of the same name, or another agent process
// of this Pod.
var ErrSuperseded = errors.New("superseded")

// ErrForeign says that a key is taken by a value that is not Usher's to change.
var ErrForeign = errors.New("not ours")

// Registrar keeps the records of one instance in etcd. It satisfies lifecycle.Registrar.
type Registrar struct {
	cfg      Config
	log      *zap.Logger
	agent    string // this process, in Owner.Agent
	holdKey  string
	Counters Counters
	client   atomic.Pointer[clientv3.Client] // session.cli, once there is one

	mu      sync.Mutex
	desired *lifecycle.Desired
	gen     uint64        // of desired
	applied uint64        // generation that etcd was last seen to match
	said    error         // of the last attempt: all that is not as desired
	kept    error         // of the last attempt: what kept it from being carried out
	changed chan struct{} // closed and replaced at each change of these
	abandon func()        // ends what is done for the verdict of desired; nil: nothing is

	wake chan struct{} // Set was called
	s    session       // of Run's goroutine only
}

// session is what Run's goroutine knows of etcd.
type session struct {
	cli       *clientv3.Client
	live      context.Context // ends with Run, later than the context Run was given
	lease     clientv3.LeaseID
	leases    map[clientv3.LeaseID]bool // all that this process was granted
	lost      chan struct{}             // closed when the lease is lost; nil without one
	stopLease context.CancelFunc
	late      bool // the last one was lost, and the wait of returnLate is still to come

	known    map[string]known // keys as last seen; one that is missing is taken for absent, and the transaction proves it
	stale    bool             // known is to be read anew before it is relied on
	held     map[string]bool  // ledger keys that this process has owned
	revision int64            // of the last transaction
	// inherited is the lease of the agent before this one, whose records were left as they are; 0: there were none.
	inherited clientv3.LeaseID

	stopWatch context.CancelFunc
	watched   []string
	events    chan event // of the present watch

	hold     *lifecycle.Hold // as last told; nil: none
	badHold  error           // what stands in place of one
	holdEnds *time.Timer

	keptVerdict  *lifecycle.Verdict // that the ledger got last
	verdictLease clientv3.LeaseID   // granted for the next one
	verdictErr   error              // why the present one has not been kept yet

	status lifecycle.RegistryStatus
}

// event is what a watch has seen.
type event struct {
	rev int64 // mod revision of a change
	err error // the watch itself broke
}

type known struct {
	rev   int64 // mod revision; 0: absent
	value string
	lease clientv3.LeaseID
}

// New validates cfg.
func New(cfg Config) (*Registrar, error) {
	for _, f := range []struct{ name, value string }{
		{"cluster", cfg.Cluster}, {"namespace", cfg.Namespace}, {"pod", cfg.Pod}, {"pod UID", cfg.PodUID},
	} {
		if err := checkSegment(f.name, f.value); err != nil {
			return nil, err
		}
	}
	for service := range cfg.Formats {
		if err := checkSegment("service", service); err != nil {
			return nil, err
		}
	}
	if cfg.TTL == 0 {
		cfg.TTL = DefaultTTL
	}
	if cfg.TTL < MinTTL || cfg.TTL%time.Second != 0 {
		return nil, fmt.Errorf("lease TTL %s: want whole seconds, at least %s", cfg.TTL, MinTTL)
	}
	switch {
	case cfg.VerdictTTL == 0:
		cfg.VerdictTTL = DefaultVerdictTTL
	case cfg.VerdictTTL > 0 && cfg.VerdictTTL%time.Second != 0:
		return nil, fmt.Errorf("verdict TTL %s: want whole seconds, or less than 0 to keep no verdict", cfg.VerdictTTL)
	}
	if cfg.Dial == nil {
		return nil, errors.New("no way to dial etcd")
	}
	if err := checkOverlap(cfg.Formats); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	if cfg.OnChange == nil {
		cfg.OnChange = func(lifecycle.RegistryStatus) {}
	}
	if cfg.OnHold == nil {
		cfg.OnHold = func(*lifecycle.Hold) {}
	}
	return &Registrar{
		cfg: cfg, log: cfg.Logger, agent: rand.Text(), holdKey: HoldKey(cfg.Cluster, cfg.Namespace, cfg.PodUID),
		changed: make(chan struct{}),
		wake:    make(chan struct{}, 1),
		s: session{
			leases: map[clientv3.LeaseID]bool{},
			known:  map[string]known{},
			held:   map[string]bool{},
		},
	}, nil
}

func checkSegment(field, value string) error {
	if value == "" {
		return fmt.Errorf("%s: empty, and it is part of every key", field)
	}
	for _, r := range value {
		if r == '/' || r <= ' ' || r == 0x7f || r == '\ufffd' {
			return fmt.Errorf("%s %q: want no slash, space or control character, as it is one segment of a key", field, value)
		}
	}
	return nil
}

// checkOverlap refuses a format whose readers would take another one's records for their own.
func checkOverlap(formats map[string][]NamedFormat) error {
	seen := map[string]string{}
	for service, fs := range formats {
		for _, f := range fs {
			p := f.Prefix()
			for q, other := range seen {
				if len(p) >= len(q) && p[:len(q)] == q || len(q) >= len(p) && q[:len(p)] == p {
					return fmt.Errorf("service %s: format %s writes under %q, which overlaps %q of service %s: readers of the shorter one would read both", service, f.Name, p, q, other)
				}
			}
			seen[p] = service
		}
	}
	return nil
}

// Set replaces what is desired. It never blocks.
func (r *Registrar) Set(d lifecycle.Desired) {
	r.mu.Lock()
	if r.abandon != nil && !reflect.DeepEqual(d.Verdict, r.desired.Verdict) {
		r.abandon()
	}
	r.desired, r.gen = &d, r.gen+1
	r.broadcast()
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Sync waits until etcd matches what was last set, and has its verdict; what has to be left alone doesn't count. When
// ctx ends first, the error is ctx's and what kept it, if an attempt has failed.
func (r *Registrar) Sync(ctx context.Context) error {
	r.mu.Lock()
	want := r.gen
	for {
		if r.applied >= want {
			r.mu.Unlock()
			return nil
		}
		changed, kept := r.changed, r.kept
		r.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			if kept != nil {
				return fmt.Errorf("%w (%w)", kept, context.Cause(ctx))
			}
			return fmt.Errorf("etcd has not answered: %w", context.Cause(ctx))
		}
		r.mu.Lock()
	}
}

func (r *Registrar) broadcast() {
	close(r.changed)
	r.changed = make(chan struct{})
}

// Run keeps etcd as desired until ctx ends, then revokes the lease and with it whatever is left. That takes at most 2 s,
// and as long again as Dial takes if it is under way.
func (r *Registrar) Run(ctx context.Context) error {
	live, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	r.s.live = live
	verify := time.NewTicker(verifyEvery + mrand.N(verifyEvery/10))
	defer verify.Stop()
	retry := time.NewTimer(time.Hour)
	retry.Stop()
	r.s.holdEnds = time.NewTimer(time.Hour)
	defer r.s.holdEnds.Stop()
	r.s.holdEnds.Stop()
	var attempts, watches pause
	// Records that are still in etcd are to be taken over before their lease ends.
	longest := min(maxBackoff, r.cfg.TTL/3)
	var last time.Time // attempt

	for {
		select {
		case <-ctx.Done():
			r.end()
			return nil
		case <-r.wake:
			attempts.reset()
		case <-r.s.lost:
			r.loseLease()
			r.s.late = true
		case ev := <-r.s.events:
			if ev.err != nil {
				if watches.fresh() {
					r.log.Warn("watch broken, reading and watching anew", zap.Error(ev.err))
				}
				r.unwatch()
				r.s.stale = true
				retry.Reset(watches.next(longest))
				continue
			}
			watches.reset()
			if ev.rev <= r.s.revision {
				continue // our own writing
			}
			r.s.stale = true
			if wait := minPause - time.Since(last); wait > 0 {
				retry.Reset(wait)
				continue
			}
		case <-r.s.holdEnds.C:
		case <-verify.C:
			r.s.stale = true
		case <-retry.C:
			r.s.stale = true
		}
		retry.Stop()
		if r.converge(ctx) {
			attempts.reset()
		} else {
			r.Counters.Failures.Add(1)
			retry.Reset(attempts.next(longest))
		}
		last = time.Now()
	}
}

// pause is the next one before jitter; 0 means firstBackoff.
type pause time.Duration

func (p *pause) reset()      { *p = 0 }
func (p *pause) fresh() bool { return *p == 0 }

func (p *pause) next(longest time.Duration) time.Duration {
	d := max(time.Duration(*p), firstBackoff)
	*p = pause(min(2*d, longest))
	return d/2 + mrand.N(d)
}

// end revokes the lease, best effort: what is left goes with it now instead of a TTL later.
func (r *Registrar) end() {
	r.unwatch()
	if r.s.cli == nil {
		return
	}
	if lease := r.s.lease; lease != 0 {
		ctx, cancel := context.WithTimeout(r.s.live, revokeTimeout)
		defer cancel()
		r.forgetLease()
		if _, err := r.s.cli.Revoke(ctx, lease); err != nil {
			r.log.Warn("lease not revoked, it ends by itself", zap.Stringer("lease", LeaseID(lease)), zap.Duration("ttl", r.cfg.TTL), zap.Error(err))
		}
	}
	r.s.cli.Close()
}

// converge makes etcd match what is desired, once, and says whether it does. It gives up when ctx ends.
func (r *Registrar) converge(ctx context.Context) bool {
	r.mu.Lock()
	d, gen := r.desired, r.gen
	r.mu.Unlock()
	if d == nil {
		return true
	}
	problem, err := r.apply(ctx, *d)
	if err != nil && ctx.Err() != nil {
		return false // the end, not a failure
	}
	if d.Verdict == nil {
		r.s.verdictErr = nil
	}
	if err == nil && r.owesVerdict(*d) {
		// What consumers see is told first, and a return comes before the verdict on what was.
		r.report(d.State, 0, problem, r.s.verdictErr)
		keep, done := r.whileDesired(ctx, d.Verdict)
		err = r.keepVerdict(keep, *d)
		pointless := keep.Err() != nil
		done()
		if err != nil && pointless {
			return ctx.Err() == nil
		}
		r.s.verdictErr = err
	}
	return r.report(d.State, gen, problem, err)
}

// whileDesired ends with ctx, and when v is desired no more. done is to be called.
func (r *Registrar) whileDesired(ctx context.Context, v *lifecycle.Verdict) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancel(ctx)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.abandon = cancel
	if !reflect.DeepEqual(r.desired.Verdict, v) {
		cancel()
	}
	return ctx, func() {
		cancel()
		r.mu.Lock()
		defer r.mu.Unlock()
		r.abandon = nil
	}
}

// report tells of an attempt, and says whether all is as desired. gen is what etcd matches without an err; 0 when more
// is to be done for it.
func (r *Registrar) report(state lifecycle.State, gen uint64, problem, err error) bool {
	now := errors.Join(problem, err)
	r.mu.Lock()
	before := r.said
	r.said, r.kept = now, err
	if err == nil && gen != 0 {
		r.applied = gen // a problem is nothing that waiting would mend
	}
	r.broadcast()
	r.mu.Unlock()

	switch {
	case now == nil && before != nil:
		r.log.Info("registry as desired again", zap.Stringer("state", state))
	case now == nil || before != nil && before.Error() == now.Error():
	case err != nil:
		r.log.Warn("registry not as desired, retrying", zap.Stringer("state", state), zap.Error(err))
	case errors.Is(problem, ErrForeign) || errors.Is(problem, ErrSuperseded):
		r.Counters.Conflicts.Add(1)
		r.log.Error("registry left alone", zap.Error(problem))
	default:
		r.log.Error("no record can be made", zap.Error(problem))
	}
	r.publish(now)
	return now == nil
}

// publish hands out the status, if it is another than before.
func (r *Registrar) publish(err error) {
	st := lifecycle.RegistryStatus{InSync: err == nil, Updated: time.Now()}
	for _, k := range slices.Sorted(maps.Keys(r.s.known)) {
		if kn := r.s.known[k]; kn.rev != 0 && kn.lease != 0 && (kn.lease == r.s.lease || kn.lease == r.s.inherited) {
			st.Keys = append(st.Keys, k)
			st.Advertised = st.Advertised || !isLedger(k)
			st.Inherited = st.Inherited || !isLedger(k) && kn.lease != r.s.lease
		}
	}
	if st.Inherited {
		st.Lease = LeaseID(r.s.inherited).String()
	} else if r.s.lease != 0 {
		st.Lease = LeaseID(r.s.lease).String()
	}
	if err != nil {
		st.Err = err.Error()
	}
	old := r.s.status
	if old.InSync == st.InSync && old.Lease == st.Lease && old.Inherited == st.Inherited && old.Err == st.Err && slices.Equal(old.Keys, st.Keys) && !old.Updated.IsZero() {
		return
	}
	r.s.status = st
	r.cfg.OnChange(st)
}

// grant gets a lease and keeps it alive.
func (r *Registrar) grant(ctx context.Context, d lifecycle.Desired) error {
	if err := r.returnLate(ctx, d); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	asked := time.Now()
	resp, err := r.s.cli.Grant(clientv3.WithRequireLeader(ctx), int64(r.cfg.TTL/time.Second))
	if err != nil {
		return fmt.Errorf("getting a lease: %w", r.unanswered(err))
	}
	keep, stop := context.WithCancel(r.s.live)
	lost := make(chan struct{})
	cli := r.s.cli
	go func() {
		defer close(lost)
		r.renew(keep, cli, resp.ID, asked)
	}()
	r.s.lease, r.s.lost, r.s.stopLease, r.s.late = resp.ID, lost, stop, false
	r.s.leases[resp.ID] = true
	r.Counters.LeasesGranted.Add(1)
	r.log.Debug("lease granted", zap.Stringer("lease", LeaseID(resp.ID)), zap.Duration("ttl", r.cfg.TTL))
	return nil
}

// returnLate is for an agent that had a lease and lost it: it waits until etcd is there again, and then at random for up to
// lostLeaseSpread, so that not all agents that one outage hit return at once. News of what is desired ends that wait, and
// whoever has nothing to advertise does without: a withdrawal can't wait.
func (r *Registrar) returnLate(ctx context.Context, d lifecycle.Desired) error {
	if !r.s.late {
		return nil
	}
	conn := r.s.cli.ActiveConnection()
	ready, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if !conn.WaitForStateChange(ready, s) {
			return fmt.Errorf("getting a lease: %w", r.unanswered(ready.Err()))
		}
	}
	r.s.late = false
	if !d.Advertised() {
		return nil
	}
	select {
	case <-time.After(mrand.N(lostLeaseSpread)):
	case <-r.wake:
		select {
		case r.wake <- struct{}{}: // for Run, which takes it next
		default:
		}
	case <-ctx.Done():
	}
	return nil
}

func (r *Registrar) forgetLease() {
	if r.s.stopLease != nil {
		r.s.stopLease()
	}
	r.s.lease, r.s.lost, r.s.stopLease = 0, nil, nil
}

func (r *Registrar) loseLease() {
	r.log.Warn("lease lost, registering anew", zap.Stringer("lease", LeaseID(r.s.lease)))
	r.Counters.LeasesLost.Add(1)
	r.forgetLease()
	r.s.stale = true
	err := errors.New("the lease was lost")
	r.mu.Lock()
	r.said, r.kept = err, err
	r.broadcast()
	r.mu.Unlock()
	r.publish(err)
}

// rewatch watches exactly keys, so that what others do to them is seen at once.
func (r *Registrar) rewatch(keys []string) {
	if r.s.stopWatch != nil && slices.Equal(keys, r.s.watched) {
		return
	}
	r.unwatch()
	ctx, stop := context.WithCancel(r.s.live)
	// A channel of its own, so that nothing of an earlier watch is taken for this one's.
	events := make(chan event, 16)
	r.s.stopWatch, r.s.watched, r.s.events = stop, keys, events
	cli, from := r.s.cli, r.s.revision+1
	// A member that has lost the others would go on serving a watch on which nothing ever comes.
	through := clientv3.WithRequireLeader(ctx)
	for _, key := range keys {
		go func() {
			tell := func(ev event) {
				select {
				case events <- ev:
				case <-ctx.Done():
				}
			}
			err := errors.New("ended")
			for resp := range cli.Watch(through, key, clientv3.WithRev(from)) {
				if resp.Err() != nil {
					err = resp.Err()
					break
				}
				for _, ev := range resp.Events {
					tell(event{rev: ev.Kv.ModRevision})
				}
			}
			tell(event{err: fmt.Errorf("watching %s: %w", key, err)})
		}()
	}
}

func (r *Registrar) unwatch() {
	if r.s.stopWatch != nil {
		r.s.stopWatch()
	}
	r.s.stopWatch, r.s.watched, r.s.events = nil, nil, nil
}
