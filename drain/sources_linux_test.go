package drain

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestWaitNeedsTheApplicationsSourcesToAgree is with the sources that ask an application: each has something in flight for a
// while that the others don't see.
func TestWaitNeedsTheApplicationsSourcesToAgree(t *testing.T) {
	var asJSON, asGauge atomic.Int32
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/inflight":
			fmt.Fprintf(w, `{"inFlight":%d}`, asJSON.Load())
		case "/metrics":
			fmt.Fprintf(w, "# TYPE in_flight gauge\nin_flight{app=\"a\"} %d\n", asGauge.Load())
		}
	}))
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "count")
	asText := func(n int) {
		t.Helper()
		if err := os.WriteFile(file+".new", fmt.Append(nil, n), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	sources := func(metric string) []Source {
		t.Helper()
		h, err := NewHTTP(HTTPConfig{URL: srv.URL + "/inflight", Field: "inFlight", Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		p, err := NewPrometheus(PrometheusConfig{URL: srv.URL + "/metrics", Metric: metric, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		e, err := NewExec(ExecConfig{Command: []string{"cat", file}, Timeout: time.Minute})
		if err != nil {
			t.Fatal(err)
		}
		return []Source{h, p, e}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	const quietSamples = 4
	seen := make(chan Progress)
	cfg := Config{
		Sources: sources("in_flight"), Interval: 10 * time.Millisecond, Quiet: quietSamples * 10 * time.Millisecond,
		SampleTimeout: time.Minute, Floor: time.Hour,
		OnSample: func(p Progress) {
			select {
			case seen <- p:
			case <-ctx.Done():
			}
		},
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	asJSON.Store(1)
	asGauge.Store(2)
	asText(3)
	done := make(chan Result, 1)
	go func() { done <- d.Wait(ctx, time.Now()) }()
	// stands waits until the sources have said so, each for longer than the quiet period.
	stands := func(want ...int) {
		t.Helper()
		since := make([]int, len(want))
		for i := range since {
			since[i] = -1
		}
		for {
			select {
			case r := <-done:
				t.Fatalf("the wait ended while the sources said %v: %+v", want, r)
			case p := <-seen:
				long := true
				for i, s := range p.Sources {
					if s.InFlight != want[i] || s.Err != "" {
						since[i] = -1
					} else if since[i] < 0 {
						since[i] = s.Samples
					}
					long = long && since[i] >= 0 && s.Samples > since[i]+2*quietSamples
				}
				if long {
					return
				}
			}
		}
	}
	stands(1, 2, 3)
	asJSON.Store(0)
	stands(0, 2, 3)
	asText(0)
	stands(0, 2, 0)
	asJSON.Store(4)
	asGauge.Store(0)
	stands(4, 0, 0)
	asJSON.Store(0)
	for over := false; !over; {
		select {
		case r := <-done:
			if over = true; r.Outcome != Quiet || r.InFlight != 0 {
				t.Errorf("got %+v, want quiet", r)
			}
			for i, want := range []int{4, 2, 3} {
				if got := r.Sources[i]; got.Peak != want {
					t.Errorf("%s: at most %d in flight, want %d", got.Name, got.Peak, want)
				}
			}
		case <-seen:
		}
	}

	cfg.Sources, cfg.Floor, cfg.OnSample = sources("in_fligth"), 300*time.Millisecond, nil
	if d, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	r := d.Wait(ctx, time.Now())
	if r.Outcome != Floor || r.Took < cfg.Floor || !strings.Contains(r.Sources[1].Err, "there is no metric in_fligth (similar gauges: in_flight)") {
		t.Errorf("with a wrong metric: got %+v, want the floor waited out", r)
	}
}
