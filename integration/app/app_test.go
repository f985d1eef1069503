package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/internal/api"
)

// asApp makes the test binary be the application, so that signals can end it.
const asApp = "USHER_TEST_AS_APP"

func TestMain(m *testing.M) {
	if os.Getenv(asApp) != "" {
		main()
	}
	os.Exit(m.Run())
}

func newTestServer(t *testing.T) (*server, string) {
	t.Helper()
	s := newServer("pod-1", time.Second, slog.New(slog.DiscardHandler))
	hs := httptest.NewServer(s.handler())
	t.Cleanup(hs.Close)
	return s, hs.URL
}

func call(t *testing.T, method, url, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if pod := resp.Header.Get(wire.PodHeader); pod != "pod-1" {
		t.Errorf("%s %s: the answer names the pod %q", method, url, pod)
	}
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func TestHTTPAnswers(t *testing.T) {
	_, url := newTestServer(t)
	for _, c := range []struct {
		method, path, body string
		status             int
		answer             string
	}{
		{"GET", "/fast", "", 200, "pod-1\n"},
		{"POST", "/fast", "hello", 200, "pod-1\n"},
		{"GET", "/slow?for=20ms", "", 200, "pod-1\n"},
		{"POST", "/slow?for=20ms", "hello", 200, "pod-1\n"},
		{"POST", "/upload", strings.Repeat("x", 100_000), 200, "pod-1 100000\n"},
		{"PUT", "/upload", "", 200, "pod-1 0\n"},
		{"GET", "/stream?for=10ms&every=1s", "", 200, "pod-1\npod-1\nend\n"},
		{"POST", "/stream?for=0s", "hello", 200, "pod-1\nend\n"},
		{"GET", "/slow?for=2s", "", 400, "for=\"2s\": give a duration from 0s to 1s, such as 2s\n"},
		{"GET", "/slow?for=-1s", "", 400, "for=\"-1s\": give a duration from 0s to 1s, such as 2s\n"},
		{"GET", "/stream?for=x&every=0s", "", 400, "for=\"x\": give a duration from 0s to 1s, such as 5s\nevery=\"0s\": give a duration from 1ms to 1s, such as 100ms\n"},
		{"GET", "/upload", "", 405, "Method Not Allowed\n"},
		{"GET", "/", "", 404, "404 page not found\n"},
	} {
		if status, answer := call(t, c.method, url+c.path, c.body); status != c.status || answer != c.answer {
			t.Errorf("%s %s: %d %q, want %d %q", c.method, c.path, status, answer, c.status, c.answer)
		}
	}
}

func TestSlowTakesItsTimeAndIsInFlightMeanwhile(t *testing.T) {
	_, url := newTestServer(t)
	began := time.Now()
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		resp, err := http.Post(url+"/slow?for=300ms", "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Error(err)
			return
		}
		resp.Body.Close()
	}()
	for {
		if _, n := call(t, "GET", url+"/inflight", ""); n == "1\n" {
			break
		}
		select {
		case <-answered:
			t.Fatal("never seen in flight")
		case <-time.After(time.Millisecond):
		}
	}
	<-answered
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("answered after %v, want 300ms or more", took)
	}
	if _, n := call(t, "GET", url+"/inflight", ""); n != "0\n" {
		t.Errorf("%q in flight after the answer", n)
	}
}

