package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/yaml"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/integration/stack"
	"usher.dev/usher/internal/api"
)

const (
	// soon is for what takes moments on a machine that has time, such as a pod's start. It only bounds how long a
	// test that fails takes.
	soon = 2 * time.Minute
	// pollEvery is the pause between two looks.
	pollEvery = 25 * time.Millisecond

	agentName, appName = "usher", "shop"
)

// space is one test's namespace.
type space struct {
	t       testing.TB
	s       *stack.Stack
	ctx     context.Context
	name    string
	etcd    *clientv3.Client // the registry that its pods use
	changes *changes
	logs    *logs
}

// newSpace makes a namespace with the example's permissions and Service. Its pods use own as their registry; nil: the
// cluster's.
func newSpace(t testing.TB, own *ownEtcd) *space {
	t.Helper()
	sp := bareSpace(t, own)
	svc, _ := sp.example("shop.yaml")
	if _, err := sp.s.Client.CoreV1().Services(sp.name).Create(sp.ctx, svc, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return sp
}

// bareSpace is newSpace without the Service.
func bareSpace(t testing.TB, own *ownEtcd) *space {
	t.Helper()
	name := strings.ToLower(regexp.MustCompile(`[^A-Za-z0-9]+`).ReplaceAllString(strings.TrimPrefix(t.Name(), "Test"), "-"))
	sp := &space{
		t: t, s: shared, ctx: t.Context(), etcd: shared.Etcd,
		name: fmt.Sprintf("%s-%04x", name[:min(len(name), 50)], rand.IntN(1<<16)),
	}
	if err := sp.s.Namespace(sp.ctx, sp.name); err != nil {
		t.Fatal(err)
	}
	if own != nil {
		sp.etcd = own.client
		maps := sp.s.Client.CoreV1().ConfigMaps(sp.name)
		cm, err := maps.Get(sp.ctx, "usher-registry", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		cm.Data["ETCDCTL_ENDPOINTS"] = own.url
		if _, err := maps.Update(sp.ctx, cm, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	background, stop := context.WithCancel(context.WithoutCancel(sp.ctx))
	sp.changes = watchRegistry(background, sp.etcd, sp.name+"/", sp.ledgerPrefix())
	sp.logs = followLogs(background, sp.s.Dir(), sp.name)
	t.Cleanup(func() {
		defer stop()
		defer sp.logs.close()
		ctx, cancel := context.WithTimeout(background, soon)
		defer cancel()
		if t.Failed() {
			sp.dump(ctx)
		}
		// It goes on behind the other tests.
		if err := sp.s.Client.CoreV1().Namespaces().Delete(ctx, sp.name, metav1.DeleteOptions{}); err != nil {
			t.Errorf("deleting namespace %s: %v", sp.name, err)
		}
	})
	return sp
}

func (sp *space) ledgerPrefix() string { return "/usher/v1/default/instances/" + sp.name + "/" }

// dump tells all that may explain a failure.
func (sp *space) dump(ctx context.Context) {
	for _, args := range [][]string{
		{"get", "events", "-o", "custom-columns=TIME:.lastTimestamp,OBJECT:.involvedObject.name,REASON:.reason,MESSAGE:.message"},
		{"get", "pods,services,endpointslices", "-o", "yaml"},
	} {
		out, err := sp.s.Run(ctx, nil, append([]string{"-n", sp.name}, args...)...)
		sp.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	for _, c := range sp.changes.all() {
		sp.t.Logf("registry: %s", c)
	}
	sp.logs.each(func(pod, container string, lines []line) {
		var b strings.Builder
		for _, l := range lines {
			fmt.Fprintf(&b, "%s %s\n", l.at.Format("15:04:05.000"), l.text)
		}
		sp.t.Logf("log of pod %s, container %s:\n%s", pod, container, b.String())
	})
}

// own makes a manifest's registry keys this namespace's.
func (sp *space) own(manifest string) string {
	return strings.ReplaceAll(manifest, "target=shop/", "target="+sp.name+"/")
}

// example reads a manifest of deploy/example.
func (sp *space) example(file string) (*corev1.Service, *appsv1.Deployment) {
	sp.t.Helper()
	text, err := stack.Example(sp.ctx, file)
	if err != nil {
		sp.t.Fatal(err)
	}
	var svc corev1.Service
	var dep appsv1.Deployment
	docs := yaml.NewYAMLReader(bufio.NewReader(strings.NewReader(sp.own(text))))
	for {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return &svc, &dep
		}
		var kind metav1.TypeMeta
		if err == nil {
			err = yaml.Unmarshal(doc, &kind)
		}
		if err == nil {
			switch kind.Kind {
			case "Service":
				err = yaml.UnmarshalStrict(doc, &svc)
			case "Deployment":
				err = yaml.UnmarshalStrict(doc, &dep)
			default:
				err = fmt.Errorf("a %s, want a Service or a Deployment", kind.Kind)
			}
		}
		if err != nil {
			sp.t.Fatalf("%s: %v", file, err)
		}
	}
}

// apply is kubectl apply of an object.
func (sp *space) apply(object any) {
	sp.t.Helper()
	b, err := json.Marshal(object)
	if err != nil {
		sp.t.Fatal(err)
	}
	if err := sp.s.Apply(sp.ctx, sp.name, string(b)); err != nil {
		sp.t.Fatal(err)
	}
}

func (sp *space) kubectl(args ...string) string {
	sp.t.Helper()
	out, err := sp.s.Run(sp.ctx, nil, append([]string{"-n", sp.name}, args...)...)
	if err != nil {
		sp.t.Fatal(err)
	}
	return out
}

// eventually polls until what is asked for is there.
func (sp *space) eventually(within time.Duration, what string, try func() error) {
	sp.t.Helper()
	deadline := time.Now().Add(within)
	for {
		err := try()
		switch {
		case err == nil:
			return
		case time.Now().After(deadline):
			sp.t.Fatalf("%s: not within %v: %v", what, within, err)
		case sp.ctx.Err() != nil:
			sp.t.Fatalf("%s: the test ended: %v", what, err)
		}
		time.Sleep(pollEvery)
	}
}

// parts are the places of a pod that tests change.
type parts struct {
	*corev1.PodSpec
	agent, app *corev1.Container
}

// bare makes the example's pod template a Pod of its own. What is changed for all tests is how fast the kubelet sees
// that it isn't ready.
func (sp *space) bare(name string, edits ...func(parts)) *corev1.Pod {
	_, dep := sp.example("shop.yaml")
	spec := dep.Spec.Template.Spec
	p := parts{&spec, &spec.InitContainers[0], &spec.Containers[0]}
	p.app.ReadinessProbe.FailureThreshold, p.app.ReadinessProbe.TimeoutSeconds = 1, 5
	for _, edit := range edits {
		edit(p)
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: dep.Spec.Template.Labels}, Spec: spec}
}

// pod is one running instance.
type pod struct {
	*space
	name, uid, ip string
	http          int // the application's port
}

// start creates the example's pod, changed by edits, and waits until it has an address.
func (sp *space) start(name string, edits ...func(parts)) *pod {
	sp.t.Helper()
	created, err := sp.s.Client.CoreV1().Pods(sp.name).Create(sp.ctx, sp.bare(name, edits...), metav1.CreateOptions{})
	if err != nil {
		sp.t.Fatal(err)
	}
	p := &pod{space: sp, name: name, uid: string(created.UID), http: 8080}
	p.eventually(soon, "the pod has an address", func() error {
		now, err := p.get()
		if err != nil {
			return err
		}
		if p.ip = now.Status.PodIP; p.ip == "" {
			return fmt.Errorf("phase %s", now.Status.Phase)
		}
		return nil
	})
	return p
}

// online starts a pod and waits until it is registered.
func (sp *space) online(name string, edits ...func(parts)) *pod {
	sp.t.Helper()
	p := sp.start(name, edits...)
	p.waitRegistered()
	return p
}

func (p *pod) get() (*corev1.Pod, error) {
	return p.s.Client.CoreV1().Pods(p.space.name).Get(p.ctx, p.name, metav1.GetOptions{})
}

// keys are the records that consumers read.
func (p *pod) keys() []string {
	return []string{p.space.name + "/grpc/" + p.uid, p.space.name + "/http/" + p.uid}
}

func (p *pod) ledger() string { return p.ledgerPrefix() + "shop/" + p.name }

// registered says what is missing of the pod's records in etcd.
func (p *pod) registered() error {
	for i, port := range []int{9090, 8080} {
		key := p.keys()[i]
		resp, err := p.etcd.Get(p.ctx, key)
		if err != nil {
			return err
		}
		if len(resp.Kvs) == 0 {
			return fmt.Errorf("key %s is not there", key)
		}
		kv := resp.Kvs[0]
		if want := fmt.Sprintf(`{"Op":0,"Addr":"%s:%d"}`, p.ip, port); string(kv.Value) != want || kv.Lease == 0 {
			return fmt.Errorf("key %s has %s under lease %x, want %s under a lease", key, kv.Value, kv.Lease, want)
		}
	}
	return nil
}

func (p *pod) waitRegistered() {
	p.t.Helper()
	p.eventually(soon, "the pod is registered", p.registered)
}

// withdrawn waits until no consumer record is left, and returns when a watcher saw the last one go.
func (p *pod) withdrawn(since time.Time) time.Time {
	p.t.Helper()
	var last time.Time
	p.eventually(soon, "the pod is withdrawn", func() error {
		for _, key := range p.keys() {
			c, ok := p.changes.last(key)
			if !ok || !c.deleted || c.at.Before(since) {
				return fmt.Errorf("key %s was not deleted", key)
			}
			if c.at.After(last) {
				last = c.at
			}
		}
		return nil
	})
	return last
}

// stayedRegistered fails the test if a consumer record was gone for a moment, ever.
func (p *pod) stayedRegistered() {
	p.t.Helper()
	if err := p.registered(); err != nil {
		p.t.Error(err)
	}
	for _, c := range p.changes.all() {
		if c.deleted && slices.Contains(p.keys(), c.key) {
			p.t.Errorf("the record was gone: %s", c)
		}
	}
}

// gone waits until Kubernetes has forgotten the pod.
func (p *pod) gone() {
	p.t.Helper()
	p.eventually(soon, "the pod is gone", func() error {
		now, err := p.get()
		if err == nil && string(now.UID) == p.uid {
			return fmt.Errorf("it is there, phase %s", now.Status.Phase)
		}
		if err != nil && !strings.Contains(err.Error(), "not found") {
			return err
		}
		return nil
	})
}

// delete begins the pod's deletion; grace 0: the pod's own.
func (p *pod) delete(grace time.Duration) time.Time {
	p.t.Helper()
	opts := metav1.DeleteOptions{}
	if grace > 0 {
		opts.GracePeriodSeconds = new(int64(grace / time.Second))
	}
	at := time.Now()
	if err := p.s.Client.CoreV1().Pods(p.space.name).Delete(p.ctx, p.name, opts); err != nil {
		p.t.Fatal(err)
	}
	return at
}

// do calls the pod and returns its answer.
func (p *pod) do(client *http.Client, method string, port int, path, body string) (int, string, error) {
	req, err := http.NewRequestWithContext(p.ctx, method, fmt.Sprintf("http://%s:%d%s", p.ip, port, path), strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// process is the one of the pod's processes that runs a program. Each of a pod's containers has files of the kubelet's
// mounted, in a folder of the pod's UID.
func (p *pod) process(program string) *os.Process {
	p.t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	if err != nil {
		p.t.Fatal(err)
	}
	for _, file := range all {
		dir := filepath.Dir(file)
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		name, _, _ := strings.Cut(string(cmdline), "\x00")
		if err != nil || name != program {
			continue
		}
		mounts, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(mounts), p.uid) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			p.t.Fatal(err)
		}
		proc, err := os.FindProcess(pid)
		if err != nil {
			p.t.Fatal(err)
		}
		return proc
	}
	p.t.Fatalf("no process of pod %s runs %s", p.name, program)
	return nil
}

// once is a client with a connection for one request.
func once() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: soon}
}

// set turns a knob of the application.
func (p *pod) set(path string, value bool) {
	p.t.Helper()
	code, body, err := p.do(once(), http.MethodPut, p.http, path, strconv.FormatBool(value))
	if err != nil || code != http.StatusOK {
		p.t.Fatalf("PUT %s %v: %d %s %v", path, value, code, body, err)
	}
}

// answer is the end of a request.
type answer struct {
	code int
	err  error
}

// pending sends a request that the application answers when it is told to (finish), up to a minute later, and returns once
// it has it.
func (p *pod) pending() <-chan answer {
	p.t.Helper()
	before := p.inFlight()
	done := make(chan answer, 1)
	go func() {
		code, _, err := p.do(once(), http.MethodPost, p.http, wire.PendingPath, "x")
		done <- answer{code, err}
	}()
	p.eventually(soon, "the request is in flight", func() error {
		if n := p.inFlight(); n <= before {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	return done
}

func (p *pod) inFlight() int {
	p.t.Helper()
	_, body, err := p.do(once(), http.MethodGet, p.http, wire.InFlightPath, "")
	if err != nil {
		p.t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(body))
	if err != nil {
		p.t.Fatal(err)
	}
	return n
}

// finish has the application answer what is pending, which must reach the client, and returns when it was told to: no
// moment of this busy process's that comes later says anything of the pod.
func (p *pod) finish(done <-chan answer) time.Time {
	p.t.Helper()
	told := time.Now()
	if code, body, err := p.do(once(), http.MethodPut, p.http, wire.PendingPath, ""); err != nil || code != http.StatusOK {
		p.t.Errorf("PUT %s: %d %s %v", wire.PendingPath, code, body, err)
	}
	p.good(<-done)
	return told
}

func (p *pod) good(a answer) {
	p.t.Helper()
	if a.err != nil || a.code != http.StatusOK {
		p.t.Errorf("a request in flight was lost: %d %v", a.code, a.err)
	}
}

// longerThanIdle lets a drain go on for longer than it would take without a request.
func (p *pod) longerThanIdle() { p.pass(3 * time.Second) }

// metric reads one of the agent's metrics; labels as in `{result="refused"}`.
func (p *pod) metric(name string) float64 {
	p.t.Helper()
	code, body, err := p.do(once(), http.MethodGet, 7400, "/metrics", "")
	if err != nil || code != http.StatusOK {
		p.t.Fatalf("GET /metrics: %d %v", code, err)
	}
	for l := range strings.Lines(body) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(l), name+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			return f
		}
	}
	p.t.Fatalf("no metric %s in\n%s", name, body)
	return 0
}

// status asks the agent's control listener, which is on the pod's loopback.
func (p *pod) status() api.Status {
	p.t.Helper()
	var st api.Status
	p.eventually(soon, "the agent tells its status", func() (err error) {
		st, err = p.askStatus()
		return err
	})
	return st
}

func (p *pod) askStatus() (api.Status, error) {
	ctx, cancel := context.WithTimeout(p.ctx, soon)
	cmd := exec.CommandContext(ctx, p.s.Kubectl(), "--kubeconfig", p.s.Kubeconfig(), "-n", p.space.name, "port-forward", "pod/"+p.name, ":7401")
	stderr := new(bytes.Buffer)
	cmd.Stderr = stderr
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		return api.Status{}, err
	}
	ended := func() {
		cancel()
		cmd.Wait() // ended by us
	}
	first, err := bufio.NewReader(out).ReadString('\n')
	address := regexp.MustCompile(`127\.0\.0\.1:\d+`).FindString(first)
	if address == "" {
		ended()
		return api.Status{}, fmt.Errorf("kubectl port-forward: %q, %w, %s", first, err, stderr)
	}
	defer ended()
	resp, err := once().Get("http://" + address + api.StatusPath)
	if err != nil {
		return api.Status{}, err
	}
	defer resp.Body.Close()
	var st api.Status
	err = json.NewDecoder(resp.Body).Decode(&st)
	return st, err
}

// event waits for a Kubernetes Event on the pod and returns its message.
func (p *pod) event(reason string) string {
	p.t.Helper()
	var message string
	p.eventually(soon, "event "+reason, func() error {
		list, err := p.s.Client.CoreV1().Events(p.space.name).List(p.ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + p.uid})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range list.Items {
			if e.Reason == reason {
				message = e.Message
				return nil
			}
			seen = append(seen, e.Reason)
		}
		return fmt.Errorf("there are %v", seen)
	})
	return message
}

