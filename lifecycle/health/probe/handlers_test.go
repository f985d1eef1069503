package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// patience is longer than any answer takes that does come.
const patience = 30 * time.Second

// soon is the timeout of probes that are to run into it.
const soon = 200 * time.Millisecond

func at(port int) func() (int, error) { return func() (int, error) { return port, nil } }

func portOf(t *testing.T, addr string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// closedPort is one that nobody listens on.
func closedPort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return portOf(t, l.Addr().String())
}

func (v verdict) String() string { return [...]string{"error", "failure", "success", "warning"}[v] }

// webApp answers in the ways that the rules speak of.
type webApp struct {
	*httptest.Server
	mu      sync.Mutex
	asked   []*http.Request
	release chan struct{}
}

func newWebApp(t *testing.T, start func(*httptest.Server)) *webApp {
	a := &webApp{release: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, _ := strconv.Atoi(r.PathValue("code"))
		w.WriteHeader(code)
		if code != http.StatusNoContent && code != http.StatusNotModified {
			io.WriteString(w, "secret")
		}
	})
	mux.HandleFunc("/to", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Location", r.URL.Query().Get("url"))
		w.WriteHeader(http.StatusFound)
		io.WriteString(w, "over there")
	})
	mux.HandleFunc("/hops/{left}", func(w http.ResponseWriter, r *http.Request) {
		left, _ := strconv.Atoi(r.PathValue("left"))
		if left > 0 {
			http.Redirect(w, r, fmt.Sprintf("/hops/%d", left-1), http.StatusFound)
		}
	})
	mux.HandleFunc("/long", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, strings.Repeat("x", 3*maxOutput)) })
	mux.HandleFunc("/early/{code}", func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusProcessing)
		w.WriteHeader(http.StatusEarlyHints)
		code, _ := strconv.Atoi(r.PathValue("code"))
		w.WriteHeader(code)
		io.WriteString(w, "at last")
	})
	mux.HandleFunc("/switch", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusSwitchingProtocols) })
	mux.HandleFunc("/gone", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	mux.HandleFunc("/header", func(w http.ResponseWriter, _ *http.Request) {
		long := strings.Repeat("x", 1<<20)
		for i := range 12 {
			w.Header().Set(fmt.Sprint("X-", i), long)
		}
	})
	mux.HandleFunc("/proto", func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Proto) })
	mux.HandleFunc("/silent", func(http.ResponseWriter, *http.Request) { <-a.release })
	mux.HandleFunc("/half", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "some")
		w.(http.Flusher).Flush()
		<-a.release
	})
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		a.asked = append(a.asked, r)
		a.mu.Unlock()
		mux.ServeHTTP(w, r)
	}))
	start(a.Server)
	t.Cleanup(func() {
		close(a.release)
		a.Close()
	})
	return a
}

func (a *webApp) port(t *testing.T) int { return portOf(t, a.Listener.Addr().String()) }

func (a *webApp) requests() []*http.Request {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.asked)
}

// ask carries out an http probe that may be configured further.
func ask(t *testing.T, spec HTTPGet, port int, timeout time.Duration) (verdict, string, error) {
	t.Helper()
	spec.Port = Port{Number: port}
	s := Spec{HTTPGet: &spec}
	if err := s.Validate(Readiness); err != nil {
		t.Fatal(err)
	}
	return newHTTPHandler(*s.defaulted().HTTPGet, "127.0.0.1", "usher-probe/1.2", at(port), timeout, dialer().DialContext).probe(t.Context())
}

