package watcher

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"usher.dev/usher/lifecycle"
)

const patience = 20 * time.Second

// rig is a Watcher against an api, and all that it has told so far.
type rig struct {
	*api
	w *Watcher

	mu   sync.Mutex
	seen []lifecycle.Observation
	more chan struct{}
}

// watchPod starts a Watcher for the pod web-1 (UID u1, 10.0.0.1) and the Service web. It ends with the test.
func watchPod(t *testing.T, a *api, change ...func(*Config)) *rig {
	t.Helper()
	r := &rig{api: a, more: make(chan struct{}, 1)}
	cfg := Config{Namespace: "shop", Pod: "web-1", PodUID: "u1", Services: []string{"web"}, Client: a.client(runtime.ContentTypeJSON),
		OnObservation: func(o lifecycle.Observation) {
			r.mu.Lock()
			r.seen = append(r.seen, o)
			r.mu.Unlock()
			select {
			case r.more <- struct{}{}:
			default:
			}
		}}
	for _, f := range change {
		f(&cfg)
	}
	w, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.w = w
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return r
}

func (r *rig) all() []lifecycle.Observation {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.seen)
}

// until waits for an Observation that holds, and returns it.
func (r *rig) until(what string, holds func(lifecycle.Observation) bool) lifecycle.Observation {
	r.t.Helper()
	deadline := time.After(patience)
	for {
		if seen := r.all(); len(seen) > 0 && holds(seen[len(seen)-1]) {
			return seen[len(seen)-1]
		}
		select {
		case <-r.more:
		case <-deadline:
			r.t.Fatalf("waited for: %s; seen: %s", what, r.dump())
		}
	}
}

func (r *rig) dump() string {
	var b strings.Builder
	for _, o := range r.all() {
		fmt.Fprintf(&b, "\n  %+v", o)
	}
	return b.String()
}

// always fails the test if any Observation from the nth on breaks the rule.
func (r *rig) always(n int, what string, holds func(lifecycle.Observation) bool) {
	r.t.Helper()
	for _, o := range r.all()[n:] {
		if !holds(o) {
			r.t.Fatalf("not always: %s; seen: %s", what, r.dump())
		}
	}
}

// watching waits until the slices are watched by exactly these names, "*" being all.
func (r *rig) watching(names ...string) {
	r.t.Helper()
	poll(r.t, fmt.Sprintf("slices watched are %v", names), func() bool { return slices.Equal(r.watches("endpointslices"), names) })
}

func poll(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for: %s", what)
		}
	}
}

func ready(o lifecycle.Observation) bool    { return o.Endpoints[0].Ready }
func notReady(o lifecycle.Observation) bool { return !o.Endpoints[0].Ready }
func found(o lifecycle.Observation) bool    { return o.Endpoints[0].Found }
func absent(o lifecycle.Observation) bool   { return !o.Endpoints[0].Found }
func healthy(o lifecycle.Observation) bool  { return len(o.Problems) == 0 }

func problem(part string) func(lifecycle.Observation) bool {
	return func(o lifecycle.Observation) bool {
		return slices.ContainsFunc(o.Problems, func(s string) bool { return strings.Contains(s, part) })
	}
}

func pod(change ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web-1", UID: "u1"},
		Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}}}
	for _, f := range change {
		f(p)
	}
	return p
}

func svc(families ...corev1.IPFamily) *corev1.Service {
	if families == nil {
		families = []corev1.IPFamily{corev1.IPv4Protocol}
	}
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{IPFamilies: families}}
}

func slice(name string, eps ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   eps,
		Ports:       []discoveryv1.EndpointPort{{Name: ptr("http"), Port: ptr(int32(8080)), Protocol: ptr(corev1.ProtocolTCP), AppProtocol: ptr("http")}},
	}
	if len(eps) > 0 && strings.Contains(eps[0].Addresses[0], ":") {
		s.AddressType = discoveryv1.AddressTypeIPv6
	}
	return s
}

