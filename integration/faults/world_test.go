package faults_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/faults/registrant/wire"
	"usher.dev/usher/registry"
)

const ledger = "/usher/v1/test/instances/shop/api/api-0"

// world is one test's etcd, with somebody who watches it.
type world struct {
	t    *testing.T
	etcd *etcd
	cli  *clientv3.Client // may do everything
	seen *observer
	env  []string // of registrants
}

func newWorld(t *testing.T, members int, flags ...string) *world {
	w := &world{t: t, etcd: startEtcd(t, members, false, flags...)}
	w.use(w.etcd.client(nil))
	return w
}

// use makes c the world's client, and watches through it from now on.
func (w *world) use(c *clientv3.Client) {
	w.t.Helper()
	w.cli = c
	w.answers()
	if w.seen != nil {
		w.seen.stop()
	}
	w.seen = observe(w.t, c)
}

// answers waits until etcd does.
func (w *world) answers() {
	w.t.Helper()
	eventually(w.t, patience, "etcd answers", func() bool {
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Second)
		defer cancel()
		_, err := w.cli.Get(ctx, "x")
		return err == nil
	})
}

// observer is a consumer that sees everything: a watch, and a look at the whole when the watch breaks.
type observer struct {
	mu      sync.Mutex
	keys    map[string]*key
	byHand  map[string]bool // keys that the test itself puts
	wrong   []string
	stop    func()        // may be called twice
	longest time.Duration // gap of a consumer key since mark
}

type key struct {
	value string
	rev   int64
	lease string // empty: absent
	gone  time.Time
}

func observe(t testing.TB, cli *clientv3.Client) *observer {
	o := &observer{keys: map[string]*key{}, byHand: map[string]bool{}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			o.follow(ctx, cli)
		}
	}()
	o.stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(func() {
		o.stop()
		for _, w := range o.wrong {
			t.Error(w)
		}
	})
	return o
}

func (o *observer) follow(ctx context.Context, cli *clientv3.Client) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	look, stop := context.WithTimeout(ctx, time.Second)
	resp, err := cli.Get(look, "\x00", clientv3.WithFromKey())
	stop()
	if err != nil {
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
		}
		return
	}
	there := map[string]bool{}
	for _, kv := range resp.Kvs {
		there[string(kv.Key)] = true
		o.put(string(kv.Key), string(kv.Value), kv.ModRevision, kv.Lease)
	}
	o.mu.Lock()
	var gone []string
	for k, v := range o.keys {
		if v.lease != "" && !there[k] {
			gone = append(gone, k)
		}
	}
	o.mu.Unlock()
	for _, k := range gone {
		o.remove(k)
	}
	for resp := range cli.Watch(clientv3.WithRequireLeader(ctx), "\x00", clientv3.WithFromKey(), clientv3.WithRev(resp.Header.Revision+1)) {
		if resp.Err() != nil {
			return
		}
		for _, ev := range resp.Events {
			if ev.Type == clientv3.EventTypeDelete {
				o.remove(string(ev.Kv.Key))
			} else {
				o.put(string(ev.Kv.Key), string(ev.Kv.Value), ev.Kv.ModRevision, ev.Kv.Lease)
			}
		}
	}
}

func (o *observer) put(name, value string, rev, lease int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.byHand[name] {
		return
	}
	if lease == 0 {
		o.wrong = append(o.wrong, fmt.Sprintf("revision %d: %s was put without a lease", rev, name))
	}
	k := o.keys[name]
	if k == nil {
		k = &key{}
		o.keys[name] = k
	} else if k.lease == "" && consumer(name) {
		o.longest = max(o.longest, time.Since(k.gone))
	}
	k.value, k.rev, k.lease = value, rev, registry.LeaseID(lease).String()
	if consumer(name) {
		return
	}
	if rec, err := registry.DecodeRecord(name, []byte(value)); err != nil {
		o.wrong = append(o.wrong, fmt.Sprintf("revision %d: %v", rev, err))
	} else if int64(rec.Owner.Lease) != lease {
		o.wrong = append(o.wrong, fmt.Sprintf("revision %d: the ledger names lease %s, and is under %x", rev, rec.Owner.Lease, lease))
	}
}

