package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"usher.dev/usher/client"
	"usher.dev/usher/integration/stack"
)

// probePeriod is how often the kubelet asks in these tests: the shortest period that it has.
const probePeriod = time.Second

// agentProbe is a probe of the application's container that asks the agent.
func agentProbe(path string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromInt32(7400)}},
		PeriodSeconds: int32(probePeriod / time.Second), TimeoutSeconds: 5, FailureThreshold: 1,
	}
}

// askAgent has the kubelet ask the agent whether the application is ready; health is the agent's setting of that name.
func askAgent(health string) func(parts) {
	return func(p parts) {
		p.app.ReadinessProbe = agentProbe("/health/readiness")
		if health != "" {
			p.agent.Args = append(p.agent.Args, "--health="+health)
		}
	}
}

// forward leads to the agent's control listener, on the pod's loopback, from a port of this machine; 0 for any.
func (p *pod) forward(port int) (address string, end func(), err error) {
	ctx, cancel := context.WithCancel(p.ctx)
	cmd := exec.CommandContext(ctx, p.s.Kubectl(), "--kubeconfig", p.s.Kubeconfig(), "-n", p.space.name,
		"port-forward", "--address=127.0.0.1", "pod/"+p.name, fmt.Sprintf("%d:7401", port))
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return "", nil, err
	}
	end = func() {
		cancel()
		cmd.Wait() // ended by us
	}
	late := time.AfterFunc(soon, cancel)
	defer late.Stop()
	first, err := bufio.NewReader(out).ReadString('\n')
	if address = regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(first); address == "" {
		end()
		return "", nil, fmt.Errorf("kubectl port-forward: %q, %w, %s", first, err, stderr)
	}
	return address, end, nil
}

// mustForward ends with the test, or before.
func (p *pod) mustForward(port int) (address string, end func()) {
	p.t.Helper()
	p.eventually(soon, "a way to the control listener", func() (err error) {
		address, end, err = p.forward(port)
		return err
	})
	p.t.Cleanup(end)
	return address, end
}

