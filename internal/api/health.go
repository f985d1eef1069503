package api

import "time"

const (
	// AvailabilityPath and "liveness" or "readiness": PUT an [Availability], GET reads what holds with all that bears upon it.
	// Control listeners only.
	AvailabilityPath = "/v1/availability/"
	// WorkersPath and a worker's id: PUT a [Worker], GET reads it, DELETE takes it out. GET without an id lists them all.
	// Control listeners only.
	WorkersPath = "/v1/workers/"
	// HoldPath: PUT a [Hold] keeps the instance offline, DELETE lets it back, GET reads it. Control listeners only.
	HoldPath = "/v1/hold"
	// HealthPath answers a [Health]; below it are the groups, their components, and the components. GET, on every listener.
	HealthPath = "/health"
)

// The statuses of a [Health]: Spring Boot's, and Degraded.
const (
	HealthDown         = "DOWN"
	HealthOutOfService = "OUT_OF_SERVICE"
	HealthUp           = "UP"
	HealthUnknown      = "UNKNOWN"
	// HealthDegraded is of a component that fails and isn't critical; of a group it never is.
	HealthDegraded = "DEGRADED"
)

// Health is the answer below [HealthPath], in the shape of Spring Boot's health endpoint.
type Health struct {
	Status     string            `json:"status"`
	Components map[string]Health `json:"components,omitempty"`
	Details    map[string]any    `json:"details,omitempty"`
	Groups     []string          `json:"groups,omitempty"` // of HealthPath itself only
}

// Availability is one of the two states: liveness CORRECT or BROKEN, readiness ACCEPTING_TRAFFIC or REFUSING_TRAFFIC; in
// answers also UNKNOWN, while nobody says anything.
type Availability struct {
	State string    `json:"state"`
	Cause string    `json:"cause,omitempty"` // cut after 1,024 bytes
	Since time.Time `json:"since,omitzero"`  // in answers only
}

// The states of a [Worker].
const (
	WorkerReady    = "READY"
	WorkerNotReady = "NOT_READY"
	// WorkerSilent is of one whose TTL is over, in answers only.
	WorkerSilent = "SILENT"
)

// The roles of a [Worker].
const (
	RoleMaster = "master"
	RoleWorker = "worker"
)

// Worker is what one process of the application says of itself.
type Worker struct {
	ID    string `json:"id,omitempty"` // in answers only: in requests it is in the path
	State string `json:"state"`
	Role  string `json:"role,omitempty"`  // default worker
	Cause string `json:"cause,omitempty"` // cut after 1,024 bytes
	// TTLSeconds is for how long the word stands without being said again: 1 to 3600, default health.workers.ttlSeconds. An
	// answer has 0 for a worker that is probed.
	TTLSeconds int       `json:"ttlSeconds,omitempty"`
	Since      time.Time `json:"since,omitzero"`   // of the state; in answers only
	Expires    time.Time `json:"expires,omitzero"` // in answers only
}

// Hold keeps an instance offline for the sake of an operator.
type Hold struct {
	Reason  string    `json:"reason"`
	Actor   string    `json:"actor,omitempty"`
	Since   time.Time `json:"since,omitzero"`   // in answers only
	Expires time.Time `json:"expires,omitzero"` // in an order the default is an hour from now; at most 7 days
}
