// Package examples_test runs the examples for applications in other languages as they are, against the agent's own stream.
package examples_test

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"usher.dev/usher/integration/internal/need"
	"usher.dev/usher/internal/api"
	"usher.dev/usher/notify"
)

// program finds an interpreter, and installs Debian's package of it where that may be done.
func program(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	need.Root(t)
	for _, args := range [][]string{{"update", "-qq"}, {"install", "-y", "-qq", "--no-install-recommends", pkg}} {
		if out, err := exec.CommandContext(t.Context(), "apt-get", args...).CombinedOutput(); err != nil {
			t.Fatalf("%s is missing, and apt-get %s: %v\n%s", name, args, err, out)
		}
	}
	if path, err = exec.LookPath(name); err != nil {
		t.Fatal(err)
	}
	return path
}

// agent is the part of one that the examples talk to. It cuts streams when it is told to.
type agent struct {
	hub       *notify.Hub
	url       string
	server    *http.Server
	readiness chan string
	streams   atomic.Int64 // ever begun
	cut       chan struct{}
	half      atomic.Bool  // streams end in the middle of their first event
	refusals  atomic.Int64 // how often the readiness is still refused
}

// halfWriter lets half of the first event through, and ends the connection.
type halfWriter struct{ http.ResponseWriter }

func (w halfWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w halfWriter) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "data: ") {
		w.ResponseWriter.Write(p[:len(p)/2])
		http.NewResponseController(w.ResponseWriter).Flush()
		panic(http.ErrAbortHandler)
	}
	return w.ResponseWriter.Write(p)
}

func newAgent(t *testing.T, address string) *agent {
	t.Helper()
	a := &agent{hub: notify.NewHub(), readiness: make(chan string, 8), cut: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.EventsPath, func(w http.ResponseWriter, r *http.Request) {
		a.streams.Add(1)
		if a.half.Load() {
			w = halfWriter{w}
		}
		a.hub.ServeHTTP(w, r)
	})
	mux.HandleFunc("PUT "+api.AvailabilityPath+"readiness", func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if a.refusals.Add(-1) >= 0 {
			http.Error(w, `{"error":"not yet"}`, http.StatusServiceUnavailable)
			return
		}
		a.readiness <- strings.ReplaceAll(string(body), " ", "")
	})
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	a.url = "http://" + ln.Addr().String()
	a.server = &http.Server{Handler: mux}
	go a.server.Serve(ln)
	t.Cleanup(func() { a.server.Close() })
	return a
}

func (a *agent) publish(types ...api.EventType) {
	for _, e := range types {
		a.hub.Publish(api.Event{Type: e, State: string(e), Cause: "why: " + string(e)})
	}
}

// reported is the application's word that it is ready.
func (a *agent) reported(t *testing.T) {
	t.Helper()
	select {
	case got := <-a.readiness:
		if got != `{"state":"ACCEPTING_TRAFFIC","cause":"cachesarewarm"}` {
			t.Errorf("readiness is said to be %s", got)
		}
	case <-time.After(30 * time.Second):
		t.Error("nothing is said of readiness")
	}
}

func TestExamplesFollowTheAgent(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for name, command := range map[string]func(*testing.T) *exec.Cmd{
		"node": func(t *testing.T) *exec.Cmd {
			return exec.Command(program(t, "node", "nodejs"), "examples/node/follow.mjs")
		},
		"python": func(t *testing.T) *exec.Cmd {
			return exec.Command(program(t, "python3", "python3"), "examples/python/follow.py")
		},
		"go": func(t *testing.T) *exec.Cmd {
			bin := filepath.Join(t.TempDir(), "follow")
			build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "./examples/go")
			build.Dir = root
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			return exec.Command(bin)
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, "127.0.0.1:0")
			a.refusals.Store(2) // what is said too early is said again
			a.publish(api.EventOffline)
			cmd := command(t)
			cmd.Dir = root
			// A proxy is for what is outside of the pod.
			const nowhere = "=http://127.0.0.1:9"
			cmd.Env = append(os.Environ(), "USHER_AGENT="+a.url, "http_proxy"+nowhere, "HTTP_PROXY"+nowhere, "NODE_USE_ENV_PROXY=1", "no_proxy=", "NO_PROXY=")
			next := start(t, cmd)

			next("offline: why: offline; background work: false")
			a.reported(t)
			a.publish(api.EventOnline, api.EventHeld)
			next("online: why: online; background work: true")
			next("held: why: held; background work: true")

			// A connection that ends in the middle of an event, twice.
			a.half.Store(true)
			began := a.streams.Load()
			a.server.Close() // and with it every connection
			address := strings.TrimPrefix(a.url, "http://")
			a.publish(api.EventResumed, api.EventOnline)
			again := serveAgain(t, a, address)
			until(t, "two streams that were cut", func() bool { return a.streams.Load() >= began+2 })
			a.half.Store(false)
			next("resumed: why: resumed; background work: true")
			next("online: why: online; background work: true")
			a.publish(api.EventDraining)
			next("draining: why: draining; background work: false")
			again.Close()

			// Another agent at the same place.
			b := newAgent(t, address)
			b.publish(api.EventReleased)
			next("released: why: released; background work: false")
			b.reported(t) // again, since the agent can't know
		})
	}
}

// serveAgain is the same agent once more at its address.
func serveAgain(t *testing.T, a *agent, address string) *http.Server {
	t.Helper()
	ln, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: a.server.Handler}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return s
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never came: %s", what)
		}
	}
}

// start starts an example; next takes the next line that it prints, and holds it against what it should be.
func start(t *testing.T, cmd *exec.Cmd) (next func(want string)) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := make(chan string)
	go func() {
		defer close(lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			lines <- in.Text()
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		for line := range lines {
			t.Errorf("printed besides: %q", line)
		}
		cmd.Wait()
		if t.Failed() {
			t.Logf("standard error: %s", &stderr)
		}
	})
	return func(want string) {
		t.Helper()
		select {
		case got, ok := <-lines:
			if !ok || got != want {
				t.Fatalf("printed %q, want %q", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("printed nothing, want %q", want)
		}
	}
}