// control is a client of the agent, as the pod's own processes are.
func (p *pod) control() *client.Client {
	p.t.Helper()
	address, _ := p.mustForward(0)
	c, err := client.New(client.Config{Address: "http://" + address})
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// inSlice says whether the pod's endpoint is ready; an error if it isn't there.
func (p *pod) inSlice() (bool, error) {
	list, err := p.s.Client.DiscoveryV1().EndpointSlices(p.space.name).List(p.ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=shop"})
	if err != nil {
		return false, err
	}
	for _, slice := range list.Items {
		for _, e := range slice.Endpoints {
			if e.TargetRef != nil && string(e.TargetRef.UID) == p.uid {
				return e.Conditions.Ready == nil || *e.Conditions.Ready, nil
			}
		}
	}
	return false, errors.New("no slice has the endpoint")
}

// waitInSlice waits until the EndpointSlice says so of the pod, and returns when it did.
func (p *pod) waitInSlice(ready bool) time.Time {
	p.t.Helper()
	p.eventually(soon, fmt.Sprintf("the slice says ready=%v", ready), func() error {
		is, err := p.inSlice()
		if err == nil && is != ready {
			err = fmt.Errorf("it says ready=%v", is)
		}
		return err
	})
	return time.Now()
}

// pass lets time pass in which the kubelet does something, or does not.
func (p *pod) pass(d time.Duration) {
	p.t.Helper()
	select {
	case <-time.After(d):
	case <-p.ctx.Done():
		p.t.Fatal(p.ctx.Err())
	}
}

// health asks the agent at the pod's address, as the kubelet does.
func (p *pod) health(path string) (code int, body string) {
	p.t.Helper()
	p.eventually(soon, "the agent answers "+path, func() (err error) {
		code, body, err = p.do(once(), http.MethodGet, 7400, path, "")
		return err
	})
	return code, body
}

// says waits until the agent's health has a text in it.
func (p *pod) says(path string, code int, texts ...string) {
	p.t.Helper()
	p.eventually(soon, fmt.Sprintf("GET %s says %d %q", path, code, texts), func() error {
		got, body := p.health(path)
		for _, want := range texts {
			if got != code || !strings.Contains(body, want) {
				return fmt.Errorf("it says %d %s", got, body)
			}
		}
		return nil
	})
}

// dependency is something that pods depend upon, at an address of the node that they reach.
type dependency struct {
	port int
	up   atomic.Bool
}

func newDependency(t testing.TB) *dependency {
	t.Helper()
	d := &dependency{}
	ln, err := net.Listen("tcp", net.JoinHostPort(shared.NodeIP(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	d.port = ln.Addr().(*net.TCPAddr).Port
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !d.up.Load() {
			http.Error(w, "the disk is full", http.StatusInternalServerError)
		}
	})}}
	srv.Start()
	t.Cleanup(srv.Close)
	return d
}

// component is the setting that has it probed, once a second.
func (d *dependency) component(name string, critical bool) string {
	return fmt.Sprintf(`{components: {%s: {critical: %v, readinessProbe: {httpGet: {host: %q, port: %d, path: /}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 1}}}}`,
		name, critical, shared.NodeIP(), d.port)
}

func TestWeakDependencyThatIsDownLeavesThePodReady(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	reviews := newDependency(t)
	p := sp.online("shop", askAgent(reviews.component("reviews", false)))
	p.waitInSlice(true)
	p.says("/health", 200, `"status": "UP"`, `"status": "DEGRADED"`)
	p.says("/health/readiness", 200, `"status": "UP"`, `"status": "DEGRADED"`)
	c := p.control()
	p.eventually(soon, "the application gets to know why it is DEGRADED", func() error {
		h, err := c.Health(sp.ctx, "reviews")
		if err == nil && (h.Status != "DEGRADED" || !strings.Contains(fmt.Sprint(h.Details), "500")) {
			err = fmt.Errorf("it is told %+v", h)
		}
		return err
	})
	// It gets better and worse, and nobody is bothered.
	reviews.up.Store(true)
	p.says("/health/reviews", 200, `"status": "UP"`)
	reviews.up.Store(false)
	p.says("/health/reviews", 200, `"status": "DEGRADED"`)
	p.stayedRegistered()
	if ready, err := p.inSlice(); !ready || err != nil {
		t.Errorf("the slice says ready=%v, %v", ready, err)
	}
}

func TestCriticalDependencyTakesThePodOutOfSliceAndRegistryAndBack(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	database := newDependency(t)
	p := sp.start("shop", askAgent(database.component("database", true)))
	p.says("/health", 503, `"status": "OUT_OF_SERVICE"`)
	database.up.Store(true)
	p.waitRegistered()
	p.waitInSlice(true)

	turned := time.Now()
	database.up.Store(false)
	withdrawn := p.withdrawn(turned)
	unready := p.waitInSlice(false)
	p.says("/health/readiness/database", 503, `"status": "DOWN"`)
	t.Logf("out of the registry after %v, of the slice after %v", withdrawn.Sub(turned), unready.Sub(turned))
	p.logged(agentName, `"availability"`, `"level":"warn"`, "database", "500")

	turned = time.Now()
	database.up.Store(true)
	p.waitInSlice(true)
	p.waitRegistered()
	t.Logf("back after %v", time.Since(turned))
	if now, err := p.get(); err != nil || now.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the container was restarted: %v", err)
	}
}

// Three processes and their master, as an application of a single-threaded runtime is.
func TestWorkerThatIsKilledTurnsThePodNotReadyUntilItIsReplaced(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", askAgent("{workers: {required: 3}}"), func(p parts) {
		p.app.Args = append(p.app.Args, "--workers=3")
	})
	p.waitInSlice(true)
	killed := time.Now()
	if err := p.process("worker-2").Kill(); err != nil {
		t.Fatal(err)
	}
	withdrawn := p.withdrawn(killed)
	unready := p.waitInSlice(false)
	code, body := p.health("/health/readiness")
	t.Logf("out of the registry after %v, of the slice after %v: %d %s", withdrawn.Sub(killed), unready.Sub(killed), code, body)
	p.logged(agentName, `"availability"`, "2 of 3 workers ready", "SILENT")
	p.waitInSlice(true)
	p.waitRegistered()
	t.Logf("back after %v", time.Since(killed))
	p.logged(appName, "worker ended", "worker-2", "killed")
	if now, err := p.get(); err != nil || now.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the container was restarted: %v", err)
	}
}

