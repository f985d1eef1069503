package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapgrpc"
	"google.golang.org/grpc/grpclog"

	"usher.dev/usher/drain"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health"
	"usher.dev/usher/notify"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
	"usher.dev/usher/watcher"
)

const (
	// flushTimeout bounds how long answers to hook calls may take to leave at the very end.
	flushTimeout = 2 * time.Second
	// lastWord is for the ledger's last write, so that it isn't cut off in the middle, which etcd's client would warn of.
	lastWord = 200 * time.Millisecond
)

var (
	errStopped = errors.New("stopped by a signal")
	errExited  = errors.New("the application has exited")
)

// agent is the packages put together.
type agent struct {
	cfg       config
	log       *zap.Logger
	watcher   *watcher.Watcher // nil without Kubernetes, as is the recorder
	recorder  *watcher.Recorder
	alone     *standalone // nil with Kubernetes
	child     *child      // nil unless the agent runs the application
	registrar *registry.Registrar
	machine   *lifecycle.Machine
	sockdiag  *drain.Sockdiag // nil when it isn't a source, or the kernel refuses it
	sockets   connections     // sockdiag or its fallback; nil when neither is a source
	progress  atomic.Pointer[drain.Progress]
	hook      hook
	prober    prober
	readiness *readiness
	health    *health.Health
	own       drain.Own // the connections of probes and webhooks
	hub       *notify.Hub
	receivers *notify.Receivers
	// healthGRPC serves grpc.health.v1; nil unless wanted.
	healthGRPC func(context.Context) error
	metrics    *metrics
	servers    []server

	// registeredOnce is of the registrar's goroutine only.
	registeredOnce bool
	// restarts are of the watcher's goroutine only.
	restarts     int
	restartsSeen bool
}

type server struct {
	*http.Server
	listener net.Listener
}

// newAgent checks everything that can be checked, and takes the addresses it is to listen on, before anything starts.
func newAgent(cfg config, log *zap.Logger) (_ *agent, err error) {
	a := &agent{cfg: cfg, log: log, readiness: newReadiness()}
	watcher.RouteKlog(log.Named("client-go"))
	clients := sparing(log)
	// gRPC has one logger for the process, and says at its info level what each connection does.
	grpclog.SetLoggerV2(zapgrpc.NewLogger(clients.Named("grpc").WithOptions(zap.IncreaseLevel(zap.WarnLevel))))

	formats := map[string][]registry.NamedFormat{}
	for _, s := range cfg.Services {
		for _, spec := range s.Formats {
			f, err := format.New(spec)
			if err != nil {
				return nil, fmt.Errorf("service %s: %w", s.Name, err)
			}
			formats[s.Name] = append(formats[s.Name], registry.NamedFormat{Name: spec.Type, Format: f})
		}
	}
	a.registrar, err = registry.New(registry.Config{
		Cluster: cfg.Cluster, Namespace: cfg.Namespace, Pod: cfg.Pod, PodUID: cfg.PodUID,
		Dial:       func() (*clientv3.Client, error) { return cfg.Etcd.Dial(clients.Named("etcd")) },
		Formats:    formats,
		Attributes: cfg.Attributes,
		TTL:        cfg.LeaseTTL,
		VerdictTTL: cfg.VerdictTTL,
		OnChange:   a.registryChanged,
		OnHold:     func(h *lifecycle.Hold) { a.machine.SetHold(h) },
		Logger:     log.Named("registry"),
	})
	if err != nil {
		return nil, err
	}

	drainer, err := a.newDrainer()
	if err != nil {
		return nil, err
	}
	if err := a.newHealth(); err != nil {
		return nil, err
	}
	machine := lifecycle.Config{
		Registrar: a.registrar, Drainer: drainer, Budget: cfg.Budget, Quiet: cfg.Quiet, Announcer: a.receivers,
		OnTransition: a.transition, OnHold: a.held,
		Logger: log.Named("lifecycle"),
	}
	if cfg.MinAvailable > 0 {
		machine.Guard = guard{a.registrar, cfg.MinAvailable}
	}
	a.machine, err = lifecycle.New(machine)
	if err != nil {
		return nil, err
	}

	if cfg.Readiness == readinessProbe {
		a.alone = newStandalone(cfg)
	} else if err := a.watch(); err != nil {
		return nil, err
	}
	a.machine.SetAvailability(a.health.Availability())
	a.metrics = newMetrics(a)
	return a, a.listen()
}