func TestPendingIsAnsweredWhenItIsLetGo(t *testing.T) {
	s, url := newTestServer(t)
	s.maxFor = time.Minute
	answered := make(chan string)
	go func() {
		resp, err := http.Post(url+wire.PendingPath, "text/plain", strings.NewReader("x"))
		if err != nil {
			t.Error(err)
			close(answered)
			return
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		answered <- string(text)
	}()
	for {
		if _, n := call(t, "GET", url+"/inflight", ""); n == "1\n" {
			break
		}
		select {
		case text := <-answered:
			t.Fatalf("answered before it was let go: %q", text)
		case <-time.After(time.Millisecond):
		}
	}
	call(t, "PUT", url+wire.PendingPath, "")
	if text := <-answered; text != "pod-1\n" {
		t.Errorf("answered %q", text)
	}
}

// A hook that refuses calls, takes the one in a hundred, and has no patience with those that are slow.
func TestFloodTellsWhatBecameOfItsCalls(t *testing.T) {
	var n atomic.Int64
	hook := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path != api.PrestopPath, r.Method != http.MethodGet:
		case n.Add(1)%100 != 0:
			w.WriteHeader(http.StatusForbidden)
		}
	}))
	hook.Config.ReadTimeout = time.Second
	hook.Start()
	defer hook.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	lines, out := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- flood(ctx, config{flood: hook.Listener.Addr().String(), floodCalls: 1000}, out) }()
	var first, rest wire.Flooded
	said := json.NewDecoder(lines)
	if err := said.Decode(&first); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := said.Decode(&rest); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if first.Calls != 1000 || first.Refused+first.Cut+first.Taken != 1000 || first.Refused == 0 || first.Taken == 0 || first.Slow == 0 {
		t.Errorf("the first calls: %+v", first)
	}
	if rest.Slow < 3*floodSlow {
		t.Errorf("at the end: %+v", rest)
	}
}

func TestStreamKeepsItsPaceAndEndsOnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		var at []time.Duration
		err := paced(t.Context(), 250*time.Millisecond, 100*time.Millisecond, func() error {
			at = append(at, time.Since(began))
			return nil
		})
		want := []time.Duration{0, 100 * time.Millisecond, 200 * time.Millisecond, 250 * time.Millisecond}
		if err != nil || !slices.Equal(at, want) {
			t.Errorf("messages at %v, %v; want %v", at, err, want)
		}
	})
}

func TestKnobs(t *testing.T) {
	s, url := newTestServer(t)
	conn := dialTest(t, s)
	want := func(path string, status int, answer string) {
		t.Helper()
		if got, text := call(t, "GET", url+path, ""); got != status || text != answer {
			t.Errorf("GET %s: %d %q, want %d %q", path, got, text, status, answer)
		}
	}
	serving := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		for _, name := range []string{"", wire.ServiceName} {
			r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: name})
			if err != nil || r.Status != want {
				t.Errorf("gRPC health of %q: %v, %v; want %v", name, r.GetStatus(), err, want)
			}
		}
	}
	want("/readyz", 503, "false\n")
	want("/livez", 200, "true\n")
	serving(healthpb.HealthCheckResponse_NOT_SERVING)

	call(t, "PUT", url+"/readyz", "true\n")
	call(t, "PUT", url+"/livez", "false")
	want("/readyz", 200, "true\n")
	want("/livez", 503, "false\n")
	serving(healthpb.HealthCheckResponse_SERVING)

	for _, body := range []string{"", "yes", strings.Repeat("true", 1000)} {
		if status, text := call(t, "PUT", url+"/readyz", body); status != 400 || !strings.Contains(text, "give true or false") {
			t.Errorf("PUT /readyz %.10q: %d %q, want 400 and what to give", body, status, text)
		}
	}
	want("/readyz", 200, "true\n")
}

func dialTest(t *testing.T, s *server) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gs := s.grpcServer()
	go gs.Serve(l)
	t.Cleanup(gs.Stop)
	return dial(t, l.Addr().String())
}

