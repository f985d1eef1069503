package load

import (
	"context"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// brisk is every kind, short enough for a test.
func brisk() []Share {
	return []Share{
		{Kind: Fast, Weight: 90},
		{Kind: Slow, Weight: 6, For: 300 * time.Millisecond},
		{Kind: VerySlow, Weight: 2, For: 800 * time.Millisecond},
		{Kind: Stream, Weight: 2, For: 400 * time.Millisecond},
	}
}

func TestInstanceThatLeavesTheRegistryAndDiesLaterCostsNothing(t *testing.T) {
	r := newRegistry(t)
	a, b := startApplication(t, "a"), startApplication(t, "b")
	r.online(a)
	r.online(b)
	g := start(t, Config{HTTPTarget: r.http, GRPCTarget: r.grpc, Rate: 150, Workers: 4, Mix: brisk()})
	eventually(t, "both instances answer over both protocols, and slow requests are in flight on a", func() bool {
		s := g.Snapshot()
		return answered(s, HTTP, "a") > 50 && answered(s, HTTP, "b") > 50 && answered(s, GRPC, "a") > 50 &&
			answered(s, GRPC, "b") > 50 && a.inFlight() > 0
	})

	r.offline(a)
	// Quiet for longer than a registry's news takes, as an agent would see to it.
	quiet := time.Now()
	eventually(t, "a is quiet for 500 ms", func() bool {
		if a.inFlight() > 0 {
			quiet = time.Now()
		}
		return time.Since(quiet) > 500*time.Millisecond
	})
	a.signal(syscall.SIGTERM)
	<-a.gone
	if code := a.cmd.ProcessState.ExitCode(); code != 143 {
		t.Errorf("the application exited with %d, want 143: it dies at once by default", code)
	}
	before := g.Snapshot()
	eventually(t, "b goes on", func() bool {
		s := g.Snapshot()
		return answered(s, HTTP, "b") > answered(before, HTTP, "b")+50 && answered(s, GRPC, "b") > answered(before, GRPC, "b")+50
	})

	report := g.stop()
	if report.Failed > 0 {
		t.Errorf("failures although the instance was quiet when it died:\n%s", report)
	}
	for _, k := range report.Kinds {
		if k.Answered == 0 {
			t.Errorf("no %s %s was answered", k.Protocol, k.Kind)
		}
	}
	if n := len(report.Kinds); n != 8 {
		t.Errorf("%d kinds were sent, want 4 over each of 2 protocols", n)
	}
}

func TestDeathOfARegisteredInstanceIsCountedAsLoss(t *testing.T) {
	for name, sig := range map[string]syscall.Signal{"SIGTERM": syscall.SIGTERM, "SIGKILL": syscall.SIGKILL} {
		for _, p := range []Protocol{HTTP, GRPC} {
			t.Run(name+"/"+string(p), func(t *testing.T) {
				t.Parallel()
				r := newRegistry(t)
				a := startApplication(t, "a")
				r.online(a)
				cfg := Config{Rate: 50, Workers: 2, Mix: []Share{{Kind: Slow, Weight: 1, For: 1500 * time.Millisecond}}}
				if p == HTTP {
					cfg.HTTPTarget = r.http
				} else {
					cfg.GRPCTarget = r.grpc
				}
				g := start(t, cfg)
				eventually(t, "slow requests are in flight", func() bool { return a.inFlight() >= 20 })
				a.signal(sig)
				<-a.gone
				report := g.stop()
				// All that was in flight at the signal is lost: at least what was seen, as none is answered within 1.5 s.
				if report.Failed < 20 {
					t.Errorf("%d failed, want the 20 or more that were in flight:\n%s", report.Failed, report)
				}
				for _, f := range report.Failures {
					want := []Class{EOF, Reset, Refused}
					if p == GRPC {
						want = append(want, Unavailable)
					}
					if !slices.Contains(want, f.Class) || f.Kind != Slow || f.Err == "" {
						t.Errorf("%+v: want a slow request with its error, of class %v", f, want)
					}
				}
				broken := report.Classes[EOF] + report.Classes[Reset] + report.Classes[Unavailable]
				if broken < 20 {
					t.Errorf("%d failed on a connection that broke, want 20 or more: %v", broken, report.Classes)
				}
			})
		}
	}
}

func TestRequestsToADeadInstanceFailUntilItLeavesTheRegistry(t *testing.T) {
	for _, p := range []Protocol{HTTP, GRPC} {
		t.Run(string(p), func(t *testing.T) {
			t.Parallel()
			r := newRegistry(t)
			a, b := startApplication(t, "a"), startApplication(t, "b")
			r.online(a)
			cfg := Config{Rate: 100, Mix: []Share{{Kind: Fast, Weight: 1}}}
			if p == HTTP {
				cfg.HTTPTarget = r.http
			} else {
				cfg.GRPCTarget = r.grpc
			}
			g := start(t, cfg)
			eventually(t, "a answers", func() bool { return answered(g.Snapshot(), p, "a") > 20 })
			// Its kept-alive connections are idle nearly all the time.
			a.signal(syscall.SIGKILL)
			<-a.gone
			eventually(t, "losses are counted", func() bool { return g.Snapshot().Failed > 10 })

			r.online(b)
			r.offline(a)
			eventually(t, "b answers", func() bool { return answered(g.Snapshot(), p, "b") > 10 })
			if n := g.Snapshot().Classes[Refused]; n == 0 {
				t.Errorf("no request was refused: %v", g.Snapshot().Classes)
			}
			report := g.stop()
			if last := report.Failures[len(report.Failures)-1]; len(report.Failures) < maxFailures && last.Class == "" {
				t.Errorf("a failure without a class: %+v", last)
			}
		})
	}
}

func TestInstanceThatAppearsIsUsed(t *testing.T) {
	r := newRegistry(t)
	a, b := startApplication(t, "a"), startApplication(t, "b")
	r.online(a)
	g := start(t, Config{HTTPTarget: r.http, GRPCTarget: r.grpc, Rate: 100, Workers: 2, Mix: []Share{{Kind: Fast, Weight: 1}}})
	eventually(t, "a answers", func() bool {
		return answered(g.Snapshot(), HTTP, "a") > 10 && answered(g.Snapshot(), GRPC, "a") > 10
	})
	r.online(b)
	eventually(t, "b answers", func() bool {
		return answered(g.Snapshot(), HTTP, "b") > 10 && answered(g.Snapshot(), GRPC, "b") > 10
	})
	if report := g.stop(); report.Failed > 0 {
		t.Errorf("failures without a cause:\n%s", report)
	}
}

func TestEmptyRegistryIsAFailureOfItsOwn(t *testing.T) {
	r := newRegistry(t)
	a := startApplication(t, "a")
	r.online(a)
	g := start(t, Config{HTTPTarget: r.http, GRPCTarget: r.grpc, Rate: 100, Workers: 2, Mix: []Share{{Kind: Fast, Weight: 1}}})
	eventually(t, "a answers", func() bool {
		return answered(g.Snapshot(), HTTP, "a") > 5 && answered(g.Snapshot(), GRPC, "a") > 5
	})
	r.offline(a)
	eventually(t, "requests find no instance", func() bool {
		s := g.Snapshot()
		return kindOf(s, HTTP, Fast).Failed > 5 && kindOf(s, GRPC, Fast).Failed > 5
	})
	report := g.stop()
	if n := report.Classes[NoInstance]; n != report.Failed {
		t.Errorf("%d of %d failures found no instance, want all:\n%s", n, report.Failed, report)
	}
}

func TestRunWaitsForTheFirstInstance(t *testing.T) {
	r := newRegistry(t)
	a := startApplication(t, "a")
	g := start(t, Config{HTTPTarget: r.http, GRPCTarget: r.grpc, Rate: 50, Mix: []Share{{Kind: Fast, Weight: 1}}})
	// The HTTP target alone is not enough.
	r.put(r.http, a.pod, a.http)
	for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if s := g.Snapshot(); s.Sent > 0 || !s.Started.IsZero() {
			t.Fatalf("%d requests were sent while a target had no instance", s.Sent)
		}
	}
	r.put(r.grpc, a.pod, a.grpc)
	eventually(t, "a answers", func() bool { return g.Snapshot().Answered > 5 })
	if report := g.stop(); report.Failed > 0 {
		t.Errorf("failures without a cause:\n%s", report)
	}
}

