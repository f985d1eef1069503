package health

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health/probe"
)

func parse(t testing.TB, settings string) Settings {
	t.Helper()
	s, err := strict(settings)
	if err != nil {
		t.Fatalf("%s: %v", settings, err)
	}
	return s
}

// strict decodes settings as the agent does.
func strict(settings string) (s Settings, err error) {
	dec := json.NewDecoder(strings.NewReader(settings))
	dec.DisallowUnknownFields()
	err = dec.Decode(&s)
	return s, err
}

// rig is a Health with both listeners, and a record of what OnChange heard.
type rig struct {
	*Health
	t             testing.TB
	hook, control *http.ServeMux

	mu    sync.Mutex
	heard []string
}

func newRig(t testing.TB, settings string) *rig {
	t.Helper()
	r := &rig{t: t, hook: http.NewServeMux(), control: http.NewServeMux()}
	h, err := New(Config{
		Settings: parse(t, settings),
		OnChange: func(a lifecycle.Availability) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.heard = append(r.heard, words(a))
		},
		Authorized: func(r *http.Request) bool { return r.Header.Get(api.TokenHeader) == "let me in" },
	})
	if err != nil {
		t.Fatal(err)
	}
	h.Routes(r.hook, r.control)
	r.Health = h
	return r
}

func words(a lifecycle.Availability) string {
	return strings.TrimSpace(fmt.Sprintf("%s %s / %s %s", a.Liveness.State, a.Liveness.Cause, a.Readiness.State, a.Readiness.Cause))
}

// run starts Run, in a bubble or out of it, and ends it with the test.
func (r *rig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	r.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("Run: %v", err)
		}
	})
}

func (r *rig) ask(mux *http.ServeMux, method, path, body string, header ...string) *httptest.ResponseRecorder {
	req := httptest.NewRequest(method, path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, req)
	return w
}