func TestHTTPRules(t *testing.T) {
	app := newWebApp(t, (*httptest.Server).Start)
	other := newWebApp(t, (*httptest.Server).Start)
	secure := newWebApp(t, (*httptest.Server).StartTLS)
	both := newWebApp(t, func(s *httptest.Server) {
		s.EnableHTTP2 = true
		s.StartTLS()
	})
	to := func(u string) string { return "/to?url=" + url.QueryEscape(u) }
	elsewhere := fmt.Sprintf("http://localhost:%d/", other.port(t))
	for _, tc := range []struct {
		rule, path string
		app        *webApp
		timeout    time.Duration
		want       verdict
		output     string // a part of it
	}{
		{rule: "http.go: 200 is a success, with its body", path: "/", want: success, output: "hello"},
		{rule: "http.go: 204", path: "/status/204", want: success},
		{rule: "http.go: 299", path: "/status/299", want: success},
		{rule: "http.go: 300 and above is a success with a warning", path: "/status/300", want: warning, output: "Probe terminated redirects, Response body: secret"},
		{rule: "http.go: 304", path: "/status/304", want: warning},
		{rule: "http.go: a redirect to nowhere", path: "/status/302", want: warning},
		{rule: "http.go: 399", path: "/status/399", want: warning},
		{rule: "http.go: 400 is a failure, without its body", path: "/status/400", want: failure, output: "HTTP probe failed with statuscode: 400"},
		{rule: "http.go: 404", path: "/status/404", want: failure},
		{rule: "http.go: 500", path: "/status/500", want: failure},
		{rule: "http.go: 503", path: "/status/503", want: failure, output: "HTTP probe failed with statuscode: 503"},
		{rule: "http.go, RedirectChecker: the same host is followed", path: to("/"), want: success, output: "hello"},
		{rule: "http.go, RedirectChecker: and its answer counts", path: to("/status/503"), want: failure, output: "503"},
		{rule: "http.go, RedirectChecker: another port is the same host", path: to(other.URL), want: success, output: "hello"},
		{rule: "http.go, RedirectChecker: another scheme is the same host", path: to(secure.URL), want: success, output: "hello"},
		{rule: "http.go, RedirectChecker: another host is a success with a warning", path: to(elsewhere), want: warning, output: "Response body: over there"},
		{rule: "http.go, RedirectChecker: ten requests in a row will do", path: "/hops/9", want: success},
		{rule: "http.go, RedirectChecker: the tenth redirect is one too many", path: "/hops/10", want: failure, output: "stopped after 10 redirects"},
		{rule: "http.go: the certificate isn't verified", app: secure, path: "/proto", want: success, output: "HTTP/1.1"},
		{rule: "http.go: HTTP/2 where TLS agrees on it", app: both, path: "/proto", want: success, output: "HTTP/2.0"},
		{rule: "http.Transport: informational answers go before the answer", path: "/early/200", want: success, output: "at last"},
		{rule: "http.Transport: and say nothing of it", path: "/early/503", want: failure, output: "503"},
		{rule: "http.go: below 200 is a failure", path: "/switch", want: failure, output: "HTTP probe failed with statuscode: 101"},
		{rule: "http.go: no answer is a failure", path: "/gone", want: failure, output: "EOF"},
		{rule: "http.Transport: a header has an end", path: "/header", want: failure},
		{rule: "http.go: what isn't HTTP is a failure", app: app, path: "/", want: failure, output: "server gave HTTP response to HTTPS client"},
		{rule: "http.go: no answer in time is a failure", path: "/silent", timeout: soon, want: failure, output: "Client.Timeout exceeded"},
		{rule: "http.go: a body that breaks off is an error", path: "/half", timeout: soon, want: unknown},
		{rule: "request.go, formatURL: a query", path: "/status/201?x=1&y", want: success},
		{rule: "request.go, formatURL: no slash", path: "status/503", want: failure, output: "503"},
		{rule: "request.go, formatURL: what can't be parsed is passed along", path: "/%zz", want: success, output: "hello"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			spec := HTTPGet{Path: tc.path}
			if tc.app == nil {
				tc.app = app
			} else {
				spec.Scheme = "HTTPS"
			}
			if tc.timeout == 0 {
				tc.timeout = patience
			}
			got, output, err := ask(t, spec, tc.app.port(t), tc.timeout)
			if got != tc.want || (err != nil) != (tc.want == unknown) || !strings.Contains(output, tc.output) {
				t.Errorf("got %v, %q, %v; want %v, %q", got, output, err, tc.want, tc.output)
			}
			if tc.want == failure && strings.Contains(output, "secret") {
				t.Errorf("the body is in a failure's output: %q", output)
			}
		})
	}
	for _, r := range other.requests() {
		if strings.HasPrefix(r.Host, "localhost") {
			t.Error("a redirect to another host was followed")
		}
	}
	t.Run("http.go: connection refused is a failure", func(t *testing.T) {
		if got, output, err := ask(t, HTTPGet{}, closedPort(t), patience); got != failure || err != nil || !strings.Contains(output, "connection refused") {
			t.Errorf("got %v, %q, %v", got, output, err)
		}
	})
	t.Run("http.go, maxRespBodyLength: 10 KiB are kept", func(t *testing.T) {
		if _, output, _ := ask(t, HTTPGet{Path: "/long"}, app.port(t), patience); output != strings.Repeat("x", 10240) {
			t.Errorf("%d bytes, want 10240", len(output))
		}
	})
	t.Run("request.go: httpGet.host goes before the default host", func(t *testing.T) {
		h := newHTTPHandler(HTTPGet{Host: "127.0.0.1", Path: "/", Scheme: "HTTP"}, "192.0.2.1", "", at(app.port(t)), patience, dialer().DialContext)
		if got, output, err := h.probe(t.Context()); got != success {
			t.Errorf("got %v, %q, %v", got, output, err)
		}
	})
	for scheme, app := range map[string]*webApp{"HTTP": app, "HTTPS": secure} {
		t.Run("http.go: no proxy for "+scheme, func(t *testing.T) {
			t.Setenv("HTTP_PROXY", "http://127.0.0.1:1")
			t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
			h := newHTTPHandler(HTTPGet{Path: "/", Scheme: scheme}, "shop.example", "", at(8080), patience, func(ctx context.Context, network, addr string) (net.Conn, error) {
				if addr != "shop.example:8080" {
					t.Errorf("dials %s, want shop.example:8080", addr)
				}
				return dialer().DialContext(ctx, network, app.Listener.Addr().String())
			})
			if got, output, err := h.probe(t.Context()); got != success {
				t.Errorf("got %v, %q, %v", got, output, err)
			}
		})
	}
}

