package api

import "time"

const (
	// AvailabilityPath and "liveness" or "readiness": PUT an [Availability], GET reads it. Control listeners only.
	AvailabilityPath = "/v1/availability/"
	// WorkersPath and a worker's id: PUT a [Worker], DELETE takes it out, GET without an id lists them. Control listeners
	// only.
	WorkersPath = "/v1/workers/"
	// HoldPath: PUT a [Hold] keeps the instance offline, DELETE lets it back, GET reads it. Control listeners only.
	HoldPath = "/v1/hold"
	// HealthPath and a group, and one of its components: GET, on every listener.
	HealthPath = "/health"
)

// Availability is one of the two states: liveness CORRECT or BROKEN, readiness ACCEPTING_TRAFFIC or REFUSING_TRAFFIC.
type Availability struct {
	State string    `json:"state"`
	Cause string    `json:"cause,omitempty"`
	Since time.Time `json:"since,omitzero"` // in answers only
}

// Worker is what one process of the application says of itself.
type Worker struct {
	ID    string `json:"id,omitempty"`   // in answers; in requests it is in the path
	State string `json:"state"`          // "READY", "NOT_READY"
	Role  string `json:"role,omitempty"` // "master" or "worker"; default worker
	Cause string `json:"cause,omitempty"`
	// TTLSeconds is for how long the word stands without being said again; default and bounds are the agent's settings.
	TTLSeconds int       `json:"ttlSeconds,omitempty"`
	Since      time.Time `json:"since,omitzero"`   // in answers only
	Expires    time.Time `json:"expires,omitzero"` // in answers only
}

// Hold keeps an instance offline for the sake of an operator.
type Hold struct {
	Reason  string    `json:"reason"`
	Actor   string    `json:"actor,omitempty"`
	Since   time.Time `json:"since,omitzero"`   // in answers only
	Expires time.Time `json:"expires,omitzero"` // zero: until it is taken back
}