func (o *observer) remove(name string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if k := o.keys[name]; k != nil && k.lease != "" {
		k.lease, k.gone = "", time.Now()
	}
}

func consumer(name string) bool { return !strings.HasPrefix(name, registry.Root) }

// mark begins a new measurement of gaps.
func (o *observer) mark() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.longest = 0
}

// under are the keys that are there now under one of the leases, or, without any, under any lease.
func (o *observer) under(leases ...string) (names []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, k := range o.keys {
		for _, l := range leases {
			if k.lease == l {
				names = append(names, name)
			}
		}
		if len(leases) == 0 && k.lease != "" {
			names = append(names, name)
		}
	}
	return names
}

func (o *observer) key(name string) key {
	o.mu.Lock()
	defer o.mu.Unlock()
	if k := o.keys[name]; k != nil {
		return *k
	}
	return key{}
}

// registrant is a process that registers one Pod, or many.
type registrant struct {
	*process
	w     *world
	stdin io.Writer
	uids  []string

	mu    sync.Mutex
	last  map[string]wire.Line // by UID
	errs  []string
	asked []wire.Line // requests that etcd answered
}

// pod says what a registrant registers; the zero value is the usual one.
type pod struct {
	cluster string // default test
	name    string // default api-0
	uid     string // default uid-0
	ip      string
	created int
	count   int
	ttl     time.Duration
	formats string

	passwordFile string
}

func (w *world) launch(p pod) *registrant {
	w.t.Helper()
	if p.uid == "" {
		p.uid = "uid-0"
	}
	args := []string{"--uid", p.uid, "--created", strconv.Itoa(p.created), "--ttl", ttl.String()}
	if p.ttl != 0 {
		args = append(args, "--ttl", p.ttl.String())
	}
	if p.cluster != "" {
		args = append(args, "--cluster", p.cluster)
	}
	if p.name != "" {
		args = append(args, "--pod", p.name)
	}
	if p.ip != "" {
		args = append(args, "--ip", p.ip)
	}
	if p.formats != "" {
		args = append(args, "--formats", p.formats)
	}
	if p.passwordFile != "" {
		args = append(args, "--password-file", p.passwordFile)
	}
	r := &registrant{w: w, uids: []string{p.uid}, last: map[string]wire.Line{}}
	if p.count > 1 {
		args = append(args, "--count", strconv.Itoa(p.count))
		r.uids = nil
		for i := range p.count {
			r.uids = append(r.uids, fmt.Sprintf("%s-%d", p.uid, i))
		}
	}
	cmd := exec.Command(registrantBinary, args...)
	cmd.Env = append(append(os.Environ(), "ETCDCTL_ENDPOINTS="+w.etcd.endpoints()), w.env...)
	out, in := io.Pipe()
	cmd.Stdout = in
	stdin, err := cmd.StdinPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	r.stdin = stdin
	go func() {
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			r.hear(lines.Bytes())
		}
	}()
	r.process = startProcess(w.t, "registrant "+p.uid, cmd)
	return r
}

func (r *registrant) hear(text []byte) {
	var l wire.Line
	if err := json.Unmarshal(text, &l); err != nil {
		r.t.Errorf("the registrant printed %q: %v", text, err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if l.Request != "" {
		r.asked = append(r.asked, l)
		return
	}
	r.last[l.UID] = l
	if l.Err != "" {
		r.errs = append(r.errs, l.Err)
	}
}

// say changes what is desired: "online" or "offline", and a cause.
func (r *registrant) say(desired string) {
	r.t.Helper()
	if _, err := io.WriteString(r.stdin, desired+"\n"); err != nil {
		r.t.Fatal(err)
	}
}

func (r *registrant) status() wire.Line {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last[r.uids[0]]
}

// said tells whether any status had an error with text in it.
func (r *registrant) said(text string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Contains(strings.Join(r.errs, "\n"), text)
}

func (r *registrant) saidAll() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.errs, "\n")
}

