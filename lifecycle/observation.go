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
	// Restarts is the sum of its containers' restart counts.
	Restarts int
	// Disrupted is the condition DisruptionTarget (eviction, preemption, taint manager).
	Disrupted bool

	// Terminating says that deletionTimestamp is set.
	Terminating bool
	// Deadline is the end of the grace period on this machine's clock; zero unless Terminating. The API server's
	// deletionTimestamp is already the deadline, in the API server's clock, and honours `kubectl delete
	// --grace-period`.
	Deadline time.Time
	// DeletionStarted is when the deletion that Deadline is of was asked for, in whole seconds; zero unless Terminating.
	DeletionStarted time.Time

	// Hooked are the containers with a preStop hook that leads to the agent, and Unhooked the other ones that are neither
	// init containers nor sidecars.
	Hooked, Unhooked []string
	// HostNetwork says that the Pod is in its node's network, whose addresses are HostIPs.
	HostNetwork bool
	HostIPs     []netip.Addr

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