func TestRunSaysWhyItNeverBegan(t *testing.T) {
	for name, c := range map[string]struct {
		endpoint string
		want     string
	}{
		"no instance": {etcdURL, "no instance under nowhere/ within 300ms"},
		"no etcd":     {"http://" + nobody, "read nowhere/ from etcd at"},
	} {
		t.Run(name, func(t *testing.T) {
			g, err := New(Config{Endpoints: []string{c.endpoint}, HTTPTarget: "nowhere", Rate: 1, FirstInstance: 300 * time.Millisecond})
			if err != nil {
				t.Fatal(err)
			}
			_, err = g.Run(t.Context())
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if _, err := g.Run(t.Context()); err != ErrStarted {
				t.Errorf("a second run: %v, want ErrStarted", err)
			}
		})
	}
}

func TestResultsArriveOneAtATimeAndAddUp(t *testing.T) {
	r := newRegistry(t)
	a := startApplication(t, "a", "--max-for=100ms")
	r.online(a)
	var busy atomic.Bool
	var seen Counts
	cfg := Config{HTTPTarget: r.http, GRPCTarget: r.grpc, Rate: 200, Workers: 2, Duration: 700 * time.Millisecond,
		// The slow ones ask for more than the application grants: an answer, but a failure.
		Mix: []Share{{Kind: Fast, Weight: 8}, {Kind: Slow, Weight: 2, For: 200 * time.Millisecond}},
		OnResult: func(r Result) {
			if busy.Swap(true) {
				t.Error("two calls of OnResult at once")
			}
			defer busy.Store(false)
			seen.Sent++
			if r.Class == "" {
				seen.Answered++
			} else {
				seen.Failed++
			}
			if (r.Kind == Slow) != (r.Class == Status) {
				t.Errorf("%+v: want just the slow requests to fail, by their status", r)
			}
		}}
	report := start(t, cfg).wait()
	if seen != report.Counts {
		t.Errorf("OnResult saw %+v, the report says %+v", seen, report.Counts)
	}
	if report.Failed == 0 || report.Answered == 0 {
		t.Errorf("want some of each: %+v", report.Counts)
	}
}

