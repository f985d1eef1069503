package watcher

import (
	"io"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"

	"usher.dev/usher/lifecycle"
)

// online starts a Watcher of a pod whose endpoint is ready, and waits until it is seen and watched narrowly.
func online(t *testing.T, change ...func(*api)) *rig {
	t.Helper()
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	for _, f := range change {
		a.set(func() { f(a) })
	}
	r := watchPod(t, a)
	r.until("ready", ready)
	r.watching("web-a")
	return r
}

func TestServerThatIsLostChangesNothingButProblems(t *testing.T) {
	r := online(t)
	n := len(r.all())
	r.down()
	o := r.until("a problem", problem("the API server can't be reached since "))
	if !o.Unreachable {
		t.Error("Unreachable is false")
	}
	if !strings.Contains(o.Problems[0], "connection refused") || strings.Contains(o.Problems[0], r.addr) {
		t.Errorf("problem is %q", o.Problems[0])
	}
	if len(o.Problems) != 1 {
		t.Errorf("more than one sentence: %q", o.Problems)
	}
	r.up()
	r.until("no problem", healthy)
	r.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	r.until("not ready", notReady)
	before := r.all()[n:]
	r.always(n, "found, Pod known and not gone", func(o lifecycle.Observation) bool { return found(o) && o.Pod.Known && !o.Pod.Gone })
	if len(before) > 3 {
		t.Errorf("more than lost, back and not ready was told:%s", r.dump())
	}
}

func TestLostServerIsToldOnceThroughAllRetries(t *testing.T) {
	f := &feed[podInfo]{reduce: reducePod(7400), notify: func() {}, failures: map[string]failure{}}
	told := func() []string {
		var p problems
		f.problems(&p)
		return p.list()
	}
	f.failures["watch"] = failure{err: syscall.ECONNREFUSED, lost: true, since: time.Unix(1000, 0)}
	first := told()
	f.lost(t.Context(), "watch", io.EOF)
	if now := told(); len(now) != 1 || !slices.Equal(now, first) {
		t.Errorf("told %q, then %q", first, now)
	}
}

func TestServerThatClosesConnectionsWithoutAnAnswerIsLost(t *testing.T) {
	r := online(t)
	r.set(func() { r.hangup = true })
	r.cut()
	r.until("a problem", problem("can't be reached"))
	r.set(func() { r.hangup = false })
	r.until("no problem", healthy)
	r.always(0, "ready", ready)
}

func TestWhatHappenedWhileTheServerWasLostIsSeenAfterwards(t *testing.T) {
	r := online(t)
	r.down()
	r.until("a problem", problem("can't be reached"))
	r.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	r.remove("pods", "web-1")
	r.compact() // so that only a relist can tell
	if o := r.all()[len(r.all())-1]; !ready(o) || o.Pod.Gone {
		t.Fatalf("told without a server: %+v", o)
	}
	r.up()
	r.until("not ready, Pod gone", func(o lifecycle.Observation) bool { return notReady(o) && found(o) && o.Pod.Gone && healthy(o) })
}

func TestCutConnectionIsResumedUnnoticed(t *testing.T) {
	r := online(t)
	n := len(r.all())
	for range 3 {
		r.cut()
		r.watching("web-a")
	}
	r.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	r.until("not ready", notReady)
	r.always(n, "found", found)
}

func TestExpiredWatchIsListedAnew(t *testing.T) {
	r := online(t)
	n := len(r.all())
	r.set(func() { r.plainList = true }) // list and watch instead of the streaming list
	r.compact()
	lists := r.count("list endpointslices")
	r.cut()
	poll(t, "a list", func() bool { return r.count("list endpointslices") > lists })
	r.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	r.until("not ready", notReady)
	r.until("no problem", healthy)
	r.always(n, "found", found)
}

func TestServerWithoutStreamingListsIsListed(t *testing.T) {
	r := online(t, func(a *api) { a.plainList = true })
	r.put(slice("web-a"))
	r.until("absent", absent)
	r.until("no problem", healthy)
}

