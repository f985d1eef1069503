package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"usher.dev/usher/drain"
	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health"
	"usher.dev/usher/registry"
)

const token = "0123456789abcdef"

// instantly is a registry that always is as it should be, and a drain that takes a second.
type instantly struct{ drains *sync.WaitGroup }

func (instantly) Set(lifecycle.Desired)      {}
func (instantly) Sync(context.Context) error { return nil }
func (i instantly) Wait(context.Context, time.Time) lifecycle.DrainResult {
	i.drains.Add(1)
	defer i.drains.Done()
	time.Sleep(time.Second)
	return lifecycle.DrainResult{Outcome: lifecycle.Drained}
}

// newTestAgent is an agent whose machine runs until the test ends, without etcd and Kubernetes.
func newTestAgent(t *testing.T, log *zap.Logger) *agent {
	t.Helper()
	a := &agent{cfg: config{HookToken: token, Cluster: "c", Namespace: "ns", Pod: "p", PodUID: "u"}, log: log, readiness: newReadiness()}
	var err error
	fake := instantly{new(sync.WaitGroup)}
	a.machine, err = lifecycle.New(lifecycle.Config{Registrar: fake, Drainer: fake, Budget: lifecycle.DefaultBudget(), Quiet: drain.DefaultQuiet})
	if err != nil {
		t.Fatal(err)
	}
	a.registrar, err = registry.New(registry.Config{Cluster: "c", Namespace: "ns", Pod: "p", PodUID: "u",
		Dial: func() (*clientv3.Client, error) { return nil, errors.New("not dialled") }})
	if err != nil {
		t.Fatal(err)
	}
	if a.health, err = health.New(health.Config{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { a.machine.Run(ctx) })
	t.Cleanup(func() { cancel(); wg.Wait(); fake.drains.Wait() })
	a.seen(lifecycle.Pod{})
	return a
}

// seen has the machine observe an instance that is ready.
func (a *agent) seen(p lifecycle.Pod) {
	p.Known, p.Ready, p.Grace = true, true, 30*time.Second
	a.machine.Observe(lifecycle.Observation{Pod: p, Endpoints: []lifecycle.Endpoint{{
		Service: "api", Found: true, Ready: true, Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
	}}})
}

func call(a *agent, trusted bool, method string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, api.PrestopPath, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	a.prestop(trusted)(w, r)
	return w
}

func TestWhoMayCallTheHook(t *testing.T) {
	for _, c := range []struct {
		name    string
		trusted bool
		pod     lifecycle.Pod
		header  []string
		code    int
	}{
		{"a stranger", false, lifecycle.Pod{}, nil, http.StatusForbidden},
		{"a wrong token", false, lifecycle.Pod{Terminating: true, Deadline: time.Now().Add(time.Hour)}, []string{api.TokenHeader, "fedcba9876543210"}, http.StatusForbidden},
		{"the token", false, lifecycle.Pod{}, []string{api.TokenHeader, token}, http.StatusOK},
		{"whoever is in the pod", true, lifecycle.Pod{}, nil, http.StatusOK},
		{"anybody while the Pod is evicted", false, lifecycle.Pod{Disrupted: true}, nil, http.StatusOK},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newTestAgent(t, zap.NewNop())
				a.seen(c.pod)
				synctest.Wait()
				w := call(a, c.trusted, http.MethodGet, c.header...)
				if w.Code != c.code {
					t.Fatalf("%d %s, want %d", w.Code, w.Body, c.code)
				}
				state := a.machine.Status().State
				if c.code == http.StatusOK {
					var v api.Verdict
					if err := json.Unmarshal(w.Body.Bytes(), &v); err != nil || v.Outcome != api.Drained || v.TotalMs < 1000 {
						t.Errorf("verdict %s, %v", w.Body, err)
					}
				} else if a.hook.refused.Load() != 1 || c.pod.Terminating == false && state != lifecycle.Online {
					t.Errorf("refused %d, state %s: want one refusal counted, and the instance untouched", a.hook.refused.Load(), state)
				}
			})
		})
	}
}

func TestHookWaitsForTheWatchToCatchUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, zap.NewNop())
		time.AfterFunc(800*time.Millisecond, func() { a.seen(lifecycle.Pod{Terminating: true, Deadline: time.Now().Add(20 * time.Second)}) })
		if w := call(a, false, http.MethodGet); w.Code != http.StatusOK {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	})
}

func TestFloodOfRefusedCallsIsOneLogLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		a := newTestAgent(t, zap.New(core))
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { call(a, false, http.MethodGet) })
		}
		wg.Wait()
		if n := logs.FilterMessage("hook call refused").Len(); n != 1 || a.hook.refused.Load() != 1000 {
			t.Errorf("%d lines for %d refusals, want 1 for 1000", n, a.hook.refused.Load())
		}
	})
}

