package watcher

import (
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// api is an API server of one namespace: list, watch (also the streaming list) and create for the four resources that
// are used here, in JSON or protobuf, with selectors, resource versions and their expiry. What fails, when and how is
// set by its methods.
type api struct {
	t      *testing.T
	addr   string
	codecs serializer.CodecFactory

	mu         sync.Mutex
	changed    *sync.Cond
	version    int
	compacted  int // versions below it are expired
	history    []change
	objects    map[string]map[string]runtime.Object // by resource and name
	forbidden  map[string]bool                      // "watch endpointslices"
	plainList  bool                                 // refuses the streaming list
	ahead      time.Duration                        // of the server's clock
	open       map[string]int                       // watches under way, by description
	served     map[string]int                       // requests, by description
	hold       chan struct{}                        // lists and streaming lists wait until it is closed
	holdCreate bool
	hangup     bool // connections are closed without an answer
	created    []*corev1.Event

	server *http.Server
	stop   chan struct{} // closed when the server goes down or connections are cut
}

type change struct {
	version  int
	resource string
	old, now runtime.Object
}

func newAPI(t *testing.T) *api {
	a := &api{
		// Not 127.0.0.1: while the server is down, no connection of anybody gets its port for a source port there.
		t: t, addr: "127.0.0.2:0", codecs: serializer.NewCodecFactory(newScheme()), version: 100,
		objects:   map[string]map[string]runtime.Object{"pods": {}, "services": {}, "endpointslices": {}},
		forbidden: map[string]bool{}, open: map[string]int{}, served: map[string]int{},
	}
	a.changed = sync.NewCond(&a.mu)
	a.up()
	t.Cleanup(a.down)
	return a
}

func (a *api) up() {
	a.t.Helper()
	l, err := net.Listen("tcp", a.addr)
	if err != nil {
		a.t.Fatal(err)
	}
	a.addr = l.Addr().String()
	a.mu.Lock()
	a.stop = make(chan struct{})
	a.server = &http.Server{Handler: a}
	server := a.server
	a.mu.Unlock()
	go server.Serve(l)
}

// down ends the server and all connections: dialling is refused.
func (a *api) down() {
	a.cut()
	a.server.Close()
}

// cut ends all watches; what is asked next is answered.
func (a *api) cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.stop)
	a.stop = make(chan struct{})
	a.changed.Broadcast()
}

func (a *api) client(contentType string) *Client {
	a.t.Helper()
	c, err := NewClient(&rest.Config{Host: "http://" + a.addr, ContentConfig: rest.ContentConfig{ContentType: contentType}})
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

func (a *api) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
	a.changed.Broadcast()
}

func resourceOf(obj runtime.Object) string {
	switch obj.(type) {
	case *corev1.Pod:
		return "pods"
	case *corev1.Service:
		return "services"
	case *discoveryv1.EndpointSlice:
		return "endpointslices"
	}
	panic(fmt.Sprintf("%T", obj))
}

// put creates or updates an object.
func (a *api) put(obj runtime.Object) {
	a.t.Helper()
	obj = obj.DeepCopyObject()
	m, _ := meta.Accessor(obj)
	a.set(func() {
		a.version++
		m.SetResourceVersion(strconv.Itoa(a.version))
		m.SetNamespace("shop")
		r := resourceOf(obj)
		a.history = append(a.history, change{a.version, r, a.objects[r][m.GetName()], obj})
		a.objects[r][m.GetName()] = obj
	})
}

func (a *api) remove(resource, name string) {
	a.set(func() {
		a.version++
		a.history = append(a.history, change{a.version, resource, a.objects[resource][name], nil})
		delete(a.objects[resource], name)
	})
}

// compact expires all versions so far.
func (a *api) compact() {
	a.set(func() {
		a.version++
		a.compacted = a.version
		a.history = nil
	})
}

// watches are those under way, described by resource, slice name if any, and count.
func (a *api) watches(resource string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []string
	for k, n := range a.open {
		if n > 0 && strings.HasPrefix(k, resource+" ") {
			out = append(out, strings.TrimPrefix(k, resource+" "))
		}
	}
	slices.Sort(out)
	return out
}

func (a *api) count(request string) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.served[request]
}

