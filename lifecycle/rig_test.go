package lifecycle_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

const quiet = 500 * time.Millisecond

// rig is a Machine between a registry and an application, both fakes, in a synctest bubble. Time stands still unless
// everybody waits, so every figure is exact.
type rig struct {
	*lifecycle.Machine
	t       *testing.T
	start   time.Time
	obs     lifecycle.Observation
	reg     *fakeRegistrar
	app     *fakeDrainer
	runErr  chan error
	endRun  context.CancelFunc
	changes log // transitions, as OnTransition was told of them
	calls   log // of the Registrar and the Drainer, in order
}

// newRig starts a Machine that has seen a Pod with a grace period of 30 s, and an endpoint that is not ready. Unless it is
// changed, the registry does what it is told at once, and nothing is in flight.
func newRig(t *testing.T, change ...func(*rig, *lifecycle.Config)) *rig {
	t.Helper()
	r := bareRig(t, change...)
	r.see(func(o *lifecycle.Observation) {
		o.Pod = lifecycle.Pod{Known: true, Name: "web-0", UID: "u1", Grace: 30 * time.Second, IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}
		o.Endpoints = []lifecycle.Endpoint{{Service: "web", Found: true, Addresses: o.Pod.IPs}}
	})
	return r
}

// bareRig starts a Machine that has seen nothing.
func bareRig(t *testing.T, change ...func(*rig, *lifecycle.Config)) *rig {
	t.Helper()
	r := &rig{t: t, start: time.Now(), runErr: make(chan error, 1)}
	r.calls.start, r.changes.start = r.start, r.start
	r.reg = &fakeRegistrar{rig: r, changed: make(chan struct{})}
	r.app = &fakeDrainer{rig: r, quiet: quiet}
	cfg := lifecycle.Config{
		Registrar: r.reg, Drainer: r.app, Budget: lifecycle.DefaultBudget(), Quiet: quiet,
		OnTransition: func(tr lifecycle.Transition) { r.changes.add("%s -> %s: %s", tr.From, tr.State, tr.Cause) },
	}
	for _, c := range change {
		c(r, &cfg)
	}
	m, err := lifecycle.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Machine = m
	ctx, cancel := context.WithCancel(t.Context())
	r.endRun = cancel
	go func() { r.runErr <- m.Run(ctx) }()
	t.Cleanup(cancel)
	return r
}

// see lets the Machine see a changed world, and waits until it has come to terms with it.
func (r *rig) see(change func(*lifecycle.Observation)) {
	r.obs.Endpoints = slices.Clone(r.obs.Endpoints)
	change(&r.obs)
	r.Observe(r.obs)
	synctest.Wait()
}

func (r *rig) ready(yes bool) {
	r.see(func(o *lifecycle.Observation) {
		o.Pod.Ready, o.Endpoints[0].Ready, o.Endpoints[0].Serving = yes, yes, yes
	})
}

// deleted is `kubectl delete --grace-period` as the own Pod's watch shows it.
func (r *rig) deleted(grace time.Duration) {
	r.see(func(o *lifecycle.Observation) { o.Pod.Terminating, o.Pod.Deadline = true, time.Now().Add(grace) })
}

// restarted is a container that the kubelet started anew, and that is ready.
func (r *rig) restarted() {
	r.see(func(o *lifecycle.Observation) { o.Pod.Restarts++ })
	r.ready(true)
}

type answer struct {
	lifecycle.Verdict
	err error
	at  time.Duration // since the rig's start
}

// stop calls Stop and doesn't wait.
func (r *rig) stop(ctx context.Context, cause string) <-chan answer {
	c := make(chan answer, 1)
	go func() {
		v, err := r.Stop(ctx, cause)
		c <- answer{v, err, time.Since(r.start)}
	}()
	synctest.Wait()
	return c
}

func (r *rig) hook() <-chan answer { return r.stop(r.t.Context(), lifecycle.CauseHook) }

