package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"usher.dev/usher/internal/api"
)

// drainedBeforeSIGTERM checks a pod's end that has a request in flight: withdrawn, answered, and only then SIGTERM.
func (p *pod) drainedBeforeSIGTERM(since time.Time, slow <-chan answer) {
	p.t.Helper()
	withdrawn := p.withdrawn(since)
	p.longerThanIdle()
	answered := p.finish(slow)
	died := p.diedDrained()
	p.t.Logf("withdrawn after %v, answered after %v, SIGTERM after %v", withdrawn.Sub(since), answered.Sub(since), died.at.Sub(since))
	if died.at.Before(answered) {
		p.t.Errorf("the application got SIGTERM with a request in flight: %s", died.text)
	}
}

// diedDrained waits for the application's SIGTERM, which must find nothing in flight.
func (p *pod) diedDrained() line {
	p.t.Helper()
	died := p.logged(appName, "dying at once")
	if died.fields()["inFlight"] != 0.0 {
		p.t.Errorf("the application got SIGTERM with a request in flight: %s", died.text)
	}
	return died
}

// releasedSoonAfter checks that nothing but the requests in flight has held a release back, for as long as time-outs take.
func (p *pod) releasedSoonAfter(answered time.Time) line {
	p.t.Helper()
	released := p.logged(agentName, `"released"`)
	p.t.Logf("released %v after the last answer: %s", released.at.Sub(answered), released.text)
	if released.at.Before(answered) || released.at.Sub(answered) > releaseLag {
		p.t.Errorf("released %v after the last answer, want at most %v", released.at.Sub(answered), releaseLag)
	}
	return released
}

// releaseLag is far above what a release takes (half a second; how exact that is, benchmarks measure), since the machine
// may be busy, and far below what is left of a grace period of 30 s.
const releaseLag = 8 * time.Second

func TestEvictedPodIsDrained(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	slow := p.pending()
	evicted := time.Now()
	err := sp.s.Client.CoreV1().Pods(sp.name).EvictV1(sp.ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: p.name, Namespace: sp.name}})
	if err != nil {
		t.Fatal(err)
	}
	p.drainedBeforeSIGTERM(evicted, slow)
	p.gone()
}

func TestContainerThatFailsItsStartupProbeIsReleasedAndComesOnline(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	var started atomic.Bool
	probed := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !started.Load() {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer probed.Close()
	address := probed.Listener.Addr().(*net.TCPAddr)
	p := sp.start("shop", func(p parts) {
		p.app.StartupProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Host: address.IP.String(), Port: intstr.FromInt(address.Port)}},
			PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 2,
		}
		p.app.Lifecycle.PreStop = &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/usher-prestop", "--log-to-pid1"}}}
	})
	p.logged(agentName, "hook call")
	released := p.logged(agentName, `"released"`)
	if total := released.duration("total"); total > releaseLag {
		t.Errorf("an instance that nobody knows of was released after %v", total)
	}
	p.logged(appName, "dying at once")
	started.Store(true)
	p.waitRegistered()
	now, err := p.get()
	if err != nil || now.Status.ContainerStatuses[0].RestartCount == 0 {
		t.Errorf("the container was never restarted: %v", err)
	}
}

func TestHookCallsJoinOneDrain(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	slow := p.pending()
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.logged(agentName, "hook call") // the kubelet's
	const more = 5
	var mu sync.Mutex
	var verdicts []api.Verdict
	var calls sync.WaitGroup
	for range more {
		calls.Go(func() {
			code, body, err := p.do(once(), http.MethodGet, 7400, "/prestop", "")
			var v api.Verdict
			if err == nil {
				err = json.Unmarshal([]byte(body), &v)
			}
			if err != nil || code != http.StatusOK {
				t.Errorf("a call while the pod is being deleted: %d %v", code, err)
				return
			}
			mu.Lock()
			verdicts = append(verdicts, v)
			mu.Unlock()
		})
	}
	p.eventually(soon, "all calls have come", func() error {
		if n := len(p.logs.find(p.name, agentName, "hook call")); n < more+1 {
			return fmt.Errorf("%d have", n)
		}
		return nil
	})
	p.finish(slow)
	calls.Wait()
	for _, v := range verdicts {
		if v.Outcome != api.Drained || !v.Started.Equal(verdicts[0].Started) || v.TotalMs != verdicts[0].TotalMs {
			t.Errorf("verdicts differ: %+v and %+v", v, verdicts[0])
		}
	}
	p.gone()
	if n := len(p.logs.find(p.name, agentName, `"released"`)); n != 1 {
		t.Errorf("%d shutdowns for all calls, want 1", n)
	}
}

