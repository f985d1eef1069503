// Package watcher tells what Kubernetes says of one pod: its endpoint in the EndpointSlices of the configured Services,
// and the Pod itself. It hands over a [lifecycle.Observation] whenever that changed.
//
//	EndpointSlices of each Service --+
//	own Pod -------------------------+-> stores -> one worker -> OnObservation(lifecycle.Observation)
//	each Service --------------------+     \-- wakes --^
//
// It is level-triggered: an event only changes a store and wakes the worker, which reads all stores, builds the whole
// Observation and compares it with the last. No event is the only chance to see a thing, and none waits for a timer.
//
// # Wide and narrow
//
// A thousand sidecars that each watch all slices of one Service cost a million deliveries a rollout. So the slices of a
// Service (label kubernetes.io/service-name) are watched wide only until the own endpoint is found, then only those that
// hold it, one for each IP family:
//
//	wide --own endpoint found, in each family that Pod and Service share--> narrow (metadata.name=<slice>)
//	narrow --slice deleted, or own endpoint no longer in it--> wide
//
// The wide watch ends only once the narrow one has caught up with it. On the way back, what was last seen stands until
// the wide list, a consistent read, has answered; only then absent is absent.
//
// # Which endpoint is the own one
//
// The one whose targetRef has the Pod's UID. One without a targetRef (a slice made by hand) is matched by IP; one whose
// targetRef names anything else never is. While an endpoint moves between slices both may hold it: the slice written
// last (the highest resourceVersion) counts, since the controller writes the new place before it clears the old one.
// With two IP families, the one of the Pod's primary IP decides readiness and ports, and both give addresses.
//
// # When the API server is lost
//
// The stores keep what they had, so nothing changes but Problems. A relist replaces a store in one step: an endpoint
// that is still there doesn't vanish for a moment, and what was deleted meanwhile is gone. Reads are consistent ones or
// not older than what was already seen, so an API server that lags doesn't take the state back.
//
// # The deadline of a Pod that is being deleted
//
// The deadline is the earlier of two bounds. The kubelet counts deletionGracePeriodSeconds from when it sees the
// deletion: seen + deletionGracePeriodSeconds. And metadata.deletionTimestamp is the deadline on the API server's clock,
// which matters when this watch lags or the agent starts late. Two facts blur the second one. It is truncated to the
// second; taken as it is, it is never late, and less than 1 s early. And the clocks may differ: the difference is
// bounded by the Date header of each answer, see [Client]. The deadline of a Pod only ever moves closer.
//
// A second delete may shorten the grace. The API server counts it from the first delete, too: it moves
// deletionTimestamp by as much, though not into the past (BeforeDelete in k8s.io/apiserver/pkg/registry/rest). So both
// values together tell when the deletion began, whichever delete they are of; only a grace that was over already is
// lost, as 1 s from the second delete on.
package watcher