// The kubelet restarts the container of a BROKEN application, and nothing but its address tells that the hook is its call.
func TestHookOfABrokenApplicationIsAcceptedFromTheNode(t *testing.T) {
	for _, tc := range []struct {
		name   string
		broken bool
		node   string // as the caller's address is 192.0.2.1
		want   int
	}{
		{"BROKEN, from the node", true, "192.0.2.1", http.StatusOK},
		{"BROKEN, from elsewhere", true, "192.0.2.2", http.StatusForbidden},
		{"well, from the node", false, "192.0.2.1", http.StatusForbidden},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newTestAgent(t, zap.NewNop())
				a.seen(lifecycle.Pod{HostIPs: []netip.Addr{netip.MustParseAddr(tc.node)}})
				if tc.broken {
					control := http.NewServeMux()
					a.health.Routes(nil, control)
					w := httptest.NewRecorder()
					control.ServeHTTP(w, httptest.NewRequest(http.MethodPut, "/v1/availability/liveness", strings.NewReader(`{"state":"BROKEN","cause":"deadlock"}`)))
					if w.Code != http.StatusOK {
						t.Fatalf("PUT liveness: %d %s", w.Code, w.Body)
					}
				}
				synctest.Wait()
				if w := call(a, false, http.MethodGet); w.Code != tc.want {
					t.Errorf("%d %s, want %d", w.Code, w.Body, tc.want)
				}
			})
		})
	}
}

func TestStatusTellsOfTheHoldAndTheAvailability(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, zap.NewNop())
		synctest.Wait()
		if st := a.status(); st.Hold != nil || st.Liveness != nil || st.Readiness != nil {
			t.Errorf("nobody says anything, and the status has %v, %v, %v", st.Hold, st.Liveness, st.Readiness)
		}
		a.machine.SetHold(&lifecycle.Hold{Reason: "heap dump", Actor: "ann"})
		a.machine.SetAvailability(lifecycle.Availability{
			Liveness:  lifecycle.Liveness{State: lifecycle.Correct},
			Readiness: lifecycle.Readiness{State: lifecycle.RefusingTraffic, Cause: "cold"},
		})
		synctest.Wait()
		st := a.status()
		if st.State != "Offline" || st.Hold == nil || st.Hold.Reason != "heap dump" || st.Hold.Actor != "ann" {
			t.Errorf("state %s, hold %v", st.State, st.Hold)
		}
		if st.Liveness == nil || st.Liveness.State != "CORRECT" || st.Readiness == nil || st.Readiness.State != "REFUSING_TRAFFIC" || st.Readiness.Cause != "cold" {
			t.Errorf("liveness %v, readiness %v", st.Liveness, st.Readiness)
		}
	})
}

func TestHookTakesGetAndPostOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, zap.NewNop())
		if w := call(a, true, http.MethodDelete); w.Code != http.StatusMethodNotAllowed || w.Header().Get("Allow") != "GET, POST" {
			t.Errorf("DELETE: %d, Allow %q", w.Code, w.Header().Get("Allow"))
		}
		if w := call(a, true, http.MethodPost); w.Code != http.StatusOK {
			t.Errorf("POST: %d", w.Code)
		}
	})
}

func TestRestartThatConsumersDoNotSeeIsNoRegistration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		a := newTestAgent(t, zap.New(core))
		a.registryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Inherited: true, Lease: "6", Keys: []string{"k"}})
		a.registryChanged(lifecycle.RegistryStatus{InSync: true, Advertised: true, Lease: "7", Keys: []string{"k"}})
		a.registryChanged(lifecycle.RegistryStatus{InSync: true, Lease: "7"})
		var said []string
		for _, e := range logs.All() {
			said = append(said, e.Message)
		}
		if got, want := strings.Join(said, "; "), "found registered by the agent before this one; deregistered"; got != want {
			t.Errorf("said %q, want %q", got, want)
		}
	})
}