func (a *api) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	q := req.URL.Query()
	parts := strings.Split(strings.Trim(req.URL.Path, "/"), "/")
	resource := parts[len(parts)-1]
	verb := "list"
	switch {
	case req.Method == http.MethodPost:
		verb = "create"
	case q.Get("watch") == "true" || q.Get("watch") == "1":
		verb = "watch"
	}
	a.mu.Lock()
	w.Header().Set("Date", time.Now().Add(a.ahead).UTC().Format(http.TimeFormat))
	a.served[verb+" "+resource]++
	forbidden := a.forbidden[verb+" "+resource]
	noStream := a.plainList && q.Get("sendInitialEvents") != ""
	hangup := a.hangup
	hold, stop, holdCreate := a.hold, a.stop, a.holdCreate
	a.mu.Unlock()
	gr := schema.GroupResource{Resource: resource}
	if resource == "endpointslices" {
		gr.Group = discoveryv1.GroupName
	}
	switch {
	case hangup:
		panic(http.ErrAbortHandler)
	case forbidden:
		a.fail(w, req, http.StatusForbidden, metav1.StatusReasonForbidden, gr.String()+" is forbidden")
		return
	case noStream:
		a.fail(w, req, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid, "sendInitialEvents is not supported")
		return
	}
	if hold != nil && (verb == "create" && holdCreate || verb == "list" || q.Get("sendInitialEvents") != "") {
		select {
		case <-hold:
		case <-stop:
		case <-req.Context().Done():
		}
	}
	sel, err := labels.Parse(q.Get("labelSelector"))
	if err != nil {
		a.t.Error(err)
	}
	fsel, err := fields.ParseSelector(q.Get("fieldSelector"))
	if err != nil {
		a.t.Error(err)
	}
	match := func(obj runtime.Object) bool {
		if obj == nil {
			return false
		}
		m, _ := meta.Accessor(obj)
		return sel.Matches(labels.Set(m.GetLabels())) && fsel.Matches(fields.Set{"metadata.name": m.GetName()})
	}
	switch verb {
	case "list":
		if q.Get("resourceVersion") == "0" {
			a.t.Error("a list that may answer with any old state")
		}
		a.list(w, req, resource, match)
	case "create":
		a.create(w, req)
	default:
		name, _ := fsel.RequiresExactMatch("metadata.name")
		a.watch(w, req, resource, name, match)
	}
}

// info negotiates the content type.
func (a *api) info(req *http.Request) runtime.SerializerInfo {
	for _, accept := range strings.Split(req.Header.Get("Accept"), ",") {
		mt, _, err := mime.ParseMediaType(accept)
		if err != nil {
			continue
		}
		if info, ok := runtime.SerializerInfoForMediaType(a.codecs.SupportedMediaTypes(), mt); ok {
			return info
		}
	}
	info, _ := runtime.SerializerInfoForMediaType(a.codecs.SupportedMediaTypes(), runtime.ContentTypeJSON)
	return info
}

func (a *api) encode(s runtime.Serializer, obj runtime.Object) []byte {
	gv := corev1.SchemeGroupVersion
	switch obj.(type) {
	case *discoveryv1.EndpointSlice, *discoveryv1.EndpointSliceList:
		gv = discoveryv1.SchemeGroupVersion
	}
	b, err := runtime.Encode(a.codecs.WithoutConversion().EncoderForVersion(s, gv), obj)
	if err != nil {
		a.t.Error(err)
	}
	return b
}

func (a *api) fail(w http.ResponseWriter, req *http.Request, code int, reason metav1.StatusReason, message string) {
	info := a.info(req)
	w.Header().Set("Content-Type", info.MediaType)
	w.WriteHeader(code)
	w.Write(a.encode(info.Serializer, &metav1.Status{Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message}))
}

