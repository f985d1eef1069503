package rollout

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/tools/cache"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/integration/load"
	"usher.dev/usher/integration/stack"
)

const (
	service = "shop" // of the example, and its Deployment, and its container
	agent   = "usher"

	// probeTimeout, in seconds, replaces the kubelet's 1 s, in every way. On a machine that is busy with other things, probes of
	// all pods time out at once, all leave the registry, and requests find no instance: a loss, but not a rollout's.
	probeTimeout = 5

	lookEvery = 100 * time.Millisecond
	// removeWithin covers a pod's whole grace period.
	removeWithin = time.Minute
)

// site is one way's namespace, and what was seen of its pods.
type site struct {
	stack     *stack.Stack
	way       Way
	namespace string // and the prefix of its keys in the registry
	extra     int    // pods besides the Deployment's
	idle      *http.Transport
	close     context.CancelFunc

	mu     sync.Mutex
	pods   map[string]*pod // by name
	byIP   map[string]*pod
	strays []load.Result // failed at no pod that is known
}

// pod is all that is known of one. Times are zero until they are known.
type pod struct {
	name, ip string
	ready    bool
	deleted  time.Time // when its deletion was seen
	ended    time.Time // when its application got SIGTERM, as that says itself
	gone     bool
	owed     int // answers, when SIGTERM came, as the application counts them
	answered time.Time
	failed   []load.Result
	told     int             // how many of failed are accounted for
	followed map[string]bool // containers whose log is read
	log      []line
}

type line struct {
	at        time.Time
	container string
	text      string
}

// deploy makes a way's namespace and Deployment, and begins to watch it. It doesn't wait for the pods.
func deploy(ctx context.Context, st *stack.Stack, way Way) (*site, error) {
	s := &site{
		stack: st, way: way, namespace: fmt.Sprintf("rollout-%s-%04x", way.Name, rand.IntN(1<<16)),
		idle: &http.Transport{}, pods: map[string]*pod{}, byIP: map[string]*pod{},
	}
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	s.close = stop
	if err := st.Namespace(ctx, s.namespace); err != nil {
		return s, err
	}
	svc, dep, err := example(ctx, s.namespace)
	if err != nil {
		return s, err
	}
	dep.Spec.Replicas = new(int32(replicas))
	for _, c := range []*corev1.Container{app(dep), &dep.Spec.Template.Spec.InitContainers[0]} {
		c.ReadinessProbe.TimeoutSeconds = probeTimeout
	}
	way.edit(dep, s.namespace)
	for _, object := range []any{svc, dep} {
		b, err := json.Marshal(object)
		if err != nil {
			return s, err
		}
		if err := st.Apply(ctx, s.namespace, string(b)); err != nil {
			return s, err
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(st.Client.CoreV1().RESTClient(), "pods", s.namespace, fields.Everything()),
		ObjectType:    &corev1.Pod{},
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { s.see(watching, o.(*corev1.Pod), false) },
			UpdateFunc: func(_, o any) { s.see(watching, o.(*corev1.Pod), false) },
			DeleteFunc: func(o any) {
				if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
					o = last.Obj
				}
				s.see(watching, o.(*corev1.Pod), true)
			},
		},
	})
	go informer.RunWithContext(watching)
	return s, nil
}

// example is the example manifest, with the registry keys of this prefix.
func example(ctx context.Context, prefix string) (*corev1.Service, *appsv1.Deployment, error) {
	text, err := stack.Example(ctx, "shop.yaml")
	if err != nil {
		return nil, nil, err
	}
	docs := yaml.NewYAMLOrJSONDecoder(strings.NewReader(strings.ReplaceAll(text, "target="+service+"/", "target="+prefix+"/")), 4096)
	svc, dep := &corev1.Service{}, &appsv1.Deployment{}
	if err := errors.Join(docs.Decode(svc), docs.Decode(dep)); err != nil {
		return nil, nil, fmt.Errorf("reading the example: %w", err)
	}
	if svc.Kind != "Service" || dep.Kind != "Deployment" || len(dep.Spec.Template.Spec.InitContainers) != 1 || len(dep.Spec.Template.Spec.Containers) != 1 {
		return nil, nil, errors.New("reading the example: want a Service and a Deployment with the agent as init container, beside one application")
	}
	return svc, dep, nil
}

