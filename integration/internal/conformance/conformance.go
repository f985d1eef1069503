// Package conformance takes the real readers of the record formats through the life of two instances, which the real
// registrar writes to a real etcd.
//
//	registrar a --\                    /-- reader: what would you send to now?
//	               etcd (restarted) --<
//	registrar b --/                    \-- reader: ...
//
// All readers look at once, all the time. An instance that a step doesn't touch has to be in every look, so a reader that
// loses the one while it drops the other is seen.
package conformance

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

const (
	namespace, service = "shop", "api"

	// margin is what a busy machine may add to the lag of a format, less than the longest lag is.
	margin = 4 * time.Second
	// patience is for what has no limit of ours: a reader that finds etcd again.
	patience = 30 * time.Second
)

// Instance is a pod as one test has it.
type Instance struct {
	Pod       string
	Addresses []netip.Addr // the primary one first
	Ports     []lifecycle.Port
}

// Reader is a real client of one format.
type Reader struct {
	Name string
	// Format is the type of the format that it reads.
	Format string
	// Sees is what Look returns for an instance.
	Sees func(Instance) string
	// Look is what the reader would send to now.
	Look func(context.Context) ([]string, error)
	// KeepsLast says that it ignores the removal of the last instance.
	KeepsLast bool
	// KeepsNone says that it remembers for long that there was nobody, so it isn't asked before there is somebody.
	KeepsNone bool
	// NeedsEtcd says that it knows nothing while etcd is away.
	NeedsEtcd bool
}

// World is an etcd, the formats written to it, and the readers of it.
type World struct {
	Etcd    *etcdtest.Server
	Formats []format.Spec
	Readers []Reader

	t     *testing.T
	lags  map[string]time.Duration // by format
	a, b  *pod
	times map[string]*times // by reader
}

// times are how long a reader took to notice, from the moment that the registrar was told.
type times struct{ appears, disappears []time.Duration }

// New is a world with nothing in it yet. Settings that a spec leaves out are the Service's.
func New(t *testing.T, formats ...format.Spec) *World {
	t.Helper()
	w := &World{Etcd: etcdtest.Start(t), t: t, lags: map[string]time.Duration{}, times: map[string]*times{}}
	for _, s := range formats {
		s = s.WithDefaults(namespace, service)
		w.Formats = append(w.Formats, s)
		f, err := format.New(s)
		if err != nil {
			t.Fatal(err)
		}
		w.lags[s.Type] = f.Lag()
	}
	return w
}

// pod is an instance with the registrar of its agent.
type pod struct {
	Instance
	r *registry.Registrar
}

func (w *World) start(in Instance) *pod {
	var formats []registry.NamedFormat
	for _, s := range w.Formats {
		f, err := format.New(s)
		if err != nil {
			w.t.Fatal(err)
		}
		formats = append(formats, registry.NamedFormat{Name: s.Type, Format: f})
	}
	r, err := registry.New(registry.Config{
		Cluster: "test", Namespace: namespace, Pod: in.Pod, PodUID: "uid-" + in.Pod,
		Formats: map[string][]registry.NamedFormat{service: formats},
		Dial: func() (*clientv3.Client, error) {
			return registry.Connection{Endpoints: []string{w.Etcd.Endpoint()}}.Dial(nil)
		},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("registrar of %s: %v", in.Pod, err)
		}
	})
	return &pod{in, r}
}

func (p *pod) set(state lifecycle.State) {
	p.r.Set(lifecycle.Desired{
		State: state, Cause: "test", Since: time.Now(),
		Pod: lifecycle.Pod{Known: true, Namespace: namespace, Name: p.Pod, UID: "uid-" + p.Pod, Created: time.Now().Add(-time.Minute).Truncate(time.Second)},
		Instances: []lifecycle.Instance{{
			Service: service, Advertise: state == lifecycle.Online, Zone: "zone-1", Addresses: p.Addresses, Ports: p.Ports,
		}},
	})
}

// kind says how a step is timed.
type kind int

const (
	plain     kind = iota // a withdrawal is seen within the lag and the margin
	counted               // and goes into the table
	unlimited             // readers may still be finding etcd again
)

