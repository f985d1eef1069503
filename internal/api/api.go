// Package api is the agent's HTTP surface as its callers see it: paths, headers, defaults and bodies. The agent,
// usher-prestop and package client share it. It imports the standard library only, for the sake of those two.
package api

import "time"

const (
	// PrestopPath blocks until the instance is drained and answers a [Verdict]. GET or POST, on every listener.
	PrestopPath = "/prestop"
	// StatusPath answers a [Status]. Control listeners only.
	StatusPath = "/v1/status"

	// ReleasePath ends the wait of the shutdown under way: POST, with a [Release] or nothing. Control listeners only. 409 when
	// there is none.
	ReleasePath = "/v1/release"

	// TokenHeader carries the hook token of a caller that the agent can't recognise otherwise.
	TokenHeader = "Usher-Token"

	// DefaultHookAddress is where the kubelet's httpGet hook arrives, on every address of the pod.
	DefaultHookAddress = ":7400"
	// DefaultControlAddress is the control listener, which every process in the pod may use.
	DefaultControlAddress = "127.0.0.1:7401"
)

// Outcome is how a shutdown ended.
type Outcome string

const (
	// Drained: nothing was in flight for the quiet period.
	Drained Outcome = "drained"
	// TimedOut: the deadline came first; InFlight says how many requests were left.
	TimedOut Outcome = "timed-out"
	// Unmeasured: a source failed, so the configured floor was waited out instead.
	Unmeasured Outcome = "unmeasured"
	// Forced: somebody ended the wait; ForcedBy says who, InFlight how many requests were left.
	Forced Outcome = "forced"
	// Skipped: no in-flight source is configured, so only the settle time was waited.
	Skipped Outcome = "skipped"
)

// Verdict is the answer to a hook call. Durations are milliseconds.
type Verdict struct {
	Outcome Outcome `json:"outcome"`
	// Message is the verdict in one sentence.
	Message string `json:"message"`
	// Cause is what began the shutdown: "prestop hook", "pod terminating" or "SIGTERM".
	Cause    string    `json:"cause"`
	Started  time.Time `json:"started"`
	Deadline time.Time `json:"deadline"` // of the release, the application's reserve already taken off

	TotalMs    int64 `json:"totalMs"`
	GuardMs    int64 `json:"guardMs,omitempty"` // before all else: waiting for enough other instances
	WithdrawMs int64 `json:"withdrawMs"`
	SettleMs   int64 `json:"settleMs"`
	DrainMs    int64 `json:"drainMs"` // after the settle time

	// Withdrawn is false when the registry couldn't be told before the release: WithdrawError says why. The lease's
	// expiry takes the records out then.
	Withdrawn     bool   `json:"withdrawn"`
	WithdrawError string `json:"withdrawError,omitempty"`

	// GuardError says with how few others the withdrawal went on, and AnnounceError who could not be told of the shutdown.
	GuardError    string `json:"guardError,omitempty"`
	AnnounceError string `json:"announceError,omitempty"`
	ForcedBy      string `json:"forcedBy,omitempty"`

	InFlight int             `json:"inFlight"` // at the release
	Unsure   int             `json:"unsure"`   // of InFlight, how many might have been idle
	Sources  []SourceVerdict `json:"sources,omitempty"`
}

// SourceVerdict is what one source said last.
type SourceVerdict struct {
	Name        string `json:"name"`
	InFlight    int    `json:"inFlight"`
	Unsure      int    `json:"unsure,omitempty"`
	Connections int    `json:"connections,omitempty"`
	Peak        int    `json:"peak"` // the most that was in flight during the drain
	Error       string `json:"error,omitempty"`
}

// Release is the order to wait no longer.
type Release struct {
	Actor string `json:"actor,omitempty"` // for the verdict
}

// Status is the agent's own account of itself.
type Status struct {
	Version   string     `json:"version"`
	Cluster   string     `json:"cluster"`
	Namespace string     `json:"namespace"`
	Pod       string     `json:"pod"`
	PodUID    string     `json:"podUID"`
	Node      string     `json:"node,omitempty"`
	State     string     `json:"state"`
	Since     time.Time  `json:"since"`
	Cause     string     `json:"cause"`
	Deadline  *time.Time `json:"deadline,omitempty"` // of the shutdown under way

	Endpoints []Endpoint `json:"endpoints"`
	Registry  Registry   `json:"registry"`
	// Liveness and Readiness are what the application and its probes say; none while nobody says anything.
	Liveness  *Availability `json:"liveness,omitempty"`
	Readiness *Availability `json:"readiness,omitempty"`
	Hold      *Hold         `json:"hold,omitempty"`
	// Draining is how the drain stands, while one is under way.
	Draining *Draining `json:"draining,omitempty"`
	// Verdict is the last shutdown's.
	Verdict  *Verdict   `json:"verdict,omitempty"`
	Problems []string   `json:"problems,omitempty"`
	Refused  int64      `json:"refusedHookCalls"`
	Trail    []Decision `json:"trail"` // oldest first, bounded
}

// Endpoint is the own endpoint of one Service, as Kubernetes says it.
type Endpoint struct {
	Service     string   `json:"service"`
	Found       bool     `json:"found"`
	Ready       bool     `json:"ready"`
	Serving     bool     `json:"serving"`
	Terminating bool     `json:"terminating"`
	Addresses   []string `json:"addresses,omitempty"`
	Ports       []string `json:"ports,omitempty"` // "http:8080/TCP"
}

// Registry is how the registry stands against what is wanted.
type Registry struct {
	InSync  bool      `json:"inSync"`
	Lease   string    `json:"lease,omitempty"` // hexadecimal, as etcdctl prints it
	Keys    []string  `json:"keys,omitempty"`
	Error   string    `json:"error,omitempty"`
	Updated time.Time `json:"updated"`
}

// Draining is a drain under way.
type Draining struct {
	InFlight  int   `json:"inFlight"`
	Unsure    int   `json:"unsure"`
	ElapsedMs int64 `json:"elapsedMs"`
}

// Decision is one entry of the decision trail.
type Decision struct {
	Time  time.Time `json:"time"`
	State string    `json:"state"`
	Cause string    `json:"cause"`
}

// Error is the body of every answer that isn't 2xx.
type Error struct {
	Error string `json:"error"`
}
