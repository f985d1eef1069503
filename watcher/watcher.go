package watcher

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/klog/v2"

	"usher.dev/usher/lifecycle"
)

// Config is what a Watcher needs.
type Config struct {
	// Namespace and Pod name the own Pod; the Services are in the same namespace.
	Namespace, Pod string
	// PodUID is the own Pod's UID. When it is "", the UID of the first Pod seen under the name is taken for the own one,
	// which is wrong if that Pod is a successor already: give it, the downward API has it (metadata.uid).
	PodUID string
	// PodIPs are the own Pod's addresses, the primary one first. Optional: they serve until the Pod's status has them.
	PodIPs []netip.Addr
	// Services are the names of the Services to watch, at least one.
	Services []string
	// HookPort is the port of the agent's preStop hook: an httpGet hook of another port isn't one. 0 is for not known, and
	// then an httpGet hook's path alone tells.
	HookPort uint16
	// Client speaks to the API server.
	Client *Client
	// OnObservation is called with each new Observation, from one goroutine, and only when something changed. The first
	// call comes once the API server has answered, or refused to answer, every question. What is handed over is never
	// changed afterwards. While it runs, further changes are collected into the next call.
	OnObservation func(lifecycle.Observation)
	// Logger gets a warning for each problem as it appears, and an info line when it is over. Optional.
	Logger *zap.Logger
}

func (c *Config) validate() error {
	var errs []error
	bad := func(field, value, format string, args ...any) {
		errs = append(errs, fmt.Errorf("watcher: %s is %q: %s", field, value, fmt.Sprintf(format, args...)))
	}
	if msgs := validation.IsDNS1123Label(c.Namespace); len(msgs) > 0 {
		bad("Namespace", c.Namespace, "%s", strings.Join(msgs, "; "))
	}
	if msgs := validation.IsDNS1123Subdomain(c.Pod); len(msgs) > 0 {
		bad("Pod", c.Pod, "%s", strings.Join(msgs, "; "))
	}
	for i, ip := range c.PodIPs {
		if !ip.IsValid() {
			bad(fmt.Sprintf("PodIPs[%d]", i), ip.String(), "it must be an IP address")
		}
	}
	if len(c.Services) == 0 {
		errs = append(errs, errors.New("watcher: Services is empty: name at least one Service"))
	}
	for i, s := range c.Services {
		if msgs := validation.IsDNS1123Label(s); len(msgs) > 0 {
			bad(fmt.Sprintf("Services[%d]", i), s, "%s", strings.Join(msgs, "; "))
		} else if slices.Contains(c.Services[:i], s) {
			bad(fmt.Sprintf("Services[%d]", i), s, "it is named twice")
		}
	}
	if c.Client == nil {
		errs = append(errs, errors.New("watcher: Client is missing"))
	}
	if c.OnObservation == nil {
		errs = append(errs, errors.New("watcher: OnObservation is missing"))
	}
	return errors.Join(errs...)
}

// Watcher watches one pod and its endpoints. Make it with New.
type Watcher struct {
	cfg  Config
	wake chan struct{}

	// Below is the worker's.
	podFeed  *feed[podInfo]
	services []*service
	pod      lifecycle.Pod
	del      *deletion // the one that pod.Deadline was made from
	started  bool      // the first Observation is out
	last     lifecycle.Observation
}

// New makes a Watcher. Its error names every field of cfg that is wrong.
func New(cfg Config) (*Watcher, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	ips := make([]netip.Addr, len(cfg.PodIPs))
	for i, ip := range cfg.PodIPs {
		ips[i] = ip.Unmap()
	}
	cfg.PodIPs = ips
	cfg.Services = slices.Clone(cfg.Services)
	w := &Watcher{cfg: cfg, wake: make(chan struct{}, 1)}
	w.pod = lifecycle.Pod{Namespace: cfg.Namespace, Name: cfg.Pod, UID: cfg.PodUID, IPs: cfg.PodIPs}
	for _, name := range cfg.Services {
		w.services = append(w.services, &service{w: w, name: name})
	}
	return w, nil
}