func dial(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func TestGRPCAnswers(t *testing.T) {
	s, _ := newTestServer(t)
	conn := dialTest(t, s)
	answer := new(wrapperspb.StringValue)
	began := time.Now()
	if err := conn.Invoke(t.Context(), wire.WaitMethod, durationpb.New(50*time.Millisecond), answer); err != nil || answer.Value != "pod-1" {
		t.Errorf("Wait: %q, %v", answer.GetValue(), err)
	}
	if took := time.Since(began); took < 50*time.Millisecond {
		t.Errorf("Wait answered after %v, want 50ms or more", took)
	}

	st, err := conn.NewStream(t.Context(), wire.StreamDesc(), wire.StreamMethod)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(st.SendMsg(durationpb.New(150*time.Millisecond)), st.CloseSend()); err != nil {
		t.Fatal(err)
	}
	n := 0
	for {
		err := st.RecvMsg(answer)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || answer.Value != "pod-1" {
			t.Fatalf("Stream: %q, %v", answer.GetValue(), err)
		}
		n++
	}
	// At 0, 100 and 150 ms; a busy machine may miss the one in the middle.
	if n < 2 || n > 3 {
		t.Errorf("a stream of 150 ms had %d messages, want 3", n)
	}

	for _, bad := range []*durationpb.Duration{durationpb.New(2 * time.Second), durationpb.New(-1), {Seconds: 1, Nanos: -1}} {
		err := conn.Invoke(t.Context(), wire.WaitMethod, bad, answer)
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "give 0s to 1s") {
			t.Errorf("Wait(%v): %v, want InvalidArgument and what to give", bad, err)
		}
	}
}

func TestBadFlagsAreNamed(t *testing.T) {
	t.Setenv("ETCDCTL_ENDPOINTS", "")
	for want, args := range map[string][]string{
		`--on-term="explode": give die or drain`:  {"--on-term=explode"},
		`--http="8080" is no listening address`:   {"--http=8080"},
		`--grpc="" is no listening address`:       {"--grpc="},
		"--max-for=0s: give at least 1ms":         {"--max-for=0s"},
		"--ready-after=-1s: give at least 0s":     {"--ready-after=-1s"},
		"--drain-timeout=-1s: give at least 1ms":  {"--drain-timeout=-1s"},
		`unexpected argument "now"`:               {"now"},
		`"shop/http": give TARGET=HOST:PORT`:      {"--register=shop/http"},
		`"a=:80": give TARGET=HOST:PORT`:          {"--register=a=:80"},
		"--register-ttl=1.5s: give whole seconds": {"--register-ttl=1500ms"},
		"--register is set, but neither --etcd":   {"--register=shop/http=10.0.0.7:8080"},
		"--workers=-1: give at least 0":           {"--workers=-1"},
		`--flood="10.0.0.7" is no address`:        {"--flood=10.0.0.7"},
		"--flood-calls=0: give at least 1":        {"--flood-calls=0"},
		"--replace-after=-1s: give at least 0s":   {"--replace-after=-1s"},
		"flag provided but not defined: -x":       {"-x"},
	} {
		if _, err := parse(args, io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: error %v, want one with %q", args, err, want)
		}
	}
}

func TestHelpNamesEveryFlagAndDefaultsAreHarsh(t *testing.T) {
	var help bytes.Buffer
	if _, err := parse([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) {
		t.Fatalf("%v, want ErrHelp", err)
	}
	t.Setenv("ETCDCTL_ENDPOINTS", "")
	for _, name := range []string{
		"-http", "-grpc", "-pod", "-on-term", "-drain-timeout", "-ready-after", "-max-for", "-register", "-register-ttl", "-etcd",
		"-agent", "-workers", "-replace-after", "-worker", "-flood", "-flood-calls",
	} {
		if !strings.Contains(help.String(), name) {
			t.Errorf("%s is missing in\n%s", name, help.String())
		}
	}
	cfg, err := parse(nil, io.Discard)
	host, _ := os.Hostname()
	want := config{
		httpAddr: ":8080", grpcAddr: ":9090", pod: host, onTerm: "die", drainTimeout: 30 * time.Second, maxFor: time.Minute,
		registerTTL: 15 * time.Second, replaceAfter: 10 * time.Second, floodCalls: 10_000,
	}
	if err != nil || !reflect.DeepEqual(cfg, want) {
		t.Errorf("%+v, %v; want %+v", cfg, err, want)
	}
}

// process is the application in a process of its own.
type process struct {
	cmd        *exec.Cmd
	http, grpc string
	logs       chan string // the messages, after the first; closed at the end
}

func startProcess(t *testing.T, flags ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(os.Args[0], append([]string{"--http=127.0.0.1:0", "--grpc=127.0.0.1:0", "--pod=pod-1"}, flags...)...), logs: make(chan string, 100)}
	p.cmd.Env = append(os.Environ(), asApp+"=1")
	p.cmd.Stderr = os.Stderr
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		for range p.logs {
		}
		p.cmd.Wait()
	})
	lines := bufio.NewScanner(out)
	listening := make(chan struct{})
	go func() {
		defer close(p.logs)
		for lines.Scan() {
			var l struct{ Msg, HTTP, GRPC string }
			if json.Unmarshal(lines.Bytes(), &l) != nil {
				continue
			}
			if l.Msg == "listening" {
				p.http, p.grpc = l.HTTP, l.GRPC
				close(listening)
				continue
			}
			p.logs <- l.Msg
		}
	}()
	select {
	case <-listening:
	case <-time.After(20 * time.Second):
		t.Fatal("the application does not listen after 20 s")
	}
	return p
}