// watch makes what sees Kubernetes, and tells it Events.
func (a *agent) watch() error {
	cfg := a.cfg
	rest, err := watcher.RESTConfig(cfg.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := watcher.NewClient(rest)
	if err != nil {
		return err
	}
	names := make([]string, len(cfg.Services))
	for i, s := range cfg.Services {
		names[i] = s.Name
	}
	a.watcher, err = watcher.New(watcher.Config{
		Namespace: cfg.Namespace, Pod: cfg.Pod, PodUID: cfg.PodUID, PodIPs: cfg.PodIPs, Services: names, HookPort: hookPort(cfg.HookAddress),
		Client: client, OnObservation: a.observed, Logger: a.log.Named("watcher"),
	})
	if err != nil {
		return err
	}
	a.recorder, err = watcher.NewRecorder(watcher.RecorderConfig{
		Namespace: cfg.Namespace, Pod: cfg.Pod, PodUID: cfg.PodUID, Node: cfg.Node, Client: client, Logger: a.log.Named("events"),
	})
	return err
}

// hookPort is 0 for an address without a number.
func hookPort(address string) uint16 {
	_, port, _ := net.SplitHostPort(address)
	n, _ := strconv.ParseUint(port, 10, 16)
	return uint16(n)
}

// event writes a Kubernetes Event, where there is Kubernetes.
func (a *agent) event(kind, reason, message string) {
	if a.recorder != nil {
		a.recorder.Event(kind, reason, message)
	}
}

// newDrainer builds the configured sources.
func (a *agent) newDrainer() (lifecycle.Drainer, error) {
	var sources []drain.Source
	for _, name := range a.cfg.Sources {
		switch name {
		case sourceSockdiag:
			s, err := a.newSockdiag()
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
		case sourceHTTP:
			s, err := drain.NewHTTP(drain.HTTPConfig{URL: a.cfg.InFlightURL, Field: a.cfg.InFlightField, Own: &a.own})
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
		case sourcePrometheus:
			s, err := drain.NewPrometheus(drain.PrometheusConfig{URL: a.cfg.InFlightMetricsURL, Metric: a.cfg.InFlightMetric, Own: &a.own})
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
		case sourceExec:
			s, err := drain.NewExec(drain.ExecConfig{Command: a.cfg.InFlightCommand})
			if err != nil {
				return nil, err
			}
			sources = append(sources, s)
		}
	}
	d, err := drain.New(drain.Config{
		Sources: sources, Quiet: a.cfg.Quiet, Interval: a.cfg.Interval, Floor: a.cfg.Floor,
		OnSample: func(p drain.Progress) { a.progress.Store(&p) },
		Logger:   a.log.Named("drain"),
	})
	if err != nil {
		return nil, err
	}
	return drainer{d}, nil
}

// connections is a source that looks at the application's sockets.
type connections interface {
	drain.Source
	SetPorts([]drain.Port) error
	SetAddresses([]netip.Addr) error
}

// newSockdiag falls back to counting connections where the kernel refuses more: better a drain that is too long and says why
// than a pod that doesn't start.
func (a *agent) newSockdiag() (drain.Source, error) {
	log := a.log.Named("sockdiag")
	s, err := drain.NewSockdiag(drain.SockdiagConfig{MinPatience: a.cfg.Budget.Settle, Own: &a.own, Logger: log})
	if err == nil {
		a.sockdiag, a.sockets = s, s
		return s, nil
	}
	p, perr := drain.NewProcNet(drain.ProcNetConfig{Own: &a.own})
	if perr != nil {
		return nil, fmt.Errorf("source %s: %w; and its fallback: %w", sourceSockdiag, err, perr)
	}
	log.Error("source sockdiag can't be used here: every open connection counts until its client closes it", zap.Error(err))
	a.sockets = p
	return p, nil
}

// guard is what lifecycle wants of the registry, for a number of others.
type guard struct {
	registrar *registry.Registrar
	least     int
}

func (g guard) Wait(ctx context.Context) error { return g.registrar.WaitOthers(ctx, g.least) }

// drainer is what lifecycle wants of drain.
type drainer struct{ *drain.Drainer }

func (d drainer) Wait(ctx context.Context, settled time.Time) lifecycle.DrainResult {
	r := d.Drainer.Wait(ctx, settled)
	out := lifecycle.DrainResult{
		Outcome: map[drain.Outcome]lifecycle.Outcome{
			drain.Quiet: lifecycle.Drained, drain.Floor: lifecycle.Unmeasured, drain.Skipped: lifecycle.Skipped,
			drain.Deadline: lifecycle.TimedOut, drain.Forced: lifecycle.Forced,
		}[r.Outcome],
		InFlight: r.InFlight, Unsure: r.Unsure,
	}
	for _, s := range r.Sources {
		out.Sources = append(out.Sources, lifecycle.SourceResult{
			Name: s.Name, InFlight: s.InFlight, Unsure: s.Unsure, Connections: s.Connections, Peak: s.Peak, Err: s.Err,
		})
	}
	return out
}

// run goes from start to SIGTERM and through the shutdown. Everything that runs ends before it returns.
func (a *agent) run(ctx context.Context, signals <-chan os.Signal) error {
	a.log.Info("usher-agent starts", zap.String("version", buildVersion()), zap.String("cluster", a.cfg.Cluster),
		zap.String("namespace", a.cfg.Namespace), zap.String("pod", a.cfg.Pod), zap.String("uid", a.cfg.PodUID),
		zap.Strings("etcd", a.cfg.Etcd.Endpoints))

	// Three lives, ended one after the other: what observes and decides, what writes to etcd, what tells of it.
	deciding, stopDeciding := context.WithCancel(ctx)
	writing, stopWriting := context.WithCancel(ctx)
	telling, stopTelling := context.WithCancel(ctx)
	defer stopTelling()
	defer stopWriting()
	defer stopDeciding()
	failed := make(chan error, 8)
	start := func(name string, run func(context.Context) error, ctx context.Context) *sync.WaitGroup {
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := run(ctx); err != nil {
				failed <- fmt.Errorf("%s: %w", name, err)
			}
		})
		return &wg
	}
	registrar := start("registry", a.registrar.Run, writing)
	waits := []*sync.WaitGroup{
		start("lifecycle", a.machine.Run, deciding), start("health", a.health.Run, deciding), start("orphans", reapOrphans, deciding),
	}
	tellers := []*sync.WaitGroup{start("notify", a.receivers.Run, telling)}
	if a.healthGRPC != nil {
		waits = append(waits, start("grpc.health.v1", a.healthGRPC, deciding))
	}
	if a.watcher != nil {
		tellers = append(tellers, start("events", a.recorder.Run, telling))
		waits = append(waits, start("watcher", a.watcher.Run, deciding))
	} else {
		a.observed(a.alone.observe(lifecycle.Availability{}))
	}
	if a.sockdiag != nil {
		waits = append(waits, start("sockdiag", a.sockdiag.Run, deciding))
	}
	for _, s := range a.servers {
		start("HTTP server "+s.listener.Addr().String(), func(context.Context) error {
			if err := s.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
				return err
			}
			return nil
		}, ctx)
	}

	var err error
	if len(a.cfg.Command) > 0 {
		a.child, err = startChild(a.cfg.Command, a.log.Named("application"))
	}
	for err == nil {
		select {
		case err = <-failed:
			a.child.stop(syscall.SIGTERM, signals)
		case <-ctx.Done():
			err = ctx.Err()
		case <-a.child.exited():
			err = errExited
		case sig := <-signals:
			a.stop(ctx, sig, signals)
			err = errStopped
		}
	}

	flush, cancel := context.WithTimeout(ctx, flushTimeout)
	defer cancel()
	a.hub.Close() // whoever follows gets the last event, and the servers can end
	for _, s := range a.servers {
		if serr := s.Shutdown(flush); serr != nil {
			s.Close()
		}
	}
	stopDeciding()
	for _, wg := range waits {
		wg.Wait()
	}
	stopWriting()
	registrar.Wait()
	stopTelling()
	for _, wg := range tellers {
		wg.Wait()
	}
	return err
}