// Availability and workers are decoded by the same means; their tests are the health package's.
func TestOrdersAreReadToTheLetter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, zap.NewNop())
		synctest.Wait()
		order := map[string]http.HandlerFunc{http.MethodPut: a.orderHold, http.MethodPost: a.release}
		for _, tc := range []struct {
			method, body string
			code         int
			want         string
		}{
			{http.MethodPut, `{"Reason": "x"}`, 400, `field \"Reason\": there is none; want actor, expires, reason, since`},
			{http.MethodPut, `{"reason": "x", "reason": "y"}`, 400, `field \"reason\": is there twice`},
			{http.MethodPut, `{"reason": "x", "for": "1h"}`, 400, `field \"for\": there is none`},
			{http.MethodPut, `{"reason": 1}`, 400, `field \"reason\": 1; want a string`},
			{http.MethodPut, `{"reason": "x", "expires": "tomorrow"}`, 400, `want a time like \"2026-01-31T12:00:00Z\"`},
			{http.MethodPut, `{"reason": "x", "expires": null}`, 400, `field \"expires\": null; want a time like`},
			{http.MethodPut, `{"reason": "x"} {}`, 400, "goes on after its JSON object"},
			{http.MethodPut, ``, 400, "is no JSON object; want one with actor, expires, reason, since"},
			{http.MethodPut, strings.Repeat(" ", api.MaxBody+1), 413, "is larger than 65536 bytes"},
			// Good ones get as far as the registry, which is not there.
			{http.MethodPut, `{"reason": "x", "actor": "ann", "since": "2026-03-01T12:00:00Z", "expires": "2026-03-01T13:00:00Z"}`, 503, "not connected"},
			{http.MethodPost, `{"Actor": "ann"}`, 400, `field \"Actor\": there is none; want actor`},
			{http.MethodPost, `{"actor": "ann", "actor": "bob"}`, 400, "is there twice"},
			{http.MethodPost, `{"reason": "x"}`, 400, "there is none"},
			{http.MethodPost, `ann`, 400, "is no JSON object"},
			{http.MethodPost, `{"actor": "ann"}`, 409, "nothing to release"},
			{http.MethodPost, `{}`, 409, "nothing to release"},
			{http.MethodPost, ``, 409, "nothing to release"},
		} {
			w := httptest.NewRecorder()
			order[tc.method](w, httptest.NewRequest(tc.method, "/", strings.NewReader(tc.body)))
			if w.Code != tc.code || !strings.Contains(w.Body.String(), tc.want) {
				t.Errorf("%s %.80s: %d %s, want %d %s", tc.method, tc.body, w.Code, w.Body, tc.code, tc.want)
			}
		}
	})
}

// listening is an agent that serves on free addresses.
func listening(t *testing.T, change func(*config)) (*agent, error) {
	a := newTestAgent(t, zap.NewNop())
	rec := newRecorder(t)
	a.recorder = rec
	if err := a.newHealth(); err != nil {
		t.Fatal(err)
	}
	a.metrics = newMetrics(a)
	a.cfg.HookAddress, a.cfg.ControlAddress = "127.0.0.1:0", "127.0.0.1:0"
	if change != nil {
		change(&a.cfg)
	}
	if err := a.listen(); err != nil {
		return a, err
	}
	for _, s := range a.servers {
		go s.Serve(s.listener)
		t.Cleanup(func() { s.Close() })
	}
	return a, nil
}

func get(t *testing.T, client *http.Client, url string) (int, string) {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func TestStatusIsOnControlListenersOnly(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	a, err := listening(t, func(c *config) { c.ControlSocket = socket })
	if err != nil {
		t.Fatal(err)
	}
	hook, control := "http://"+a.servers[0].listener.Addr().String(), "http://"+a.servers[1].listener.Addr().String()
	unix := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	if code, _ := get(t, http.DefaultClient, hook+api.StatusPath); code != http.StatusNotFound {
		t.Errorf("hook listener: status answered with %d, want 404", code)
	}
	for name, f := range map[string]func() (int, string){
		"control": func() (int, string) { return get(t, http.DefaultClient, control+api.StatusPath) },
		"socket":  func() (int, string) { return get(t, unix, "http://agent"+api.StatusPath) },
	} {
		code, body := f()
		var s api.Status
		if err := json.Unmarshal([]byte(body), &s); code != http.StatusOK || err != nil || s.Pod != "p" || s.State != "Online" || len(s.Trail) == 0 {
			t.Errorf("%s: %d %s, %v", name, code, body, err)
		}
	}
	if code, body := get(t, http.DefaultClient, hook+"/metrics"); code != http.StatusOK || !strings.Contains(body, `usher_state{state="Online"} 1`) || !strings.Contains(body, `usher_hook_calls_total{result="refused"} 0`) {
		t.Errorf("metrics: %d %s", code, body)
	}
}

func TestReadyUnlessKubernetesSaysWhatIsWrong(t *testing.T) {
	missing := lifecycle.Observation{Pod: lifecycle.Pod{Known: true}, Problems: []string{`service "api" does not exist`}}
	lost := lifecycle.Observation{Problems: []string{"the API server can't be reached"}, Unreachable: true}
	fine := lifecycle.Observation{Pod: lifecycle.Pod{Known: true}}
	for name, c := range map[string]struct {
		seen []lifecycle.Observation
		code int
		body string
	}{
		"nothing is known yet":          {nil, http.StatusOK, "ok"},
		"the API server is lost":        {[]lifecycle.Observation{lost}, http.StatusOK, "ok"},
		"the Service is missing":        {[]lifecycle.Observation{missing}, http.StatusServiceUnavailable, `service "api" does not exist`},
		"it is there at last":           {[]lifecycle.Observation{missing, fine}, http.StatusOK, "ok"},
		"it was there once":             {[]lifecycle.Observation{fine, missing}, http.StatusOK, "ok"},
		"lost before it was ever there": {[]lifecycle.Observation{missing, lost}, http.StatusOK, "ok"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newReadiness()
				for _, o := range c.seen {
					r.observed(o)
				}
				w := httptest.NewRecorder()
				r.handler(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
				if w.Code != c.code || !strings.Contains(w.Body.String(), c.body) {
					t.Errorf("%d %s, want %d %s", w.Code, w.Body, c.code, c.body)
				}
			})
		})
	}
}

