// Package standalone_test runs `usher-agent run` on a real etcd, without Kubernetes: what a VM or docker compose has.
package standalone_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
)

// soon only bounds how long a test that fails takes.
const soon = 30 * time.Second

var agentBinary, appBinary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "standalone")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	agentBinary, appBinary = filepath.Join(dir, "usher-agent"), filepath.Join(dir, "app")
	for _, b := range []struct{ dir, out, pkg string }{{"../..", agentBinary, "./cmd/usher-agent"}, {"..", appBinary, "./app"}} {
		build := exec.Command("go", "build", "-tags", "grpcnotrace", "-o", b.out, b.pkg)
		build.Dir = b.dir
		if out, err := build.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "building %s: %v\n%s", b.pkg, err, out)
			return 1
		}
	}
	return m.Run()
}

// output is what a process has printed so far.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// instance is an agent with the application that it runs.
type instance struct {
	t       *testing.T
	cmd     *exec.Cmd
	stdin   io.Closer // the application's, too
	out     output
	done    chan struct{}
	etcd    *clientv3.Client
	app     string // host:port of the application
	control string
}

// freePort is one that nobody has now; what takes it a moment later makes the test fail, not pass.
func freePort(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port
}

// run starts `usher-agent run` with the sample application, or with command.
func run(t *testing.T, flags []string, command ...string) *instance {
	t.Helper()
	return runBy(t, nil, flags, command...)
}

// runBy is run by a program that gets the agent and its arguments as its own last ones.
func runBy(t *testing.T, by, flags []string, command ...string) *instance {
	t.Helper()
	server := etcdtest.Start(t)
	port, grpcPort, hook, control := freePort(t), freePort(t), freePort(t), freePort(t)
	i := &instance{
		t: t, done: make(chan struct{}), etcd: server.Client(),
		app: fmt.Sprintf("127.0.0.1:%d", port), control: fmt.Sprintf("127.0.0.1:%d", control),
	}
	if len(command) == 0 {
		command = []string{appBinary, "--http=" + i.app, fmt.Sprintf("--grpc=127.0.0.1:%d", grpcPort)}
	}
	args := append([]string{
		"run", fmt.Sprintf("--service=web,port=%d", port), "--pod-name=web-0", "--pod-ips=127.0.0.1", "--grace-period=20s",
		fmt.Sprintf("--hook-address=127.0.0.1:%d", hook), "--control-address=" + i.control,
		fmt.Sprintf("--health={components: {web: {readinessProbe: {httpGet: {path: /readyz, port: %d}, periodSeconds: 1, failureThreshold: 1}}}}", port),
	}, flags...)
	argv := slices.Concat(by, []string{agentBinary}, args, []string{"--"}, command)
	i.cmd = exec.Command(argv[0], argv[1:]...)
	i.cmd.Env = append(os.Environ(), "ETCDCTL_ENDPOINTS="+server.Endpoint())
	i.cmd.Stdout, i.cmd.Stderr, i.cmd.WaitDelay = &i.out, &i.out, time.Second
	stdin, err := i.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	i.stdin = stdin
	if err := i.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		i.cmd.Wait() // what came of it is in ProcessState
		close(i.done)
	}()
	t.Cleanup(func() {
		i.cmd.Process.Signal(syscall.SIGTERM) // SIGKILL would leave the application behind
		select {
		case <-i.done:
		case <-time.After(soon):
			i.cmd.Process.Kill()
			<-i.done
		}
		if t.Failed() {
			t.Logf("the agent and the application:\n%s", &i.out)
		}
	})
	return i
}

func (i *instance) eventually(what string, try func() error) {
	i.t.Helper()
	for deadline := time.Now().Add(soon); ; time.Sleep(20 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			i.t.Fatalf("%s: not within %v: %v", what, soon, err)
		}
	}
}

