package main

import (
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health"
)

const (
	// catchUp is how long a hook call without a token waits for the deletion of its Pod to be seen: the kubelet may be
	// quicker than the watch.
	catchUp = time.Second
	// firstLook is how long /readyz waits for the first observation: half of the kubelet's default probe timeout.
	firstLook = 500 * time.Millisecond
	// linesEvery bounds the log: a flood of calls is one line of a kind in that time, after the first firstLines.
	linesEvery = 10 * time.Second
	firstLines = 10
	// headerTimeout and maxHeader keep slow and large callers from holding the agent's memory.
	headerTimeout = 5 * time.Second
	maxHeader     = 16 << 10
)

// hook is what is counted and known about hook calls.
type hook struct {
	missing                             atomic.Bool // no container of the pod has one
	accepted, refused, left             atomic.Int64
	lastAccepted, lastRefused, lastLeft lastLine
}

// lastLine is when a line of a kind was logged last, in unix nanoseconds.
type lastLine struct{ atomic.Int64 }

// due says whether it is time for another one, to one of those who ask.
func (l *lastLine) due() bool {
	now, last := time.Now().UnixNano(), l.Load()
	return (last == 0 || now-last > int64(linesEvery)) && l.CompareAndSwap(last, now)
}

// prober is who probes the agent as the kubelet does: at the address at which the pod sees its node, which with many network
// plugins is not one of the node's own but the gateway's. There is one of each family at most.
type prober struct {
	v4, v6 atomic.Pointer[netip.Addr]
}

func (p *prober) saw(r *http.Request) {
	if !strings.HasPrefix(r.UserAgent(), "kube-probe/") {
		return
	}
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return
	}
	addr := at.Addr().Unmap().WithZone("")
	if addr.Is4() {
		p.v4.CompareAndSwap(nil, &addr)
	} else {
		p.v6.CompareAndSwap(nil, &addr)
	}
}

func (p *prober) seen() (out []netip.Addr) {
	for _, a := range []*netip.Addr{p.v4.Load(), p.v6.Load()} {
		if a != nil {
			out = append(out, *a)
		}
	}
	return out
}

// readiness is what /readyz says: whether the agent can do its work as it is set up. Once it could, nothing takes that
// back, and an API server that can't be reached is no reason either: its outage must not make pods unready.
type readiness struct {
	mu      sync.Mutex
	latched bool
	problem string
	once    sync.Once
	first   chan struct{} // closed with the first observation
}

func newReadiness() *readiness { return &readiness{first: make(chan struct{})} }

func (r *readiness) observed(o lifecycle.Observation) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.once.Do(func() { close(r.first) })
	r.latched = r.latched || len(o.Problems) == 0 && o.Pod.Known
	r.problem = ""
	if len(o.Problems) > 0 && !o.Unreachable {
		r.problem = o.Problems[0]
	}
}

// handler waits a moment for the first observation, so that a probe that comes early isn't told what isn't known yet.
func (r *readiness) handler(w http.ResponseWriter, req *http.Request) {
	ctx, cancel := context.WithTimeout(req.Context(), firstLook)
	defer cancel()
	select {
	case <-r.first:
	case <-ctx.Done():
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.problem != "" && !r.latched {
		http.Error(w, r.problem, http.StatusServiceUnavailable)
		return
	}
	health.Verbose(w, req, "readyz", health.Check{Name: "ping"}, health.Check{Name: "kubernetes"})
}

// listen takes all addresses, so that one that is taken is known before anything starts.
func (a *agent) listen() (err error) {
	defer func() {
		if err != nil {
			for _, s := range a.servers {
				s.listener.Close()
			}
		}
	}()
	hookAPI, control := http.NewServeMux(), http.NewServeMux()
	for _, mux := range []*http.ServeMux{hookAPI, control} {
		mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
			a.prober.saw(r)
			health.Verbose(w, r, "livez", health.Check{Name: "ping"})
		})
		mux.HandleFunc("GET /readyz", a.readiness.handler)
		mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{}))
	}
	hookAPI.HandleFunc(api.PrestopPath, a.prestop(false))
	control.HandleFunc(api.PrestopPath, a.prestop(true))
	a.health.Routes(hookAPI, control)
	control.Handle("GET "+api.EventsPath, a.hub)
	control.HandleFunc(api.HoldPath, a.orderHold)
	control.HandleFunc("POST "+api.ReleasePath, a.release)
	control.HandleFunc("GET "+api.StatusPath, func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, a.status()) })

	if host, _, err := net.SplitHostPort(a.cfg.ControlAddress); err != nil || !isLoopback(host) {
		return fmt.Errorf("--control-address %q: want a loopback address and a port, since every caller there is trusted", a.cfg.ControlAddress)
	}
	for _, l := range []struct {
		flag, network, address string
		mux                    http.Handler
	}{
		{"hook-address", "tcp", a.cfg.HookAddress, hurried(hookAPI)},
		{"control-address", "tcp", a.cfg.ControlAddress, control},
		{"control-socket", "unix", a.cfg.ControlSocket, control},
	} {
		if l.address == "" {
			continue
		}
		if l.network == "unix" {
			if err := clearSocket(l.address); err != nil {
				return fmt.Errorf("--%s %q: %w", l.flag, l.address, err)
			}
		}
		ln, err := net.Listen(l.network, l.address)
		if err != nil {
			return fmt.Errorf("--%s %q: %w", l.flag, l.address, err)
		}
		if l.network == "unix" {
			// The application's user is seldom the agent's; who may reach the volume may call.
			if err := os.Chmod(l.address, 0o666); err != nil {
				ln.Close()
				return fmt.Errorf("--%s %q: %w", l.flag, l.address, err)
			}
		}
		if l.flag == "hook-address" {
			ln = limitCallers(ln, maxCallers) // the other ones are the pod's own
		}
		a.servers = append(a.servers, server{&http.Server{
			Handler: l.mux, ReadHeaderTimeout: headerTimeout, MaxHeaderBytes: maxHeader, IdleTimeout: time.Minute,
			ErrorLog: zap.NewStdLog(a.log.Named("http")),
			// No write timeout: it would cut a long drain.
		}, ln})
	}
	return nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// clearSocket removes the socket of an agent that was killed, and nothing else.
