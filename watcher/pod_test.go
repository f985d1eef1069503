package watcher

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"usher.dev/usher/lifecycle"
)

// terminating deletes a Pod with that grace, now.
func terminating(seconds int64) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.DeletionTimestamp = ptr(metav1.NewTime(time.Now().Add(time.Duration(seconds) * time.Second)))
		p.DeletionGracePeriodSeconds = &seconds
	}
}

func TestPodFields(t *testing.T) {
	always := ptr(corev1.ContainerRestartPolicyAlways)
	p := pod(func(p *corev1.Pod) {
		p.Spec.TerminationGracePeriodSeconds = ptr(int64(60))
		p.Spec.Containers = []corev1.Container{
			{Name: "app", LivenessProbe: &corev1.Probe{TerminationGracePeriodSeconds: ptr(int64(20))},
				ReadinessProbe: &corev1.Probe{TerminationGracePeriodSeconds: ptr(int64(1))}},
			{Name: "b", StartupProbe: &corev1.Probe{TerminationGracePeriodSeconds: ptr(int64(15))}},
		}
		p.Spec.InitContainers = []corev1.Container{
			{Name: "init", LivenessProbe: &corev1.Probe{TerminationGracePeriodSeconds: ptr(int64(2))}},
			{Name: "sidecar", RestartPolicy: always},
		}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "app", RestartCount: 2}, {Name: "b", RestartCount: 1}}
		p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "init", RestartCount: 10}, {Name: "sidecar", RestartCount: 4}}
		p.Spec.HostNetwork = true
		p.Status.HostIPs = []corev1.HostIP{{IP: "10.0.0.1"}, {IP: "fd00::1"}, {IP: "odd"}}
		p.Status.Conditions = []corev1.PodCondition{
			{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue}}
	})
	got := reducePod(7400)(p).pod
	if got.Grace != 15*time.Second || got.Restarts != 3 || !got.Ready || !got.Disrupted || got.Terminating {
		t.Errorf("got %+v", got)
	}
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}; !got.HostNetwork || !slices.Equal(got.HostIPs, want) {
		t.Errorf("host network %v, host IPs %v", got.HostNetwork, got.HostIPs)
	}
	p.Status.Conditions[0].Status, p.Status.Conditions[1].Status = corev1.ConditionUnknown, corev1.ConditionFalse
	if got := reducePod(7400)(p).pod; got.Ready || got.Disrupted {
		t.Errorf("got %+v", got)
	}
}

// container has that preStop hook.
func container(name string, hook *corev1.LifecycleHandler) corev1.Container {
	return corev1.Container{Name: name, Lifecycle: &corev1.Lifecycle{PreStop: hook}}
}

func httpHook(path string, port intstr.IntOrString) *corev1.LifecycleHandler {
	return &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: port}}
}

func execHook(command ...string) *corev1.LifecycleHandler {
	return &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: command}}
}

