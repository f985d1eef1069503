// Package probe asks an application how it is, as the kubelet does: by http, tcp, grpc (grpc.health.v1) and exec probes,
// with the fields, defaults and rules of a container's startupProbe, livenessProbe and readinessProbe.
//
//	Run starts, or Restarted ─> started: false if there is a startup probe, live: true, ready: false if there is a readiness probe
//	                            │ every periodSeconds, once initialDelaySeconds have passed
//	                            ▼
//	         startup ──success──> started ──> liveness and readiness are probed, readiness at once
//	            │ failureThreshold                │ failureThreshold: live / ready is false
//	            ▼                                 │ successThreshold: true again
//	      live is false                           ▼
//	                                    OnChange, whenever started, live or ready turns
//
// The rules are those of Kubernetes 1.36; docstrings name the file below pkg/ in which each was read
// (https://github.com/kubernetes/kubernetes/tree/v1.36.3/pkg): kubelet/prober, probe/http, probe/tcp, probe/grpc,
// probe/exec, apis/core. One goroutine schedules all probes of an application and writes the state; each probe
// has one that carries out its runs.
//
// # Where it departs from the kubelet
//
// The first run is put off by a part of a second, one of four at random, not of a whole period: see [Prober.Run].
//
// After a liveness or startup probe has failed failureThreshold times, the kubelet stops probing until there is a new
// container (worker.go: onHold), for it is about to kill this one. Here probing goes on, and a success heals the state.
// This package kills nothing: what it finds is read by others, such as the kubelet's own probe of the agent, which has a
// threshold of its own. A hold would be lifted only by the news that the container was restarted. Where nobody restarts
// it, an application that recovered by itself would stay BROKEN for ever; and where the news is late or lost (the API
// server is away), the kubelet would read BROKEN of the fresh container and kill that one too, again and again.
//
// A startup probe that failed failureThreshold times makes live false, since the kubelet restarts the container then just
// as for liveness (kuberuntime_manager.go: computePodActions).
//
// Counts start anew with a new container. The kubelet carries an unfinished count over (worker.go: lastResult), so that
// a container may be killed for its predecessor's failures.
//
// exec runs in this process' own container, as a process group of its own, with this process' environment, which is also
// what $(NAME) in the command refers to. Its output is kept in the order written, not stdout before stderr.
//
// https resumes the TLS session of the run before; the kubelet has a full handshake each time.
//
// The kubelet also probes readiness at once when it happens to look at a pod that is not ready
// (prober_manager.go: UpdatePodStatus). Here that is so after each change: startup succeeded, the container was
// restarted, ready was lost.
//
// terminationGracePeriodSeconds has no meaning here, and no field. Nor does the end of a pod stop the probes
// (worker.go: DeletionTimestamp): whoever ends the application ends Run.
package probe