// await gets an answer; a Stop that is never answered ends in a deadlock that synctest reports.
func (r *rig) await(c <-chan answer) answer {
	r.t.Helper()
	a := <-c
	synctest.Wait()
	if a.err != nil {
		r.t.Fatalf("Stop: %v", a.err)
	}
	return a
}

func (r *rig) wantState(want lifecycle.State) {
	r.t.Helper()
	synctest.Wait()
	if got := r.Status().State; got != want {
		r.t.Fatalf("state is %s, want %s; transitions:\n%s", got, want, &r.changes)
	}
}

// log is what happened, in order, each line with the time since the start.
type log struct {
	mu    sync.Mutex
	start time.Time
	lines []string
}

func (l *log) add(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf("%s ", time.Since(l.start))+fmt.Sprintf(format, args...))
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.lines, "\n")
}

func (l *log) want(t *testing.T, want ...string) {
	t.Helper()
	synctest.Wait()
	if got := l.String(); got != strings.Join(want, "\n") {
		t.Errorf("got:\n%s\nwant:\n%s", got, strings.Join(want, "\n"))
	}
}

// fakeRegistrar is a registry that can be made to hang.
type fakeRegistrar struct {
	rig *rig

	mu      sync.Mutex
	desired *lifecycle.Desired // what was set last
	applied *lifecycle.Desired // what the registry says
	hangs   bool
	err     error         // what Sync says of a registry that hangs
	changed chan struct{} // closed and replaced when applied changes
}

func (f *fakeRegistrar) Set(d lifecycle.Desired) {
	advertised := ""
	if d.Advertised() {
		advertised = " advertised"
	}
	f.rig.calls.add("set %s%s", d.State, advertised)
	f.mu.Lock()
	f.desired = &d
	f.mu.Unlock()
	f.converge()
}

// hang makes the registry not answer any more; err is what Sync says of it.
func (f *fakeRegistrar) hang(err error) {
	f.mu.Lock()
	f.hangs, f.err = true, err
	f.mu.Unlock()
}

// answer makes the registry answer again.
func (f *fakeRegistrar) answer() {
	f.mu.Lock()
	f.hangs, f.err = false, nil
	f.mu.Unlock()
	f.converge()
}

func (f *fakeRegistrar) converge() {
	f.mu.Lock()
	if f.hangs || f.applied == f.desired {
		f.mu.Unlock()
		return
	}
	f.applied = f.desired
	st := lifecycle.RegistryStatus{InSync: true, Advertised: f.applied.Advertised(), Lease: "7", Updated: time.Now()}
	close(f.changed)
	f.changed = make(chan struct{})
	f.mu.Unlock()
	f.rig.RegistryChanged(st)
}

func (f *fakeRegistrar) Sync(ctx context.Context) error {
	for {
		f.mu.Lock()
		synced, changed, err := f.applied == f.desired, f.changed, f.err
		f.mu.Unlock()
		if synced {
			f.rig.calls.add("synced")
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			f.rig.calls.add("sync ended: %v", context.Cause(ctx))
			if err == nil {
				err = errors.New("no answer")
			}
			return err
		}
	}
}

// fakeDrainer is an application with requests in flight.
type fakeDrainer struct {
	rig    *rig
	quiet  time.Duration
	busy   time.Duration // from the call of Wait
	result lifecycle.DrainResult
}

func (f *fakeDrainer) Wait(ctx context.Context, settled time.Time) lifecycle.DrainResult {
	f.rig.calls.add("drain, settled in %s", max(0, time.Until(settled)))
	until := time.Now().Add(f.busy + f.quiet)
	if until.Before(settled) {
		until = settled
	}
	t := time.NewTimer(time.Until(until))
	defer t.Stop()
	select {
	case <-t.C:
		f.rig.calls.add("quiet")
		res := f.result
		if res.Outcome == "" {
			res.Outcome = lifecycle.Drained
		}
		return res
	case <-ctx.Done():
		f.rig.calls.add("drain ended: %v", context.Cause(ctx))
		res := f.result
		res.Outcome, res.InFlight, res.Unsure = lifecycle.TimedOut, 3, 1
		return res
	}
}