func TestHookThatLeadsToTheAgentIsFound(t *testing.T) {
	named := container("app", httpHook("/prestop", intstr.FromString("usher")))
	named.Ports = []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}, {Name: "usher", ContainerPort: 7400}}
	elsewhere := named
	elsewhere.Ports = []corev1.ContainerPort{{Name: "usher", ContainerPort: 8080}}
	undeclared := named
	undeclared.Ports = nil
	onStart := corev1.Container{Lifecycle: &corev1.Lifecycle{PostStart: httpHook("/prestop", intstr.FromInt32(7400))}}

	for _, c := range []struct {
		name      string
		container corev1.Container
		port      uint16
		want      bool
	}{
		{"no lifecycle", corev1.Container{}, 7400, false},
		{"no preStop", onStart, 7400, false},
		{"the agent's port", container("", httpHook("/prestop", intstr.FromInt32(7400))), 7400, true},
		{"another port", container("", httpHook("/prestop", intstr.FromInt32(8080))), 7400, false},
		{"any port while the agent's isn't known", container("", httpHook("/prestop", intstr.FromInt32(8080))), 0, true},
		{"a number in quotes", container("", httpHook("/prestop", intstr.FromString("7400"))), 7400, true},
		{"a name of that port", named, 7400, true},
		{"a name of another port", elsewhere, 7400, false},
		{"a name that the container doesn't declare: the kubelet can't call it", undeclared, 7400, false},
		{"another path", container("", httpHook("/quitquitquit", intstr.FromInt32(7400))), 7400, false},
		{"a path below", container("", httpHook("/prestop/now", intstr.FromInt32(7400))), 7400, false},
		{"a path without its slash", container("", httpHook("prestop", intstr.FromInt32(7400))), 7400, true},
		{"a path with a query", container("", httpHook("/prestop?from=app", intstr.FromInt32(7400))), 7400, true},
		{"the program", container("", execHook("/usher/usher-prestop", "--log-to-pid1")), 7400, true},
		{"the program on the path", container("", execHook("usher-prestop")), 7400, true},
		{"in a shell's line", container("", execHook("sh", "-c", "sleep 1; exec /usher/usher-prestop && rm -f /tmp/ready")), 7400, true},
		{"in a subshell, with a variable", container("", execHook("sh", "-c", `x=$("$USHER"/usher-prestop);sleep 1`)), 7400, true},
		{"something with a name alike", container("", execHook("/bin/my-usher-prestop", "/etc/usher-prestop.yaml")), 7400, false},
		{"a folder of that name", container("", execHook("cat", "/usher-prestop/config")), 7400, false},
		{"another command", container("", execHook("sleep", "15")), 7400, false},
		{"sleep", container("", &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 5}}), 7400, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := hooked(c.container, c.port); got != c.want {
				t.Errorf("hooked is %v, want %v", got, c.want)
			}
		})
	}
}

// A restart of a container that doesn't serve must not look like the application's.
func TestRestartsAreThoseOfTheHookedContainers(t *testing.T) {
	hook := httpHook("/prestop", intstr.FromInt32(7400))
	with := func(containers ...corev1.Container) *corev1.Pod {
		return pod(func(p *corev1.Pod) {
			p.Spec.Containers = containers
			sidecar := container("agent", hook) // holds nobody's SIGTERM back
			sidecar.RestartPolicy = ptr(corev1.ContainerRestartPolicyAlways)
			p.Spec.InitContainers = []corev1.Container{sidecar}
			p.Status.InitContainerStatuses = []corev1.ContainerStatus{{Name: "agent", RestartCount: 1000}}
			p.Status.ContainerStatuses = []corev1.ContainerStatus{
				{Name: "helper", RestartCount: 100}, {Name: "grpc", RestartCount: 10}, {Name: "app", RestartCount: 1}}
		})
	}
	for _, c := range []struct {
		pod              *corev1.Pod
		hooked, unhooked []string
		restarts         int
	}{
		{with(container("app", hook), container("helper", nil)), []string{"app"}, []string{"helper"}, 1},
		{with(container("app", hook), container("grpc", hook), container("helper", nil)), []string{"app", "grpc"}, []string{"helper"}, 11},
		{with(container("app", nil), corev1.Container{Name: "helper"}), nil, []string{"app", "helper"}, 101},
	} {
		got := reducePod(7400)(c.pod).pod
		if !slices.Equal(got.Hooked, c.hooked) || !slices.Equal(got.Unhooked, c.unhooked) || got.Restarts != c.restarts {
			t.Errorf("hooked %v, unhooked %v, %d restarts; want %v, %v, %d", got.Hooked, got.Unhooked, got.Restarts, c.hooked, c.unhooked, c.restarts)
		}
	}
}

// deadlines runs the worker's own path on a series of Pods, each after a pause, and returns the deadlines as time since
// the start.
func deadlines(t *testing.T, observe func(*serverClock), steps ...func(*corev1.Pod)) []time.Duration {
	t.Helper()
	start := time.Now()
	c := &Client{clock: newServerClock(start)}
	if observe != nil {
		observe(c.clock)
	}
	f := &feed[podInfo]{reduce: reducePod(7400), notify: func() {}, synced: true, items: map[string]podInfo{}}
	w := &Watcher{cfg: Config{Namespace: "shop", Pod: "web-1", Client: c}, podFeed: f}
	var out []time.Duration
	for _, s := range steps {
		if err := f.Update(pod(s)); err != nil {
			t.Fatal(err)
		}
		w.observePod(&problems{})
		if w.pod.Deadline.IsZero() {
			out = append(out, 0)
		} else {
			out = append(out, w.pod.Deadline.Sub(start))
		}
	}
	return out
}

