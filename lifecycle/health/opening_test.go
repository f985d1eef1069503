package health

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health/probe"
)

// opening is a Health whose components are probed over connections that exist in the bubble alone.
type opening struct {
	*Health
	t     *testing.T
	start time.Time

	mu      sync.Mutex
	down    map[string]bool // ports
	changes []string
}

func newOpening(t *testing.T, settings string, change ...func(*Config)) *opening {
	t.Helper()
	o := &opening{t: t, start: time.Now(), down: map[string]bool{}}
	cfg := Config{
		Settings: parse(t, settings),
		Wrap:     func(probe.Dial) probe.Dial { return o.dial },
		OnChange: func(a lifecycle.Availability) {
			o.mu.Lock()
			defer o.mu.Unlock()
			o.changes = append(o.changes, fmt.Sprintf("%s undecided=%t", a.Readiness.State, a.Undecided))
		},
	}
	for _, c := range change {
		c(&cfg)
	}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	o.Health = h
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return o
}

func (o *opening) dial(_ context.Context, _, address string) (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	_, port, _ := net.SplitHostPort(address)
	if o.down[port] {
		return nil, fmt.Errorf("connect %s: refused", address)
	}
	near, far := net.Pipe()
	far.Close()
	return near, nil
}

// fails makes what listens on a port go, or come back.
func (o *opening) fails(port string, yes bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.down[port] = yes
}

// until waits for the end of what is open, and says when that was.
func (o *opening) until() time.Duration {
	o.t.Helper()
	for o.Availability().Undecided {
		if time.Since(o.start) > time.Hour {
			o.t.Fatal("never decided")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
	}
	return time.Since(o.start)
}

func (o *opening) decided(state lifecycle.ReadinessState, from, to time.Duration) {
	o.t.Helper()
	at := o.until()
	if got := o.Availability().Readiness; got.State != state || at < from || at > to {
		o.t.Errorf("decided after %s: %s %q; want %s, from %s to %s", at, got.State, got.Cause, state, from, to)
	}
}

func (o *opening) undecided() {
	o.t.Helper()
	synctest.Wait()
	if a := o.Availability(); !a.Undecided || a.Readiness.State != lifecycle.RefusingTraffic {
		o.t.Errorf("after %s: %+v; want it open, and to the outside REFUSING_TRAFFIC", time.Since(o.start), a)
	}
}

const tcp1 = `{"tcpSocket": {"port": 1}, "periodSeconds": 1}`

func TestNothingIsDecidedUntilTheFirstResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpening(t, `{"components": {"app": {"readinessProbe": `+tcp1+`}}}`)
		o.undecided()
		o.decided(lifecycle.AcceptingTraffic, time.Millisecond, time.Second)
		want := []string{"REFUSING_TRAFFIC undecided=true", "ACCEPTING_TRAFFIC undecided=false"}
		o.mu.Lock()
		if !slices.Equal(o.changes, want) {
			t.Errorf("told %q, want %q", o.changes, want)
		}
		o.mu.Unlock()
		// From here on what is known counts.
		o.fails("1", true)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if a := o.Availability(); a.Undecided || a.Readiness.State != lifecycle.RefusingTraffic {
			t.Errorf("after three failures: %+v", a)
		}
	})
}

func TestRestartOfTheContainerLeavesNothingOpen(t *testing.T) {
	for name, after := range map[string]time.Duration{"in the opening": time.Second, "after it": 7 * time.Second} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOpening(t, `{"components": {"app": {"readinessProbe": {"tcpSocket": {"port": 1}, "initialDelaySeconds": 5, "periodSeconds": 1}}}}`)
				time.Sleep(after)
				o.Restarted("test", time.Time{})
				synctest.Wait() // the probe is silent again
				if a := o.Availability(); a.Undecided || a.Readiness.State != lifecycle.RefusingTraffic {
					t.Errorf("%+v", a)
				}
			})
		})
	}
}

// One failure is enough, whatever the threshold: readiness begins as failure, and nothing turns with it.
func TestFirstFailureDecides(t *testing.T) {
	for name, settings := range map[string]string{
		"readiness": `{"components": {"app": {"readinessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1, "failureThreshold": 9}}}}`,
		"startup":   `{"components": {"app": {"startupProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1, "failureThreshold": 60}, "readinessProbe": {"tcpSocket": {"port": 2}}}}}`,
		"one of two, while the other one waits": `{"components": {"app": {"readinessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1}},
			"db": {"readinessProbe": {"tcpSocket": {"port": 2}, "initialDelaySeconds": 10}}}}`,
		"of a worker": `{"workers": {"probes": {"w": {"tcpSocket": {"port": 1}, "periodSeconds": 1}}}}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOpening(t, settings)
				o.fails("1", true)
				o.undecided()
				o.decided(lifecycle.RefusingTraffic, time.Millisecond, time.Second+lookEvery)
			})
		})
	}
}

func TestOpeningGoesOnWhileAllThatIsHeardIsGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOpening(t, `{"components": {
			"app": {"startupProbe": `+tcp1+`, "readinessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1, "successThreshold": 4}},
			"cache": {"critical": false, "readinessProbe": {"tcpSocket": {"port": 2}, "periodSeconds": 1}}}}`)
		o.fails("2", true) // which says nothing about an application that can do without
		time.Sleep(2500 * time.Millisecond)
		o.undecided()
		o.decided(lifecycle.AcceptingTraffic, 3*time.Second, 5*time.Second)
	})
}

func TestOpeningIsBounded(t *testing.T) {
	for name, probe := range map[string]string{
		"by a long initial delay":           `{"tcpSocket": {"port": 1}, "initialDelaySeconds": 60}`,
		"when the probe can't be made":      `{"tcpSocket": {"port": "unknown"}, "periodSeconds": 1}`,
		"when the threshold is not reached": `{"tcpSocket": {"port": 1}, "periodSeconds": 5, "successThreshold": 9}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOpening(t, `{"components": {"app": {"readinessProbe": `+probe+`}}}`, func(c *Config) {
					c.Opening = 20 * time.Second
					c.Ports = func(string) (int, bool) { return 0, false }
				})
				time.Sleep(19 * time.Second)
				o.undecided()
				o.decided(lifecycle.RefusingTraffic, 20*time.Second, 20*time.Second+lookEvery)
				o.mu.Lock()
				defer o.mu.Unlock()
				if !slices.Contains(o.changes, "REFUSING_TRAFFIC undecided=false") {
					t.Errorf("told %q", o.changes)
				}
			})
		})
	}
}

