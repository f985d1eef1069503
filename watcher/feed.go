package watcher

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"sync"
	"syscall"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// query is what a feed asks for.
type query struct {
	client    rest.Interface
	resource  string // "pods"
	group     string // "" for core, used in sentences only
	namespace string
	name      string // metadata.name, "" for all
	labels    string // label selector, "" for all
	example   runtime.Object
}

// feed keeps what a query answers, by name, as slim values of type T: the reflector's objects are reduced at once and
// dropped. It is the reflector's store, and remembers why the API server doesn't answer.
type feed[T any] struct {
	query
	reduce func(runtime.Object) T
	notify func()
	stop   context.CancelFunc

	mu       sync.Mutex
	items    map[string]T
	synced   bool
	failures map[string]failure // by verb
	worked   string             // the verb whose answer the next Replace brings
}

// failure is why a list or watch doesn't work.
type failure struct {
	err   error
	lost  bool      // no answer at all
	since time.Time // when it was first lost
}

// backoff is the wait between tries: 0.1 to 0.2 s at first, 15 to 30 s at last. client-go's default starts at 0.8 s,
// which would be a blind second after each watch that ended oddly.
func backoff() *wait.Backoff {
	return &wait.Backoff{Duration: 100 * time.Millisecond, Factor: 2, Jitter: 1, Cap: 15 * time.Second, Steps: 20}
}

// startFeed runs a feed until ctx ends or stop is called.
func startFeed[T any](ctx context.Context, q query, notify func(), reduce func(runtime.Object) T) *feed[T] {
	ctx, stop := context.WithCancel(ctx)
	f := &feed[T]{query: q, reduce: reduce, notify: notify, stop: stop, failures: map[string]failure{}}
	r := cache.NewReflectorWithOptions(f, q.example, f, cache.ReflectorOptions{Name: q.resource, Backoff: backoff()})
	go r.RunWithContext(ctx)
	return f
}

// snapshot returns the items, and whether the API server has ever answered.
func (f *feed[T]) snapshot() (map[string]T, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.items), f.synced
}

// answered says that the API server has answered, or has refused to: there is nothing more to wait for.
func (f *feed[T]) answered() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.synced || len(f.failures) > 0
}

func (f *feed[T]) Add(obj any) error {
	m, err := meta.Accessor(obj)
	if err != nil {
		return err
	}
	f.mu.Lock()
	f.items[m.GetName()] = f.reduce(obj.(runtime.Object))
	f.mu.Unlock()
	f.notify()
	return nil
}

func (f *feed[T]) Update(obj any) error { return f.Add(obj) }

func (f *feed[T]) Delete(obj any) error {
	m, err := meta.Accessor(obj)
	if err != nil {
		return err
	}
	f.mu.Lock()
	delete(f.items, m.GetName())
	f.mu.Unlock()
	f.notify()
	return nil
}

func (f *feed[T]) Replace(objs []any, _ string) error {
	items := make(map[string]T, len(objs))
	for _, obj := range objs {
		m, err := meta.Accessor(obj)
		if err != nil {
			return err
		}
		items[m.GetName()] = f.reduce(obj.(runtime.Object))
	}
	f.mu.Lock()
	f.items, f.synced = items, true
	f.recovered(f.worked)
	f.mu.Unlock()
	f.notify()
	return nil
}

func (f *feed[T]) Resync() error { return nil }

func (f *feed[T]) ListWithContext(ctx context.Context, opts metav1.ListOptions) (runtime.Object, error) {
	// "0" allows any old state that an API server happens to have cached; absence must be true here.
	if opts.ResourceVersion == "0" {
		opts.ResourceVersion = ""
	}
	tripCtx, trip := withTrip(ctx, func(err error) { f.lost(ctx, "list", err) })
	obj, err := f.request(&opts).Do(tripCtx).Get()
	if trip.err == nil {
		f.report(ctx, "list", true, err)
	}
	return obj, err
}