// ep is an endpoint of the Pod with that UID ("" for no targetRef), at an address, with its conditions: r, s, t for
// true, R, S, T for false, absent ones nil.
func ep(uid, addr, conditions string) discoveryv1.Endpoint {
	e := discoveryv1.Endpoint{Addresses: []string{addr}}
	if uid != "" {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "web-" + strings.TrimPrefix(uid, "u"), UID: types.UID(uid)}
	}
	for _, c := range conditions {
		switch c {
		case 'r', 'R':
			e.Conditions.Ready = ptr(c == 'r')
		case 's', 'S':
			e.Conditions.Serving = ptr(c == 's')
		case 't', 'T':
			e.Conditions.Terminating = ptr(c == 't')
		}
	}
	return e
}

func ptr[T any](v T) *T { return &v }

func TestReadyEndpointIsObserved(t *testing.T) {
	for _, contentType := range []string{runtime.ContentTypeJSON, runtime.ContentTypeProtobuf} {
		t.Run(contentType, func(t *testing.T) {
			a := newAPI(t)
			a.put(svc())
			a.put(pod(func(p *corev1.Pod) {
				p.Labels = map[string]string{"app": "web"}
				p.Annotations = map[string]string{"a": "b", lastApplied: "{}"}
				p.Spec.NodeName = "n1"
				p.CreationTimestamp = metav1.NewTime(time.Unix(1000, 0))
			}))
			a.put(slice("web-a", ep("u2", "10.0.0.2", "r")))
			r := watchPod(t, a, func(c *Config) { c.Client = a.client(contentType) })
			o := r.until("pod known", func(o lifecycle.Observation) bool { return o.Pod.Known })
			if o.Endpoints[0].Found {
				t.Fatal("another pod's endpoint was taken for the own one")
			}
			if p := o.Pod; p.Name != "web-1" || p.Namespace != "shop" || p.UID != "u1" || p.Node != "n1" || p.Labels["app"] != "web" ||
				len(p.Annotations) != 1 || !p.Created.Equal(time.Unix(1000, 0)) || p.Grace != 30*time.Second ||
				!slices.Equal(p.IPs, []netip.Addr{netip.MustParseAddr("10.0.0.1")}) {
				t.Fatalf("pod is %+v", p)
			}

			e := ep("u1", "10.0.0.1", "rsT")
			e.Zone = ptr("z1")
			a.put(slice("web-a", ep("u2", "10.0.0.2", "r"), e))
			o = r.until("ready", ready)
			got := o.Endpoints[0]
			if got.Service != "web" || !got.Found || !got.Serving || got.Terminating || got.Zone != "z1" ||
				!slices.Equal(got.Addresses, []netip.Addr{netip.MustParseAddr("10.0.0.1")}) ||
				!slices.Equal(got.Ports, []lifecycle.Port{{Name: "http", Number: 8080, Protocol: "TCP", AppProtocol: "http"}}) {
				t.Fatalf("endpoint is %+v", got)
			}
			a.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
			r.until("not ready", notReady)
		})
	}
}

func TestAbsentConditionsMeanWhatTheAPISays(t *testing.T) {
	for conditions, want := range map[string][3]bool{ // ready, serving, terminating
		"":    {true, true, false},
		"R":   {false, false, false},
		"Rst": {false, true, true},
		"RSt": {false, false, true},
		"S":   {true, false, false},
	} {
		got := endpoint(ep("u1", "10.0.0.1", conditions))
		if [3]bool{got.Ready, got.Serving, got.Terminating} != want {
			t.Errorf("%q: got ready, serving, terminating = %v, %v, %v, want %v", conditions, got.Ready, got.Serving, got.Terminating, want)
		}
	}
}