// stop is the way from a signal to the application's end.
func (a *agent) stop(ctx context.Context, sig os.Signal, signals <-chan os.Signal) {
	a.log.Info("signal", zap.Stringer("signal", sig))
	draining, giveUp := context.WithCancel(ctx)
	impatience := make(chan struct{})
	gone := a.child.exited()
	go func() {
		defer close(impatience)
		for times := 2; ; times++ {
			select {
			case <-signals: // an impatient person's second Ctrl-C
				a.machine.Force("a second signal")
				if times > 2 {
					giveUp()
				}
			case <-gone:
				a.machine.Force("the application's exit")
				gone = nil
			case <-draining.Done():
				return
			}
		}
	}()
	if v, err := a.machine.Stop(draining, lifecycle.CauseSignal); err == nil {
		a.log.Info("stopped", zap.String("verdict", v.Message()))
	}
	word, cancel := context.WithTimeout(draining, lastWord)
	a.registrar.Sync(word) // that it failed is in the log
	cancel()
	giveUp()
	<-impatience
	a.child.stop(sig, signals)
}

// observed is called from the watcher's goroutine.
func (a *agent) observed(o lifecycle.Observation) {
	a.readiness.observed(o)
	if a.alone == nil {
		a.missesHook(o.Pod)
		a.restarted(o.Pod)
	}
	if a.sockets != nil {
		if err := a.scope(o); err != nil {
			a.log.Error("what is to be looked at of the sockets", zap.Error(err))
		}
	}
	a.machine.Observe(o)
}