// records are those that consumers read.
func (i *instance) records() int {
	i.t.Helper()
	resp, err := i.etcd.Get(i.t.Context(), "default/web/", clientv3.WithPrefix())
	if err != nil {
		i.t.Fatal(err)
	}
	for _, kv := range resp.Kvs {
		if want := fmt.Sprintf(`{"Op":0,"Addr":%q}`, i.app); string(kv.Value) != want || kv.Lease == 0 {
			i.t.Errorf("record %s is %s under lease %x, want %s under a lease", kv.Key, kv.Value, kv.Lease, want)
		}
	}
	return len(resp.Kvs)
}

func (i *instance) hasRecords(n int) {
	i.t.Helper()
	i.eventually(fmt.Sprintf("%d records", n), func() error {
		if now := i.records(); now != n {
			return fmt.Errorf("there are %d", now)
		}
		return nil
	})
}

// says waits for a text in what the agent and the application print.
func (i *instance) says(text string) {
	i.t.Helper()
	i.eventually(fmt.Sprintf("saying %q", text), func() error {
		if !strings.Contains(i.out.String(), text) {
			return errors.New("it doesn't")
		}
		return nil
	})
}

func (i *instance) put(address, path, body string) {
	i.t.Helper()
	req, err := http.NewRequestWithContext(i.t.Context(), http.MethodPut, "http://"+address+path, strings.NewReader(body))
	if err != nil {
		i.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		i.t.Fatal(err)
	}
	defer resp.Body.Close()
	if text, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
		i.t.Fatalf("PUT %s %s: %s %s", path, body, resp.Status, text)
	}
}

func (i *instance) exits(code int) {
	i.t.Helper()
	select {
	case <-i.done:
	case <-time.After(soon):
		i.t.Fatalf("it has not exited")
	}
	if got := i.cmd.ProcessState.ExitCode(); got != code {
		i.t.Errorf("exit code %d, want %d", got, code)
	}
}

func TestProbesDecideWhetherTheInstanceIsRegistered(t *testing.T) {
	i := run(t, nil)
	i.hasRecords(1)
	i.put(i.app, "/readyz", "false")
	i.hasRecords(0)
	i.put(i.app, "/readyz", "true")
	i.hasRecords(1)
	i.put(i.control, "/v1/availability/readiness", `{"state":"REFUSING_TRAFFIC","cause":"cache is cold"}`)
	i.hasRecords(0)
	i.put(i.control, "/v1/availability/readiness", `{"state":"ACCEPTING_TRAFFIC"}`)
	i.hasRecords(1)
}

// answer is what came of a request.
type answer struct {
	code int
	err  error
}

// slow begins a request that takes 3 s, and returns once it is in flight.
func (i *instance) slow() <-chan answer {
	i.t.Helper()
	answered := make(chan answer, 1)
	ctx, cancel := context.WithTimeout(i.t.Context(), soon)
	i.t.Cleanup(cancel)
	go func() {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+i.app+"/slow?for=3s", strings.NewReader("x"))
		if err != nil {
			answered <- answer{err: err}
			return
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			answered <- answer{err: err}
			return
		}
		resp.Body.Close()
		answered <- answer{code: resp.StatusCode}
	}()
	i.eventually("the request is in flight", func() error {
		resp, err := http.Get("http://" + i.app + "/inflight")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if b, _ := io.ReadAll(resp.Body); strings.TrimSpace(string(b)) != "1" {
			return fmt.Errorf("%s are", b)
		}
		return nil
	})
	return answered
}

func (i *instance) signal(s os.Signal) {
	i.t.Helper()
	if err := i.cmd.Process.Signal(s); err != nil {
		i.t.Fatal(err)
	}
}

func TestSIGTERMReachesTheApplicationAfterItsRequests(t *testing.T) {
	i := run(t, nil)
	i.hasRecords(1)
	answered := i.slow()
	i.signal(syscall.SIGTERM)
	i.hasRecords(0)
	select {
	case a := <-answered:
		t.Fatalf("answered before the record was gone: %+v", a)
	default:
	}
	if a := <-answered; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the request in flight was lost: %d %v", a.code, a.err)
	}
	i.exits(143) // the sample application's own, for SIGTERM
	if out := i.out.String(); !strings.Contains(out, `"inFlight":0`) || !strings.Contains(out, "dying at once") {
		t.Error("the application doesn't say that it died with nothing in flight")
	}
}