func TestEndOfRunEndsARequest(t *testing.T) {
	app := newWebApp(t, (*httptest.Server).Start)
	for _, path := range []string{"/silent", "/half"} {
		ctx, cancel := context.WithCancel(t.Context())
		before := len(app.requests())
		go func() {
			defer cancel()
			for range 1000 {
				if len(app.requests()) > before {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}()
		h := newHTTPHandler(HTTPGet{Path: path, Scheme: "HTTP"}, "127.0.0.1", "", at(app.port(t)), 5*time.Minute, dialer().DialContext)
		began := time.Now()
		v, _, err := run(ctx, h)
		if took := time.Since(began); !errors.Is(err, context.Canceled) || v != unknown || took > patience {
			t.Errorf("%s: got %v, %v after %v, want no result, at once", path, v, err, took)
		}
	}
}

func TestHTTPHeaders(t *testing.T) {
	app := newWebApp(t, (*httptest.Server).Start)
	for _, tc := range []struct {
		rule    string
		headers []HTTPHeader
		host    string
		want    http.Header
	}{
		{"request.go: User-Agent and Accept by default", nil, "", http.Header{"User-Agent": {"usher-probe/1.2"}, "Accept": {"*/*"}}},
		{"request.go: set ones go before", []HTTPHeader{{"user-agent", "me"}, {"ACCEPT", "text/plain"}}, "", http.Header{"User-Agent": {"me"}, "Accept": {"text/plain"}}},
		{"request.go: an empty Accept removes it", []HTTPHeader{{"Accept", ""}}, "", http.Header{"User-Agent": {"usher-probe/1.2"}}},
		{"request.go: Host", []HTTPHeader{{"Host", "shop.example"}}, "shop.example", http.Header{"User-Agent": {"usher-probe/1.2"}, "Accept": {"*/*"}}},
		{"request.go, v1HeaderToHTTPHeader: a name several times", []HTTPHeader{{"X-A", "1"}, {"x-a", "2"}}, "", http.Header{"User-Agent": {"usher-probe/1.2"}, "Accept": {"*/*"}, "X-A": {"1", "2"}}},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			before := len(app.requests())
			if got, output, err := ask(t, HTTPGet{HTTPHeaders: tc.headers}, app.port(t), patience); got != success {
				t.Fatal(got, output, err)
			}
			r := app.requests()[before]
			if r.Method != http.MethodGet || !r.Close {
				t.Errorf("%s, close %v; want GET, and no keep-alive", r.Method, r.Close)
			}
			r.Header.Del("Connection")
			if fmt.Sprint(r.Header) != fmt.Sprint(tc.want) {
				t.Errorf("headers %v, want %v", r.Header, tc.want)
			}
			if tc.host == "" {
				tc.host = app.Listener.Addr().String()
			}
			if r.Host != tc.host {
				t.Errorf("Host %q, want %q", r.Host, tc.host)
			}
		})
	}
}