func TestWhichEndpointIsTheOwnOne(t *testing.T) {
	own := netip.MustParseAddr("10.0.0.1")
	for name, c := range map[string]struct {
		ep   discoveryv1.Endpoint
		uid  string // known
		want bool
	}{
		"UID":                                 {ep("u1", "10.9.9.9", ""), "u1", true},
		"no targetRef, own IP":                {ep("", "10.0.0.1", ""), "u1", true},
		"no targetRef, other IP":              {ep("", "10.0.0.2", ""), "u1", false},
		"another pod with the own IP":         {ep("u2", "10.0.0.1", ""), "u1", false},
		"same name, UID of its predecessor":   {func() discoveryv1.Endpoint { e := ep("u1", "10.0.0.1", ""); e.TargetRef.UID = "u0"; return e }(), "u1", false},
		"own name without UID, own IP":        {func() discoveryv1.Endpoint { e := ep("u1", "10.0.0.1", ""); e.TargetRef.UID = ""; return e }(), "u1", true},
		"other name without UID, own IP":      {func() discoveryv1.Endpoint { e := ep("u2", "10.0.0.1", ""); e.TargetRef.UID = ""; return e }(), "u1", false},
		"targetRef to a Node, own IP":         {func() discoveryv1.Endpoint { e := ep("u1", "10.0.0.1", ""); e.TargetRef.Kind = "Node"; return e }(), "u1", false},
		"own UID not known yet, own IP":       {ep("u1", "10.0.0.1", ""), "", false},
		"own UID not known yet, no targetRef": {ep("", "10.0.0.1", ""), "", true},
	} {
		t.Run(name, func(t *testing.T) {
			s := reducer("shop", "web-1", "u1")(slice("a", c.ep))
			if _, got := s.own(identity{uid: c.uid, ips: []netip.Addr{own}}); got != c.want {
				t.Fatalf("taken for the own one: %v, want %v", got, c.want)
			}
		})
	}
}

func TestSlicesAreWatchedNarrowOnceFoundAndWideWhenLost(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u2", "10.0.0.2", "r")))
	a.put(slice("web-b", ep("u1", "10.0.0.1", "r")))
	r := watchPod(t, a)
	r.until("ready", ready)
	r.watching("web-b")

	a.put(slice("web-b", ep("u1", "10.0.0.1", "R")))
	r.until("not ready, seen narrow", notReady)
	a.put(slice("web-b", ep("u1", "10.0.0.1", "r")))
	r.until("ready, seen narrow", ready)

	// Moved: in the new slice first, as the controller does it. Nobody sees it gone.
	n := len(r.all())
	a.put(slice("web-c", ep("u1", "10.0.0.1", "r")))
	a.put(slice("web-b"))
	r.watching("web-c")
	a.put(slice("web-c", ep("u1", "10.0.0.1", "R")))
	r.until("not ready, seen in the new slice", notReady)
	r.always(n, "found", found)

	a.remove("endpointslices", "web-c")
	r.until("absent", absent)
	r.watching("*")
	a.put(slice("web-d", ep("u1", "10.0.0.1", "r")))
	r.until("ready again", ready)
	r.watching("web-d")

	// Taken over by another Service.
	s := slice("web-d", ep("u1", "10.0.0.1", "r"))
	s.Labels[discoveryv1.LabelServiceName] = "other"
	a.put(s)
	r.until("absent", absent)
	r.watching("*")
}

func TestLastStateStandsUntilTheWideListHasAnswered(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	r := watchPod(t, a)
	r.until("ready", ready)
	r.watching("web-a")
	n := len(r.all())

	hold := make(chan struct{})
	before := a.count("watch endpointslices")
	a.set(func() { a.hold = hold })
	a.remove("endpointslices", "web-a")
	poll(t, "the wide list is asked for", func() bool { return a.count("watch endpointslices") > before })
	if len(r.all()) != n {
		t.Fatalf("told something while nothing is known:%s", r.dump())
	}
	a.put(pod(func(p *corev1.Pod) { p.Labels = map[string]string{"new": "label"} }))
	if o := r.until("the label", func(o lifecycle.Observation) bool { return len(o.Pod.Labels) == 1 }); !ready(o) {
		t.Fatal("absent before the wide list has answered")
	}
	a.set(func() { a.hold = nil })
	close(hold)
	r.until("absent", absent)
}

