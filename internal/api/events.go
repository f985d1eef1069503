package api

import "time"

// EventsPath streams [Event] values as server-sent events: GET, control listeners only. It begins with the newest event,
// which is how the instance stands; with the header Last-Event-ID, or the query parameter lastEventId, it goes on after
// that event instead.
const EventsPath = "/v1/events"

// EventType is what happened to the instance.
type EventType string

// The types of events. Each says what is decided, not what is wished for.
const (
	EventOnline   EventType = "online"   // advertised from now on
	EventOffline  EventType = "offline"  // no longer advertised, and it may come back
	EventDraining EventType = "draining" // a shutdown began: withdrawn, requests in flight are waited for
	EventReleased EventType = "released" // the shutdown is over: SIGTERM may come
	EventHeld     EventType = "held"     // an operator holds it offline
	EventResumed  EventType = "resumed"  // the hold is over
)

// EventTypes are all types, in the order of an instance's life.
func EventTypes() []EventType {
	return []EventType{EventOnline, EventOffline, EventHeld, EventResumed, EventDraining, EventReleased}
}

// Event is one change of what is decided about the instance.
type Event struct {
	// ID counts from 1 for each run of the agent; Run tells the runs apart. On the wire the event's id is "RUN-ID".
	ID    uint64    `json:"id"`
	Run   string    `json:"run"`
	Time  time.Time `json:"time"`
	Type  EventType `json:"type"`
	State string    `json:"state"` // of the lifecycle: Online, Offline, Draining, Released, ...
	Cause string    `json:"cause"`
	// Deadline is when SIGTERM comes at the latest; with draining only.
	Deadline *time.Time `json:"deadline,omitempty"`
	// Verdict is set with released.
	Verdict *Verdict `json:"verdict,omitempty"`
	// Missed says that the reader fell too far behind, or that the agent was restarted: what happened between the
	// reader's last event and this one is not told any more. This one is how the instance stands now.
	Missed bool `json:"missed,omitempty"`
}
