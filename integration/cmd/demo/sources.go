package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"path"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

// askTimeout is for one question to the application.
const askTimeout = 250 * time.Millisecond

// sources watch everything that the timeline is made of, and tell it as facts.
type sources struct {
	client kubernetes.Interface
	etcd   *clientv3.Client
	facts  chan<- fact

	mu   sync.Mutex
	http map[string]string // by the pod's uid: where its HTTP record says it is
}

func (s *sources) tell(ctx context.Context, uid string, is any) {
	f := fact{at: time.Now(), uid: uid, is: is}
	select {
	case s.facts <- f:
	case <-ctx.Done():
	}
}

// run watches until ctx ends.
func (s *sources) run(ctx context.Context) {
	var wg sync.WaitGroup
	core, slices := s.client.CoreV1().RESTClient(), s.client.DiscoveryV1().RESTClient()
	wg.Go(func() {
		watch(ctx, cache.NewListWatchFromClient(core, "pods", namespace, fields.Everything()), &corev1.Pod{}, s.pod)
	})
	wg.Go(func() {
		watch(ctx, cache.NewListWatchFromClient(slices, "endpointslices", namespace, fields.Everything()), &discoveryv1.EndpointSlice{}, s.slice)
	})
	wg.Go(func() { s.records(ctx) })
	wg.Go(func() { s.ledger(ctx) })
	wg.Wait()
}

// watch calls changed for every object that is there, changes (gone false) or goes.
func watch(ctx context.Context, lw cache.ListerWatcher, kind runtime.Object, changed func(ctx context.Context, object any, gone bool)) {
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: lw,
		ObjectType:    kind,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { changed(ctx, o, false) },
			UpdateFunc: func(_, o any) { changed(ctx, o, false) },
			DeleteFunc: func(o any) {
				if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
					o = last.Obj
				}
				changed(ctx, o, true)
			},
		},
	})
	informer.RunWithContext(ctx)
}

func (s *sources) pod(ctx context.Context, object any, gone bool) {
	p := object.(*corev1.Pod)
	uid := string(p.UID)
	s.tell(ctx, uid, podSeen{p.Name, p.Status.PodIP})
	if p.DeletionTimestamp != nil {
		var grace time.Duration
		if p.DeletionGracePeriodSeconds != nil {
			grace = time.Duration(*p.DeletionGracePeriodSeconds) * time.Second
		}
		s.tell(ctx, uid, podDeleted{grace})
	}
	for _, c := range p.Status.ContainerStatuses {
		if c.Name == service && c.State.Terminated != nil {
			s.tell(ctx, uid, appEnded{c.State.Terminated.ExitCode})
		}
	}
	if gone {
		s.tell(ctx, uid, podGone{})
	}
}

func (s *sources) slice(ctx context.Context, object any, gone bool) {
	if gone {
		return
	}
	for _, e := range object.(*discoveryv1.EndpointSlice).Endpoints {
		// nil means ready (EndpointConditions).
		if e.TargetRef != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
			s.tell(ctx, string(e.TargetRef.UID), podReady{})
		}
	}
}

// records watches what consumers read: <prefix>/<protocol>/<pod uid>. The namespace is new, so nothing is there at first.
func (s *sources) records(ctx context.Context) {
	for resp := range s.etcd.Watch(clientv3.WithRequireLeader(ctx), targets+"/", clientv3.WithPrefix()) {
		for _, ev := range resp.Events {
			key := string(ev.Kv.Key)
			uid := path.Base(key)
			if ev.Type == clientv3.EventTypeDelete {
				s.tell(ctx, uid, recordDeleted{key})
			} else {
				s.tell(ctx, uid, recordPut{key})
			}
			if !strings.HasPrefix(key, httpTarget+"/") {
				continue
			}
			s.mu.Lock()
			if ev.Type == clientv3.EventTypePut {
				var record struct{ Addr string }
				if json.Unmarshal(ev.Kv.Value, &record) == nil {
					s.http[uid] = record.Addr
				}
			} else if addr := s.http[uid]; addr != "" {
				go s.ask(ctx, uid, addr)
			}
			s.mu.Unlock()
		}
	}
}

// ask asks the application itself how many answers it owes.
func (s *sources) ask(ctx context.Context, uid, addr string) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+wire.InFlightPath, nil)
	if err != nil {
		return
	}
	req.Close = true // an idle connection would be one more for the agent to look at
	resp, err := (&http.Transport{}).RoundTrip(req)
	if err != nil {
		return
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 32))
	if err != nil || resp.StatusCode != http.StatusOK {
		return
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
		s.tell(ctx, uid, inFlight{n})
	}
}

// ledger watches what operators read.
func (s *sources) ledger(ctx context.Context) {
	for ev, err := range registry.NewCatalog(s.etcd, "").Watch(ctx, namespace, service) {
		if err != nil || ev.Entry.Err != nil {
			continue // Watch goes on by itself
		}
		switch r := ev.Entry.Record; ev.Type {
		case registry.Put:
			s.tell(ctx, r.Owner.PodUID, ledgerSays{r.State, r.Cause})
		case registry.Delete:
			s.tell(ctx, r.Owner.PodUID, ledgerGone{})
		}
	}
}

// follow reads an agent's log until it ends.
func (s *sources) follow(ctx context.Context, uid, pod string) {
	if err := s.read(ctx, uid, pod); err != nil && ctx.Err() == nil {
		s.tell(ctx, uid, logUnread{err})
	}
}

func (s *sources) read(ctx context.Context, uid, pod string) error {
	log, err := s.client.CoreV1().Pods(namespace).GetLogs(pod, &corev1.PodLogOptions{Container: "usher", Follow: true}).Stream(ctx)
	if err != nil {
		return fmt.Errorf("its agent's log: %w", err)
	}
	defer log.Close()
	lines := bufio.NewScanner(log)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		if v, ok := parseReleased(lines.Bytes()); ok {
			s.tell(ctx, uid, released{v})
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("its agent's log: %w", err)
	}
	return nil
}

// parseReleased reads the log entry that an agent writes when a drain is over.
func parseReleased(line []byte) (verdict, bool) {
	var entry struct {
		Msg                            string
		Outcome                        lifecycle.Outcome
		Total, Withdraw, Settle, Drain duration
		InFlight                       int
	}
	if json.Unmarshal(line, &entry) != nil || entry.Msg != "released" || entry.Outcome == "" {
		return verdict{}, false
	}
	return verdict{
		outcome: entry.Outcome, total: time.Duration(entry.Total), withdraw: time.Duration(entry.Withdraw),
		settle: time.Duration(entry.Settle), drain: time.Duration(entry.Drain), inFlight: entry.InFlight,
	}, true
}

// duration is one as a log has it, such as "1.5s".
type duration time.Duration

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = duration(v)
	return err
}

// namespaceGone says whether there is no namespace of that name.
func namespaceGone(ctx context.Context, client kubernetes.Interface) (bool, error) {
	list, err := client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + namespace})
	if err != nil {
		return false, fmt.Errorf("looking for namespace %s: %w", namespace, err)
	}
	return len(list.Items) == 0, nil
}
