// Package registry_test holds the registrar against a real etcd: registration, rivals, values of strangers, and all that
// goes wrong between the two. Every test has an etcd of its own, and ends with a look at all that was ever written there.
package registry_test

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

const (
	cluster, namespace, service, pod = "test", "shop", "api", "api-0"

	ledger = "/usher/v1/test/instances/shop/api/api-0"
	uid    = "uid-1"
	key    = "shop/api/" + uid // of the consumer record
	value  = `{"Op":0,"Addr":"10.0.0.1:8080"}`

	patience = 15 * time.Second // for what happens in milliseconds on a machine with nothing else to do
)

var created = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// world is one test's etcd and what the test itself wrote to it.
type world struct {
	t    *testing.T
	etcd *etcdtest.Server
	cli  *clientv3.Client
	auth bool // cli is root

	mu     sync.Mutex
	byHand map[int64]bool // revisions
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, etcd: etcdtest.Start(t), byHand: map[int64]bool{}}
	w.cli = w.etcd.Client()
	t.Cleanup(w.check)
	return w
}

// check holds everything that was ever written against the registrar's invariants.
func (w *world) check() {
	if w.auth {
		w.cli = w.etcd.ClientAs("root", "root") // the test's own is closed by now
	}
	for _, ev := range w.history("") {
		rev := ev.Kv.ModRevision
		if ev.Type != clientv3.EventTypePut || w.byHand[rev] {
			continue
		}
		if ev.Kv.Lease == 0 {
			w.t.Errorf("revision %d: %s was put without a lease", rev, ev.Kv.Key)
		}
		lease, name := registry.LeaseID(ev.Kv.Lease), string(ev.Kv.Key)
		var err error
		switch {
		case strings.HasPrefix(name, registry.InstancePrefix(cluster, "", "")):
			var rec registry.Record
			rec, err = registry.DecodeRecord(name, ev.Kv.Value)
			lease = rec.Owner.Lease
		case strings.HasPrefix(name, registry.VerdictPrefix(cluster, "", "")):
			var v registry.Verdict
			v, err = registry.DecodeVerdict(name, ev.Kv.Value)
			lease = v.Owner.Lease
		case strings.HasPrefix(name, registry.HoldKey(cluster, namespace, "")):
			_, err = registry.DecodeHold(name, ev.Kv.Value)
		case strings.HasPrefix(name, registry.Root):
			w.t.Errorf("revision %d: %s is no key of the ledger", rev, name)
		}
		if err != nil {
			w.t.Errorf("revision %d: %v", rev, err)
		} else if int64(lease) != ev.Kv.Lease {
			w.t.Errorf("revision %d: %s names lease %s, and is under %x", rev, name, lease, ev.Kv.Lease)
		}
	}
}

// history is every change to keys under prefix, oldest first.
func (w *world) history(prefix string) []*clientv3.Event {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	all, err := etcdtest.History(ctx, w.cli)
	if err != nil {
		w.t.Errorf("read etcd's history: %v", err)
	}
	return slices.DeleteFunc(all, func(ev *clientv3.Event) bool { return !strings.HasPrefix(string(ev.Kv.Key), prefix) })
}

func (w *world) count(k string, kind string) int {
	w.t.Helper()
	n := 0
	for _, ev := range w.history(k) {
		if ev.Type.String() == kind {
			n++
		}
	}
	return n
}

// get reads a key; nil when it isn't there.
func (w *world) get(k string) *mvcc {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	resp, err := w.cli.Get(ctx, k)
	if err != nil {
		w.t.Fatalf("read %s: %v", k, err)
	}
	if len(resp.Kvs) == 0 {
		return nil
	}
	kv := resp.Kvs[0]
	return &mvcc{string(kv.Value), kv.ModRevision, registry.LeaseID(kv.Lease).String()}
}

type mvcc struct {
	value string
	rev   int64
	lease string
}

// record reads the ledger; zero when it isn't there.
func (w *world) record() registry.Record {
	w.t.Helper()
	kv := w.get(ledger)
	if kv == nil {
		return registry.Record{}
	}
	rec, err := registry.DecodeRecord(ledger, []byte(kv.value))
	if err != nil {
		w.t.Fatal(err)
	}
	return rec
}

// put and remove are changes by hand.
func (w *world) put(k, v string, opts ...clientv3.OpOption) {
	w.t.Helper()
	resp, err := w.cli.Put(w.t.Context(), k, v, opts...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	w.byHand[resp.Header.Revision] = true
	w.mu.Unlock()
}

func (w *world) remove(k string) {
	w.t.Helper()
	if resp, err := w.cli.Delete(w.t.Context(), k); err != nil || resp.Deleted != 1 {
		w.t.Fatalf("delete %s: %v, %v", k, resp, err)
	}
}

func (w *world) lease(ttl int64) clientv3.LeaseID {
	w.t.Helper()
	resp, err := w.cli.Grant(w.t.Context(), ttl)
	if err != nil {
		w.t.Fatal(err)
	}
	return resp.ID
}

// eventually polls until cond holds.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	eventuallyWithin(t, patience, what, cond)
}

