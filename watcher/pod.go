package watcher

import (
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"usher.dev/usher/lifecycle"
)

// podInfo is what is kept of the Pod.
type podInfo struct {
	pod lifecycle.Pod // without Known, Gone and Deadline
	del *deletion     // nil unless being deleted
}

// deletion is what a deletion says, and when it was seen saying so.
type deletion struct {
	timestamp time.Time
	grace     time.Duration // -1 when the object has none
	seen      time.Time
}

// defaultGrace is what the API server fills in for an absent terminationGracePeriodSeconds.
const defaultGrace = corev1.DefaultTerminationGracePeriodSeconds * time.Second

// lastApplied is kubectl's copy of a whole object, which nobody reads here.
const lastApplied = "kubectl.kubernetes.io/last-applied-configuration"

func reducePod(obj runtime.Object) podInfo {
	p := obj.(*corev1.Pod)
	delete(p.Annotations, lastApplied)
	info := podInfo{pod: lifecycle.Pod{
		Namespace:   p.Namespace,
		Name:        p.Name,
		UID:         string(p.UID),
		Node:        p.Spec.NodeName,
		Labels:      p.Labels,
		Annotations: p.Annotations,
		Created:     p.CreationTimestamp.UTC(),
		Ready:       conditionTrue(p, corev1.PodReady),
		Disrupted:   conditionTrue(p, corev1.DisruptionTarget),
		Terminating: p.DeletionTimestamp != nil,
		Restarts:    restarts(p),
		Grace:       grace(p),
	}}
	for _, ip := range p.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil {
			info.pod.IPs = append(info.pod.IPs, a.Unmap())
		}
	}
	if p.DeletionTimestamp != nil {
		d := deletion{timestamp: p.DeletionTimestamp.UTC(), grace: -1, seen: time.Now()}
		if s := p.DeletionGracePeriodSeconds; s != nil {
			d.grace = max(0, time.Duration(*s)*time.Second)
		}
		info.del = &d
	}
	return info
}

// deadline is the earlier of both bounds that the package comment explains.
func (d *deletion) deadline(c *serverClock) time.Time {
	t := c.local(d.timestamp)
	if d.grace >= 0 {
		if s := d.seen.Add(d.grace); s.Before(t) {
			t = s
		}
	}
	return t
}

func conditionTrue(p *corev1.Pod, t corev1.PodConditionType) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == t {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// restarts counts those of the main containers and of native sidecars: an init container that ran to its end has
// nothing to do with the instance.
func restarts(p *corev1.Pod) int {
	n := 0
	for _, s := range p.Status.ContainerStatuses {
		n += int(s.RestartCount)
	}
	for _, c := range p.Spec.InitContainers {
		if !sidecar(c) {
			continue
		}
		for _, s := range p.Status.InitContainerStatuses {
			if s.Name == c.Name {
				n += int(s.RestartCount)
			}
		}
	}
	return n
}

func sidecar(c corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// grace is the shortest time from a hook's call to SIGKILL: the Pod's own, or the one that a liveness or startup probe
// sets for the container that it kills (readiness probes kill nothing).
func grace(p *corev1.Pod) time.Duration {
	g := defaultGrace
	if s := p.Spec.TerminationGracePeriodSeconds; s != nil {
		g = time.Duration(*s) * time.Second
	}
	shorten := func(c corev1.Container) {
		for _, probe := range []*corev1.Probe{c.LivenessProbe, c.StartupProbe} {
			if probe != nil && probe.TerminationGracePeriodSeconds != nil {
				g = min(g, time.Duration(*probe.TerminationGracePeriodSeconds)*time.Second)
			}
		}
	}
	for _, c := range p.Spec.Containers {
		shorten(c)
	}
	for _, c := range p.Spec.InitContainers {
		if sidecar(c) {
			shorten(c)
		}
	}
	return max(0, g)
}