func TestBrokenLivenessRestartsTheContainerOnceAndTheInstanceReturns(t *testing.T) {
	t.Parallel()
	const delay = 10 // seconds, as in the example
	sp := newSpace(t, nil)
	p := sp.online("shop", askAgent(""), func(p parts) {
		p.app.LivenessProbe = agentProbe("/health/liveness")
		// The agent has the news of a restart from the API server. Until it has, the old container's word stands.
		p.app.LivenessProbe.InitialDelaySeconds, p.app.LivenessProbe.FailureThreshold = delay, 2
	})
	c := p.control()
	p.pass((delay + 1) * time.Second)
	broken := time.Now()
	if err := c.SetLiveness(sp.ctx, false, "deadlock in the pool"); err != nil {
		t.Fatal(err)
	}
	withdrawn := p.withdrawn(broken)
	died := p.logged(appName, "dying at once")
	t.Logf("out of the registry after %v, SIGTERM after %v", withdrawn.Sub(broken), died.at.Sub(broken))
	if withdrawn.After(died.at) {
		t.Error("the container was stopped while its instance was registered")
	}
	p.logged(agentName, "container restarted")
	p.waitRegistered()
	p.waitInSlice(true)
	t.Logf("back after %v", time.Since(broken))
	// Had the word outlived the container, the next one would be gone after two more probes.
	p.says("/health/liveness", 200, `"status": "UN`)
	p.pass(delay*time.Second + 5*probePeriod)
	now, err := p.get()
	if err != nil || now.Status.ContainerStatuses[0].RestartCount != 1 {
		t.Errorf("%d restarts, want 1: %v", now.Status.ContainerStatuses[0].RestartCount, err)
	}
	if err := p.registered(); err != nil {
		t.Error(err)
	}
}

func TestApplicationThatRefusesTrafficIsOutAtOnceAndBack(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	// The kubelet needs two periods at least to notice: what is quicker was told to the agent.
	const period = 3
	p := sp.online("shop", askAgent(""), func(p parts) {
		p.app.ReadinessProbe.PeriodSeconds, p.app.ReadinessProbe.FailureThreshold = period, 3
	})
	c := p.control()
	refused := time.Now()
	if err := c.SetReadiness(sp.ctx, false, "rebuilding the cache"); err != nil {
		t.Fatal(err)
	}
	withdrawn := p.withdrawn(refused)
	if took := withdrawn.Sub(refused); took > 2*period*time.Second {
		t.Errorf("out of the registry after %v, want before the kubelet knows", took)
	}
	unready := p.waitInSlice(false)
	t.Logf("out of the registry after %v, of the slice after %v", withdrawn.Sub(refused), unready.Sub(refused))
	if st := p.status(); !strings.Contains(st.Cause, "rebuilding the cache") {
		t.Errorf("the status gives the cause %q", st.Cause)
	}
	accepted := time.Now()
	if err := c.SetReadiness(sp.ctx, true, "warm"); err != nil {
		t.Fatal(err)
	}
	p.waitInSlice(true)
	p.waitRegistered()
	t.Logf("back after %v", time.Since(accepted))
}