// Run watches until ctx ends, and returns nil then. No problem ends it: each is retried and shows in the Observation.
// It must be called once only.
func (w *Watcher) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the feeds
	// What client-go has to say of each retry is for debugging: problems are told once, below.
	ctx = klog.NewContext(ctx, klogLogger(w.cfg.Logger, zapcore.DebugLevel))

	w.podFeed = startFeed(ctx, query{
		client: w.cfg.Client.core, resource: "pods", namespace: w.cfg.Namespace, name: w.cfg.Pod,
		example: &corev1.Pod{},
	}, w.notify, reducePod(w.cfg.HookPort))
	for _, s := range w.services {
		s.start(ctx)
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.wake:
			w.work(ctx)
		}
	}
}

// notify wakes the worker. A wake-up that is pending already covers this one: the worker reads all stores after it.
func (w *Watcher) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// work builds the Observation of this moment and hands it over if it differs from the last.
func (w *Watcher) work(ctx context.Context) {
	var p problems
	w.observePod(&p)
	id := identity{uid: w.pod.UID, ips: w.pod.IPs}
	obs := lifecycle.Observation{Pod: w.pod}
	answered := w.podFeed.answered()
	for _, s := range w.services {
		obs.Endpoints = append(obs.Endpoints, s.observe(ctx, id, w.pod.Terminating || w.pod.Gone))
		s.problems(&p)
		answered = answered && s.answered()
	}
	obs.Problems, obs.Unreachable = p.list(), p.lost != nil

	// An endpoint that wasn't asked for yet isn't absent.
	w.started = w.started || answered
	if !w.started || reflect.DeepEqual(obs, w.last) {
		return
	}
	w.logProblems(w.last.Problems, obs.Problems)
	w.last = obs
	w.cfg.OnObservation(obs)
}

// observePod brings w.pod up to date. Its maps and slices are replaced, never changed.
func (w *Watcher) observePod(p *problems) {
	w.podFeed.problems(p)
	items, synced := w.podFeed.snapshot()
	if !synced {
		return
	}
	info, exists := items[w.cfg.Pod]
	switch {
	case !exists && w.pod.Known:
		w.pod.Gone = true
	case !exists:
		p.add(fmt.Sprintf("pod %q does not exist in namespace %q; is it the name and namespace of the own Pod?", w.cfg.Pod, w.cfg.Namespace))
	case w.pod.UID != "" && info.pod.UID != w.pod.UID:
		w.pod.Gone = true
		p.add(fmt.Sprintf("pod %q in namespace %q has the UID %s and the own one is %s: the name belongs to another Pod now",
			w.cfg.Pod, w.cfg.Namespace, info.pod.UID, w.pod.UID))
	default:
		deadline, started := w.pod.Deadline, w.pod.DeletionStarted
		w.pod = info.pod
		w.pod.Known = true
		if len(w.pod.IPs) == 0 {
			w.pod.IPs = w.cfg.PodIPs
		}
		w.pod.Deadline = w.deadline(info.del, deadline)
		if w.pod.DeletionStarted = started; started.IsZero() && info.del != nil {
			w.pod.DeletionStarted = info.del.started(w.cfg.Client.clock)
		}
	}
}

// deadline is computed once for each version of the deletion, so that it doesn't waver, and only ever moves closer.
func (w *Watcher) deadline(del *deletion, before time.Time) time.Time {
	if del == nil {
		return time.Time{}
	}
	if w.del != nil && del.timestamp.Equal(w.del.timestamp) && del.grace == w.del.grace {
		return before
	}
	w.del = del
	d := del.deadline(w.cfg.Client.clock)
	if !before.IsZero() && before.Before(d) {
		return before
	}
	return d
}

func (w *Watcher) logProblems(before, now []string) {
	for _, s := range now {
		if !slices.Contains(before, s) {
			w.cfg.Logger.Warn("Kubernetes can't be seen clearly", zap.String("problem", s))
		}
	}
	for _, s := range before {
		if !slices.Contains(now, s) {
			w.cfg.Logger.Info("A problem with seeing Kubernetes is over", zap.String("problem", s))
		}
	}
}