func clearSocket(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(filepath.Dir(path)); err != nil {
			return fmt.Errorf("want a path in a folder that exists, such as one of an emptyDir volume: %w", err)
		}
		return nil
	case err != nil:
		return err
	case info.Mode()&fs.ModeSocket == 0:
		return errors.New("there is a file that is no socket")
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return errors.New("another process listens there")
	}
	return os.Remove(path)
}

// prestop blocks until the verdict. trusted: whoever can call is in the pod.
func (a *agent) prestop(trusted bool) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodPost {
			w.Header().Set("Allow", "GET, POST")
			answer(w, http.StatusMethodNotAllowed, api.Error{Error: fmt.Sprintf("method %s: want GET or POST", r.Method)})
			return
		}
		if why, ok := a.admit(r, trusted); !ok {
			a.refuse(r, why)
			answer(w, http.StatusForbidden, api.Error{Error: "refused: " + why})
			return
		}
		if n := a.hook.accepted.Add(1); n <= firstLines || a.hook.lastAccepted.due() {
			a.log.Info("hook call", zap.String("from", r.RemoteAddr), zap.String("agent", r.UserAgent()), zap.Int64("accepted", n))
		}
		// The caller going away ends this wait, and never the drain.
		v, err := a.machine.Stop(r.Context(), lifecycle.CauseHook)
		if err != nil {
			if n := a.hook.left.Add(1); n <= firstLines || a.hook.lastLeft.due() {
				a.log.Warn("hook caller went away before the verdict", zap.String("from", r.RemoteAddr), zap.Int64("so far", n))
			}
			return
		}
		answer(w, http.StatusOK, verdict(v))
	}
}

// release ends the wait of the shutdown under way.
func (a *agent) release(w http.ResponseWriter, r *http.Request) {
	var order api.Release
	if err := (api.Fields{"actor": &order.Actor}).ReadOptional(w, r); err != nil {
		badBody(w, err)
		return
	}
	if a.machine.Status().State != lifecycle.Draining {
		answer(w, http.StatusConflict, api.Error{Error: "no shutdown is waiting for anything: there is nothing to release"})
		return
	}
	if order.Actor == "" {
		order.Actor = "an order to " + api.ReleasePath
	}
	a.machine.Force(order.Actor)
	w.WriteHeader(http.StatusAccepted)
}

// badBody refuses a body.
func badBody(w http.ResponseWriter, err error) {
	code := http.StatusBadRequest
	if bad := new(api.BodyError); errors.As(err, &bad) {
		code = bad.Code
	}
	answer(w, code, api.Error{Error: err.Error()})
}

// admit says whether a call is the kubelet's, by a token or by what it would be calling for.
func (a *agent) admit(r *http.Request, trusted bool) (why string, ok bool) {
	if trusted {
		return "", true
	}
	if a.carriesToken(r) {
		return "", true
	}
	if a.brokenAndFromNode(r) {
		return "", true
	}
	if r.Header.Get(api.TokenHeader) != "" {
		return "the token in " + api.TokenHeader + " is wrong", false
	}
	ctx, cancel := context.WithTimeout(r.Context(), catchUp)
	defer cancel()
	ending := func(s lifecycle.Status) bool {
		p := s.Observation.Pod
		return p.Terminating || p.Disrupted || p.Gone
	}
	if a.machine.Await(ctx, ending) {
		return "", true
	}
	return "the Pod is not being deleted, and the call carries no token in " + api.TokenHeader, false
}

// brokenAndFromNode recognises the hook of a container that the kubelet restarts because its application is BROKEN. Such an
// instance is offline already, so whoever calls from the node without being the kubelet can do no harm to it.
func (a *agent) brokenAndFromNode(r *http.Request) bool {
	if a.health.Availability().Liveness.State != lifecycle.Broken {
		return false
	}
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return false
	}
	// Only what Kubernetes says of the node: anybody can call like a probe, and so get into a.prober.
	return slices.Contains(a.machine.Status().Observation.Pod.HostIPs, at.Addr().Unmap().WithZone(""))
}

func (a *agent) carriesToken(r *http.Request) bool {
	return a.cfg.HookToken != "" && subtle.ConstantTimeCompare([]byte(r.Header.Get(api.TokenHeader)), []byte(a.cfg.HookToken)) == 1
}

func (a *agent) refuse(r *http.Request, why string) {
	if n := a.hook.refused.Add(1); a.hook.lastRefused.due() {
		a.log.Warn("hook call refused", zap.String("from", r.RemoteAddr), zap.String("agent", r.UserAgent()), zap.String("why", why), zap.Int64("refused", n))
	}
}

func answer(w http.ResponseWriter, code int, body any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(answerTimeout)) // a recorder of a test has none
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.Encode(body) // a caller that is gone is no error
}