// The application's reserve is a third of a short grace period; what is asked after the release gets the same verdict.
func TestRequestLongerThanTheGraceIsGivenUpAReserveBeforeItsEnd(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) {
		p.TerminationGracePeriodSeconds = new(int64(14))
		p.app.Args = append(p.app.Args, "--on-term=drain")
	})
	slow := p.pending()
	deleted := p.delete(0)
	released := p.logged(agentName, `"released"`)
	if total := released.duration("total"); total < 6*time.Second || total > 11*time.Second {
		t.Errorf("released after %v of 14 s, want 8.3 to 9.3 s", total)
	}
	if released.fields()["outcome"] != "timed-out" || released.fields()["inFlight"] != 1.0 {
		t.Errorf("%s", released.text)
	}
	// The application still waits for its last request, so its pod and the agent are there.
	code, body, err := p.do(once(), http.MethodGet, 7400, "/prestop", "")
	var v api.Verdict
	if err == nil {
		err = json.Unmarshal([]byte(body), &v)
	}
	if err != nil || code != http.StatusOK || v.Outcome != api.TimedOut || v.InFlight != 1 {
		t.Errorf("a call after the release: %d %s %v, want the same verdict", code, body, err)
	}
	p.good(<-slow) // by the application's own patience
	t.Logf("released after %v, answered after %v", released.at.Sub(deleted), time.Since(deleted))
	p.gone()
}

// The kubelet restarts nothing in a pod that ends. Where something else does (a supervisor in the container), the agent that
// comes back goes on from the deletion: here it runs on the node, and starts when the pod is half gone.
func TestAgentThatComesBackInMidDrainGoesOnFromTheDeletion(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	const grace, late = 20 * time.Second, 6 * time.Second
	p := sp.start("shop", func(p parts) {
		p.TerminationGracePeriodSeconds = new(int64(grace / time.Second))
		p.InitContainers = nil
		p.app.Lifecycle.PreStop = &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 18}} // for the agent that is gone
	})
	p.eventually(soon, "the pod is ready", p.ready)
	p.pending()
	deleted := p.delete(0)
	p.pass(late)
	ctx, cancel := context.WithTimeout(sp.ctx, soon)
	defer cancel()
	agent := exec.CommandContext(ctx, sp.s.Programs.Agent, "--kubeconfig="+sp.s.Kubeconfig(), "--service=shop,target="+sp.name+"/http,port=http",
		"--pod-namespace="+sp.name, "--pod-name="+p.name, "--pod-uid="+p.uid, "--etcd-endpoints="+sp.s.RegistryEndpoint(),
		"--hook-address=127.0.0.1:0", "--control-address=127.0.0.1:0", "--in-flight-source=http", "--in-flight-url=http://"+p.ip+":8080/inflight")
	stderr, err := agent.StderrPipe()
	if err == nil {
		err = agent.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		agent.Process.Kill()
		agent.Wait() // ended by us
	}()
	var said []string
	for lines := bufio.NewScanner(stderr); lines.Scan(); {
		said = append(said, lines.Text())
		l := line{at: time.Now(), text: lines.Text()}
		if !strings.Contains(l.text, `"msg":"released"`) {
			continue
		}
		// Of 20 s the application keeps 5; Kubernetes' clock has whole seconds, so it may be one less. An agent that begins
		// anew has 20 s from its start.
		total, after := l.duration("total"), l.at.Sub(deleted)
		t.Logf("released %v after the deletion, which it says is %v: %s", after, total, l.text)
		if after > 18*time.Second || total < 13*time.Second || total > 19*time.Second {
			t.Errorf("released %v after the deletion, and says %v: it began anew", after, total)
		}
		if l.fields()["outcome"] != "timed-out" {
			t.Errorf("%s", l.text)
		}
		return
	}
	t.Errorf("the agent ended without a release: %s", strings.Join(said, "\n"))
}

func TestDeadApplicationIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) { p.RestartPolicy = corev1.RestartPolicyNever })
	died := time.Now()
	if err := p.process("/app").Kill(); err != nil {
		t.Fatal(err)
	}
	p.withdrawn(died)
	t.Logf("withdrawn %v after the application's end", time.Since(died))
	deleted := p.delete(0)
	p.gone()
	if took := time.Since(deleted); took > 20*time.Second { // of 30 s
		t.Errorf("a pod whose application is dead took %v to go", took)
	}
}