func TestDeadline(t *testing.T) {
	deleted := func(at, grace time.Duration) func(*corev1.Pod) { // at: deletionTimestamp since the start
		start := time.Now()
		return func(p *corev1.Pod) {
			p.DeletionTimestamp = ptr(metav1.NewTime(start.Add(at)))
			p.DeletionGracePeriodSeconds = ptr(int64(grace / time.Second))
		}
	}
	after := func(d time.Duration, f func(*corev1.Pod)) func(*corev1.Pod) {
		return func(p *corev1.Pod) { time.Sleep(d); f(p) }
	}
	behind := func(d time.Duration) func(*serverClock) { // the server's clock is ahead by d, known to the second
		return func(c *serverClock) {
			now := time.Now()
			c.observe(now, now, now.Add(d).Truncate(time.Second))
		}
	}
	const s = time.Second
	// In a bubble the clock starts at a whole second and stands still in between.
	for name, c := range map[string]struct {
		clock func(*serverClock)
		steps func() []func(*corev1.Pod)
		want  []time.Duration
	}{
		"not deleted":  {nil, func() []func(*corev1.Pod) { return []func(*corev1.Pod){func(*corev1.Pod) {}} }, []time.Duration{0}},
		"seen at once": {nil, func() []func(*corev1.Pod) { return []func(*corev1.Pod){deleted(20*s, 20*s)} }, []time.Duration{20 * s}},
		"seen late: the timestamp counts": {nil, func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){after(8*s, deleted(20*s, 20*s))}
		}, []time.Duration{20 * s}},
		"an unrelated change leaves it": {nil, func() []func(*corev1.Pod) {
			d := deleted(25*s, 20*s)
			return []func(*corev1.Pod){d, after(3*s, d)}
		}, []time.Duration{20 * s, 20 * s}},
		"a second delete with a shorter grace": {nil, func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){deleted(30*s, 30*s), after(2*s, deleted(5*s, 5*s))}
		}, []time.Duration{30 * s, 5 * s}},
		"a second delete whose grace is over": {nil, func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){deleted(30*s, 30*s), after(9*s, deleted(9*s, s))}
		}, []time.Duration{30 * s, 9 * s}},
		"never later": {nil, func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){deleted(10*s, 10*s), after(2*s, deleted(60*s, 60*s))}
		}, []time.Duration{10 * s, 10 * s}},
		"a server ahead by an hour": {behind(time.Hour), func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){deleted(time.Hour+20*s, 20*s)}
		}, []time.Duration{19 * s}}, // the skew is known to the second, the early end counts
		"a server behind by an hour": {behind(-time.Hour), func() []func(*corev1.Pod) {
			return []func(*corev1.Pod){deleted(-time.Hour+20*s, 20*s)}
		}, []time.Duration{19 * s}},
		"grace 0": {nil, func() []func(*corev1.Pod) { return []func(*corev1.Pod){deleted(0, 0)} }, []time.Duration{0}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				got := deadlines(t, c.clock, c.steps()...)
				for i := range c.want {
					if got[i] != c.want[i] {
						t.Errorf("deadline after step %d is %v, want %v", i+1, got[i], c.want[i])
					}
				}
			})
		})
	}
}

