// Package notify tells the application what is decided about its instance.
//
// The agent publishes each decision once, and everybody reads at their own pace:
//
//	                        +-> server-sent events: the application follows
//	Publish -> Hub (ring) --+-> webhook:    POST to the application, tried again until it has it
//	                        +-> command:    a program of the agent's container
//	                        +-> state file: how things stand, on a volume shared with the application
//
// Publishing never waits for a reader, so a deregistration never does either. Whoever carries out a shutdown may wait for
// the receivers with [Receivers.Announced], for as long as it can afford.
//
// # Each event once and in order
//
// The hub numbers its events from 1 and keeps the newest 256. A reader has a position and no queue: what is in the ring it
// gets in order, and a reader that the ring has overtaken, or that comes with a position of an agent before this one, is
// given the newest event with [usher.dev/usher/internal/api.Event.Missed] set. There is never a silent gap, and the newest
// event is always the state that counts. Streams and commands have an event at most once; a webhook has it a second time
// when its answer got lost, with the same run and ID.
//
// # What fails
//
// A webhook is tried again, with jittered back-off from 50 ms to 2 s, until the event is older than the deadline; then it is
// dropped, logged and counted, and the next one's turn comes. Behind a shutdown that began nothing waits: once draining is
// published, an older event has one attempt. A command has one attempt. The state file is written until it is written, or
// there is something newer to write.
package notify