func TestApplicationWithoutAnOpenPortIsReleasedAfterTheSettleTime(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) {
		p.app.Args = append(p.app.Args, "--http=127.0.0.1:18080", "--grpc=127.0.0.1:19090")
		p.app.ReadinessProbe = nil
	})
	p.delete(0)
	released := p.logged(agentName, `"released"`)
	if total := released.duration("total"); total > releaseLag || released.fields()["outcome"] != "drained" {
		t.Errorf("%s", released.text)
	}
	p.gone()
}

// Without a hook nothing holds SIGTERM back; what is left to do is to say so, and to withdraw at once.
func TestMissingHookIsWarnedOfAndThePodWithdrawnAtOnce(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) { p.app.Lifecycle = nil })
	if p.metric("usher_prestop_missing") != 1 {
		t.Error("usher_prestop_missing is not 1")
	}
	p.logged(agentName, "preStop hook missing", `"shop"`)
	if m := p.event("PreStopMissing"); !strings.Contains(m, "/prestop") {
		t.Errorf("event PreStopMissing: %q, want what to add", m)
	}
	deleted := p.delete(0)
	withdrawn := p.withdrawn(deleted)
	if took := withdrawn.Sub(deleted); took > 10*time.Second { // a lease ends after 15 s
		t.Errorf("withdrawn %v after the deletion", took)
	}
	p.gone()
}

func TestPodWithItsHookMissesNone(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	if p.metric("usher_prestop_missing") != 0 {
		t.Error("usher_prestop_missing is not 0")
	}
}

