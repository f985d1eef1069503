package lifecycle

import (
	"net/netip"
	"time"
)

// Observation is what Kubernetes says of this instance at one moment. It is immutable once handed over.
type Observation struct {
	Pod Pod
	// Endpoints has one entry for each configured Service, in the configured order.
	Endpoints []Endpoint
	// Problems are what keeps the watcher from seeing clearly, one sentence each: a Service that doesn't exist, a
	// permission that RBAC lacks, an API server that can't be reached. What was seen before a problem still stands.
	Problems []string
	// Unreachable says that one of the Problems is an API server that can't be reached.
	Unreachable bool
}

// Pod is the part of the own Pod that matters here.
type Pod struct {
	// Known is false until the own Pod has been seen once.
	Known bool
	// Gone says that the Pod was seen and no longer exists, or that its name now belongs to another UID.
	Gone bool

	Namespace, Name, UID string
	Node                 string
	Labels, Annotations  map[string]string
	Created              time.Time
	IPs                  []netip.Addr // the primary one first

	// Ready is the Pod's Ready condition.
	Ready bool
	// HostNetwork says that the Pod has no network namespace of its own: its addresses and ports are the node's.
	HostNetwork bool
	HostIPs     []netip.Addr // the node's addresses, the primary one first

	// Hooked are the containers whose preStop hook leads to the agent, so that their SIGTERM waits for the drain; Unhooked
	// are the others. Native sidecars are in neither: they get SIGTERM after all of these have exited. A classic
	// sidecar, the agent's own container among them, is a container like any other.
	Hooked, Unhooked []string
	// Restarts is the sum of the restart counts of the Hooked containers, or, without any, of the Unhooked ones: of those
	// that serve, not of what runs beside them, as far as the Pod tells.
	Restarts int
	// Restarted is when the last of them started that is running now; zero for not known.
	Restarted time.Time
	// Disrupted is the condition DisruptionTarget (eviction, preemption, taint manager).
	Disrupted bool

	// Terminating says that deletionTimestamp is set.
	Terminating bool
	// DeletionStarted is when the Pod was first deleted, on this machine's clock: deletionTimestamp less
	// deletionGracePeriodSeconds, up to 1 s early (the API keeps whole seconds), and not after it was seen. It is zero
	// unless Terminating, and for a deletion that has no grace period. A later delete with a shorter grace doesn't change
	// it, with one exception: where that grace was over already, the API server restarts the deletion with 1 s, and a
	// watcher that hasn't seen it before (an agent that was restarted) takes that for the start.
	DeletionStarted time.Time
	// Deadline is the end of the grace period on this machine's clock; zero unless Terminating. The API server's
	// deletionTimestamp is already the deadline, in the API server's clock, and honours `kubectl delete
	// --grace-period`.
	Deadline time.Time

	// Grace is the time from a hook's call to SIGKILL when the Pod isn't being deleted: spec.terminationGracePeriodSeconds,
	// or the shortest one that a liveness or startup probe carries.
	Grace time.Duration
}

// Endpoint is the own endpoint in the EndpointSlices of one Service.
type Endpoint struct {
	Service string
	// Found says that a slice has the own endpoint. The fields below are zero otherwise.
	Found bool
	// Ready, Serving and Terminating are the endpoint's conditions, nil already resolved as the API defines it: ready
	// when nil, serving as ready when nil, not terminating when nil.
	Ready, Serving, Terminating bool
	Addresses                   []netip.Addr // of the Pod's primary IP family first
	Ports                       []Port
	Zone                        string
}

// Port is one port of an endpoint, as the EndpointSlice gives it: the target port in the pod.
type Port struct {
	Name        string
	Number      uint16
	Protocol    string // "TCP", "UDP", "SCTP"
	AppProtocol string // "" when the slice has none
}
