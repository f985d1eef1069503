// Package health makes one word of all that is said about an application: its probes, its worker processes and the
// application itself. It tells that word to whoever decides ([Config].OnChange), and shows what it is made of.
//
//	startup, liveness, readiness probes of each component --+
//	PUT /v1/workers/{id}, with a TTL, or a probe each ------+--> groups --> lifecycle.Availability --> OnChange
//	PUT /v1/availability/{liveness,readiness} --------------+      |
//	drain, hold (SetLifecycle) -----------------------------+------+------> /health, grpc.health.v1
//
// # Groups
//
// A group has a status, made of its members'. The groups liveness and readiness decide the availability: one truth for
// whoever asks, the kubelet's probe or the registry. A component is seen in the aspect of the group that is asked for: in
// liveness it is UP while its liveness probe doesn't fail, in startup once its startup probe succeeded, in readiness while
// its readiness probe succeeds, and elsewhere when nothing of it fails. A group that is in another takes over its aspect.
//
//	livenessState   the application's own word: BROKEN is DOWN                             in liveness, always
//	readinessState  the application's own word: REFUSING_TRAFFIC is OUT_OF_SERVICE         in readiness, always
//	lifecycle       a drain or a hold is OUT_OF_SERVICE                                    in readiness, always
//	NAME            a component: DOWN, OUT_OF_SERVICE before its first success, DEGRADED   where it has a probe for
//	workers         liveness: the master is heard; readiness: as many as required are      in both, when configured
//
// The status of a group is the first of DOWN, OUT_OF_SERVICE, UP, UNKNOWN that a member has, as in Spring Boot. DEGRADED
// counts as UP: a component that isn't critical never keeps an application from being ready. The cause is that of the first
// member that fails, in the order above and by name.
//
// # What goes to whom
//
// OnChange is not told of drains and holds: they come from where it leads, and an instance whose way back online depends
// upon its own drain would never come back. HTTP and gRPC show them, so that the kubelet's readiness probe of the
// application may be a question for the group readiness.
//
// # Until all have been heard
//
// An agent that just started has heard nothing: readiness begins as failure, and HTTP, gRPC and the status say so. But an agent
// before it may have heard, and registered the instance, so the availability is Undecided (see [lifecycle.Availability]) while it
// refuses only for want of components and workers that are still silent. It is decided once and for all
//
//   - with the first word that is enough: every critical component ready, as many workers as are required, anything that
//     refuses whatever the others may say: a probe's first failure, the application's own REFUSING_TRAFFIC;
//   - when the container is restarted: then nothing is left to be inherited;
//   - as far as reporting workers are waited for, after the TTL of their reports, by which each of them has to be heard again;
//   - after Config.Opening at the latest, one lease TTL: initialDelaySeconds and probes that can't be carried out don't
//     prolong it.
//
// # Rules
//
//  1. A word holds once its PUT is answered, whether Run is about to tell of it or not. Hence a mutex, and no goroutine that
//     owns the state: an answer must not depend upon a loop that begins later and ends earlier than the listeners.
//  2. OnChange gets the newest value, from Run's goroutine alone; what came and went in between is skipped.
//  3. Nothing polls once all is decided: there is one timer, for the worker whose word expires next, and none without workers.
//  4. A restart of the application's container ends what its processes said, or BROKEN would restart it for ever.
package health