func TestEachHTTPRunHasAConnectionOfItsOwn(t *testing.T) {
	app := newWebApp(t, (*httptest.Server).Start)
	h := newHTTPHandler(HTTPGet{Path: "/long", Scheme: "HTTP"}, "127.0.0.1", "", at(app.port(t)), patience, dialer().DialContext)
	var outputs []string
	for range 3 {
		got, output, err := h.probe(t.Context())
		if got != success {
			t.Fatal(got, output, err)
		}
		outputs = append(outputs, output)
		h.url.Path = "/" // shorter: nothing of the one before may show
	}
	if want := []string{strings.Repeat("x", maxOutput), "hello", "hello"}; !slices.Equal(outputs, want) {
		t.Errorf("outputs of %d, %q, %q", len(outputs[0]), outputs[1], outputs[2])
	}
	from := map[string]bool{}
	for _, r := range app.requests() {
		from[r.RemoteAddr] = true
	}
	if len(from) != 3 {
		t.Errorf("3 runs came from %v", from)
	}
}

func TestNamedPortIsLookedUpAtEachRun(t *testing.T) {
	// probe/util.go: ResolveContainerPort; an error, not a failure.
	app := newWebApp(t, (*httptest.Server).Start)
	ports := map[string]int{}
	p, err := New(Config{
		Name:      "app",
		Liveness:  &Spec{HTTPGet: &HTTPGet{Port: Port{Name: "web"}}},
		Readiness: &Spec{TCPSocket: &TCPSocket{Port: Port{Name: "web"}}},
		Ports:     func(name string) (int, bool) { n, ok := ports[name]; return n, ok },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []Kind{Liveness, Readiness} {
		for _, tc := range []struct {
			port int
			want string
		}{{0, `port "web" not found`}, {70000, "invalid port number: 70000"}, {app.port(t), ""}} {
			delete(ports, "web")
			if tc.port > 0 {
				ports["web"] = tc.port
			}
			v, _, err := p.probes[kind].handler.probe(t.Context())
			if tc.want == "" && (err != nil || v != success) || tc.want != "" && (err == nil || err.Error() != tc.want) {
				t.Errorf("%v, port %d: got %v, %v; want %q", kind, tc.port, v, err, tc.want)
			}
		}
	}
}

func TestTCPRules(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tc := range []struct {
		rule    string
		port    int
		timeout time.Duration
		want    verdict
		output  string
	}{
		{"tcp.go: opened is a success, though nobody accepts", portOf(t, l.Addr().String()), patience, success, ""},
		{"tcp.go: refused is a failure", closedPort(t), patience, failure, "connection refused"},
		{"tcp.go: not opened in time is a failure", fullPort(t), soon, failure, "i/o timeout"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			h := &tcpHandler{host: "127.0.0.1", port: at(tc.port), timeout: tc.timeout, dial: dialer().DialContext}
			if got, output, err := h.probe(t.Context()); got != tc.want || err != nil || !strings.Contains(output, tc.output) {
				t.Errorf("got %v, %q, %v; want %v, %q", got, output, err, tc.want, tc.output)
			}
		})
	}
}

// fullPort is one whose queue of connections is full, so that the kernel answers no more of them.
func fullPort(t *testing.T) int {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	port := name.(*syscall.SockaddrInet4).Port
	for range 16 {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)), soon)
		if err != nil {
			return port
		}
		t.Cleanup(func() { conn.Close() })
	}
	t.Fatal("the kernel queues 16 connections with a backlog of 0")
	return 0
}

// healthServer answers by the service's name.
type healthServer struct {
	healthpb.UnimplementedHealthServer
	*health.Server
	agents  chan string
	release chan struct{}
}