// logged waits for a line in a container's log that has all the words.
func (p *pod) logged(container string, words ...string) line {
	p.t.Helper()
	var found line
	p.eventually(soon, fmt.Sprintf("container %s says %q", container, words), func() error {
		lines := p.logs.find(p.name, container, words...)
		if len(lines) == 0 {
			return errors.New("it doesn't")
		}
		found = lines[0]
		return nil
	})
	return found
}

// late is what a warning says when others took too long to answer.
var late = regexp.MustCompile(`(?i)deadline exceeded|no answer within|timeout|timed out|time allowed|connection lost|keepalive|code = Canceled`)

// calm fails the test if an agent had anything to warn of: what is normal is told as information. A machine that stands
// still for seconds is not the agent's fault: of an etcd and an API server that are late it may speak, each once.
func (sp *space) calm() {
	sp.t.Helper()
	spoken := map[string]int{} // by pod
	for _, l := range sp.logs.find("", agentName, `"level":"warn"`) {
		msg, _ := l.fields()["msg"].(string)
		switch msg {
		case "registry not as desired, retrying", "lease not renewed, trying again", "watch broken, reading and watching anew",
			"Kubernetes can't be seen clearly", "Event not written":
			if key := l.pod + ": " + msg; late.MatchString(l.text) && spoken[key] == 0 {
				spoken[key]++
				sp.t.Logf("the machine is slow: the agent of pod %s: %s", l.pod, l.text)
				continue
			}
		}
		sp.t.Errorf("the agent of pod %s, in a life without trouble: %s", l.pod, l.text)
	}
	for _, l := range sp.logs.find("", agentName, `"level":"error"`) {
		sp.t.Errorf("the agent of pod %s, in a life without trouble: %s", l.pod, l.text)
	}
}