// see takes in what the watch says of a pod.
func (s *site) see(ctx context.Context, o *corev1.Pod, gone bool) {
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pods[o.Name]
	if p == nil {
		p = &pod{name: o.Name, followed: map[string]bool{}}
		s.pods[o.Name] = p
	}
	if o.DeletionTimestamp != nil && p.deleted.IsZero() {
		p.deleted = now
	}
	p.gone = gone
	was := p.ready
	p.ready = false
	for _, c := range o.Status.Conditions {
		if c.Type == corev1.PodReady {
			p.ready = c.Status == corev1.ConditionTrue
		}
	}
	if p.ip == "" && o.Status.PodIP != "" {
		p.ip = o.Status.PodIP
		s.byIP[p.ip] = p
	}
	if p.ready && !was && p.deleted.IsZero() {
		go s.connect(ctx, p.ip)
	}
	for _, c := range append(o.Status.InitContainerStatuses, o.Status.ContainerStatuses...) {
		if c.State.Running != nil && !p.followed[c.Name] {
			p.followed[c.Name] = true
			go s.follow(ctx, p, c.Name)
		}
	}
}

// connect asks once, and leaves the connection open, as a scraper or a client's pool does that nobody tells of the registry.
func (s *site) connect(ctx context.Context, ip string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+net.JoinHostPort(ip, "8080")+wire.FastPath, nil)
	if err != nil {
		return
	}
	if resp, err := s.idle.RoundTrip(req); err == nil {
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
}

// follow reads a container's log until its end.
func (s *site) follow(ctx context.Context, p *pod, container string) {
	stream, err := s.stack.Client.CoreV1().Pods(s.namespace).GetLogs(p.name, &corev1.PodLogOptions{Container: container, Follow: true, Timestamps: true}).Stream(ctx)
	if err == nil {
		defer stream.Close()
		lines := bufio.NewScanner(stream)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			s.read(p, container, lines.Text())
		}
		err = lines.Err()
	}
	if err != nil && ctx.Err() == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		p.log = append(p.log, line{time.Now(), container, "its log could not be read: " + err.Error()})
	}
}

func (s *site) read(p *pod, container, text string) {
	stamp, text, _ := strings.Cut(text, " ")
	at, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p.log = append(p.log, line{at, container, text})
	var said struct {
		Time     time.Time
		Msg      string
		InFlight int
	}
	if container == service && json.Unmarshal([]byte(text), &said) == nil && said.Msg == "dying at once" {
		p.ended, p.owed = said.Time, said.InFlight
	}
}

// result takes in the end of a request.
func (s *site) result(r load.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Class == "" {
		if p, end := s.pods[r.Pod], r.Scheduled.Add(r.Latency); p != nil && end.After(p.answered) {
			p.answered = end
		}
		return
	}
	host, _, _ := net.SplitHostPort(r.Instance) // none: it reached no instance
	if p := s.byIP[host]; p != nil {
		p.failed = append(p.failed, r)
	} else if s.way.Ours {
		s.strays = append(s.strays, r)
	}
}

// until waits for something to be so; what says what is missing.
func (s *site) until(ctx context.Context, within time.Duration, missing func(context.Context) string) error {
	var last string
	err := wait.PollUntilContextTimeout(ctx, lookEvery, within, true, func(ctx context.Context) (bool, error) {
		if text := missing(ctx); text != "" {
			last = text
			return false, nil
		}
		return true, nil
	})
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("%s: not within %s: %s", s.way.Name, within, last)
	}
	return nil
}