func eventuallyWithin(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// spec is what a test may say of an agent; the zero value is the usual one.
type spec struct {
	uid      string
	created  time.Time
	ttl      time.Duration
	link     *etcdtest.Link // another way to etcd
	port     string
	services []string
	formats  []format.Spec // of each Service, beside grpc
	conn     registry.Connection
	wrap     func(*clientv3.Client) // last changes to the client

	verdictTTL time.Duration
}

// agent is a registrar that runs.
type agent struct {
	*registry.Registrar
	w      *world
	spec   spec
	cancel context.CancelFunc
	done   chan struct{}

	mu       sync.Mutex
	statuses []lifecycle.RegistryStatus
	holds    []*lifecycle.Hold // as told
	client   *clientv3.Client
}

// start runs an agent; it ends with the test.
func (w *world) start(s spec) *agent {
	w.t.Helper()
	if s.uid == "" {
		s.uid = uid
	}
	if s.created.IsZero() {
		s.created = created
	}
	if s.services == nil {
		s.services = []string{service}
	}
	if s.port == "" {
		s.port = "http"
	}
	s.conn.Endpoints = []string{w.etcd.Endpoint()}
	if s.link != nil {
		s.conn.Endpoints = []string{s.link.Endpoint()}
	}
	a := &agent{w: w, spec: s, done: make(chan struct{})}
	formats := map[string][]registry.NamedFormat{}
	for _, svc := range s.services {
		f, err := format.New(format.Spec{Type: "grpc", Target: "shop/" + svc, Port: s.port})
		if err != nil {
			w.t.Fatal(err)
		}
		formats[svc] = []registry.NamedFormat{{Name: "grpc", Format: f}}
		for _, fs := range s.formats {
			f, err := format.New(fs.WithDefaults(namespace, svc))
			if err != nil {
				w.t.Fatal(err)
			}
			formats[svc] = append(formats[svc], registry.NamedFormat{Name: fs.Type, Format: f})
		}
	}
	r, err := registry.New(registry.Config{
		Cluster: cluster, Namespace: namespace, Pod: pod, PodUID: s.uid, TTL: s.ttl, Formats: formats,
		Dial: a.dial, VerdictTTL: s.verdictTTL,
		OnHold: func(h *lifecycle.Hold) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.holds = append(a.holds, h)
		},
		OnChange: func(st lifecycle.RegistryStatus) {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.statuses = append(a.statuses, st)
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	a.Registrar = r
	ctx, cancel := context.WithCancel(context.Background())
	a.cancel = cancel
	go func() {
		defer close(a.done)
		if err := r.Run(ctx); err != nil {
			w.t.Errorf("Run: %v", err)
		}
	}()
	w.t.Cleanup(a.stop)
	return a
}

func (a *agent) dial() (*clientv3.Client, error) {
	c, err := a.spec.conn.Dial(nil)
	if err == nil {
		if a.spec.wrap != nil {
			a.spec.wrap(c)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.client = c
	return c, err
}

// stop ends the agent as SIGTERM does.
func (a *agent) stop() {
	a.cancel()
	select {
	case <-a.done:
	case <-time.After(patience):
		a.w.t.Errorf("Run has not ended after %s", patience)
	}
}

// kill ends the agent as SIGKILL does: etcd hears no more of it.
func (a *agent) kill() {
	a.mu.Lock()
	c := a.client
	a.mu.Unlock()
	c.Close()
	a.stop()
}

func (a *agent) status() lifecycle.RegistryStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.statuses) == 0 {
		return lifecycle.RegistryStatus{}
	}
	return a.statuses[len(a.statuses)-1]
}

// said tells whether any status so far had an error with text in it.
func (a *agent) said(text string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.ContainsFunc(a.statuses, func(st lifecycle.RegistryStatus) bool { return strings.Contains(st.Err, text) })
}

// sync waits until etcd is as desired.
func (a *agent) sync() {
	a.w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := a.Sync(ctx); err != nil {
		a.w.t.Fatalf("Sync: %v", err)
	}
}

// online and offline set what is desired; cause tells one from another.
func (a *agent) online(cause string)  { a.Set(a.desired(lifecycle.Online, cause)) }
func (a *agent) offline(cause string) { a.Set(a.desired(lifecycle.Offline, cause)) }

func (a *agent) desired(state lifecycle.State, cause string) lifecycle.Desired {
	d := lifecycle.Desired{
		State: state, Cause: cause, Since: created.Add(time.Minute),
		Pod: lifecycle.Pod{Known: true, Namespace: namespace, Name: pod, UID: a.spec.uid, Node: "node-1", Created: a.spec.created},
	}
	for _, svc := range a.spec.services {
		d.Instances = append(d.Instances, lifecycle.Instance{
			Service: svc, Advertise: state == lifecycle.Online, Zone: "zone-1",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
			Ports:     []lifecycle.Port{{Name: "http", Number: 8080, Protocol: "TCP"}},
		})
	}
	return d
}

// registered starts an agent, brings it online and waits until it is registered.
func (w *world) registered(s spec) *agent {
	w.t.Helper()
	a := w.start(s)
	a.online("ready")
	a.sync()
	a.advertised()
	return a
}

// advertised waits until the agent's own record is there, under the lease that its status names, and that it is content.
func (a *agent) advertised() {
	a.w.t.Helper()
	k := "shop/api/" + a.spec.uid
	var last string
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		st, kv := a.status(), a.w.get(k)
		if st.InSync && st.Advertised && kv != nil && kv.lease == st.Lease && kv.value == value {
			return
		}
		last = fmt.Sprintf("status %+v, %s is %+v", st, k, kv)
		if time.Now().After(deadline) {
			a.w.t.Fatalf("not registered after %s: %s", patience, last)
		}
	}
}