func TestEarlyProbeWaitsForTheFirstObservation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReadiness()
		time.AfterFunc(300*time.Millisecond, func() { r.observed(lifecycle.Observation{Problems: []string{"RBAC lacks it"}}) })
		w := httptest.NewRecorder()
		r.handler(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		if w.Code != http.StatusServiceUnavailable {
			t.Errorf("%d %s, want what the first observation says", w.Code, w.Body)
		}
	})
}

func TestBadListenAddressesAreNamed(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	plain := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	live := filepath.Join(t.TempDir(), "live.sock")
	other, err := net.Listen("unix", live)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	for name, c := range map[string]struct {
		change func(*config)
		want   []string
	}{
		"taken":                 {func(c *config) { c.HookAddress = taken.Addr().String() }, []string{"--hook-address", "in use"}},
		"control not loopback":  {func(c *config) { c.ControlAddress = "0.0.0.0:7401" }, []string{"--control-address", "0.0.0.0:7401", "loopback"}},
		"control without port":  {func(c *config) { c.ControlAddress = "127.0.0.1" }, []string{"--control-address", "port"}},
		"socket is a file":      {func(c *config) { c.ControlSocket = plain }, []string{"--control-socket", "no socket"}},
		"socket of another one": {func(c *config) { c.ControlSocket = live }, []string{"--control-socket", "another process"}},
		"socket without folder": {func(c *config) { c.ControlSocket = "/nowhere/x/agent.sock" }, []string{"--control-socket", "emptyDir"}},
	} {
		_, err := listening(t, c.change)
		if err == nil {
			t.Errorf("%s: accepted", name)
			continue
		}
		for _, w := range c.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q doesn't say %q", name, err, w)
			}
		}
	}
	if _, err := os.Stat(plain); err != nil {
		t.Error("a file that was no socket is gone")
	}
}

func TestSocketOfAKilledAgentIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ln.(*net.UnixListener).SetUnlinkOnClose(false)
	ln.Close()
	if _, err := listening(t, func(c *config) { c.ControlSocket = path }); err != nil {
		t.Fatal(err)
	}
}

func TestProtocolsAreToldByAppProtocolNameAndSetting(t *testing.T) {
	a := &agent{cfg: config{MultiplexedPorts: []string{"rpc", "7000"}}}
	ports := []lifecycle.Port{
		{Name: "http", Number: 8080}, {Name: "grpc", Number: 1}, {Name: "grpc-api", Number: 2}, {Name: "web", Number: 3, AppProtocol: "kubernetes.io/h2c"},
		{Name: "grpc", Number: 4, AppProtocol: "http"}, {Name: "rpc", Number: 5}, {Name: "x", Number: 7000}, {Name: "ws", Number: 6, AppProtocol: "kubernetes.io/ws"},
		{Name: "dns", Number: 53, Protocol: "UDP"}, {Name: "https", Number: 8443}, {Name: "http", Number: 8444, AppProtocol: "https"},
		{Name: "http-web", Number: 8081}, {Name: "web", Number: 8082},
	}
	got := map[uint16]drain.Port{}
	for _, p := range a.ports(lifecycle.Observation{Endpoints: []lifecycle.Endpoint{{Found: true, Ports: ports}}}) {
		got[p.Number] = p
	}
	want := map[uint16]drain.Port{}
	for _, n := range []uint16{1, 2, 3, 5, 7000} {
		want[n] = drain.Port{Number: n, Multiplexed: true}
	}
	for _, n := range []uint16{4, 6, 8080, 8081} {
		want[n] = drain.Port{Number: n, Cleartext: true}
	}
	for _, n := range []uint16{8443, 8444, 8082} {
		want[n] = drain.Port{Number: n}
	}
	if !maps.Equal(got, want) {
		t.Errorf("ports %v, want %v", got, want)
	}
	if p := a.ports(lifecycle.Observation{Endpoints: []lifecycle.Endpoint{{}}}); p != nil {
		t.Errorf("without an endpoint: %v, want the last known ones to stand", p)
	}
}