func (s healthServer) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		select {
		case s.agents <- strings.Join(md.Get("user-agent"), ","):
		default:
		}
	}
	if r.Service == "slow" {
		<-s.release // not ctx: an answer upon the client's deadline may still reach it
	}
	return s.Server.Check(ctx, r)
}

func (s healthServer) Watch(r *healthpb.HealthCheckRequest, w healthpb.Health_WatchServer) error {
	return s.Server.Watch(r, w)
}

func (s healthServer) List(ctx context.Context, r *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	return s.Server.List(ctx, r)
}

func serveGRPC(t testing.TB, register func(*grpc.Server)) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.Serve(l); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
	})
	return l.Addr().(*net.TCPAddr).Port
}

func TestGRPCRules(t *testing.T) {
	hs := healthServer{Server: health.NewServer(), agents: make(chan string, 100), release: make(chan struct{})}
	defer close(hs.release)
	hs.SetServingStatus("up", healthpb.HealthCheckResponse_SERVING)
	hs.SetServingStatus("down", healthpb.HealthCheckResponse_NOT_SERVING)
	hs.SetServingStatus("vague", healthpb.HealthCheckResponse_UNKNOWN)
	serving := serveGRPC(t, func(s *grpc.Server) { healthpb.RegisterHealthServer(s, hs) })
	bare := serveGRPC(t, func(*grpc.Server) {})
	mute, err := net.Listen("tcp", "127.0.0.1:0") // nobody speaks HTTP/2 there
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	for _, tc := range []struct {
		rule, service string
		port          int
		timeout       time.Duration
		want          verdict
		output        string
	}{
		{"grpc.go: SERVING, of the server as a whole", "", serving, patience, success, "service healthy"},
		{"grpc.go: SERVING, of a service", "up", serving, patience, success, "service healthy"},
		{"grpc.go: NOT_SERVING", "down", serving, patience, failure, `service unhealthy (responded with "NOT_SERVING")`},
		{"grpc.go: UNKNOWN", "vague", serving, patience, failure, `service unhealthy (responded with "UNKNOWN")`},
		{"grpc.go: a service that isn't there", "none", serving, patience, failure, "error: health rpc probe failed: rpc error: code = NotFound desc = unknown service"},
		{"grpc.go: no health service", "", bare, patience, failure, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): unknown service grpc.health.v1.Health"},
		{"grpc.go: no answer in time", "slow", serving, soon, failure, "timeout: health rpc did not complete within 200ms"},
		{"grpc.go: refused, until the timeout", "", closedPort(t), soon, failure, `within 200ms: context deadline exceeded`},
		{"grpc.go: connected, but no gRPC", "", portOf(t, mute.Addr().String()), soon, failure, "timeout: failed to connect service"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			h := newGRPCHandler("127.0.0.1", tc.port, tc.service, "usher-probe/1.2", tc.timeout, dialer().DialContext)
			if got, output, err := h.probe(t.Context()); got != tc.want || err != nil || !strings.Contains(output, tc.output) {
				t.Errorf("got %v, %q, %v; want %v, %q", got, output, err, tc.want, tc.output)
			}
		})
	}
	if agent := <-hs.agents; !strings.HasPrefix(agent, "usher-probe/1.2 grpc-go/") {
		t.Errorf("user agent %q", agent)
	}
}