func (a *api) list(w http.ResponseWriter, req *http.Request, resource string, match func(runtime.Object) bool) {
	var list runtime.Object
	a.mu.Lock()
	lm := metav1.ListMeta{ResourceVersion: strconv.Itoa(a.version)}
	switch resource {
	case "pods":
		l := &corev1.PodList{ListMeta: lm}
		for _, o := range a.objects[resource] {
			if match(o) {
				l.Items = append(l.Items, *o.(*corev1.Pod))
			}
		}
		list = l
	case "services":
		l := &corev1.ServiceList{ListMeta: lm}
		for _, o := range a.objects[resource] {
			if match(o) {
				l.Items = append(l.Items, *o.(*corev1.Service))
			}
		}
		list = l
	case "endpointslices":
		l := &discoveryv1.EndpointSliceList{ListMeta: lm}
		for _, o := range a.objects[resource] {
			if match(o) {
				l.Items = append(l.Items, *o.(*discoveryv1.EndpointSlice))
			}
		}
		list = l
	}
	a.mu.Unlock()
	info := a.info(req)
	w.Header().Set("Content-Type", info.MediaType)
	w.Write(a.encode(info.Serializer, list))
}

func (a *api) create(w http.ResponseWriter, req *http.Request) {
	info := a.info(req)
	body, _ := io.ReadAll(req.Body)
	obj, err := runtime.Decode(info.Serializer, body)
	e, ok := obj.(*corev1.Event)
	if err != nil || !ok {
		a.fail(w, req, http.StatusBadRequest, metav1.StatusReasonBadRequest, fmt.Sprint(err))
		return
	}
	a.set(func() { a.created = append(a.created, e) })
	w.Header().Set("Content-Type", info.MediaType)
	w.WriteHeader(http.StatusCreated)
	w.Write(a.encode(info.Serializer, e))
}

func (a *api) watch(w http.ResponseWriter, req *http.Request, resource, name string, match func(runtime.Object) bool) {
	q := req.URL.Query()
	from, _ := strconv.Atoi(q.Get("resourceVersion"))
	info := a.info(req)
	w.Header().Set("Content-Type", info.MediaType+";stream=watch")
	w.WriteHeader(http.StatusOK)
	frame := info.StreamSerializer.Framer.NewFrameWriter(w)
	flusher := w.(http.Flusher)
	flusher.Flush()
	send := func(t watch.EventType, obj runtime.Object) {
		raw := a.encode(info.StreamSerializer.Serializer, obj)
		ev := &metav1.WatchEvent{Type: string(t), Object: runtime.RawExtension{Raw: raw}}
		if info.MediaType == runtime.ContentTypeJSON {
			b, err := json.Marshal(ev)
			if err != nil {
				a.t.Error(err)
			}
			frame.Write(b)
		} else {
			frame.Write(a.encode(info.StreamSerializer.Serializer, ev))
		}
		flusher.Flush()
	}

	if name == "" {
		name = "*"
	}
	key := resource + " " + name
	a.mu.Lock()
	defer a.mu.Unlock()
	a.open[key]++
	defer func() { a.open[key]-- }()
	stop := a.stop
	go func() {
		select {
		case <-req.Context().Done():
		case <-stop:
		}
		a.set(func() {})
	}()

	if q.Get("sendInitialEvents") == "true" {
		for _, o := range a.objects[resource] {
			if match(o) {
				send(watch.Added, o)
			}
		}
		bookmark := map[string]runtime.Object{"pods": &corev1.Pod{}, "services": &corev1.Service{}, "endpointslices": &discoveryv1.EndpointSlice{}}[resource]
		m, _ := meta.Accessor(bookmark)
		m.SetResourceVersion(strconv.Itoa(a.version))
		m.SetAnnotations(map[string]string{metav1.InitialEventsAnnotationKey: "true"})
		send(watch.Bookmark, bookmark)
		from = a.version
	} else if from < a.compacted {
		send(watch.Error, &metav1.Status{Status: metav1.StatusFailure, Code: http.StatusGone, Reason: metav1.StatusReasonExpired, Message: "too old resource version"})
		return
	}
	for {
		for _, c := range a.history {
			if c.version <= from || c.resource != resource {
				continue
			}
			from = c.version
			switch was, is := match(c.old), match(c.now); {
			case was && is:
				send(watch.Modified, c.now)
			case is:
				send(watch.Added, c.now)
			case was:
				gone := c.old.DeepCopyObject()
				m, _ := meta.Accessor(gone)
				m.SetResourceVersion(strconv.Itoa(c.version))
				send(watch.Deleted, gone)
			}
		}
		select {
		case <-req.Context().Done():
			return
		case <-stop:
			return
		default:
		}
		a.changed.Wait()
	}
}