func TestSliceWrittenLastWinsAmongDuplicates(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	a.put(slice("web-b", ep("u1", "10.0.0.1", "r")))
	r := watchPod(t, a)
	r.until("ready", ready)
	r.watching("web-b")
	r.always(0, "ready", ready)
}

func TestBothFamiliesOfADualStackPod(t *testing.T) {
	a := newAPI(t)
	a.put(svc(corev1.IPv4Protocol, corev1.IPv6Protocol))
	a.put(pod(func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: "fd00::1"}, {IP: "10.0.0.1"}} }))
	a.put(slice("web-4", ep("u1", "10.0.0.1", "r")))
	r := watchPod(t, a)
	r.until("ready through the only family there is", ready)
	r.watching("*")

	a.put(slice("web-6", ep("u1", "fd00::1", "R")))
	o := r.until("not ready, as the primary family says", notReady)
	want := []netip.Addr{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("10.0.0.1")}
	if got := o.Endpoints[0].Addresses; !slices.Equal(got, want) {
		t.Fatalf("addresses are %v, want %v", got, want)
	}
	r.watching("web-4", "web-6")
	a.put(slice("web-6", ep("u1", "fd00::1", "r")))
	r.until("ready", ready)

	// One family's slice is made anew: nothing changes.
	n := len(r.all())
	a.put(slice("web-4b", ep("u1", "10.0.0.1", "r")))
	a.remove("endpointslices", "web-4")
	r.watching("web-4b", "web-6")
	r.always(n, "both addresses", func(o lifecycle.Observation) bool { return slices.Equal(o.Endpoints[0].Addresses, want) })
}

func TestBothFamiliesAreFollowedWithoutKnowingTheService(t *testing.T) {
	a := newAPI(t)
	a.forbidden["list services"], a.forbidden["watch services"] = true, true
	a.put(pod(func(p *corev1.Pod) { p.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}} }))
	a.put(slice("web-4", ep("u1", "10.0.0.1", "r")))
	a.put(slice("web-6", ep("u1", "fd00::1", "r")))
	r := watchPod(t, a)
	both := func(o lifecycle.Observation) bool { return len(o.Endpoints[0].Addresses) == 2 }
	r.until("both addresses", both)
	r.watching("web-4", "web-6")
	n := len(r.all())
	a.put(slice("web-6b", ep("u1", "fd00::1", "r")))
	a.remove("endpointslices", "web-6")
	r.watching("web-4", "web-6b")
	r.always(n, "both addresses", both)
}

func TestNarrowFeedThatIsBehindDoesNotTakeOver(t *testing.T) {
	numbered := func(version, conditions string) *discoveryv1.EndpointSlice {
		s := slice("web-a", ep("u1", "10.0.0.1", conditions))
		s.ResourceVersion = version
		return s
	}
	slices := func(s *discoveryv1.EndpointSlice) *feed[sliceInfo] {
		f := &feed[sliceInfo]{reduce: reducer("shop", "web-1", "u1"), notify: func() {}, stop: func() {}}
		if err := f.Replace([]any{s}, s.ResourceVersion); err != nil {
			t.Fatal(err)
		}
		return f
	}
	narrow := slices(numbered("4", "r"))
	s := &service{name: "web", object: &feed[serviceInfo]{}, wide: slices(numbered("5", "R")), narrow: map[string]*feed[sliceInfo]{"web-a": narrow}}
	if e := s.observe(t.Context(), identity{uid: "u1"}, false); e.Ready || s.wide == nil {
		t.Fatalf("went back in time: ready %v, wide watch ended %v", e.Ready, s.wide == nil)
	}
	if err := narrow.Update(numbered("6", "r")); err != nil {
		t.Fatal(err)
	}
	if e := s.observe(t.Context(), identity{uid: "u1"}, false); !e.Ready || s.wide != nil {
		t.Fatalf("ready %v, wide watch ended %v, want true and true", e.Ready, s.wide == nil)
	}
}