func TestExecRules(t *testing.T) {
	t.Setenv("PROBED_PORT", "8080")
	sh := func(script string) []string { return []string{"sh", "-c", script} }
	for _, tc := range []struct {
		rule    string
		command []string
		timeout time.Duration
		want    verdict
		output  string
	}{
		{"exec.go: exit code 0 is a success", sh("echo fine"), patience, success, "fine\n"},
		{"exec.go: any other is a failure, with the output", sh("echo bad; exit 3"), patience, failure, "bad\n"},
		{"exec.go: stderr is output too", sh("echo a; echo b >&2"), patience, success, "a\nb\n"},
		{"exec.go: ended by a signal", sh("kill -9 $$$$"), patience, failure, ""},
		{"exec.go: ErrCommandTimedOut is a failure", sh("echo x; sleep 300; exit"), soon, failure, `command timed out: "sh -c echo x; sleep 300; exit" timed out after 200ms`},
		{"exec.go, maxReadLength: 10 KiB are kept", sh("head -c 40000 /dev/zero | tr '\\0' x"), patience, success, strings.Repeat("x", 10240)},
		{"exec.go: what can't be started is an error", []string{"/no/such/program"}, patience, unknown, ""},
		{"prober.go: no shell, no standard input", []string{"cat"}, patience, success, ""},
		{"helpers.go, ExpandContainerCommandOnlyStatic", []string{"echo", "$(PROBED_PORT)", "$$(PROBED_PORT)", "$(NO_SUCH)", "$PROBED_PORT", "$("}, patience, success, "8080 $(PROBED_PORT) $(NO_SUCH) $PROBED_PORT $(\n"},
		{"output that something left behind holds on to isn't waited for", sh("sleep 60 & echo done"), patience, success, "done\n"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			h := &execHandler{command: tc.command, timeout: tc.timeout}
			for range 2 { // a handler's memory is used again
				began := time.Now()
				got, output, err := h.probe(t.Context())
				if took := time.Since(began); took > patience {
					t.Errorf("took %v", took)
				}
				if got != tc.want || (err != nil) != (tc.want == unknown) || output != tc.output {
					t.Errorf("got %v, %q, %v; want %v, %q", got, output, err, tc.want, tc.output)
				}
			}
		})
	}
}

// TestTimeoutEndsTheWholeProcessGroup also holds that this process, where it is the first of its container, keeps no dead
// children: it makes itself the one that orphans come to.
func TestTimeoutEndsTheWholeProcessGroup(t *testing.T) {
	const setChildSubreaper = 36
	prctl := func(on uintptr) {
		if _, _, errno := syscall.Syscall(syscall.SYS_PRCTL, setChildSubreaper, on, 0); errno != 0 {
			t.Fatal(errno)
		}
	}
	prctl(1)
	defer prctl(0)
	file := filepath.Join(t.TempDir(), "pid")
	h := &execHandler{command: []string{"sh", "-c", "sleep 300 & sleep 300 & echo $! >$0; wait", file}, timeout: soon}
	if got, output, err := h.probe(t.Context()); got != failure || err != nil {
		t.Fatal(got, output, err)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if pid := strings.TrimSpace(string(text)); pid == "" {
		t.Error("the command hadn't started its child")
	} else if stat, err := os.ReadFile("/proc/" + pid + "/stat"); err == nil {
		t.Errorf("the command's child is still there: %s", stat)
	}
}

func TestEndOfRunEndsACommand(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	file := filepath.Join(t.TempDir(), "started")
	go func() {
		defer cancel()
		for range 1000 {
			if _, err := os.Stat(file); err == nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	began := time.Now()
	v, _, err := run(ctx, &execHandler{command: []string{"sh", "-c", "touch $0; sleep 300", file}, timeout: 5 * time.Minute})
	if took := time.Since(began); err == nil || v != unknown || took > patience {
		t.Errorf("got %v, %v after %v, want no result, at once", v, err, took)
	}
}

// TestProberFollowsAnApplication is the whole, in real time: an http probe of an application that turns.
func TestProberFollowsAnApplication(t *testing.T) {
	var mu sync.Mutex
	code := http.StatusOK
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		w.WriteHeader(code)
	}))
	defer app.Close()
	states := make(chan State, 10)
	p, err := New(Config{
		Name:      "app",
		Readiness: &Spec{HTTPGet: &HTTPGet{Port: Port{Number: portOf(t, app.Listener.Addr().String())}}, PeriodSeconds: 1, TimeoutSeconds: 10, FailureThreshold: 1},
		OnChange:  func(s State) { states <- s },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	for i, want := range []string{"started live", "started live ready", "started live", "started live ready"} {
		select {
		case s := <-states:
			if short(s) != want {
				t.Fatalf("change %d is %q, want %q", i, short(s), want)
			}
		case <-time.After(patience):
			t.Fatalf("change %d to %q never came", i, want)
		}
		mu.Lock()
		code = [...]int{http.StatusOK, http.StatusServiceUnavailable, http.StatusOK, http.StatusOK}[i]
		mu.Unlock()
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