// settled says what is missing until all pods are ready and registered, and no other is left.
func (s *site) settled(ctx context.Context) string {
	want := replicas + s.extra
	s.mu.Lock()
	ready, ending := 0, 0
	for _, p := range s.pods {
		switch {
		case p.deleted.IsZero() && p.ready:
			ready++
		case !p.deleted.IsZero() && p.ended.IsZero():
			ending++
		}
	}
	s.mu.Unlock()
	if ready != want || ending > 0 {
		return fmt.Sprintf("%d of %d pods are ready, %d have yet to end", ready, want, ending)
	}
	for _, target := range []string{"http", "grpc"} {
		resp, err := s.stack.Etcd.Get(ctx, s.namespace+"/"+target+"/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err.Error()
		}
		if resp.Count != int64(want) {
			return fmt.Sprintf("%d %s records, want %d", resp.Count, target, want)
		}
	}
	return ""
}

// standing are the pods that nobody has deleted.
func (s *site) standing() []*pod {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*pod
	for _, p := range s.pods {
		if p.deleted.IsZero() && p.name != steady {
			out = append(out, p)
		}
	}
	return out
}

// rollOut waits for the lead, replaces all pods, and returns when the last old one has ended and the new ones are registered.
func (s *site) rollOut(ctx context.Context, lead time.Duration) (Turn, error) {
	select {
	case <-time.After(lead):
	case <-ctx.Done():
		return Turn{}, context.Cause(ctx)
	}
	t := Turn{old: s.standing(), begun: time.Now()}
	if _, err := s.stack.Run(ctx, nil, "-n", s.namespace, "rollout", "restart", "deployment/"+service); err != nil {
		return t, err
	}
	err := s.until(ctx, turnWithin, func(ctx context.Context) string {
		s.mu.Lock()
		for _, p := range t.old {
			if p.ended.IsZero() {
				text := fmt.Sprintf("old pod %s has not ended", p.name)
				if p.gone {
					text = fmt.Sprintf("old pod %s is gone, and the end of its application was not seen in its log", p.name)
				}
				s.mu.Unlock()
				return text
			}
		}
		s.mu.Unlock()
		return s.settled(ctx)
	})
	if err != nil {
		return t, err
	}
	t.Took = time.Since(t.begun)
	return t, nil
}

// stops are how the pods ended. All answers must be in.
func (s *site) stops(pods []*pod) []Stop {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []Stop
	for _, p := range pods {
		out = append(out, p.stop())
	}
	return out
}

// removeAll deletes the namespaces, and waits until the pods have ended.
func removeAll(ctx context.Context, sites []*site) error {
	ctx, cancel := context.WithTimeout(ctx, removeWithin)
	defer cancel()
	errs := make([]error, len(sites))
	var wg sync.WaitGroup
	for i, s := range sites {
		if s != nil {
			wg.Go(func() { errs[i] = s.remove(ctx) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *site) remove(ctx context.Context) error {
	s.close()
	s.idle.CloseIdleConnections()
	// The Deployment first: Kubernetes leaves a namespace's pods alone for its first 5 s, and looks again much later if any
	// are left then (namespaceDeletionGracePeriod in pkg/controller/namespace/namespace_controller.go).
	background := metav1.DeletePropagationBackground
	err := s.stack.Client.AppsV1().Deployments(s.namespace).Delete(ctx, service, metav1.DeleteOptions{PropagationPolicy: &background})
	if err == nil || apierrors.IsNotFound(err) {
		err = s.stack.Client.CoreV1().Namespaces().Delete(ctx, s.namespace, metav1.DeleteOptions{})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("removing namespace %s: %w", s.namespace, err)
	}
	err = wait.PollUntilContextCancel(ctx, lookEvery, true, func(ctx context.Context) (bool, error) {
		pods, err := s.stack.Client.CoreV1().Pods(s.namespace).List(ctx, metav1.ListOptions{})
		return err == nil && len(pods.Items) == 0, nil
	})
	if err != nil {
		return fmt.Errorf("removing namespace %s: its pods are still there: %w", s.namespace, err)
	}
	return nil
}
