// Package lifecycle decides when an instance is advertised, and carries out its end.
//
// It is the middle of Usher: the watcher tells it what Kubernetes says ([Observation]), it tells the registry what
// should be there ([Desired]), and when the pod ends it withdraws the instance, waits until the requests in flight are
// done, and says when SIGTERM may proceed ([Verdict]). It knows neither client-go nor etcd; the interfaces that it
// needs, [Registrar] and [Drainer], are declared here and satisfied elsewhere.
//
//	EndpointSlice, own Pod -> Observation -> Decide -> Desired -> Registrar -> etcd
//	preStop, deletion, SIGTERM -> Stop -> withdraw -> settle -> drain -> Verdict -> the kubelet sends SIGTERM
//
// # States
//
//	Pending --ready--> Online <--ready / not ready, hold, refusing--> Offline <--hold-- Pending
//	any state --preStop, own Pod terminating, SIGTERM--> Draining --quiet or deadline--> Released --SIGTERM--> Stopped
//	Released, and the Pod is not being deleted --container restarted and ready, or grace over and ready--> Online
//
// # The end of an instance
//
//	T0            the first of: hook call, deletion of the own Pod seen, SIGTERM
//	T0 ..         guard, where it is wanted: the instance stays Online until enough others are registered; at most 10 s,
//	              and at most half of the time until the latest release
//	    ..        withdraw: the consumer records are deleted; retried for at most 2 s, then in the background
//	    .. +1 s   settle: consumers learn of it, and beside it the application is told (at most as long as withdrawing)
//	    ..        drain: until nothing has been in flight for the quiet period, which may overlap the settle time
//	    ..        release: every hook call that waits gets the same verdict, and the kubelet goes on to SIGTERM
//	T0+grace      the kubelet's SIGKILL. Release comes at the latest a reserve earlier (5 s, at most a third of the
//	              grace), which belongs to the application for its own shutdown.
//
// # Invariants
//
//  1. Only an instance whose endpoint is ready, which nobody holds, which says nothing to the contrary itself, and which is
//     not being shut down is advertised; one that a guard keeps, as long as its endpoint serves.
//     While what decides that has not been heard since the agent's start, an instance is neither put into the registry nor
//     taken out: what an agent before this one left stays until the first word against it, or until its lease ends.
//  2. One goroutine writes the state ([Machine.Run]); everybody else sends to it.
//  3. There is one shutdown at a time: every trigger joins the one under way and gets its verdict.
//  4. Whatever fails makes a shutdown shorter, never longer, and shows in its verdict.
//  5. While a shutdown is under way, its latest moment of release only ever moves closer.
package lifecycle