func TestMissingPermissionIsNamed(t *testing.T) {
	for _, c := range []struct{ request, want string }{
		{"endpointslices", `on endpointslices.discovery.k8s.io in namespace "shop"`},
		{"pods", `on pods in namespace "shop"`},
		{"services", `on services in namespace "shop"`},
	} {
		t.Run(c.request, func(t *testing.T) {
			a := newAPI(t)
			a.put(svc())
			a.put(pod())
			a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
			a.forbidden["list "+c.request] = true
			a.forbidden["watch "+c.request] = true
			r := watchPod(t, a)
			r.until("list is named", problem(`RBAC lacks "list" `+c.want))
			r.until("watch is named", problem(`RBAC lacks "watch" `+c.want))
			a.set(func() { clear(a.forbidden) })
			r.until("ready, no problem", func(o lifecycle.Observation) bool { return ready(o) && healthy(o) && o.Pod.Known })
		})
	}
}

func TestProblemIsOverOnlyWithTheStateThatWasMissed(t *testing.T) {
	for _, c := range []struct {
		name, verb   string
		whole        bool
		over, synced []string // what is left after the call, and after its answer
	}{
		{"streaming list", "watch", true, []string{"list", "watch"}, nil},
		{"list", "list", true, []string{"list", "watch"}, []string{"watch"}},
		{"watch after a list", "watch", false, nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := &feed[podInfo]{query: query{resource: "pods", namespace: "shop"}, reduce: reducePod(7400), notify: func() {}, failures: map[string]failure{}}
			denied := apierrors.NewForbidden(corev1.Resource("pods"), "", nil)
			f.report(t.Context(), "list", true, denied)
			f.report(t.Context(), "watch", false, denied)
			left := func(want []string) {
				t.Helper()
				var p problems
				f.problems(&p)
				for i, verb := range want {
					want[i] = `RBAC lacks "` + verb + `" on pods in namespace "shop"`
				}
				if !slices.Equal(p.list(), want) {
					t.Errorf("problems are %q, want %q", p.list(), want)
				}
			}
			f.report(t.Context(), c.verb, c.whole, nil)
			left(c.over)
			if err := f.Replace([]any{pod()}, "1"); err != nil {
				t.Fatal(err)
			}
			left(c.synced)
		})
	}
}

func TestPermissionToWatchAloneIsMissing(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	a.forbidden["watch endpointslices"] = true
	r := watchPod(t, a)
	o := r.until("what the list says", func(o lifecycle.Observation) bool { return ready(o) && problem(`RBAC lacks "watch"`)(o) })
	if problem(`"list"`)(o) {
		t.Errorf("problems are %q", o.Problems)
	}
}

func TestMissingServiceIsWaitedFor(t *testing.T) {
	a := newAPI(t)
	a.put(pod())
	r := watchPod(t, a)
	o := r.until("Pod known", func(o lifecycle.Observation) bool { return o.Pod.Known })
	if want := `service "web" does not exist in namespace "shop"; waiting for it`; !slices.Equal(o.Problems, []string{want}) {
		t.Fatalf("problems are %q, want %q", o.Problems, want)
	}
	a.put(svc())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	r.until("ready, no problem", func(o lifecycle.Observation) bool { return ready(o) && healthy(o) })
	a.remove("services", "web")
	r.until("the problem again, endpoint as the slice says", func(o lifecycle.Observation) bool { return ready(o) && !healthy(o) })
}

func TestServicesKeepTheirOrder(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(pod())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	r := watchPod(t, a, func(c *Config) { c.Services = []string{"admin", "web"} })
	r.until("second ready, first absent", func(o lifecycle.Observation) bool {
		return len(o.Endpoints) == 2 && o.Endpoints[0].Service == "admin" && !o.Endpoints[0].Found && o.Endpoints[1].Ready && len(o.Problems) == 1
	})
}

