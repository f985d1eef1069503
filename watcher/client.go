package watcher

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Client speaks to the API server: core/v1 and discovery/v1 only, as protobuf unless the rest.Config says otherwise. It
// costs half of what client-go's full clientset does, in the binary and in memory. It also learns by how much the
// API server's clock differs from this machine's.
type Client struct {
	core      rest.Interface
	discovery rest.Interface
	clock     *serverClock
}

// RESTConfig reads how to reach the API server: from the kubeconfig file of that path, or, when path is "", from the
// service account that Kubernetes mounts into a pod.
func RESTConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("reading the pod's service account (outside of a pod, name a kubeconfig file): %w", err)
		}
		return cfg, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig %q: %w", kubeconfig, err)
	}
	return cfg, nil
}

// NewClient makes a Client. It doesn't connect yet. cfg is not changed; its QPS and Burst are ignored, since the few
// requests made here have their own back-off and must not wait behind one another.
func NewClient(cfg *rest.Config) (*Client, error) {
	if cfg == nil {
		return nil, errors.New("watcher: NewClient needs a rest.Config")
	}
	c := &Client{clock: newServerClock(time.Now())}
	cfg = rest.CopyConfig(cfg)
	cfg.QPS = -1
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(newScheme()).WithoutConversion()
	if cfg.ContentType == "" {
		cfg.ContentType = runtime.ContentTypeProtobuf
		// JSON second, for the errors of proxies on the way.
		cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	}
	if cfg.UserAgent == "" {
		cfg.UserAgent = rest.DefaultKubernetesUserAgent()
	}
	cfg.Wrap(func(next http.RoundTripper) http.RoundTripper { return &roundTripper{next: next, clock: c.clock} })

	httpClient, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("making the API server's HTTP client: %w", err)
	}
	group := func(apiPath string, gv schema.GroupVersion) (rest.Interface, error) {
		cfg := rest.CopyConfig(cfg)
		cfg.APIPath = apiPath
		cfg.GroupVersion = &gv
		r, err := rest.RESTClientForConfigAndClient(cfg, httpClient)
		if err != nil {
			return nil, fmt.Errorf("making the API server's client for %s: %w", gv, err)
		}
		return r, nil
	}
	if c.core, err = group("/api", corev1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	if c.discovery, err = group("/apis", discoveryv1.SchemeGroupVersion); err != nil {
		return nil, err
	}
	return c, nil
}

// newScheme has only the types that are read or written: each further one costs memory in every sidecar.
func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	s.AddKnownTypes(corev1.SchemeGroupVersion,
		&corev1.Pod{}, &corev1.PodList{}, &corev1.Service{}, &corev1.ServiceList{}, &corev1.Event{})
	s.AddKnownTypes(discoveryv1.SchemeGroupVersion, &discoveryv1.EndpointSlice{}, &discoveryv1.EndpointSliceList{})
	metav1.AddToGroupVersion(s, corev1.SchemeGroupVersion)
	metav1.AddToGroupVersion(s, discoveryv1.SchemeGroupVersion)
	return s
}

// ClockSkew returns what is added to this machine's clock to get the API server's, and whether any answer has told it
// yet. It is 0 as long as the answers allow for that.
func (c *Client) ClockSkew() (time.Duration, bool) { return c.clock.skew() }

// roundTripper reads the clock off each answer, and tells who asked how the connection fared: client-go tries again by
// itself for a minute or two before it says so, and then hides EOF and time-outs of a watch behind an empty, successful one.
type roundTripper struct {
	next  http.RoundTripper
	clock *serverClock
}

func (r *roundTripper) RoundTrip(req *http.Request) (*http.Response, error) {
	sent := time.Now()
	resp, err := r.next.RoundTrip(req)
	if t, ok := req.Context().Value(tripKey{}).(*trip); ok {
		t.ended(err)
	}
	if err == nil {
		if date, perr := http.ParseTime(resp.Header.Get("Date")); perr == nil {
			r.clock.observe(sent, time.Now(), date)
		}
	}
	return resp, err
}

// WrappedRoundTripper lets client-go find the transport below.
func (r *roundTripper) WrappedRoundTripper() http.RoundTripper { return r.next }

// trip follows the round trips of one call, which run one after the other.
type trip struct {
	err  error       // of the last one
	lost func(error) // called for each one that got no answer
}

type tripKey struct{}

func withTrip(ctx context.Context, lost func(error)) (context.Context, *trip) {
	t := &trip{lost: lost}
	return context.WithValue(ctx, tripKey{}, t), t
}

func (t *trip) ended(err error) {
	if t.err = err; err != nil {
		t.lost(err)
	}
}