// An application whose image has no usher-prestop gets it from an init container, and calls over a unix socket on the
// same volume.
func TestInstalledHookProgramOverTheUnixSocket(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	const folder = "/run/usher"
	p := sp.online("shop", func(p parts) {
		mount := corev1.VolumeMount{Name: "usher", MountPath: folder}
		p.Volumes = append(p.Volumes, corev1.Volume{Name: "usher", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
		p.agent.VolumeMounts = append(p.agent.VolumeMounts, mount)
		p.agent.Args = append(p.agent.Args, "--control-socket="+folder+"/agent.sock")
		p.app.VolumeMounts = append(p.app.VolumeMounts, mount)
		p.app.Lifecycle.PreStop = &corev1.LifecycleHandler{Exec: &corev1.ExecAction{
			Command: []string{folder + "/usher-prestop", "--log-to-pid1", "--agent=unix://" + folder + "/agent.sock"},
		}}
		p.InitContainers = append([]corev1.Container{{
			Name: "usher-prestop", Image: p.agent.Image, ImagePullPolicy: p.agent.ImagePullPolicy,
			Command:         []string{"/usher-prestop", "install", folder},
			SecurityContext: p.agent.SecurityContext, VolumeMounts: []corev1.VolumeMount{mount},
		}}, p.InitContainers...)
	})
	slow := p.pending()
	deleted := p.delete(0)
	p.drainedBeforeSIGTERM(deleted, slow)
	p.logged(appName, "usher-prestop: drained in")
	p.gone()
}

// The kubelet calls an httpGet hook at the pod's address, which a pod in the node's network shares with the node: there the hook
// has to name the host.
func TestPodInTheHostsNetworkIsDrained(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.start("shop", func(p parts) {
		p.HostNetwork = true
		p.agent.Args = append(p.agent.Args, "--hook-address=127.0.0.1:17400", "--control-address=127.0.0.1:17401")
		p.agent.Ports[0].ContainerPort, p.agent.Ports[0].HostPort = 17400, 17400
		for _, probe := range []*corev1.Probe{p.agent.LivenessProbe, p.agent.ReadinessProbe} {
			probe.HTTPGet.Host = "127.0.0.1"
		}
		p.app.Args = append(p.app.Args, "--http=:28080", "--grpc=:29090")
		p.app.Ports[0].ContainerPort, p.app.Ports[0].HostPort = 28080, 28080
		p.app.Ports[1].ContainerPort, p.app.Ports[1].HostPort = 29090, 29090
		p.app.Lifecycle.PreStop.HTTPGet.Host, p.app.Lifecycle.PreStop.HTTPGet.Port = "127.0.0.1", intstr.FromInt32(17400)
	})
	p.http = 28080
	p.eventually(soon, "the pod is registered", func() error {
		resp, err := p.etcd.Get(p.ctx, p.keys()[1])
		if err != nil || len(resp.Kvs) == 0 || !strings.Contains(string(resp.Kvs[0].Value), ":28080") {
			return fmt.Errorf("it isn't: %v %v", resp, err)
		}
		return nil
	})
	slow := p.pending()
	deleted := p.delete(0)
	p.drainedBeforeSIGTERM(deleted, slow)
	p.gone()
}

func TestVerdictStaysInTheRegistryWhenThePodIsGone(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	slow := p.pending()
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.finish(slow)
	p.gone()
	out := sp.usherctl("status", p.name)
	for _, want := range []string{"drained in", "sockdiag"} {
		if !strings.Contains(out, want) {
			t.Errorf("usherctl status of a pod that is gone says nothing of %q:\n%s", want, out)
		}
	}
	if list := sp.usherctl("get", "verdicts"); !strings.Contains(list, p.name) || !strings.Contains(list, "drained") {
		t.Errorf("usherctl get verdicts:\n%s", list)
	}
}

// The last of a service's instances stays registered until its successor is.
func TestGuardKeepsTheLastInstanceUntilAnotherIsRegistered(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	// Time enough for a successor on a busy machine.
	guarded := func(p parts) {
		p.TerminationGracePeriodSeconds = new(int64(120))
		p.agent.Args = append(p.agent.Args, "--min-available=1", "--min-available-timeout=50s")
	}
	old := sp.online("old", guarded)
	deleted := old.delete(0)
	old.logged(agentName, "hook call")
	if err := old.registered(); err != nil {
		t.Fatalf("withdrawn although nobody else is there: %v", err)
	}
	next := sp.online("next", guarded)
	withdrawn := old.withdrawn(deleted)
	registered, ok := sp.changes.first(next.keys()[0])
	released := old.logged(agentName, `"released"`)
	t.Logf("the successor was registered %v after the deletion, the old one withdrawn after %v: %s", registered.at.Sub(deleted), withdrawn.Sub(deleted), released.text)
	if !ok || registered.at.After(withdrawn) {
		t.Errorf("withdrawn at %v, before the successor was registered: %s", withdrawn, registered)
	}
	if released.duration("guard") == 0 || released.fields()["outcome"] != "drained" {
		t.Errorf("%s", released.text)
	}
	old.gone()
	next.stayedRegistered()
}

func TestHookCallsFromElsewhere(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	const token = "a-token-that-nobody-guesses"
	p := sp.online("shop", func(p parts) {
		p.agent.Env = append(p.agent.Env, corev1.EnvVar{Name: "USHER_HOOK_TOKEN", Value: token})
	})
	// Another pod: its own hook program, with the agent's address.
	other := sp.start("other", func(q parts) {
		q.app.Lifecycle.PreStop = nil
		q.agent.Args[0] = strings.Replace(q.agent.Args[0], "http", "other", 1)
	})
	other.eventually(soon, "the other pod runs", other.ready)
	call := func(extra ...string) (string, error) {
		args := append([]string{"-n", sp.name, "exec", other.name, "-c", appName, "--", "/usher-prestop",
			"--agent=http://" + p.ip + ":7400", "--fail-open=false"}, extra...)
		return sp.s.Run(sp.ctx, nil, args...)
	}
	for _, extra := range [][]string{nil, {"--token=a-token-that-is-guessed"}} {
		if out, err := call(extra...); err == nil || !strings.Contains(out+err.Error(), "refused") {
			t.Errorf("a call from another pod, with %q: %v\n%s", extra, err, out)
		}
	}
	// From the node.
	if code, body, err := p.do(once(), http.MethodGet, 7400, "/prestop", ""); err != nil || code != http.StatusForbidden {
		t.Errorf("a call from the node: %d %s %v", code, body, err)
	}
	with := func(token string) int {
		ctx, cancel := context.WithTimeout(sp.ctx, soon)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.ip+":7400/prestop", nil)
		req.Header.Set(api.TokenHeader, token)
		resp, err := once().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp.StatusCode
	}
	if code := with("a-token-that-is-guessed"); code != http.StatusForbidden {
		t.Errorf("a wrong token: %d", code)
	}
	p.stayedRegistered()
	called := time.Now()
	if out, err := call("--token=" + token); err != nil || !strings.Contains(out, "drained") {
		t.Errorf("the token, from another pod: %v\n%s", err, out)
	}
	p.withdrawn(called)
	if code := with(token); code != http.StatusOK {
		t.Errorf("the token, from the node: %d", code)
	}
}
