package lifecycle

import "time"

// LivenessState says whether the application can go on by itself, or needs a restart.
type LivenessState string

// ReadinessState says whether the application takes requests.
type ReadinessState string

// The states, named as in Spring Boot's availability (org.springframework.boot.availability), whose users know them.
const (
	Correct LivenessState = "CORRECT"
	Broken  LivenessState = "BROKEN"

	AcceptingTraffic ReadinessState = "ACCEPTING_TRAFFIC"
	RefusingTraffic  ReadinessState = "REFUSING_TRAFFIC"
)

// Liveness is a state with why and since when.
type Liveness struct {
	State LivenessState
	Cause string
	Since time.Time
}

// Readiness is a state with why and since when.
type Readiness struct {
	State ReadinessState
	Cause string
	Since time.Time
}

// Availability is what the application, its probes and its workers say of it. It is a value, never changed once handed
// over. The zero value means that nobody says anything, and Kubernetes' word alone counts.
type Availability struct {
	Liveness  Liveness
	Readiness Readiness
	// Undecided says that it refuses for no other reason than that not everybody has been heard since the agent's start.
	// That keeps a new instance out, and is no reason to take one out that an agent before this one registered.
	Undecided bool
}

// Refusing says whether the instance must not be advertised, whatever its endpoint says, and why.
func (a Availability) Refusing() (cause string, refusing bool) {
	switch {
	case a.Liveness.State == Broken:
		return "liveness " + string(Broken) + ": " + a.Liveness.Cause, true
	case a.Readiness.State == RefusingTraffic:
		return "readiness " + string(RefusingTraffic) + ": " + a.Readiness.Cause, true
	}
	return "", false
}

// Hold keeps an instance offline for the sake of an operator. It is immutable once handed over.
type Hold struct {
	Reason  string
	Actor   string // "" when nobody says who
	Since   time.Time
	Expires time.Time
}

// String is the hold in one sentence.
func (h Hold) String() string {
	by := ""
	if h.Actor != "" {
		by = " by " + h.Actor
	}
	return "held" + by + ": " + h.Reason
}