// scope tells the source that looks at sockets which are the application's.
func (a *agent) scope(o lifecycle.Observation) error {
	var errs []error
	if ports := a.ports(o); len(ports) > 0 {
		errs = append(errs, a.sockets.SetPorts(ports))
	}
	if o.Pod.HostNetwork && a.alone == nil {
		// The sockets of all the node are in sight there.
		errs = append(errs, a.sockets.SetAddresses(o.Pod.IPs))
	}
	if a.sockdiag != nil && len(o.Pod.HostIPs) > 0 {
		errs = append(errs, a.sockdiag.SetNodes(append(slices.Clone(o.Pod.HostIPs), a.prober.seen()...)))
	}
	return errors.Join(errs...)
}

// missesHook warns, once, of a pod in which nothing makes SIGTERM wait: its instance leaves the registry when the pod's
// deletion is seen, and the application may be gone before its consumers know.
func (a *agent) missesHook(p lifecycle.Pod) {
	if !p.Known || p.Gone {
		return
	}
	missing := len(p.Hooked) == 0
	if missing && !a.hook.missing.Swap(missing) {
		const advice = "no container has a preStop hook that leads to the agent, so SIGTERM won't wait for the drain: add lifecycle.preStop.httpGet (path /prestop, the agent's port) or exec usher-prestop"
		a.log.Warn("preStop hook missing", zap.Strings("containers", p.Unhooked), zap.String("advice", advice))
		a.event("Warning", "PreStopMissing", strings.ToUpper(advice[:1])+advice[1:])
	}
	a.hook.missing.Store(missing)
}