func (f *feed[T]) WatchWithContext(ctx context.Context, opts metav1.ListOptions) (watch.Interface, error) {
	opts.Watch = true
	tripCtx, trip := withTrip(ctx, func(err error) { f.lost(ctx, "watch", err) })
	w, err := f.request(&opts).Watch(tripCtx)
	if trip.err == nil {
		f.report(ctx, "watch", opts.SendInitialEvents != nil, err)
	}
	return w, err
}

func (f *feed[T]) List(opts metav1.ListOptions) (runtime.Object, error) {
	return f.ListWithContext(context.Background(), opts)
}

func (f *feed[T]) Watch(opts metav1.ListOptions) (watch.Interface, error) {
	return f.WatchWithContext(context.Background(), opts)
}

func (f *feed[T]) request(opts *metav1.ListOptions) *rest.Request {
	opts.LabelSelector = f.labels
	if f.name != "" {
		opts.FieldSelector = "metadata.name=" + f.name
	}
	return f.client.Get().Namespace(f.namespace).Resource(f.resource).VersionedParams(opts, metav1.ParameterCodec)
}

// lost remembers that a call got no answer. The first cause and its time stay.
func (f *feed[T]) lost(ctx context.Context, verb string, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil || f.failures[verb].lost {
		return
	}
	f.failures[verb] = failure{err: err, lost: true, since: time.Now()}
	f.notify()
}

// report remembers how a call was answered. When the answer brings the whole state, its failures are over only with that
// state, so that nobody sees the old one and no problem.
func (f *feed[T]) report(ctx context.Context, verb string, whole bool, err error) {
	var status apierrors.APIStatus
	switch {
	case apierrors.IsResourceExpired(err) || apierrors.IsGone(err):
		return // the reflector lists anew at once
	case err != nil && !errors.As(err, &status): // the connection broke in the middle of an answer, say
		f.lost(ctx, verb, err)
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case ctx.Err() != nil:
	case err != nil:
		f.failures[verb] = failure{err: err}
		f.notify()
	case whole:
		f.worked = verb
	default:
		f.recovered(verb)
	}
}

// recovered forgets failures of that verb. A watch that works needs no list, or comes after one.
func (f *feed[T]) recovered(verb string) {
	if len(f.failures) == 0 {
		return
	}
	delete(f.failures, verb)
	if verb == "watch" {
		clear(f.failures)
	}
	f.notify()
}

// problems adds what is wrong to p.
func (f *feed[T]) problems(p *problems) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resource := f.resource
	if f.group != "" {
		resource += "." + f.group
	}
	for _, verb := range []string{"list", "watch"} {
		switch fail, failed := f.failures[verb]; {
		case !failed:
		case fail.lost:
			p.lose(fail)
		case apierrors.IsForbidden(fail.err):
			p.add(fmt.Sprintf("RBAC lacks %q on %s in namespace %q", verb, resource, f.namespace))
		default:
			p.add(fmt.Sprintf("the API server refuses to %s %s in namespace %q: %v", verb, resource, f.namespace, fail.err))
		}
	}
}

// problems collects the sentences of an Observation.
type problems struct {
	sentences []string
	lost      *failure
}

func (p *problems) add(sentence string) {
	for _, s := range p.sentences {
		if s == sentence {
			return
		}
	}
	p.sentences = append(p.sentences, sentence)
}

// lose notes a lost API server. One sentence covers all feeds, with the earliest time.
func (p *problems) lose(f failure) {
	if p.lost == nil || f.since.Before(p.lost.since) {
		p.lost = &f
	}
}

func (p *problems) list() []string {
	if p.lost == nil {
		return p.sentences
	}
	return append([]string{fmt.Sprintf("the API server can't be reached since %s (%v); what was last seen stands",
		p.lost.since.UTC().Format(time.RFC3339), cause(p.lost.err))}, p.sentences...)
}

// cause is the innermost error that still says something, without the URL and the ports that change with each try.
func cause(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	return err
}