// advertised says whether all its instances are: it is content, and what it names is in etcd under its lease.
func (r *registrant) advertised() bool {
	r.mu.Lock()
	last := make([]wire.Line, 0, len(r.uids))
	for _, uid := range r.uids {
		last = append(last, r.last[uid])
	}
	r.mu.Unlock()
	r.w.seen.mu.Lock()
	defer r.w.seen.mu.Unlock()
	for _, l := range last {
		if !l.InSync || !l.Advertised {
			return false
		}
		for _, name := range l.Keys {
			if k := r.w.seen.keys[name]; k == nil || k.lease != l.Lease {
				return false
			}
		}
	}
	return true
}

// wrote waits until its ledger record has the cause.
func (r *registrant) wrote(cause string) {
	r.t.Helper()
	eventually(r.t, patience, "the ledger says "+cause, func() bool {
		rec, err := registry.DecodeRecord(ledger, []byte(r.w.seen.key(ledger).value))
		return err == nil && rec.Cause == cause
	})
}

// register starts a registrant and waits until all is there.
func (w *world) register(p pod) *registrant {
	w.t.Helper()
	r := w.launch(p)
	r.within(patience)
	return r
}

func (r *registrant) within(d time.Duration) {
	r.t.Helper()
	for deadline := time.Now().Add(d); !r.advertised(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			r.t.Fatalf("not registered within %s: %+v, there is %q; it said:\n%s", d, r.status(), r.w.seen.under(), r.saidAll())
		}
	}
}

// fault is one row of the table while it is being made.
type fault struct {
	row
	w     *world
	begun time.Time
}

// fault begins one. Consumers' gaps count from here.
func (w *world) fault(number int, name string, limit, gapMax time.Duration) *fault {
	w.seen.mark()
	return &fault{row: row{number: number, fault: name, limit: limit, gapMax: gapMax}, w: w, begun: time.Now()}
}

// over says that the fault has ended.
func (f *fault) over() { f.begun = time.Now() }

// healed waits until r is back, looks for ghosts once it is time, and adds the row to the table. Nobody but r and others
// is alive.
func (f *fault) healed(r *registrant, others ...*registrant) {
	f.w.t.Helper()
	// Beyond the limit too, to see by how much it is missed.
	r.within(f.limit + patience)
	f.heal = time.Since(f.begun)
	if f.heal > f.limit {
		f.w.t.Errorf("%s: healed after %s, want %s; it said:\n%s", f.fault, f.heal, f.limit, r.saidAll())
	}
	f.count(append(others, r)...)
}

// count finishes the row.
func (f *fault) count(alive ...*registrant) {
	f.w.t.Helper()
	ghosts := func() (names []string) {
		kept := map[string]bool{}
		for _, a := range alive {
			a.mu.Lock()
			for _, l := range a.last {
				kept[l.Lease] = true
			}
			a.mu.Unlock()
		}
		f.w.seen.mu.Lock()
		defer f.w.seen.mu.Unlock()
		for name, k := range f.w.seen.keys {
			if k.lease != "" && !kept[k.lease] {
				names = append(names, name+" under "+k.lease)
			}
		}
		return names
	}
	for deadline := f.begun.Add(max(ghostAfter, f.heal)); len(ghosts()) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
	}
	left := ghosts()
	if f.ghosts = len(left); f.ghosts > 0 {
		f.w.t.Errorf("%s: left after %s: %q", f.fault, time.Since(f.begun), left)
	}
	f.w.seen.mu.Lock()
	f.gap = f.w.seen.longest
	f.w.seen.mu.Unlock()
	if f.gap > f.gapMax {
		f.w.t.Errorf("%s: consumers found nothing for %s, want at most %s", f.fault, f.gap, f.gapMax)
	}
	table.add(f.row)
}
