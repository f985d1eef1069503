package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"

	"usher.dev/usher/integration/stack"
	"usher.dev/usher/internal/api"
	"usher.dev/usher/registry"
)

const (
	// warmup rounds are not counted: connections, caches and the first garbage collections.
	warmup = 10
	// eventTimeout is far more than any event takes.
	eventTimeout = 15 * time.Second
	hookToken    = "usher-bench-hook-token"
	// nobody schedules the pod of the bench, so no kubelet has a say in its status.
	nobody   = "usher-bench-nobody"
	address  = "192.0.2.1" // RFC 5737: nobody's
	port     = 8080
	rawValue = `{"Op":0,"Addr":"192.0.2.1:8080"}` // as format grpc has it
	leaseTTL = 15                                 // seconds, the agent's default
)

// latency is an agent, run on this machine for a Pod that no kubelet runs, and all that is needed to see what it does.
type latency struct {
	client *kubernetes.Clientset
	etcd   *clientv3.Client
	stop   context.CancelFunc
	agent  *exec.Cmd
	log    *bytes.Buffer // read it after the agent has ended
	hookAt string

	pod      *corev1.Pod
	own, raw *slice
	record   <-chan etcdEvent // the consumer record that the agent writes
	lease    clientv3.LeaseID
	rawKey   string
	rawSeen  <-chan etcdEvent

	// Of the transaction that is shaped like Usher's: the ledger's key and value, and the keys' revisions, 0 while absent.
	ledger, value     string
	keyRev, ledgerRev int64
}

// slice is an EndpointSlice with one endpoint, and a watch on it.
type slice struct {
	object *discoveryv1.EndpointSlice
	seen   <-chan sliceEvent
}

type sliceEvent struct {
	version string
	at      time.Time
}

type etcdEvent struct {
	deleted bool
	at      time.Time
}

