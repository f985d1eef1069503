package registry_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

// other writes another pod's record.
func (w *world) other(svc, name, state string, keys ...string) {
	w.t.Helper()
	r := registry.Record{Owner: registry.Owner{Cluster: cluster, PodUID: "uid-of-" + name, Agent: "a"},
		Namespace: namespace, Service: svc, Pod: name, State: state, Keys: keys}
	v, err := r.Encode()
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(registry.InstanceKey(cluster, namespace, svc, name), string(v))
}

func TestOthersAreThoseOfOtherPodsWithRecordsThatConsumersSee(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	w.other("api", "api-1", "Online", "k")
	w.other("api", "api-2", "Online", "k")
	w.other("api", "api-3", "Online") // held, or not written yet
	w.other("api", "api-4", "Draining", "k")
	w.other("api-v2", "api-5", "Online", "k")
	w.put(registry.InstanceKey(cluster, namespace, "api", "api-6"), "by hand")
	if n, err := a.Others(t.Context(), "api"); n != 2 || err != nil {
		t.Errorf("%d others, %v; want 2", n, err)
	}
	if n, err := a.Others(t.Context(), "nobody"); n != 0 || err != nil {
		t.Errorf("%d others of a service that nobody has, %v", n, err)
	}
}

func TestOthersOfAThousand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	for i := range 1000 {
		w.other("api", fmt.Sprintf("api-%04d", i), "Online", "k")
	}
	start := time.Now()
	if n, err := a.Others(t.Context(), "api"); n != 1000 || err != nil {
		t.Errorf("%d others, %v; want 1000", n, err)
	}
	t.Logf("counted in %s", time.Since(start))
	start = time.Now()
	if err := a.WaitOthers(t.Context(), 3); err != nil {
		t.Error(err)
	}
	t.Logf("3 found in %s", time.Since(start))
	if err := a.WaitOthers(t.Context(), 1000); err != nil {
		t.Error(err)
	}
}

// waiting runs WaitOthers.
func (a *agent) waiting(ctx context.Context, least int) <-chan error {
	done := make(chan error, 1)
	go func() { done <- a.WaitOthers(ctx, least) }()
	return done
}

func finished(t *testing.T, done <-chan error) error {
	t.Helper()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatalf("WaitOthers has not returned after %s", patience)
		return nil
	}
}

func stillWaits(t *testing.T, done <-chan error, when string) {
	t.Helper()
	select {
	case err := <-done:
		t.Fatalf("%s: WaitOthers returned %v", when, err)
	case <-time.After(200 * time.Millisecond):
	}
}

func TestWaitOthersReturnsWithTheLastOneThatIsNeeded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{services: []string{"api", "web"}})
	w.other("web", "api-1", "Online", "k")
	w.other("web", "api-2", "Online", "k")
	done := a.waiting(t.Context(), 2)
	w.other("api", "api-1", "Online", "k")
	stillWaits(t, done, "1 of 2")
	w.other("api", "api-1", "Draining")
	w.other("api", "api-2", "Online", "k")
	stillWaits(t, done, "1 of 2, as one went")
	w.remove(registry.InstanceKey(cluster, namespace, "web", "api-1"))
	w.other("api", "api-3", "Online", "k")
	stillWaits(t, done, "2 of 2, and the other Service has lost one")
	w.other("api", "api-2", "Draining")
	w.other("web", "api-3", "Online", "k")
	stillWaits(t, done, "the other Service has it back, and this one has lost one")
	w.other("api", "api-4", "Online", "k")
	if err := finished(t, done); err != nil {
		t.Error(err)
	}
}

func TestWaitOthersSaysHowManyThereWere(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{})
	w.other("api", "api-1", "Online", "k")
	enough := errors.New("no time left")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 500*time.Millisecond, enough)
	defer cancel()
	err := finished(t, a.waiting(ctx, 2))
	if !errors.Is(err, enough) || !strings.Contains(err.Error(), "service api has 1 other instances advertised, want 2") {
		t.Errorf("error %v", err)
	}
}

func TestWaitOthersWithNothingToGuard(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(spec{})
	if err := finished(t, a.waiting(t.Context(), 1)); err != nil {
		t.Errorf("before anything was desired: %v", err)
	}
	a.offline("not ready")
	a.sync()
	if err := finished(t, a.waiting(t.Context(), 1)); err != nil {
		t.Errorf("not advertised: %v", err)
	}
	a.Set(a.desired(lifecycle.Online, "ready"))
	a.sync()
	if err := finished(t, a.waiting(t.Context(), 0)); err != nil {
		t.Errorf("none wanted: %v", err)
	}
}

func TestWaitOthersGoesOnAfterEtcdWasAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	link := w.etcd.Link()
	a := w.registered(spec{link: link, ttl: time.Minute})
	done := a.waiting(t.Context(), 1)
	stillWaits(t, done, "none")
	link.Set(etcdtest.Refuse)
	w.other("api", "api-1", "Online", "k")
	stillWaits(t, done, "etcd is away")
	link.Set(etcdtest.Pass)
	if err := finished(t, done); err != nil {
		t.Error(err)
	}
	link.Set(etcdtest.Hold)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := finished(t, a.waiting(ctx, 1)); err == nil || !strings.Contains(err.Error(), "the other instances of service api could not be counted") {
		t.Errorf("error %v", err)
	}
}