func TestMissingPodIsToldAndNotGone(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	r := watchPod(t, a)
	o := r.until("a problem", problem(`pod "web-1" does not exist in namespace "shop"`))
	if o.Pod.Gone || o.Pod.Known {
		t.Fatalf("pod is %+v", o.Pod)
	}
	a.put(pod())
	r.until("known", func(o lifecycle.Observation) bool { return o.Pod.Known && healthy(o) })
}

func TestPodIsGoneWhenDeletedOrItsNameIsAnother(t *testing.T) {
	gone := func(o lifecycle.Observation) bool { return o.Pod.Gone && o.Pod.Known && o.Pod.UID == "u1" }
	t.Run("deleted", func(t *testing.T) {
		r := online(t)
		r.remove("pods", "web-1")
		r.until("gone", gone)
	})
	t.Run("replaced", func(t *testing.T) {
		r := online(t)
		r.remove("pods", "web-1")
		r.put(pod(func(p *corev1.Pod) { p.UID = "u9"; p.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.9"}} }))
		o := r.until("gone and told why", func(o lifecycle.Observation) bool { return gone(o) && problem("u9")(o) })
		if !slices.Equal(o.Pod.IPs, []netip.Addr{netip.MustParseAddr("10.0.0.1")}) {
			t.Errorf("the successor's addresses were taken: %v", o.Pod.IPs)
		}
	})
}

func TestUnknownUIDIsTakenFromTheFirstPodSeen(t *testing.T) {
	a := newAPI(t)
	a.put(svc())
	a.put(slice("web-a", ep("u1", "10.0.0.1", "r")))
	a.put(pod())
	r := watchPod(t, a, func(c *Config) { c.PodUID = "" })
	r.until("ready", func(o lifecycle.Observation) bool { return ready(o) && o.Pod.UID == "u1" })
	r.remove("pods", "web-1")
	r.put(pod(func(p *corev1.Pod) { p.UID = types.UID("u9") }))
	r.until("gone", func(o lifecycle.Observation) bool { return o.Pod.Gone && o.Pod.UID == "u1" })
}

func TestEndpointOfAnEndingPodIsNotSearchedFor(t *testing.T) {
	r := online(t)
	r.put(pod(terminating(30)))
	r.until("terminating", func(o lifecycle.Observation) bool { return o.Pod.Terminating })
	before := r.count("watch endpointslices")
	r.put(slice("web-a"))
	r.until("absent", absent)
	if n := r.count("watch endpointslices"); n != before {
		t.Errorf("%d more watches of slices", n-before)
	}
}

func TestNothingIsToldTwice(t *testing.T) {
	r := online(t)
	r.put(slice("web-a", ep("u2", "10.0.0.2", "r"), ep("u1", "10.0.0.1", "r")))
	r.put(pod())
	r.put(slice("web-a", ep("u1", "10.0.0.1", "R")))
	r.until("not ready", notReady)
	seen := r.all()
	if len(seen) != 2 {
		t.Errorf("told %d times, want ready and not ready:%s", len(seen), r.dump())
	}
}

func TestConfigErrorsNameTheField(t *testing.T) {
	good := Config{Namespace: "shop", Pod: "web-1", Services: []string{"web"}, Client: &Client{}, OnObservation: func(lifecycle.Observation) {}}
	for want, change := range map[string]func(*Config){
		`Namespace is ""`:               func(c *Config) { c.Namespace = "" },
		`Pod is "Web_1"`:                func(c *Config) { c.Pod = "Web_1" },
		`Services is empty`:             func(c *Config) { c.Services = nil },
		`Services[0] is "a/b"`:          func(c *Config) { c.Services = []string{"a/b"} },
		`Services[1] is "web": it is n`: func(c *Config) { c.Services = []string{"web", "web"} },
		`PodIPs[0] is "invalid IP"`:     func(c *Config) { c.PodIPs = []netip.Addr{{}} },
		`Client is missing`:             func(c *Config) { c.Client = nil },
		`OnObservation is missing`:      func(c *Config) { c.OnObservation = nil },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want it to say %q", err, want)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}