// ports are those that consumers may have connections to: the endpoint's, and numbers that a format names.
func (a *agent) ports(o lifecycle.Observation) []drain.Port {
	ports := map[uint16]drain.Port{}
	add := func(number uint16, name, appProtocol string) {
		told := protocol(name, appProtocol)
		told.Multiplexed = told.Multiplexed || slices.Contains(a.cfg.MultiplexedPorts, strconv.Itoa(int(number))) || name != "" && slices.Contains(a.cfg.MultiplexedPorts, name)
		p := ports[number]
		ports[number] = drain.Port{Number: number, Multiplexed: p.Multiplexed || told.Multiplexed, Cleartext: p.Cleartext || told.Cleartext}
	}
	found := false
	for _, e := range o.Endpoints {
		found = found || e.Found
		for _, p := range e.Ports {
			if p.Number != 0 && (p.Protocol == "TCP" || p.Protocol == "") {
				add(p.Number, p.Name, p.AppProtocol)
			}
		}
	}
	if !found {
		return nil // what was last known stands: connections outlive the endpoint
	}
	for _, s := range a.cfg.Services {
		for _, f := range s.Formats {
			refs, _ := f.Ports() // valid, as the settings are
			for _, ref := range refs {
				if n, err := strconv.ParseUint(ref, 10, 16); err == nil {
					add(uint16(n), "", "")
				}
			}
		}
	}
	return slices.Collect(maps.Values(ports))
}

// protocol goes by the names that Kubernetes' appProtocol (kubernetes.io/h2c, KEP-3726) and service meshes' port names (grpc,
// grpc-web, http2, http, as a whole or before a dash; to Istio http is cleartext, https is not) have in use. WebSocket is
// not multiplexed: one connection carries one stream, and its activity is seen.
func protocol(name, appProtocol string) drain.Port {
	first, _, _ := strings.Cut(strings.ToLower(name), "-")
	switch strings.ToLower(appProtocol) {
	case "kubernetes.io/h2c", "grpc", "h2c", "http2", "h2":
		return drain.Port{Multiplexed: true}
	case "http", "kubernetes.io/ws", "ws":
		return drain.Port{Cleartext: true}
	case "":
		return drain.Port{Multiplexed: first == "grpc" || first == "h2c" || first == "http2", Cleartext: first == "http"}
	}
	return drain.Port{}
}

// registryChanged is called from the registrar's goroutine.
func (a *agent) registryChanged(s lifecycle.RegistryStatus) {
	a.machine.RegistryChanged(s)
	switch {
	case s.Inherited && !a.registeredOnce: // no news to whoever reads Events
		a.registeredOnce = true
		a.log.Info("found registered by the agent before this one", zap.Strings("keys", s.Keys), zap.String("lease", s.Lease))
	case s.Advertised && !a.registeredOnce:
		a.registeredOnce = true
		a.log.Info("registered", zap.Strings("keys", s.Keys), zap.String("lease", s.Lease))
		a.event("Normal", "Registered", fmt.Sprintf("Registered in etcd under lease %s: %s", s.Lease, strings.Join(s.Keys, ", ")))
	case !s.Advertised && a.registeredOnce && s.InSync:
		a.registeredOnce = false
		a.log.Info("deregistered")
		a.event("Normal", "Deregistered", "Deregistered from etcd")
	}
}

// transition is called from the machine's goroutine.
func (a *agent) transition(t lifecycle.Transition) {
	a.metrics.transition(t)
	a.tell(t)
	if t.State == lifecycle.Draining {
		a.progress.Store(nil)
	}
	v := t.Verdict
	if v == nil || t.From != lifecycle.Draining {
		return
	}
	a.log.Info("released", zap.String("verdict", v.Message()), zap.String("outcome", string(v.Outcome)), zap.String("cause", v.Cause),
		zap.Duration("total", v.Total()), zap.Duration("withdraw", v.Withdraw), zap.Duration("settle", v.Settle), zap.Duration("drain", v.Drain),
		zap.Duration("guard", v.Guard), zap.Int("inFlight", v.InFlight), zap.Int("unsure", v.Unsure))
	switch v.Outcome {
	case lifecycle.TimedOut, lifecycle.Forced, lifecycle.Unmeasured:
		a.event("Warning", "DrainTimedOut", v.Message())
	default:
		a.event("Normal", "Drained", v.Message())
	}
}