// end waits for the process and returns its exit status.
func (p *process) end(t *testing.T) int {
	t.Helper()
	kill := time.AfterFunc(20*time.Second, func() { p.cmd.Process.Kill() })
	defer kill.Stop()
	for range p.logs {
	}
	p.cmd.Wait()
	return p.cmd.ProcessState.ExitCode()
}

// slowInFlight sends a slow request over each protocol and waits until the application has both.
func (p *process) slowInFlight(t *testing.T, d time.Duration) (httpErr, grpcErr chan error) {
	t.Helper()
	httpErr, grpcErr = make(chan error, 1), make(chan error, 1)
	conn := dial(t, p.grpc)
	go func() {
		resp, err := http.Post("http://"+p.http+"/slow?for="+d.String(), "text/plain", strings.NewReader("x"))
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		httpErr <- err
	}()
	go func() {
		grpcErr <- conn.Invoke(context.WithoutCancel(t.Context()), wire.WaitMethod, durationpb.New(d), new(wrapperspb.StringValue))
	}()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, n := call(t, "GET", "http://"+p.http+"/inflight", ""); n == "2\n" {
			return httpErr, grpcErr
		}
		if time.Now().After(deadline) {
			t.Fatal("the slow requests are not in flight after 10 s")
		}
	}
}

func TestSIGTERMKillsAtOnceByDefault(t *testing.T) {
	p := startProcess(t)
	httpErr, grpcErr := p.slowInFlight(t, 30*time.Second)
	p.cmd.Process.Signal(syscall.SIGTERM)
	if status := p.end(t); status != statusSIGTERM {
		t.Errorf("exit status %d, want %d", status, statusSIGTERM)
	}
	if err := <-httpErr; err == nil {
		t.Error("the HTTP request in flight was answered")
	}
	if err := <-grpcErr; status.Code(err) != codes.Unavailable {
		t.Errorf("the gRPC request in flight: %v, want Unavailable", err)
	}
}

func TestSIGTERMDrainsWhenAsked(t *testing.T) {
	p := startProcess(t, "--on-term=drain")
	httpErr, grpcErr := p.slowInFlight(t, 700*time.Millisecond)
	p.cmd.Process.Signal(syscall.SIGTERM)
	if status := p.end(t); status != 0 {
		t.Errorf("exit status %d, want 0", status)
	}
	if err := <-httpErr; err != nil {
		t.Errorf("the HTTP request in flight: %v", err)
	}
	if err := <-grpcErr; err != nil {
		t.Errorf("the gRPC request in flight: %v", err)
	}
}

func TestDrainEndsAtItsTimeout(t *testing.T) {
	p := startProcess(t, "--on-term=drain", "--drain-timeout=100ms")
	httpErr, grpcErr := p.slowInFlight(t, 30*time.Second)
	p.cmd.Process.Signal(syscall.SIGTERM)
	if status := p.end(t); status != 1 {
		t.Errorf("exit status %d, want 1", status)
	}
	if err := errors.Join(<-httpErr, <-grpcErr); err == nil {
		t.Error("requests of 30 s were answered")
	}
}