// The manifest as it stands in deploy/example: all probes of the application's container ask the agent.
func TestHealthExample(t *testing.T) {
	t.Parallel()
	sp := bareSpace(t, nil)
	manifest, err := stack.Example(sp.ctx, "health.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := sp.s.Apply(sp.ctx, sp.name, sp.own(manifest)); err != nil {
		t.Fatal(err)
	}
	sp.kubectl("rollout", "status", "deployment/shop", "--timeout=3m")
	pods, err := sp.s.Client.CoreV1().Pods(sp.name).List(sp.ctx, metav1.ListOptions{LabelSelector: "app=shop"})
	if err != nil || len(pods.Items) != 2 {
		t.Fatalf("%d pods, %v", len(pods.Items), err)
	}
	p := &pod{space: sp, name: pods.Items[0].Name, uid: string(pods.Items[0].UID), ip: pods.Items[0].Status.PodIP, http: 8080}
	p.waitRegistered()
	p.says("/health/dependencies", 200, `"status": "UP"`, `"status": "DEGRADED"`, "readiness probe")
	p.says("/health/startup", 200, `"status": "UP"`)
	for _, path := range []string{"/health", "/health/liveness", "/health/readiness", "/health/readiness?verbose"} {
		code, body := p.health(path)
		t.Logf("GET %s: %d\n%s", path, code, body)
	}
	p.logged(appName, `"told"`, `"online"`)

	// The quorum is two.
	if err := p.process("worker-1").Kill(); err != nil {
		t.Fatal(err)
	}
	p.says("/health/readiness/workers", 200, `"status": "DEGRADED"`)
	p.says("/health/readiness/workers", 200, `{
  "status": "UP"`)
	p.stayedRegistered()

	// The application's own endpoint says that it is broken: the agent finds out, and the kubelet restarts the container.
	broken := time.Now()
	p.set("/livez", false)
	withdrawn := p.withdrawn(broken)
	p.logged(agentName, "container restarted")
	p.waitRegistered()
	p.waitInSlice(true)
	t.Logf("out of the registry after %v, back after %v", withdrawn.Sub(broken), time.Since(broken))
	if now, err := p.get(); err != nil || now.Status.ContainerStatuses[0].RestartCount != 1 {
		t.Errorf("want one restart of the container: %v", err)
	}
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.gone()
}

func TestBadHealthSettingsAreNamed(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.start("shop", askAgent("{components: {database: {readinessProbe: {tcpSocket: {port: 5432}, periodSeconds: -1}}}}"))
	p.logged(agentName, "health.components.database.readinessProbe.periodSeconds", "-1")
	if err := p.registered(); err == nil {
		t.Error("it is registered")
	}
}

// docs/health.md shows settings that the agent takes, and what it answers to those that it doesn't. It never starts here: there is
// nothing that tells it its Pod.
func TestHealthDocument(t *testing.T) {
	root, err := stack.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(root, "docs", "health.md"))
	if err != nil {
		t.Fatal(err)
	}
	agent := func(args ...string) string {
		cmd := exec.CommandContext(t.Context(), shared.Programs.Agent, append(args, "--service=shop")...)
		cmd.Env = []string{}
		out, err := cmd.CombinedOutput()
		if err == nil {
			t.Errorf("usher-agent %v: started", args)
		}
		return string(out)
	}
	blocks := regexp.MustCompile("(?ms)^```yaml\n((?:health|notify):.*?)^```").FindAllStringSubmatch(string(raw), -1)
	rows := regexp.MustCompile("(?m)^\\| `([a-zA-Z]+: .+)` \\| `(.+)` \\|$").FindAllStringSubmatch(string(raw), -1)
	if len(blocks) < 4 || len(rows) < 10 {
		t.Fatalf("found %d blocks of settings and %d that are refused", len(blocks), len(rows))
	}
	for _, b := range blocks {
		file := filepath.Join(t.TempDir(), "agent.yaml")
		if err := os.WriteFile(file, []byte(b[1]), 0o600); err != nil {
			t.Fatal(err)
		}
		if out := agent("--config=" + file); !strings.Contains(out, "--pod-name: empty") || strings.Contains(out, "health") || strings.Contains(out, "notify") {
			t.Errorf("the agent refuses\n%s\n%s", b[1], out)
		}
	}
	for _, row := range rows {
		if out := agent("--health=" + row[1]); !strings.Contains(out, row[2]) {
			t.Errorf("--health %q: want %q in\n%s", row[1], row[2], out)
		}
	}
}

// portOf is the port of HOST:PORT.
func portOf(t testing.TB, address string) int {
	t.Helper()
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(port)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
