package load

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/integration/internal/etcdtest"
)

// One etcd and one build of the sample application serve all tests; each test has targets of its own.
var (
	etcdURL string
	appPath string
)

// nobody is an address that nothing listens on, and that no listener is given by chance.
const nobody = "127.0.0.1:1"

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "load")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		appPath = filepath.Join(dir, "app")
		build := exec.Command("go", "build", "-o", appPath, "usher.dev/usher/integration/app")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build the sample application: %v\n%s", err, out)
			return 1
		}
		address, stop, err := etcdtest.Serve()
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer stop()
		etcdURL = "http://" + address
		return m.Run()
	}())
}

// registry writes records the way etcd's naming package does.
type registry struct {
	t    *testing.T
	cli  *clientv3.Client
	http string
	grpc string
}

func newRegistry(t *testing.T) *registry {
	t.Helper()
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{etcdURL}, DialTimeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer cli.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := cli.Delete(ctx, "test/"+t.Name()+"/", clientv3.WithPrefix()); err != nil {
			t.Error(err)
		}
	})
	return &registry{t: t, cli: cli, http: "test/" + t.Name() + "/http", grpc: "test/" + t.Name() + "/grpc"}
}

func (r *registry) manager(target string) endpoints.Manager {
	r.t.Helper()
	m, err := endpoints.NewManager(r.cli, target)
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *registry) put(target, id, addr string) {
	r.t.Helper()
	if err := r.manager(target).AddEndpoint(r.t.Context(), target+"/"+id, endpoints.Endpoint{Addr: addr}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *registry) remove(target, id string) {
	r.t.Helper()
	if err := r.manager(target).DeleteEndpoint(r.t.Context(), target+"/"+id); err != nil {
		r.t.Fatal(err)
	}
}

func (r *registry) online(a *application) {
	r.t.Helper()
	r.put(r.http, a.pod, a.http)
	r.put(r.grpc, a.pod, a.grpc)
}

func (r *registry) offline(a *application) {
	r.t.Helper()
	r.remove(r.http, a.pod)
	r.remove(r.grpc, a.pod)
}

// application is the sample application in a process of its own.
type application struct {
	t    *testing.T
	pod  string
	http string
	grpc string
	cmd  *exec.Cmd
	gone chan struct{}
}

func startApplication(t *testing.T, pod string, flags ...string) *application {
	t.Helper()
	cmd := exec.Command(appPath, append([]string{"--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--pod=" + pod}, flags...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a := &application{t: t, pod: pod, cmd: cmd, gone: make(chan struct{})}
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-a.gone
	})
	lines := bufio.NewScanner(out)
	for lines.Scan() && a.http == "" {
		var line struct{ Msg, HTTP, GRPC string }
		if err := json.Unmarshal(lines.Bytes(), &line); err == nil && line.Msg == "listening" {
			a.http, a.grpc = line.HTTP, line.GRPC
			break
		}
	}
	go func() {
		defer close(a.gone)
		io.Copy(io.Discard, out)
		cmd.Wait()
	}()
	if a.http == "" {
		t.Fatalf("application %s ended before it listened", pod)
	}
	return a
}

func (a *application) signal(sig syscall.Signal) {
	a.t.Helper()
	if err := a.cmd.Process.Signal(sig); err != nil {
		a.t.Fatal(err)
	}
}

// inFlight asks the application itself, on a connection of its own.
func (a *application) inFlight() int {
	a.t.Helper()
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Get("http://" + a.http + wire.InFlightPath)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(body)))
	if err != nil {
		a.t.Fatal(err)
	}
	return n
}

// running is a generator at work.
type running struct {
	*Generator
	t      *testing.T
	cancel context.CancelFunc
	ended  chan struct{}
	report Report
	err    error
}

func start(t *testing.T, cfg Config) *running {
	t.Helper()
	cfg.Endpoints = []string{etcdURL}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r := &running{Generator: g, t: t, cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.report, r.err = g.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-r.ended
	})
	return r
}

// stop ends the sending and returns the report, in which every request must have its end.
func (r *running) stop() Report {
	r.t.Helper()
	r.cancel()
	return r.wait()
}

func (r *running) wait() Report {
	r.t.Helper()
	select {
	case <-r.ended:
	case <-time.After(30 * time.Second):
		r.t.Fatal("the generator has not ended after 30 s")
	}
	if r.err != nil {
		r.t.Fatal(r.err)
	}
	checkSums(r.t, r.report)
	return r.report
}

// checkSums is what must hold for every report that Run returns.
func checkSums(t *testing.T, r Report) {
	t.Helper()
	if r.Sent != r.Answered+r.Failed || r.InFlight != 0 {
		t.Errorf("sent %d, answered %d, failed %d, in flight %d: sent is not answered + failed", r.Sent, r.Answered, r.Failed, r.InFlight)
	}
	var kinds Counts
	for _, k := range r.Kinds {
		kinds.Sent += k.Sent
		kinds.Answered += k.Answered
		kinds.Failed += k.Failed
	}
	if kinds != r.Counts {
		t.Errorf("the kinds add up to %+v, the total is %+v", kinds, r.Counts)
	}
	var answered, failed, classes int64
	for _, i := range r.Instances {
		answered += i.Answered
		failed += i.Failed
	}
	for _, n := range r.Classes {
		classes += n
	}
	if answered != r.Answered || failed != r.Failed || classes != r.Failed {
		t.Errorf("the instances add up to %d answered and %d failed, the classes to %d failed; the total is %+v", answered, failed, classes, r.Counts)
	}
	if want := min(int(r.Failed), maxFailures); len(r.Failures) != want {
		t.Errorf("%d failures are kept, want %d", len(r.Failures), want)
	}
}

// eventually polls until ok, for at most 20 s.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// answered is how many requests over p were answered by pod so far.
func answered(r Report, p Protocol, pod string) int64 {
	var n int64
	for _, i := range r.Instances {
		if i.Protocol == p && i.Pod == pod {
			n += i.Answered
		}
	}
	return n
}

func kindOf(r Report, p Protocol, k Kind) KindReport {
	for _, kr := range r.Kinds {
		if kr.Protocol == p && kr.Kind == k {
			return kr
		}
	}
	return KindReport{Protocol: p, Kind: k}
}
