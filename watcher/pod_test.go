package watcher

import (
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
		p.Status.Conditions = []corev1.PodCondition{
			{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue}}
	})
	got := reducePod(p).pod
	if got.Grace != 15*time.Second || got.Restarts != 7 || !got.Ready || !got.Disrupted || got.Terminating {
		t.Errorf("got %+v", got)
	}
	p.Status.Conditions[0].Status, p.Status.Conditions[1].Status = corev1.ConditionUnknown, corev1.ConditionFalse
	if got := reducePod(p).pod; got.Ready || got.Disrupted {
		t.Errorf("got %+v", got)
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
	f := &feed[podInfo]{reduce: reducePod, notify: func() {}, synced: true, items: map[string]podInfo{}}
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
			return []func(*corev1.Pod){deleted(30*s, 30*s), after(2*s, deleted(7*s, 5*s))}
		}, []time.Duration{30 * s, 7 * s}},
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