// do is a request on the control listener that has to succeed.
func (r *rig) do(method, path, body string) string {
	r.t.Helper()
	w := r.ask(r.control, method, path, body)
	if w.Code >= 300 {
		r.t.Fatalf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
	return w.Body.String()
}

func (r *rig) readiness(want lifecycle.ReadinessState, cause string) {
	r.t.Helper()
	if got := r.Availability().Readiness; got.State != want || got.Cause != cause {
		r.t.Errorf("readiness: got %s %q, want %s %q", got.State, got.Cause, want, cause)
	}
}

func (r *rig) livenessIs(want lifecycle.LivenessState, cause string) {
	r.t.Helper()
	if got := r.Availability().Liveness; got.State != want || got.Cause != cause {
		r.t.Errorf("liveness: got %s %q, want %s %q", got.State, got.Cause, want, cause)
	}
}

// turn is a word of a component's probes.
func (r *rig) turn(name string, started, live, ready bool, outputs ...string) {
	s := probe.State{Started: started, Live: live, Ready: ready, Results: map[probe.Kind]probe.Result{}}
	if len(outputs) > 0 {
		for _, k := range []probe.Kind{probe.Startup, probe.Liveness, probe.Readiness} {
			s.Results[k] = probe.Result{Output: outputs[0]}
		}
	}
	r.probed(r.components[name], s)
}

const (
	threeProbes = `"startupProbe": {"exec": {"command": ["true"]}}, "livenessProbe": {"exec": {"command": ["true"]}}, "readinessProbe": {"exec": {"command": ["true"]}}`
	ready       = `"readinessProbe": {"exec": {"command": ["true"]}}`
)

func TestNobodySaysAnythingWhenNothingIsConfigured(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{}`)
		r.run()
		time.Sleep(time.Hour)
		if a := r.Availability(); a != (lifecycle.Availability{}) || len(r.heard) != 0 {
			t.Errorf("got %+v, heard %q", a, r.heard)
		}
		for path, status := range map[string]string{"/health": "UP", "/health/readiness": "UP", "/health/liveness": "UNKNOWN", "/health/startup": "UNKNOWN"} {
			w := r.ask(r.hook, "GET", path, "")
			var got api.Health
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || w.Code != 200 || got.Status != status {
				t.Errorf("%s: %d %s", path, w.Code, w.Body)
			}
		}
	})
}

func TestApplicationsWordHoldsOnceItsPutIsAnswered(t *testing.T) {
	r := newRig(t, `{}`) // and Run isn't running
	r.do("PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "cause": "warming up"}`)
	r.readiness(lifecycle.RefusingTraffic, "application: warming up")
	if w := r.ask(r.hook, "GET", "/health/readiness", ""); w.Code != 503 {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
	if w := r.ask(r.hook, "GET", "/health/liveness", ""); w.Code != 200 {
		t.Errorf("liveness: got %d %s", w.Code, w.Body)
	}
	since := r.Availability().Readiness.Since
	r.do("PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "cause": "still warming up"}`)
	r.readiness(lifecycle.RefusingTraffic, "application: still warming up")
	if got := r.Availability().Readiness.Since; got != since {
		t.Errorf("another cause of the same state moved since from %v to %v", since, got)
	}
	r.do("PUT", "/v1/availability/readiness", `{"state": "ACCEPTING_TRAFFIC"}`)
	r.readiness(lifecycle.AcceptingTraffic, "application")
	r.do("PUT", "/v1/availability/liveness", `{"state": "BROKEN", "cause": "deadlock"}`)
	r.livenessIs(lifecycle.Broken, "application: deadlock")
	if w := r.ask(r.hook, "GET", "/health/liveness", ""); w.Code != 503 {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestOnChangeHearsOfEachStateOnceAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"components": {"db": {`+ready+`}}}`)
		ctx, cancel := context.WithCancel(t.Context())
		r.probers = nil // no word but the steps' own
		go r.Run(ctx)
		synctest.Wait()
		for _, step := range []func(){
			func() { r.turn("db", true, true, true) },
			func() { r.turn("db", true, true, true) },
			func() { r.turn("db", true, true, false, "refused") },
			func() { r.setReadiness(lifecycle.RefusingTraffic, "busy") },
			func() { r.turn("db", true, true, true) },
			func() { r.setReadiness(lifecycle.AcceptingTraffic, "") },
			func() { r.setLiveness(lifecycle.Broken, "deadlock") },
		} {
			step()
			synctest.Wait()
		}
		want := []string{
			"/ REFUSING_TRAFFIC component db: readiness probe has not succeeded yet",
			"/ ACCEPTING_TRAFFIC",
			"/ REFUSING_TRAFFIC component db: readiness probe failed: refused",
			"/ REFUSING_TRAFFIC application: busy",
			"/ ACCEPTING_TRAFFIC application",
			"BROKEN application: deadlock / ACCEPTING_TRAFFIC application",
		}
		if !slices.Equal(r.heard, want) {
			t.Errorf("heard\n%s\nwant\n%s", strings.Join(r.heard, "\n"), strings.Join(want, "\n"))
		}
		cancel()
		synctest.Wait()
	})
}

func TestCriticalComponentKeepsFromReady(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+threeProbes+`}}}`)
	r.readiness(lifecycle.RefusingTraffic, "component db: startup probe has not succeeded yet")
	r.livenessIs(lifecycle.Correct, "")
	r.turn("db", true, true, false)
	r.readiness(lifecycle.RefusingTraffic, "component db: readiness probe has not succeeded yet")
	r.turn("db", true, true, true)
	r.readiness(lifecycle.AcceptingTraffic, "")
	r.turn("db", true, true, false, "connection refused")
	r.readiness(lifecycle.RefusingTraffic, "component db: readiness probe failed: connection refused")
	r.livenessIs(lifecycle.Correct, "")
	r.turn("db", true, false, false, "timeout")
	r.livenessIs(lifecycle.Broken, "component db: liveness probe failed: timeout")
	r.turn("db", false, false, false, "never came up")
	r.livenessIs(lifecycle.Broken, "component db: startup probe failed: never came up")
}

func TestWeakComponentNeverKeepsFromReady(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+ready+`}, "cache": {"critical": false, `+threeProbes+`}}}`)
	r.turn("db", true, true, true)
	r.readiness(lifecycle.AcceptingTraffic, "")
	r.turn("cache", false, false, false, "no route")
	r.readiness(lifecycle.AcceptingTraffic, "")
	r.livenessIs(lifecycle.Correct, "")
	for path, want := range map[string]string{"/health": "UP", "/health/readiness": "UP", "/health/cache": "DEGRADED", "/health/readiness/cache": "DEGRADED", "/health/startup/cache": "DEGRADED"} {
		w := r.ask(r.hook, "GET", path, "")
		var got api.Health
		if json.Unmarshal(w.Body.Bytes(), &got); w.Code != 200 || got.Status != want {
			t.Errorf("%s: %d %s, want %s", path, w.Code, w.Body, want)
		}
	}
}

func TestDrainAndHoldShowButAreNotToldBack(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+ready+`}}}`)
	r.turn("db", true, true, true)
	said := r.Availability()
	for _, tc := range []struct {
		l     Lifecycle
		cause string
	}{
		{Lifecycle{State: "Draining", Cause: "prestop hook", Draining: true}, "draining: prestop hook"},
		{Lifecycle{State: "Offline", Cause: "held by jane: upgrade", Held: true}, "held by jane: upgrade"},
		{Lifecycle{State: "Draining", Draining: true, Held: true}, "draining"},
	} {
		r.SetLifecycle(tc.l)
		if got := r.Effective().Readiness; got.State != lifecycle.RefusingTraffic || got.Cause != tc.cause {
			t.Errorf("%+v: effective %+v", tc.l, got)
		}
		if got := r.Availability(); got != said {
			t.Errorf("%+v: was told %+v", tc.l, got)
		}
		if w := r.ask(r.hook, "GET", "/health/readiness", ""); w.Code != 503 || !strings.Contains(w.Body.String(), `"OUT_OF_SERVICE"`) {
			t.Errorf("%+v: got %d %s", tc.l, w.Code, w.Body)
		}
		if w := r.ask(r.hook, "GET", "/health/liveness", ""); w.Code != 200 {
			t.Errorf("%+v: liveness: got %d", tc.l, w.Code)
		}
		if got := r.do("GET", "/v1/availability/readiness", ""); !strings.Contains(got, tc.cause) {
			t.Errorf("%+v: got %s", tc.l, got)
		}
	}
	r.SetLifecycle(Lifecycle{State: "Released"}) // and its Pod stays
	if w := r.ask(r.hook, "GET", "/health/readiness", ""); w.Code != 200 {
		t.Errorf("released: got %d %s", w.Code, w.Body)
	}
}

func TestCausesHaveAnOrder(t *testing.T) {
	r := newRig(t, `{"components": {"a": {`+ready+`}, "b": {`+ready+`}}, "workers": {"required": 1}}`)
	cause := func(want string) {
		t.Helper()
		if got := r.Effective().Readiness.Cause; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	r.setReadiness(lifecycle.RefusingTraffic, "busy")
	r.SetLifecycle(Lifecycle{Held: true, Draining: true, Cause: "x"})
	cause("application: busy")
	r.setReadiness(lifecycle.AcceptingTraffic, "fine")
	cause("draining: x")
	r.SetLifecycle(Lifecycle{})
	cause("component a: readiness probe has not succeeded yet")
	r.turn("a", true, true, true)
	cause("component b: readiness probe has not succeeded yet")
	r.turn("b", true, true, true)
	cause("0 of 1 workers ready")
	r.do("PUT", "/v1/workers/1", `{"state": "READY"}`)
	cause("application: fine")
}

func TestRestartVoidsWhatTheOldProcessesSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"components": {"db": {`+threeProbes+`}}, "workers": {"required": 1}}`)
		r.turn("db", true, false, false, "deadlock")
		r.setLiveness(lifecycle.Broken, "deadlock")
		r.setReadiness(lifecycle.RefusingTraffic, "deadlock")
		r.do("PUT", "/v1/workers/m", `{"state": "READY", "role": "master"}`)
		r.do("PUT", "/v1/workers/old", `{"state": "READY"}`)
		time.Sleep(5 * time.Second)
		restart := time.Now()
		time.Sleep(time.Second)
		// The new container is quicker than the news of it.
		r.setReadiness(lifecycle.RefusingTraffic, "starting")
		r.do("PUT", "/v1/workers/new", `{"state": "READY"}`)
		time.Sleep(time.Second)
		r.Restarted("container restarted", restart)
		r.livenessIs(lifecycle.Correct, "")
		r.readiness(lifecycle.RefusingTraffic, "application: starting")
		if got := r.do("GET", "/v1/workers/", ""); strings.Contains(got, `"old"`) || strings.Contains(got, `"m"`) || !strings.Contains(got, `"new"`) {
			t.Errorf("workers: %s", got)
		}
		r.setReadiness(lifecycle.AcceptingTraffic, "")
		r.readiness(lifecycle.RefusingTraffic, "component db: startup probe has not succeeded yet")
		r.turn("db", true, true, true)
		r.readiness(lifecycle.AcceptingTraffic, "application")

		r.setLiveness(lifecycle.Broken, "said in the new container's first second, by the old one")
		r.Restarted("container restarted", restart)
		r.livenessIs(lifecycle.Correct, "")

		r.Restarted("container restarted", time.Time{})
		r.readiness(lifecycle.RefusingTraffic, "component db: startup probe has not succeeded yet")
		if got := r.do("GET", "/v1/workers/", ""); got != "[]\n" {
			t.Errorf("workers: %s", got)
		}
	})
}