func TestWordOfTheApplicationAgainstItDecides(t *testing.T) {
	for name, say := range map[string]func(*Health){
		"readiness": func(h *Health) { h.setReadiness(lifecycle.RefusingTraffic, "busy") },
		"liveness":  func(h *Health) { h.setLiveness(lifecycle.Broken, "deadlock") },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOpening(t, `{"components": {"app": {"readinessProbe": {"tcpSocket": {"port": 1}, "initialDelaySeconds": 5}}}}`)
				o.setReadiness(lifecycle.AcceptingTraffic, "") // decides nothing: the component has not been heard
				o.undecided()
				say(o.Health)
				o.decided(lifecycle.RefusingTraffic, 0, 0)
			})
		})
	}
}

func TestWorkersHaveTheirTTLToBeHeardAgain(t *testing.T) {
	put := func(o *opening, id, body string) {
		t.Helper()
		r := &rig{t: t, Health: o.Health, control: http.NewServeMux()}
		o.Routes(nil, r.control)
		r.do("PUT", "/v1/workers/"+id, body)
	}
	const isReady, isNot = `{"state": "READY", "ttlSeconds": 60}`, `{"state": "NOT_READY", "ttlSeconds": 60}`
	for _, tc := range []struct {
		name, settings string
		say            func(*opening)
		state          lifecycle.ReadinessState
		from, to       time.Duration
	}{
		{"all report", `{"required": 2}`, func(o *opening) { put(o, "a", isReady); o.undecided(); put(o, "b", isReady) }, lifecycle.AcceptingTraffic, 0, 0},
		{"one doesn't", `{"required": 2, "ttlSeconds": 6}`, func(o *opening) { put(o, "a", isReady) }, lifecycle.RefusingTraffic, 6 * time.Second, 6*time.Second + lookEvery},
		{"one that is named doesn't", `{"ids": ["a", "b"]}`, func(o *opening) { put(o, "a", isReady) }, lifecycle.RefusingTraffic, 10 * time.Second, 10*time.Second + lookEvery},
		{"one says no", `{"required": 2}`, func(o *opening) { put(o, "a", isNot) }, lifecycle.RefusingTraffic, 0, 0},
		{"one too few for the quorum says no", `{"ids": ["a", "b", "c"], "quorum": 2}`, func(o *opening) { put(o, "a", isNot); o.undecided(); put(o, "b", isNot) }, lifecycle.RefusingTraffic, 0, 0},
		{"the master says no", `{"required": 1}`, func(o *opening) { put(o, "m", `{"state": "NOT_READY", "role": "master", "ttlSeconds": 60}`) }, lifecycle.RefusingTraffic, 0, 0},
		{"a TTL longer than a lease's", `{"required": 1, "ttlSeconds": 600}`, func(*opening) {}, lifecycle.RefusingTraffic, defaultOpening, defaultOpening + lookEvery},
		{"a short TTL is none of those that are probed", `{"ttlSeconds": 1, "probes": {"w": {"tcpSocket": {"port": 1}, "initialDelaySeconds": 5, "periodSeconds": 1}}}`,
			func(*opening) {}, lifecycle.AcceptingTraffic, 5 * time.Second, 6 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := newOpening(t, `{"workers": `+tc.settings+`}`)
				o.undecided()
				tc.say(o)
				o.decided(tc.state, tc.from, tc.to)
			})
		})
	}
}

func TestNothingIsOpenWhereNobodyIsAsked(t *testing.T) {
	for _, settings := range []string{`{}`, `{"components": {"app": {"livenessProbe": ` + tcp1 + `}, "cache": {"critical": false, "readinessProbe": ` + tcp1 + `}}}`} {
		h, err := New(Config{Settings: parse(t, settings)})
		if err != nil {
			t.Fatal(err)
		}
		h.setReadiness(lifecycle.RefusingTraffic, "busy")
		if a := h.Availability(); a.Undecided {
			t.Errorf("%s: %+v", settings, a)
		}
	}
}
