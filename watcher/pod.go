package watcher

import (
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"

	agentapi "usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

// podInfo is what is kept of the Pod.
type podInfo struct {
	pod lifecycle.Pod // without Known, Gone, Deadline and DeletionStarted
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

// reducePod keeps what an Observation has of the Pod; hookPort as in Config.
func reducePod(hookPort uint16) func(runtime.Object) podInfo {
	return func(obj runtime.Object) podInfo {
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
			Grace:       grace(p),
			HostNetwork: p.Spec.HostNetwork,
		}}
		for _, c := range p.Spec.Containers {
			if hooked(c, hookPort) {
				info.pod.Hooked = append(info.pod.Hooked, c.Name)
			} else {
				info.pod.Unhooked = append(info.pod.Unhooked, c.Name)
			}
		}
		serving := info.pod.Hooked
		if len(serving) == 0 {
			serving = info.pod.Unhooked
		}
		for _, s := range p.Status.ContainerStatuses {
			if slices.Contains(serving, s.Name) {
				info.pod.Restarts += int(s.RestartCount)
				if r := s.State.Running; r != nil && r.StartedAt.After(info.pod.Restarted) {
					info.pod.Restarted = r.StartedAt.UTC()
				}
			}
		}
		for _, ip := range p.Status.PodIPs {
			info.pod.IPs = appendIP(info.pod.IPs, ip.IP)
		}
		for _, ip := range p.Status.HostIPs {
			info.pod.HostIPs = appendIP(info.pod.HostIPs, ip.IP)
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
}

func appendIP(ips []netip.Addr, s string) []netip.Addr {
	if a, err := netip.ParseAddr(s); err == nil {
		ips = append(ips, a.Unmap())
	}
	return ips
}

// prestopProgram is the hook caller of package cmd/usher-prestop.
const prestopProgram = "usher-prestop"

// hooked says whether the container's preStop hook leads to the agent.
func hooked(c corev1.Container, hookPort uint16) bool {
	if c.Lifecycle == nil || c.Lifecycle.PreStop == nil {
		return false
	}
	// In the kubelet's order: exec, then httpGet.
	switch h := c.Lifecycle.PreStop; {
	case h.Exec != nil:
		return slices.ContainsFunc(h.Exec.Command, runsPrestop)
	case h.HTTPGet != nil:
		// The kubelet takes a path without its slash, too.
		p, _, _ := strings.Cut(h.HTTPGet.Path, "?")
		if "/"+strings.TrimPrefix(p, "/") != agentapi.PrestopPath {
			return false
		}
		return hookPort == 0 || resolvePort(h.HTTPGet.Port, c) == int(hookPort)
	}
	return false
}

// resolvePort is the kubelet's rule: a name is one that the same container declares, and may be a number in quotes.
func resolvePort(port intstr.IntOrString, c corev1.Container) int {
	if port.Type == intstr.Int {
		return port.IntValue()
	}
	for _, p := range c.Ports {
		if p.Name == port.StrVal {
			return int(p.ContainerPort)
		}
	}
	n, _ := strconv.Atoi(port.StrVal)
	return n
}

// runsPrestop finds the program in one word of a command: alone, with its folder, or in a line of shell.
func runsPrestop(word string) bool {
	words := strings.FieldsFunc(word, func(r rune) bool { return strings.ContainsRune(" \t\r\n;&|(){}<>=$`\"'", r) })
	return slices.ContainsFunc(words, func(w string) bool { return path.Base(w) == prestopProgram })
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

// started is the moment of the delete, which both values follow from and a later delete leaves (unless its grace is over
// at once); zero if the object doesn't say.
func (d *deletion) started(c *serverClock) time.Time {
	if d.grace < 0 {
		return time.Time{}
	}
	t := c.local(d.timestamp).Add(-d.grace)
	if t.After(d.seen) {
		return d.seen
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