// Only a second SIGTERM or SIGINT is somebody's impatience. systemd sends SIGHUP right behind SIGTERM (SendSIGHUP=), and a
// terminal SIGWINCH whenever.
func TestOtherSignalsDoNotCutTheDrainShort(t *testing.T) {
	i := run(t, nil)
	i.hasRecords(1)
	answered := i.slow()
	i.signal(syscall.SIGTERM)
	i.signal(syscall.SIGWINCH)
	i.hasRecords(0)
	i.signal(syscall.SIGWINCH)
	if a := <-answered; a.err != nil || a.code != http.StatusOK {
		t.Errorf("the request in flight was lost: %d %v", a.code, a.err)
	}
	i.exits(143)
}

func TestRecordsGoWithTheApplication(t *testing.T) {
	i := run(t, []string{"--health={}"}, "sh", "-c", "read line; exit 7")
	i.says("application started")
	i.put(i.control, "/v1/availability/readiness", `{"state":"ACCEPTING_TRAFFIC"}`)
	i.hasRecords(1)
	i.stdin.Close()
	i.exits(7)
	if n := i.records(); n != 0 {
		t.Errorf("%d records are left", n)
	}
}

// What counts for it may not know that it is gone.
func TestDrainEndsWithTheApplication(t *testing.T) {
	i := run(t, []string{"--health={}", "--in-flight-source=exec", "--in-flight-command=echo 1"}, "sh", "-c", "read line; exit 7")
	i.says("application started")
	i.put(i.control, "/v1/availability/readiness", `{"state":"ACCEPTING_TRAFFIC"}`)
	i.hasRecords(1)
	i.signal(syscall.SIGTERM)
	i.hasRecords(0)
	i.stdin.Close()
	i.exits(7)
	i.says("forced by the application's exit")
}

func TestOtherSignalsArePassedOn(t *testing.T) {
	i := run(t, nil, "sh", "-c", `trap 'echo got HUP' HUP; trap 'echo got TERM; exit 3' TERM; echo set; while :; do sleep 0.1; done`)
	i.says("set")
	i.signal(syscall.SIGHUP)
	i.says("got HUP")
	i.signal(syscall.SIGTERM)
	i.exits(3)
	i.says("got TERM")
}

// As one is that reads from a terminal, since it isn't in the foreground there. systemd continues what it ends, too.
func TestApplicationThatIsStoppedEnds(t *testing.T) {
	i := run(t, []string{"--health={}"}, "sh", "-c", `trap 'exit 3' TERM; echo set; kill -STOP $$; while :; do sleep 0.1; done`)
	i.says("set")
	i.signal(syscall.SIGTERM)
	i.exits(3)
}

// What nohup(1) does is for the application, too.
func TestHangupThatIsIgnoredStaysIgnored(t *testing.T) {
	i := runBy(t, []string{"sh", "-c", `trap "" HUP; exec "$0" "$@"`}, nil, "sh", "-c", "echo set; read line; exit 5")
	i.says("set")
	i.signal(syscall.SIGHUP)
	i.stdin.Close()
	i.exits(5)
}

func TestSignalThatEndsTheApplicationIsInTheExitCode(t *testing.T) {
	i := run(t, nil, "sh", "-c", "kill -KILL $$")
	i.exits(128 + 9)
}

func TestCommandThatCannotBeStartedIsNamed(t *testing.T) {
	i := run(t, nil, "/nonexistent/application")
	i.exits(1)
	i.says("/nonexistent/application")
	if n := i.records(); n != 0 {
		t.Errorf("%d records of an application that never ran", n)
	}
}