// A word that is said again and again is as new as its last time.
func TestRestartKeepsAWordThatTheNewContainerRepeats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{}`)
		r.setReadiness(lifecycle.RefusingTraffic, "starting")
		time.Sleep(10 * time.Second)
		restart := time.Now()
		time.Sleep(time.Second)
		r.setReadiness(lifecycle.RefusingTraffic, "starting")
		r.Restarted("container restarted", restart)
		r.readiness(lifecycle.RefusingTraffic, "application: starting")
	})
}

func TestProbesDecideForReal(t *testing.T) {
	dir := t.TempDir()
	r := newRig(t, fmt.Sprintf(`{"components": {"app": {"readinessProbe": {"exec": {"command": ["test", "-d", %q]}, "periodSeconds": 1, "failureThreshold": 1}}},
		"workers": {"probes": {"w1": {"exec": {"command": ["test", "-d", %q]}, "periodSeconds": 1}}}}`, dir, dir))
	r.run()
	deadline := time.Now().Add(30 * time.Second)
	for r.Availability().Readiness.State != lifecycle.AcceptingTraffic {
		if time.Now().After(deadline) {
			t.Fatalf("not ready: %+v", r.Availability())
		}
		time.Sleep(10 * time.Millisecond)
	}
	got := r.do("GET", "/health/app", "")
	if !strings.Contains(got, `"readiness": {`) || !strings.Contains(got, `"ok": true`) || !strings.Contains(got, `"streak": `) {
		t.Errorf("got %s", got)
	}
	if w := r.ask(r.control, "PUT", "/v1/workers/w1", `{"state": "READY"}`); w.Code != 409 || !strings.Contains(w.Body.String(), "is probed") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestConcurrentUse(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+threeProbes+`}}, "workers": {"required": 2}}`)
	r.run()
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for n := range 50 {
				r.do("PUT", fmt.Sprintf("/v1/workers/%d-%d", i, n%5), `{"state": "READY", "ttlSeconds": 1}`)
				r.do("PUT", "/v1/availability/readiness", `{"state": "ACCEPTING_TRAFFIC"}`)
				r.ask(r.hook, "GET", "/health", "")
				r.do("GET", "/v1/workers/", "")
				r.turn("db", true, true, n%2 == 0)
				r.SetLifecycle(Lifecycle{State: "Online", Draining: n%3 == 0})
				if n%10 == 0 {
					r.Restarted("test", time.Now())
				}
			}
		})
	}
	wg.Wait()
}

func equalJSON(t *testing.T, got []byte, want string) {
	t.Helper()
	var g, w bytes.Buffer
	if err := errors.Join(json.Compact(&g, got), json.Compact(&w, []byte(want))); err != nil {
		t.Fatal(err)
	}
	if g.String() != w.String() {
		t.Errorf("got\n%s\nwant\n%s", &g, &w)
	}
}