func newLatency(ctx context.Context, s *stack.Stack, namespace string) (_ *latency, err error) {
	ctx, stop := context.WithCancel(ctx)
	l := &latency{etcd: s.Etcd, stop: stop, log: &bytes.Buffer{}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	rest := s.RESTConfig()
	rest.ContentType = runtime.ContentTypeProtobuf // as the agent speaks
	if l.client, err = kubernetes.NewForConfig(rest); err != nil {
		return nil, fmt.Errorf("making the Kubernetes client: %w", err)
	}
	const service, other = "bench", "bench-raw"
	if l.pod, err = l.createPod(ctx, namespace, service); err != nil {
		return nil, err
	}
	for _, x := range []struct {
		service string
		slice   **slice
	}{{service, &l.own}, {other, &l.raw}} {
		if *x.slice, err = l.createService(ctx, namespace, x.service); err != nil {
			return nil, err
		}
	}

	target := namespace + "/" + service
	if l.record, err = l.watchEtcd(ctx, target+"/"); err != nil {
		return nil, err
	}
	l.rawKey = namespace + "/" + other + "/" + string(l.pod.UID)
	if l.rawSeen, err = l.watchEtcd(ctx, l.rawKey); err != nil {
		return nil, err
	}
	if err := l.prepareRaw(ctx, namespace, other); err != nil {
		return nil, err
	}

	ports, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	l.hookAt = ports[0]
	// The waits of a shutdown come after the deletion that is measured. Short ones make room for more rounds.
	l.agent = exec.Command(s.Programs.Agent,
		"--service="+service+",target="+target, "--kubeconfig="+s.Kubeconfig(), "--etcd-endpoints="+s.RegistryEndpoint(),
		"--hook-address="+ports[0], "--control-address="+ports[1],
		"--settle=10ms", "--quiet-period=20ms", "--drain-interval=10ms")
	l.agent.Env = append(os.Environ(), "POD_NAMESPACE="+namespace, "POD_NAME="+l.pod.Name, "POD_UID="+string(l.pod.UID), "USHER_HOOK_TOKEN="+hookToken)
	l.agent.Stdout, l.agent.Stderr = l.log, l.log
	if err := l.agent.Start(); err != nil {
		return nil, fmt.Errorf("starting the agent: %w", err)
	}
	if _, err := await(ctx, l.record, put); err != nil {
		return nil, fmt.Errorf("waiting for the agent to register: %w", err)
	}
	return l, nil
}

// close ends the agent. It may be called twice.
func (l *latency) close() error {
	l.stop()
	if l.agent == nil || l.agent.Process == nil || l.agent.ProcessState != nil {
		return nil
	}
	l.agent.Process.Signal(syscall.SIGTERM)
	kill := time.AfterFunc(10*time.Second, func() { l.agent.Process.Kill() })
	defer kill.Stop()
	if err := l.agent.Wait(); err != nil {
		return fmt.Errorf("the agent ended badly: %w\n%s", err, l.log)
	}
	return nil
}

func (l *latency) createPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod, err := l.client.CoreV1().Pods(namespace).Create(ctx, &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			SchedulerName: nobody,
			// The agent looks again at an instance that was released when its grace period is over: soon, so that none of
			// that is left when its idle CPU time is counted.
			TerminationGracePeriodSeconds: new(int64(3)),
			Containers:                    []corev1.Container{{Name: "app", Image: stack.AppImage}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("making pod %s: %w", name, err)
	}
	return pod, nil
}

// createService makes a Service without a selector, so that no controller writes its EndpointSlice, and that slice, ready.
func (l *latency) createService(ctx context.Context, namespace, name string) (*slice, error) {
	ports := []corev1.ServicePort{{Name: "http", Port: port}}
	_, err := l.client.CoreV1().Services(namespace).Create(ctx, &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: ports, ClusterIP: corev1.ClusterIPNone},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("making service %s: %w", name, err)
	}
	object, err := l.client.DiscoveryV1().EndpointSlices(namespace).Create(ctx, &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			discoveryv1.LabelServiceName: name, discoveryv1.LabelManagedBy: "usher-bench",
		}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints: []discoveryv1.Endpoint{{
			Addresses:  []string{address},
			Conditions: discoveryv1.EndpointConditions{Ready: new(true)},
			TargetRef:  &corev1.ObjectReference{Kind: "Pod", Namespace: namespace, Name: l.pod.Name, UID: l.pod.UID},
		}},
		Ports: []discoveryv1.EndpointPort{{Name: new("http"), Port: new(int32(port)), Protocol: new(corev1.ProtocolTCP)}},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, fmt.Errorf("making the slice of service %s: %w", name, err)
	}
	w, err := l.client.DiscoveryV1().EndpointSlices(namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String(), ResourceVersion: object.ResourceVersion,
	})
	if err != nil {
		return nil, fmt.Errorf("watching slice %s: %w", name, err)
	}
	seen := make(chan sliceEvent, 16)
	go func() {
		defer w.Stop()
		defer close(seen)
		for ev := range w.ResultChan() {
			at := time.Now()
			o, ok := ev.Object.(*discoveryv1.EndpointSlice)
			if !ok {
				return
			}
			select {
			case seen <- sliceEvent{o.ResourceVersion, at}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return &slice{object, seen}, nil
}

// prepareRaw gets the lease and the values of the raw writes.
func (l *latency) prepareRaw(ctx context.Context, namespace, service string) error {
	resp, err := l.etcd.Grant(ctx, leaseTTL)
	if err != nil {
		return fmt.Errorf("getting a lease: %w", err)
	}
	l.lease = resp.ID
	alive, err := l.etcd.KeepAlive(ctx, l.lease)
	if err != nil {
		return fmt.Errorf("keeping the lease: %w", err)
	}
	go func() {
		for range alive {
		}
	}()
	record := registry.Record{
		Owner:     registry.Owner{Cluster: "default", PodUID: string(l.pod.UID), PodCreated: l.pod.CreationTimestamp.UTC(), Lease: registry.LeaseID(l.lease), Agent: "bench"},
		Namespace: namespace, Service: service, Pod: l.pod.Name, Addresses: []string{address},
		Ports: []registry.Port{{Name: "http", Port: port, Protocol: "TCP"}},
		State: "Online", Since: time.Now().UTC(), Cause: "endpoint ready in service " + service, Formats: []string{"grpc"}, Keys: []string{l.rawKey},
	}
	l.ledger = registry.InstanceKey("default", namespace, service, l.pod.Name)
	b, err := record.Encode()
	l.value = string(b)
	return err
}

func (l *latency) watchEtcd(ctx context.Context, prefix string) (<-chan etcdEvent, error) {
	resp, err := l.etcd.Get(ctx, prefix, clientv3.WithPrefix(), clientv3.WithCountOnly())
	if err != nil {
		return nil, fmt.Errorf("reading %s from etcd: %w", prefix, err)
	}
	events := l.etcd.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(resp.Header.Revision+1))
	seen := make(chan etcdEvent, 16)
	go func() {
		defer close(seen)
		for resp := range events {
			at := time.Now()
			for _, ev := range resp.Events {
				select {
				case seen <- etcdEvent{ev.Type == clientv3.EventTypeDelete, at}:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return seen, nil
}

func put(e etcdEvent) (time.Time, bool)      { return e.at, !e.deleted }
func deletion(e etcdEvent) (time.Time, bool) { return e.at, e.deleted }

// await returns when the first event that ok says yes to came.
func await[T any](ctx context.Context, events <-chan T, ok func(T) (time.Time, bool)) (time.Time, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, eventTimeout, fmt.Errorf("no event in %s", eventTimeout))
	defer cancel()
	for {
		select {
		case e, open := <-events:
			if !open {
				return time.Time{}, errors.New("the watch broke")
			}
			if at, yes := ok(e); yes {
				return at, nil
			}
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		}
	}
}

// update turns the endpoint ready or not, and returns just before when.
func (l *latency) update(ctx context.Context, s *slice, ready bool) (time.Time, error) {
	next := s.object.DeepCopy()
	next.Endpoints[0].Conditions.Ready = &ready
	begun := time.Now()
	object, err := l.client.DiscoveryV1().EndpointSlices(next.Namespace).Update(ctx, next, metav1.UpdateOptions{})
	if err != nil {
		return begun, fmt.Errorf("updating slice %s: %w", next.Name, err)
	}
	s.object = object
	return begun, nil
}

// The measurements: each is one transition, from just before it is caused until it is seen.

func (l *latency) ours(ctx context.Context, ready bool) (time.Duration, error) {
	begun, err := l.update(ctx, l.own, ready)
	if err != nil {
		return 0, err
	}
	at, err := await(ctx, l.record, map[bool]func(etcdEvent) (time.Time, bool){true: put, false: deletion}[ready])
	if err != nil {
		return 0, fmt.Errorf("waiting for the agent's write, endpoint ready %t: %w", ready, err)
	}
	return at.Sub(begun), nil
}

func (l *latency) rawSlice(ctx context.Context, ready bool) (time.Duration, error) {
	begun, err := l.update(ctx, l.raw, ready)
	if err != nil {
		return 0, err
	}
	at, err := await(ctx, l.raw.seen, func(e sliceEvent) (time.Time, bool) { return e.at, e.version == l.raw.object.ResourceVersion })
	if err != nil {
		return 0, fmt.Errorf("waiting for the slice's update: %w", err)
	}
	return at.Sub(begun), nil
}

func (l *latency) rawPut(ctx context.Context) (time.Duration, error) {
	begun := time.Now()
	if _, err := l.etcd.Put(ctx, l.rawKey, rawValue); err != nil {
		return 0, fmt.Errorf("raw put: %w", err)
	}
	return l.sinceSeen(ctx, begun, put)
}

func (l *latency) rawDelete(ctx context.Context) (time.Duration, error) {
	begun := time.Now()
	if _, err := l.etcd.Delete(ctx, l.rawKey); err != nil {
		return 0, fmt.Errorf("raw delete: %w", err)
	}
	return l.sinceSeen(ctx, begun, deletion)
}

// rawTxn is the agent's transaction: fence, consumer record and ledger record, under a lease. It knows the revisions of its
// keys, as the agent does: reading them first would warm everything up for the write.
func (l *latency) rawTxn(ctx context.Context, ready bool) (time.Duration, error) {
	key := l.rawKey + "-txn"
	consumer, seen := clientv3.OpPut(key, rawValue, clientv3.WithLease(l.lease)), put
	if !ready {
		consumer, seen = clientv3.OpDelete(key), deletion
	}
	begun := time.Now()
	resp, err := l.etcd.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", l.keyRev), clientv3.Compare(clientv3.ModRevision(l.ledger), "=", l.ledgerRev)).
		Then(consumer, clientv3.OpPut(l.ledger, l.value, clientv3.WithLease(l.lease))).
		Commit()
	if err != nil {
		return 0, fmt.Errorf("raw transaction: %w", err)
	}
	if !resp.Succeeded {
		return 0, errors.New("raw transaction: somebody else changed the keys of the bench")
	}
	l.keyRev, l.ledgerRev = 0, resp.Header.Revision
	if ready {
		l.keyRev = resp.Header.Revision
	}
	return l.sinceSeen(ctx, begun, seen)
}

func (l *latency) sinceSeen(ctx context.Context, begun time.Time, ok func(etcdEvent) (time.Time, bool)) (time.Duration, error) {
	at, err := await(ctx, l.rawSeen, ok)
	if err != nil {
		return 0, fmt.Errorf("waiting for the raw write: %w", err)
	}
	return at.Sub(begun), nil
}

// call is the kubelet's hook call: a new connection each time. It returns when the request was sent off, and how to wait
// for the answer.
func (l *latency) call(ctx context.Context) (begun time.Time, answer func() error) {
	done := make(chan error, 1)
	begun = time.Now()
	go func() {
		done <- func() error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+l.hookAt+api.PrestopPath, nil)
			if err != nil {
				return err
			}
			req.Header.Set(api.TokenHeader, hookToken)
			client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			resp, err := client.Do(req)
			if err != nil {
				return fmt.Errorf("hook call: %w", err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != http.StatusOK {
				return fmt.Errorf("hook call: %s: %s", resp.Status, strings.TrimSpace(string(body)))
			}
			return nil
		}()
	}()
	return begun, func() error { return <-done }
}

// restart says what the kubelet says once it has restarted the pod's container: that is what brings an instance back after
// its hook.
func (l *latency) restart(ctx context.Context) error {
	pod := l.pod.DeepCopy()
	restarts := int32(0)
	if s := pod.Status.ContainerStatuses; len(s) > 0 {
		restarts = s[0].RestartCount
	}
	pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "app", RestartCount: restarts + 1, Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
	}}
	pod, err := l.client.CoreV1().Pods(pod.Namespace).UpdateStatus(ctx, pod, metav1.UpdateOptions{})
	if err != nil {
		return fmt.Errorf("updating the pod's status: %w", err)
	}
	l.pod = pod
	return nil
}

// rest lets what a transition set off (Events, the API server's other watchers) come to an end, and keeps the rounds from
// falling in step with any timer.
func rest(ctx context.Context) error {
	select {
	case <-time.After(10*time.Millisecond + rand.N(10*time.Millisecond)):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// measure appends how long a transition takes to out, after a rest.
func measure(ctx context.Context, out *[]time.Duration, transition func() (time.Duration, error)) error {
	if err := rest(ctx); err != nil {
		return err
	}
	took, err := transition()
	*out = append(*out, took)
	return err
}

// transitions are what readiness measured; index 0 is ready, 1 not ready.
type transitions [2]struct {
	ours, slice, write, txn []time.Duration
}

func (l *latency) readiness(ctx context.Context, rounds int) (t transitions, err error) {
	if _, err := l.ours(ctx, false); err != nil {
		return t, err
	}
	if _, err := l.rawSlice(ctx, false); err != nil {
		return t, err
	}
	for i := range warmup + rounds {
		if i == warmup {
			t = transitions{}
		}
		for j, ready := range []bool{true, false} {
			x := &t[j]
			write := l.rawPut
			if !ready {
				write = l.rawDelete
			}
			steps := []func() error{
				func() error {
					return measure(ctx, &x.ours, func() (time.Duration, error) { return l.ours(ctx, ready) })
				},
				func() error {
					return measure(ctx, &x.slice, func() (time.Duration, error) { return l.rawSlice(ctx, ready) })
				},
				func() error { return measure(ctx, &x.write, func() (time.Duration, error) { return write(ctx) }) },
			}
			// Who goes first changes from round to round.
			for k := range steps {
				if err := steps[(i+k)%len(steps)](); err != nil {
					return t, err
				}
			}
		}
		// The same key with the other shape of write.
		for j, ready := range []bool{true, false} {
			if err := measure(ctx, &t[j].txn, func() (time.Duration, error) { return l.rawTxn(ctx, ready) }); err != nil {
				return t, err
			}
		}
	}
	_, err = l.ours(ctx, true)
	return t, err
}

func (t transitions) rows() []Row {
	var out []Row
	for i, x := range t {
		change, write, target := "endpoint ready -> record seen", "put", 1.5
		if i == 1 {
			change, write, target = "endpoint not ready -> deletion seen", "delete", 0
		}
		ours := durations(x.ours)
		out = append(out,
			Row{Figure: change, Unit: Seconds, Ours: ours, Raw: durations(sums(x.slice, x.write)), Target: target},
			Row{Figure: "  raw: slice update -> watch", Unit: Seconds, Raw: durations(x.slice)},
			Row{Figure: "  raw: " + write + " -> watch", Unit: Seconds, Raw: durations(x.write)},
			Row{Figure: "  beside Usher's own transaction as raw", Unit: Seconds, Ours: ours, Raw: durations(sums(x.slice, x.txn))},
		)
	}
	return out
}

func sums(a, b []time.Duration) []time.Duration {
	out := make([]time.Duration, len(a))
	for i := range a {
		out[i] = a[i] + b[i]
	}
	return out
}

// hooks are what hook measured.
type hooks struct{ ours, raw, txn []time.Duration }

func (l *latency) hook(ctx context.Context, rounds int) (h hooks, err error) {
	for i := range warmup + rounds {
		if i == warmup {
			h = hooks{}
		}
		steps := []func() error{
			func() error { return measure(ctx, &h.ours, func() (time.Duration, error) { return l.hookCall(ctx) }) },
			func() error {
				if _, err := l.rawPut(ctx); err != nil {
					return err
				}
				return measure(ctx, &h.raw, func() (time.Duration, error) { return l.rawDelete(ctx) })
			},
			func() error {
				if _, err := l.rawTxn(ctx, true); err != nil {
					return err
				}
				return measure(ctx, &h.txn, func() (time.Duration, error) { return l.rawTxn(ctx, false) })
			},
		}
		for k := range steps {
			if err := steps[(i+k)%len(steps)](); err != nil {
				return h, err
			}
		}
	}
	return h, nil
}

// hookCall measures one call, and brings the instance back.
func (l *latency) hookCall(ctx context.Context) (time.Duration, error) {
	begun, answer := l.call(ctx)
	at, err := await(ctx, l.record, deletion)
	if err != nil {
		return 0, fmt.Errorf("waiting for the deletion after a hook call: %w", err)
	}
	if err := answer(); err != nil {
		return 0, err
	}
	if err := l.restart(ctx); err != nil {
		return 0, err
	}
	if _, err := await(ctx, l.record, put); err != nil {
		return 0, fmt.Errorf("waiting for the instance to come back after a hook call: %w", err)
	}
	return at.Sub(begun), nil
}

func (h hooks) rows() []Row {
	ours := durations(h.ours)
	return []Row{
		{Figure: "hook call -> deletion seen", Unit: Seconds, Ours: ours, Raw: durations(h.raw), Target: 2},
		{Figure: "  beside Usher's own transaction as raw", Unit: Seconds, Ours: ours, Raw: durations(h.txn)},
	}
}

// freePorts are loopback addresses that nobody listens on now.
func freePorts(n int) ([]string, error) {
	var out []string
	for range n {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, fmt.Errorf("looking for a free port: %w", err)
		}
		defer ln.Close()
		out = append(out, ln.Addr().String())
	}
	return out, nil
}
