package main

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/notify"
)

// metrics are what the agent tells Prometheus. What others count already is read when it is asked for.
type metrics struct {
	registry    *prometheus.Registry
	transitions *prometheus.CounterVec
	shutdowns   *prometheus.CounterVec
	duration    prometheus.Histogram
}

func newMetrics(a *agent) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		transitions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_transitions_total", Help: "Changes of state, by the state entered.",
		}, []string{"state"}),
		shutdowns: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "usher_shutdowns_total", Help: "Shutdowns that ended, by what began them and how they ended.",
		}, []string{"cause", "outcome"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "usher_shutdown_duration_seconds", Help: "From the first trigger of a shutdown to the release.",
			Buckets: []float64{.5, 1, 1.5, 2, 3, 5, 10, 20, 30, 60},
		}),
	}
	gauge := func(name, help string, value func() float64, labels prometheus.Labels) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, value)
	}
	counter := func(name, help string, value func() float64, labels prometheus.Labels) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help, ConstLabels: labels}, value)
	}
	for _, s := range lifecycle.States() {
		m.transitions.WithLabelValues(s.String())
		m.registry.MustRegister(gauge("usher_state", "1 for the state that the instance is in.",
			func() float64 { return is(a.machine.Status().State == s) }, prometheus.Labels{"state": s.String()}))
	}
	c := &a.registrar.Counters
	m.registry.MustRegister(
		m.transitions, m.shutdowns, m.duration,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		gauge("usher_build_info", "1, with the version as a label.", func() float64 { return 1 }, prometheus.Labels{"version": buildVersion()}),
		gauge("usher_registered", "1 while consumer records of this instance are in etcd.", func() float64 { return is(a.machine.Status().Registry.Advertised) }, nil),
		gauge("usher_registry_in_sync", "1 while etcd is as it should be.", func() float64 { return is(a.machine.Status().Registry.InSync) }, nil),
		counter("usher_registry_transactions_total", "Transactions sent to etcd.", func() float64 { return float64(c.Transactions.Load()) }, nil),
		counter("usher_registry_failures_total", "Attempts to bring etcd in line that failed.", func() float64 { return float64(c.Failures.Load()) }, nil),
		counter("usher_registry_conflicts_total", "Times that a record was somebody else's and left alone.", func() float64 { return float64(c.Conflicts.Load()) }, nil),
		counter("usher_registry_leases_granted_total", "Leases granted.", func() float64 { return float64(c.LeasesGranted.Load()) }, nil),
		counter("usher_registry_leases_lost_total", "Leases lost.", func() float64 { return float64(c.LeasesLost.Load()) }, nil),
		counter("usher_registry_lease_renewals_total", "Renewals of leases.", func() float64 { return float64(c.Renewals.Load()) }, nil),
		gauge("usher_kubernetes_problems", "What keeps the agent from seeing Kubernetes clearly, counted.", func() float64 { return float64(len(a.machine.Status().Observation.Problems)) }, nil),
		counter("usher_events_dropped_total", "Kubernetes Events that could not be written.", func() float64 {
			if a.recorder == nil {
				return 0
			}
			return float64(a.recorder.Dropped())
		}, nil),
		counter("usher_hook_calls_total", "Calls of the preStop hook.", func() float64 { return float64(a.hook.accepted.Load()) }, prometheus.Labels{"result": "accepted"}),
		counter("usher_hook_calls_total", "Calls of the preStop hook.", func() float64 { return float64(a.hook.refused.Load()) }, prometheus.Labels{"result": "refused"}),
		gauge("usher_event_streams", "Applications that follow the events.", func() float64 { return float64(a.hub.Streams()) }, nil),
		gauge("usher_prestop_missing", "1 while no container of the pod has a preStop hook that leads to the agent.", func() float64 { return is(a.hook.missing.Load()) }, nil),
		gauge("usher_in_flight", "Requests in flight, as the last sample of a drain saw them.", func() float64 {
			if p := a.progress.Load(); p != nil {
				return float64(p.InFlight)
			}
			return 0
		}, nil),
	)
	for kind, c := range map[string]*notify.Counters{
		"webhook": &a.receivers.Webhooks, "command": &a.receivers.Commands, "state-file": &a.receivers.StateFile,
	} {
		const help = "Events that the application was told of, and those that were given up."
		m.registry.MustRegister(
			counter("usher_notifications_total", help, func() float64 { return float64(c.Delivered.Load()) }, prometheus.Labels{"receiver": kind, "result": "delivered"}),
			counter("usher_notifications_total", help, func() float64 { return float64(c.Failed.Load()) }, prometheus.Labels{"receiver": kind, "result": "failed"}),
		)
	}
	return m
}

func (m *metrics) transition(t lifecycle.Transition) {
	m.transitions.WithLabelValues(t.State.String()).Inc()
	if v := t.Verdict; v != nil && t.From == lifecycle.Draining {
		m.shutdowns.WithLabelValues(v.Cause, string(v.Outcome)).Inc()
		m.duration.Observe(v.Total().Seconds())
	}
}

func is(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