// fakeSender answers after a while, in a synctest bubble.
type fakeSender struct {
	takes time.Duration
	err   error
}

func (f fakeSender) send(ctx context.Context, s Share) outcome {
	select {
	case <-time.After(f.takes):
		return outcome{instance: "there", err: f.err}
	case <-ctx.Done():
		return outcome{instance: "there", err: ctx.Err()}
	}
}

func fakeRoute(p Protocol, s sender) route {
	return route{protocol: p, shared: s, worker: func() (sender, func()) { return s, func() {} }}
}

func newFake(t *testing.T, cfg Config) *Generator {
	t.Helper()
	cfg.Endpoints, cfg.HTTPTarget, cfg.Mix = []string{"unused"}, "unused", []Share{{Kind: Fast, Weight: 1}}
	g, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestOpenLoopKeepsItsScheduleWhateverTheAnswersDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		g := newFake(t, Config{Rate: 10, Duration: 2*time.Second - time.Millisecond})
		r := g.generate(t.Context(), []route{fakeRoute(HTTP, fakeSender{takes: 5 * time.Second}), fakeRoute(GRPC, fakeSender{takes: 5 * time.Second})})
		checkSums(t, r)
		if r.Answered != 20 || kindOf(r, HTTP, Fast).Sent != 10 || kindOf(r, GRPC, Fast).Sent != 10 {
			t.Errorf("%d answered, want 20, half of them over each protocol: %+v", r.Answered, r.Kinds)
		}
		// The last one, due after 1.9 s, is waited for.
		if took := time.Since(began); took != 6900*time.Millisecond {
			t.Errorf("took %v, want 6.9s", took)
		}
		if l := r.Latency; l.Max != 5*time.Second || l.P50 != 5*time.Second {
			t.Errorf("latencies %+v, want 5s", l)
		}
	})
}

func TestLatencyCountsFromTheSchedule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newFake(t, Config{Rate: 1, Duration: time.Second})
		collected := make(chan Result, 1)
		go func() { collected <- <-g.results }()
		g.tally.sent(HTTP, Fast)
		due := time.Now().Add(-3 * time.Second)
		g.one(t.Context(), HTTP, fakeSender{takes: time.Second}, Share{Kind: Fast}, due)
		if r := <-collected; r.Latency != 4*time.Second || !r.Scheduled.Equal(due) {
			t.Errorf("latency %v scheduled %v, want 4s from %v", r.Latency, r.Scheduled, due)
		}
	})
}

func TestClosedLoopSendsNextWhenAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newFake(t, Config{Workers: 3, Duration: 10*time.Second - time.Millisecond})
		r := g.generate(t.Context(), []route{fakeRoute(HTTP, fakeSender{takes: time.Second})})
		checkSums(t, r)
		if r.Answered != 30 {
			t.Errorf("%d answered, want 10 by each of 3 workers", r.Answered)
		}
	})
}

func TestClosedLoopDoesNotSpinOnFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newFake(t, Config{Workers: 1, Duration: time.Second - time.Millisecond})
		r := g.generate(t.Context(), []route{fakeRoute(HTTP, fakeSender{err: errNoInstance})})
		checkSums(t, r)
		if want := int64(time.Second / afterFailure); r.Failed != want || r.Classes[NoInstance] != want {
			t.Errorf("%d failed, want %d: %v", r.Failed, want, r.Classes)
		}
	})
}

func TestAnswerThatNeverComesTimesOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		g := newFake(t, Config{Rate: 1, Duration: 1500 * time.Millisecond, Timeout: 4 * time.Second})
		r := g.generate(t.Context(), []route{fakeRoute(HTTP, fakeSender{takes: time.Hour})})
		checkSums(t, r)
		if r.Failed != 2 || r.Classes[Timeout] != 2 || time.Since(began) != 5*time.Second {
			t.Errorf("after %v: %+v %v, want 2 timeouts after 5s", time.Since(began), r.Counts, r.Classes)
		}
	})
}

func TestBadConfigIsNamed(t *testing.T) {
	good := Config{Endpoints: []string{"http://127.0.0.1:2379"}, HTTPTarget: "a", GRPCTarget: "b", Rate: 1}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for want, spoil := range map[string]func(*Config){
		"Endpoints is empty":                    func(c *Config) { c.Endpoints = nil },
		"neither HTTPTarget nor GRPCTarget":     func(c *Config) { c.HTTPTarget, c.GRPCTarget = "", "" },
		`HTTPTarget "a/" ends in a slash`:       func(c *Config) { c.HTTPTarget = "a/" },
		`GRPCTarget "a?b" has a ?`:              func(c *Config) { c.GRPCTarget = "a?b" },
		"Rate is -1":                            func(c *Config) { c.Rate = -1 },
		"Rate is 1e+09":                         func(c *Config) { c.Rate = 1e9 },
		"neither Rate nor Workers":              func(c *Config) { c.Rate = 0 },
		"Workers is -1":                         func(c *Config) { c.Workers = -1 },
		"Workers is 1 for two targets":          func(c *Config) { c.Rate, c.Workers = 0, 1 },
		"GRPCConns is -2":                       func(c *Config) { c.GRPCConns = -2 },
		"Duration is -1s":                       func(c *Config) { c.Duration = -time.Second },
		"Timeout is -1s":                        func(c *Config) { c.Timeout = -time.Second },
		"FirstInstance is -1s":                  func(c *Config) { c.FirstInstance = -time.Second },
		`kind "quick" is unknown`:               func(c *Config) { c.Mix = []Share{{Kind: "quick", Weight: 1}} },
		`kind "fast" is given twice`:            func(c *Config) { c.Mix = []Share{{Kind: Fast, Weight: 1}, {Kind: Fast, Weight: 2}} },
		"the weight of fast is -1":              func(c *Config) { c.Mix = []Share{{Kind: Fast, Weight: -1}} },
		"weights add up to 0":                   func(c *Config) { c.Mix = []Share{{Kind: Fast}} },
		"fast for -1s":                          func(c *Config) { c.Mix = []Share{{Kind: Fast, Weight: 1, For: -time.Second}} },
		"very-slow takes 8s, and Timeout is 5s": func(c *Config) { c.Timeout = 5 * time.Second },
	} {
		cfg := good
		spoil(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want one with %q", err, want)
		}
	}
}

func TestParseMix(t *testing.T) {
	got, err := ParseMix("fast=94, slow:3s=4,stream=1")
	want := []Share{{Fast, 94, 0}, {Slow, 4, 3 * time.Second}, {Stream, 1, 0}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"", "fast", "fast=", "fast=x", "slow:=1", "slow:-1s=1", "slow:2=1"} {
		if got, err := ParseMix(bad); err == nil {
			t.Errorf("%q gave %v, want an error", bad, got)
		}
	}
}

func TestChooseFollowsTheWeights(t *testing.T) {
	mix := []Share{{Kind: Fast, Weight: 3}, {Kind: Slow}, {Kind: Stream, Weight: 2}}
	var got []Kind
	for n := range 5 {
		got = append(got, choose(mix, n).Kind)
	}
	if want := []Kind{Fast, Fast, Fast, Stream, Stream}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}