func TestDeletionStartedIsTheFirstDelete(t *testing.T) {
	const s = time.Second
	type version struct {
		seen      time.Duration // since the start, as timestamp
		timestamp time.Duration
		grace     time.Duration // -1 for none
	}
	for name, c := range map[string]struct {
		versions []version
		want     []time.Duration // since the start; -1 for zero
	}{
		"seen at once":          {[]version{{0, 20 * s, 20 * s}}, []time.Duration{0}},
		"seen late":             {[]version{{8 * s, 20 * s, 20 * s}}, []time.Duration{0}},
		"not before it is seen": {[]version{{0, 22 * s, 20 * s}}, []time.Duration{0}},
		// As the API server does it: the timestamp moves by as much as the grace.
		"a second delete with a shorter grace": {[]version{{0, 30 * s, 30 * s}, {2 * s, 5 * s, 5 * s}}, []time.Duration{0, 0}},
		"a second delete whose grace is over":  {[]version{{0, 30 * s, 30 * s}, {9 * s, 9 * s, s}}, []time.Duration{0, 0}},
		"only that one seen":                   {[]version{{9 * s, 9 * s, s}}, []time.Duration{8 * s}},
		"no grace said":                        {[]version{{0, 20 * s, -1}}, []time.Duration{-1}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				f := &feed[podInfo]{reduce: reducePod(7400), notify: func() {}, synced: true, items: map[string]podInfo{}}
				w := &Watcher{cfg: Config{Namespace: "shop", Pod: "web-1", Client: &Client{clock: newServerClock(start)}}, podFeed: f}
				for i, v := range c.versions {
					time.Sleep(time.Until(start.Add(v.seen)))
					f.Update(pod(func(p *corev1.Pod) {
						p.DeletionTimestamp = ptr(metav1.NewTime(start.Add(v.timestamp)))
						if v.grace >= 0 {
							p.DeletionGracePeriodSeconds = ptr(int64(v.grace / s))
						}
					}))
					w.observePod(&problems{})
					got, want := fmt.Sprint(w.pod.DeletionStarted.Sub(start)), fmt.Sprint(c.want[i])
					if c.want[i] < 0 {
						got, want = fmt.Sprint(w.pod.DeletionStarted.IsZero()), "true"
					}
					if got != want {
						t.Errorf("after version %d it is %s, want %s", i+1, got, want)
					}
				}
			})
		})
	}
}

func TestDeletionIsObserved(t *testing.T) {
	a := newAPI(t)
	a.ahead = time.Hour
	a.put(svc())
	a.put(pod())
	r := watchPod(t, a)
	r.until("Pod known", func(o lifecycle.Observation) bool { return o.Pod.Known })
	a.put(pod(terminating(3600+20), func(p *corev1.Pod) { p.DeletionGracePeriodSeconds = ptr(int64(20)) }))
	o := r.until("terminating", func(o lifecycle.Observation) bool { return o.Pod.Terminating })
	if left := time.Until(o.Pod.Deadline); left > 20*time.Second || left < 5*time.Second {
		t.Errorf("%v left of 20 s", left)
	}
}

func TestClockSkew(t *testing.T) {
	base := time.Unix(1_000_000, 0)
	at := func(d time.Duration) time.Time { return base.Add(d) }
	// answer is one that took 10 ms, on a server whose clock is ahead.
	answer := func(c *serverClock, own, ahead time.Duration) {
		c.observe(at(own-5*time.Millisecond), at(own+5*time.Millisecond), at(own+ahead).Truncate(time.Second))
	}
	t.Run("none is assumed while the answers allow it", func(t *testing.T) {
		c := newServerClock(base)
		if _, known := c.skew(); known {
			t.Error("known without an answer")
		}
		for i := range 20 {
			answer(c, time.Duration(i)*370*time.Millisecond, 0)
		}
		if s, known := c.skew(); s != 0 || !known {
			t.Errorf("skew is %v, known %v", s, known)
		}
	})
	t.Run("narrows with each answer", func(t *testing.T) {
		c := newServerClock(base)
		const ahead = 42*time.Second + 300*time.Millisecond
		for i := range 50 {
			answer(c, time.Duration(i)*370*time.Millisecond, ahead)
			if s, _ := c.skew(); s < ahead-10*time.Millisecond {
				t.Fatalf("skew is %v after %d answers, below the true %v: the deadline would be late", s, i+1, ahead)
			}
		}
		if s, _ := c.skew(); s > ahead+50*time.Millisecond {
			t.Errorf("skew is %v, want %v to 50 ms", s, ahead)
		}
	})
	t.Run("a clock that is set starts anew", func(t *testing.T) {
		c := newServerClock(base)
		for i := range 50 {
			answer(c, time.Duration(i)*370*time.Millisecond, 42*time.Second)
		}
		answer(c, 50*time.Second, 20*time.Minute)
		if s, _ := c.skew(); s < 20*time.Minute-10*time.Millisecond || s > 20*time.Minute+1010*time.Millisecond {
			t.Errorf("skew is %v, want about 20 min", s)
		}
		answer(c, time.Minute, -10*time.Second)
		if s, _ := c.skew(); s < -10*time.Second-10*time.Millisecond || s > -9*time.Second+10*time.Millisecond {
			t.Errorf("skew is %v, want about -10 s", s)
		}
	})
}