// Run takes the readers through the whole life of a and b, with as many rounds of a's going and coming as it is told, and
// logs how long they took to notice those.
func (w *World) Run(a, b Instance, rounds int) {
	w.a, w.b = w.start(a), w.start(b)
	for _, r := range w.Readers {
		w.times[r.Name] = &times{}
	}
	online := func(p *pod) func() { return func() { p.set(lifecycle.Online) } }
	offline := func(p *pod) func() { return func() { p.set(lifecycle.Offline) } }
	none, onlyA, onlyB, both := []*pod{}, []*pod{w.a}, []*pod{w.b}, []*pod{w.a, w.b}
	type step struct {
		name        string
		act         func()
		before, now []*pod
		kind        kind
	}
	steps := []step{
		{"first instance online", online(w.a), none, onlyA, plain},
		{"second instance online", online(w.b), onlyA, both, plain},
	}
	for range rounds {
		steps = append(steps,
			step{"only the withdrawn one goes", offline(w.a), both, onlyB, counted},
			step{"and comes back", online(w.a), onlyB, both, counted})
	}
	steps = append(steps,
		step{"etcd restarted", w.restart, both, both, unlimited},
		step{"withdrawn after the restart", offline(w.b), both, onlyA, unlimited},
		step{"online after the restart", online(w.b), onlyA, both, plain},
		step{"one left", offline(w.b), both, onlyA, plain},
		step{"the last one gone", offline(w.a), onlyA, none, plain})
	for _, s := range steps {
		if !w.t.Run(s.name, func(t *testing.T) { w.step(t, s.act, s.before, s.now, s.kind) }) {
			return
		}
	}
	w.report()
}

// restart stops etcd, and starts it when all readers who can have gone on without.
func (w *World) restart() {
	w.Etcd.Stop()
	for _, r := range w.Readers {
		if r.NeedsEtcd {
			continue
		}
		ctx, cancel := context.WithTimeout(w.t.Context(), patience)
		got, err := r.Look(ctx)
		cancel()
		if want := r.all(w.a, w.b); err != nil || !slices.Equal(sorted(got), want) {
			w.t.Errorf("%s, etcd being away: %q, %v; want %q", r.Name, got, err, want)
		}
	}
	w.Etcd.Restart()
}

func (r Reader) all(pods ...*pod) []string {
	names := []string{}
	for _, p := range pods {
		names = append(names, r.Sees(p.Instance))
	}
	return sorted(names)
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return slices.Compact(s)
}

// step acts, and waits until all readers see what they should. Those that are in before and now have to be seen all the
// time, unless etcd was away.
func (w *World) step(t *testing.T, act func(), before, now []*pod, kind kind) {
	t.Helper()
	restart := slices.Equal(before, now)
	if restart {
		act()
	}
	written := make(chan struct{})
	var wg sync.WaitGroup
	start := time.Now()
	for _, r := range w.Readers {
		want := r.all(now...)
		if len(now) == 0 && r.KeepsLast {
			want = r.all(before...)
		}
		var stay []string
		if !restart {
			for _, p := range before {
				if slices.Contains(now, p) {
					stay = append(stay, r.Sees(p.Instance))
				}
			}
		}
		wg.Go(func() {
			if len(before) == 0 && r.KeepsNone || len(now) == 0 && r.KeepsLast {
				<-written
			}
			limit := patience
			if len(now) < len(before) && kind != unlimited {
				limit = w.lags[r.Format] + margin
			}
			d, err := r.follow(t.Context(), want, stay, limit, start, written)
			ts := w.times[r.Name]
			switch {
			case err != nil:
				t.Errorf("%s: %v", r.Name, err)
			case kind == counted && len(now) < len(before):
				ts.disappears = append(ts.disappears, d)
			case kind == counted:
				ts.appears = append(ts.appears, d)
			}
		})
	}
	if !restart {
		act()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	for _, p := range []*pod{w.a, w.b} {
		if err := p.r.Sync(ctx); err != nil {
			t.Errorf("registrar of %s: %v", p.Pod, err)
		}
	}
	cancel()
	close(written)
	wg.Wait()
}

// follow looks until the reader sees what is wanted. The limit counts from when it is written.
func (r Reader) follow(ctx context.Context, want, stay []string, limit time.Duration, start time.Time, written <-chan struct{}) (time.Duration, error) {
	var left <-chan time.Time
	for {
		looking, cancel := context.WithTimeout(ctx, patience)
		got, err := r.Look(looking)
		cancel()
		got = sorted(got)
		if err == nil && slices.Equal(got, want) {
			return time.Since(start), nil
		}
		for _, s := range stay {
			if err == nil && !slices.Contains(got, s) {
				return 0, fmt.Errorf("lost %s, which was not touched: sees %q", s, got)
			}
		}
		select {
		case <-written:
			if left == nil {
				left = time.After(limit)
			}
		default:
		}
		select {
		case <-left:
			return 0, fmt.Errorf("sees %q, %v, %s after it was written; want %q", got, err, limit, want)
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (w *World) report() {
	var b strings.Builder
	tab := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tab, "\nreader\tformat\tappears\tdisappears\tstated lag\n")
	for _, r := range w.Readers {
		ts := w.times[r.Name]
		fmt.Fprintf(tab, "%s\t%s\t%s\t%s\t%s\n", r.Name, r.Format, median(ts.appears), median(ts.disappears), w.lags[r.Format])
	}
	tab.Flush()
	w.t.Log(b.String())
}

func median(d []time.Duration) string {
	if len(d) == 0 {
		return "-"
	}
	slices.Sort(d)
	return cmp.Or(d[len(d)/2].Round(time.Millisecond), time.Millisecond).String()
}