func TestReadyAfterItsDelay(t *testing.T) {
	p := startProcess(t, "--ready-after=400ms")
	if status, _ := call(t, "GET", "http://"+p.http+"/readyz", ""); status != http.StatusServiceUnavailable {
		t.Errorf("status %d at the start, want 503", status)
	}
	if status, _ := call(t, "GET", "http://"+p.http+"/livez", ""); status != http.StatusOK {
		t.Errorf("not live before it is ready: status %d", status)
	}
	select {
	case msg := <-p.logs:
		if msg != "readiness changed" {
			t.Errorf("log %q, want the change of readiness", msg)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("not ready after 20 s")
	}
	if status, _ := call(t, "GET", "http://"+p.http+"/readyz", ""); status != http.StatusOK {
		t.Errorf("status %d after the delay, want 200", status)
	}
}

// What it wrote of itself must outlive it by the lease, or there would be nothing to compare a withdrawal with.
func TestRecordsOutliveTheProcessUntilTheirTTL(t *testing.T) {
	etcd := etcdtest.Start(t)
	p := startProcess(t, "--register=shop/http=10.0.0.7:8080", "--register=shop/grpc=10.0.0.7:9090", "--register-ttl=2s", "--etcd="+etcd.Endpoint())
	for msg := ""; msg != "registered"; {
		select {
		case msg = <-p.logs:
		case <-time.After(20 * time.Second):
			t.Fatal("not registered after 20 s")
		}
	}
	for key, want := range map[string]string{"shop/http/pod-1": "10.0.0.7:8080", "shop/grpc/pod-1": "10.0.0.7:9090"} {
		resp, err := etcd.Client().Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if len(resp.Kvs) != 1 || !strings.Contains(string(resp.Kvs[0].Value), want) || resp.Kvs[0].Lease == 0 {
			t.Errorf("key %s: %v, want %s under a lease", key, resp.Kvs, want)
		}
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	if status := p.end(t); status != statusSIGTERM {
		t.Errorf("exit status %d, want %d", status, statusSIGTERM)
	}
	left := func() int64 {
		resp, err := etcd.Client().Get(t.Context(), "shop/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			t.Fatal(err)
		}
		return resp.Count
	}
	if n := left(); n != 2 {
		t.Errorf("%d records right after the end, want 2", n)
	}
	for deadline := time.Now().Add(20 * time.Second); left() > 0; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the records are there 20 s after the end, want their TTL of 2 s")
		}
	}
}

// The agent that a test has sees who reports, and who comes in the place of one that was killed.
func TestWorkersAreProcessesThatReportAndAreReplaced(t *testing.T) {
	type word struct{ id, role string }
	words := make(chan word, 100)
	agent := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var said struct{ Role, State string }
		if r.Method == http.MethodDelete {
			return // one that ended in peace
		}
		if err := json.NewDecoder(r.Body).Decode(&said); err != nil || said.State != "READY" {
			t.Errorf("%s %s: %+v, %v", r.Method, r.URL, said, err)
		}
		words <- word{strings.TrimPrefix(r.URL.Path, "/v1/workers/"), said.Role}
	}))
	defer agent.Close()
	p := startProcess(t, "--workers=2", "--replace-after=1ms", "--agent="+agent.URL)
	known := map[string]string{}
	heard := func(n int) {
		t.Helper()
		for deadline := time.After(20 * time.Second); len(known) < n; {
			select {
			case w := <-words:
				known[w.id] = w.role
			case <-deadline:
				t.Fatalf("%d processes report after 20 s, want %d: %v", len(known), n, known)
			}
		}
	}
	heard(3)
	if known["master"] != "master" {
		t.Errorf("no master among %v", known)
	}
	for id := range known {
		if pid, err := strconv.Atoi(strings.TrimPrefix(id, "worker-")); err == nil {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			break
		}
	}
	heard(4)
	p.cmd.Process.Signal(syscall.SIGTERM)
	p.end(t)
}
