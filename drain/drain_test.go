package drain

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// fake is a source whose answer is a function of the time since the wait began.
type fake struct {
	name  string
	start time.Time
	at    func(ctx context.Context, since time.Duration) (Sample, error)
}

func (f *fake) Name() string { return f.name }

func (f *fake) Sample(ctx context.Context) (Sample, error) {
	return f.at(ctx, time.Since(f.start))
}

func newFake(name string, at func(since time.Duration) (Sample, error)) *fake {
	return &fake{name: name, start: time.Now(), at: func(_ context.Context, since time.Duration) (Sample, error) { return at(since) }}
}

// busyUntil has n in flight until end, then none.
func busyUntil(end time.Duration, n int) func(time.Duration) (Sample, error) {
	return func(since time.Duration) (Sample, error) {
		if since < end {
			return Sample{InFlight: n, Connections: n}, nil
		}
		return Sample{}, nil
	}
}

var errBroken = errors.New("broken")

func TestWait(t *testing.T) {
	const settle = time.Second
	always := func(s Sample) func(time.Duration) (Sample, error) {
		return func(time.Duration) (Sample, error) { return s, nil }
	}
	for _, tc := range []struct {
		name     string
		sources  []func(time.Duration) (Sample, error)
		deadline time.Duration
		outcome  Outcome
		took     time.Duration
		inFlight int
	}{
		{name: "an idle instance needs exactly the settle time",
			sources: []func(time.Duration) (Sample, error){always(Sample{Connections: 7})},
			outcome: Quiet, took: settle},
		{name: "what ends within the settle time and the quiet period before its end costs nothing",
			sources: []func(time.Duration) (Sample, error){busyUntil(450*time.Millisecond, 1)},
			outcome: Quiet, took: settle},
		{name: "the quiet period starts when the last request ends",
			sources: []func(time.Duration) (Sample, error){busyUntil(2*time.Second, 3)},
			outcome: Quiet, took: 2500 * time.Millisecond},
		{name: "one more request starts the quiet period anew",
			sources: []func(time.Duration) (Sample, error){func(since time.Duration) (Sample, error) {
				if since == 1200*time.Millisecond || since < 800*time.Millisecond {
					return Sample{InFlight: 1}, nil
				}
				return Sample{}, nil
			}},
			outcome: Quiet, took: 1750 * time.Millisecond},
		{name: "all sources must agree",
			sources: []func(time.Duration) (Sample, error){busyUntil(0, 0), busyUntil(3*time.Second, 1)},
			outcome: Quiet, took: 3500 * time.Millisecond},
		{name: "activity holds the wait though nothing is ever seen in flight",
			sources: []func(time.Duration) (Sample, error){func(since time.Duration) (Sample, error) {
				return Sample{Activity: uint64(min(since, 2*time.Second) / (200 * time.Millisecond))}, nil
			}},
			outcome: Quiet, took: 2500 * time.Millisecond},
		{name: "activity from before the wait does not hold it",
			sources: []func(time.Duration) (Sample, error){always(Sample{Activity: 1000})},
			outcome: Quiet, took: settle},
		{name: "the deadline ends a wait for a request that never does",
			sources:  []func(time.Duration) (Sample, error){always(Sample{InFlight: 4, Unsure: 1})},
			deadline: 6 * time.Second, outcome: Deadline, took: 6 * time.Second, inFlight: 4},
		{name: "the deadline ends the settle time too",
			sources:  []func(time.Duration) (Sample, error){always(Sample{})},
			deadline: 300 * time.Millisecond, outcome: Deadline, took: 300 * time.Millisecond},
		{name: "two views of the same requests are not added up",
			sources:  []func(time.Duration) (Sample, error){always(Sample{InFlight: 4}), always(Sample{InFlight: 3})},
			deadline: 2 * time.Second, outcome: Deadline, took: 2 * time.Second, inFlight: 4},
		{name: "an unknown source is not zero: the floor is waited out",
			sources: []func(time.Duration) (Sample, error){always(Sample{}), func(time.Duration) (Sample, error) { return Sample{}, errBroken }},
			outcome: Floor, took: 5 * time.Second},
		{name: "after the floor the known sources still have their say",
			sources: []func(time.Duration) (Sample, error){busyUntil(7*time.Second, 1), func(time.Duration) (Sample, error) { return Sample{}, errBroken }},
			outcome: Floor, took: 7500 * time.Millisecond},
		{name: "a source that comes back is known again, and its zero is new",
			sources: []func(time.Duration) (Sample, error){func(since time.Duration) (Sample, error) {
				if since < 2*time.Second {
					return Sample{}, errBroken
				}
				return Sample{}, nil
			}},
			outcome: Quiet, took: 2500 * time.Millisecond},
		{name: "what a source saw before it failed is no part of the quiet period",
			sources: []func(time.Duration) (Sample, error){func(since time.Duration) (Sample, error) {
				if since >= 850*time.Millisecond && since < 1200*time.Millisecond {
					return Sample{}, errBroken
				}
				return Sample{}, nil
			}},
			outcome: Quiet, took: 1700 * time.Millisecond},
		{name: "a negative count is unknown",
			sources: []func(time.Duration) (Sample, error){always(Sample{InFlight: -1})},
			outcome: Floor, took: 5 * time.Second},
		{name: "without a source only the settle time is waited",
			outcome: Skipped, took: settle},
		{name: "without a source the deadline still holds",
			deadline: 300 * time.Millisecond, outcome: Deadline, took: 300 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := Config{}
				for i, at := range tc.sources {
					cfg.Sources = append(cfg.Sources, newFake(string(rune('a'+i)), at))
				}
				d, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				if tc.deadline == 0 {
					tc.deadline = time.Minute
				}
				ctx, cancel := context.WithTimeout(t.Context(), tc.deadline)
				defer cancel()
				r := d.Wait(ctx, time.Now().Add(settle))
				if r.Outcome != tc.outcome || r.Took != tc.took || r.InFlight != tc.inFlight {
					t.Errorf("%s after %v with %d in flight, want %s after %v with %d", r.Outcome, r.Took, r.InFlight, tc.outcome, tc.took, tc.inFlight)
				}
				if (r.Cause != nil) != (tc.outcome == Deadline) {
					t.Errorf("cause is %v for outcome %s", r.Cause, r.Outcome)
				}
				if len(r.Sources) != len(tc.sources) {
					t.Errorf("%d sources in the result, want %d", len(r.Sources), len(tc.sources))
				}
			})
		})
	}
}

func TestWaitSamplesOnceMoreWhenTheSettleTimeEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Between two samples, just before the end of a settle time that is no multiple of the interval, a request comes.
		src := newFake("a", func(since time.Duration) (Sample, error) {
			if since >= 1020*time.Millisecond && since < 3*time.Second {
				return Sample{InFlight: 1}, nil
			}
			return Sample{}, nil
		})
		d, err := New(Config{Sources: []Source{src}})
		if err != nil {
			t.Fatal(err)
		}
		r := d.Wait(t.Context(), time.Now().Add(1030*time.Millisecond))
		if r.Outcome != Quiet || r.Took < 3500*time.Millisecond {
			t.Errorf("%s after %v, want quiet not before 3.5s", r.Outcome, r.Took)
		}
	})
}

func TestWaitEndsWithASettleTimeThatIsNoMultipleOfTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d, err := New(Config{Sources: []Source{newFake("a", busyUntil(0, 0))}})
		if err != nil {
			t.Fatal(err)
		}
		if r := d.Wait(t.Context(), time.Now().Add(1030*time.Millisecond)); r.Outcome != Quiet || r.Took != 1030*time.Millisecond {
			t.Errorf("%s after %v, want quiet after 1.03s", r.Outcome, r.Took)
		}
	})
}

func TestWaitReportsEachSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		count := newFake("count", func(since time.Duration) (Sample, error) {
			switch {
			case since < time.Second:
				return Sample{InFlight: 9, Unsure: 5, Connections: 20}, nil
			default:
				return Sample{InFlight: 2, Unsure: 1, Connections: 12}, nil
			}
		})
		broken := newFake("broken", func(since time.Duration) (Sample, error) {
			if since < time.Second {
				return Sample{InFlight: 3}, nil
			}
			return Sample{}, errBroken
		})
		var last Progress
		samples := 0
		d, err := New(Config{Sources: []Source{count, broken}, OnSample: func(p Progress) { last = p; samples++ }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 1975*time.Millisecond)
		defer cancel()
		r := d.Wait(ctx, time.Now())
		if r.Outcome != Deadline || r.InFlight != 3 || r.Unsure != 1 {
			t.Errorf("got %+v, want deadline with 3 in flight (the broken source's last word), 1 unsure", r)
		}
		want := []SourceResult{
			{Name: "count", InFlight: 2, Unsure: 1, Connections: 12, Peak: 9, PeakUnsure: 5, Samples: 40},
			{Name: "broken", InFlight: 3, Peak: 3, Samples: 20, Err: "broken"},
		}
		for i := range want {
			if r.Sources[i] != want[i] {
				t.Errorf("source %d is %+v, want %+v", i, r.Sources[i], want[i])
			}
			if last.Sources[i] != want[i] {
				t.Errorf("progress has %+v, want %+v", last.Sources[i], want[i])
			}
		}
		if last.Elapsed != 1950*time.Millisecond || samples != 80 {
			t.Errorf("last of %d progress reports at %v, want the last of 80 at 1.95s", samples, last.Elapsed)
		}
	})
}

func TestWaitIsCutShortByACause(t *testing.T) {
	shortened := errors.New("second delete")
	for _, tc := range []struct {
		cause   error
		outcome Outcome
	}{{shortened, Forced}, {context.DeadlineExceeded, Deadline}} {
		synctest.Test(t, func(t *testing.T) {
			d, err := New(Config{Sources: []Source{newFake("a", busyUntil(time.Hour, 2))}})
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			defer cancel(nil)
			time.AfterFunc(1234*time.Millisecond, func() { cancel(tc.cause) })
			r := d.Wait(ctx, time.Now())
			if r.Outcome != tc.outcome || !errors.Is(r.Cause, tc.cause) || r.Took != 1234*time.Millisecond || r.InFlight != 2 {
				t.Errorf("got %+v, want %s by %v after 1.234s with 2 in flight", r, tc.outcome, tc.cause)
			}
		})
	}
}

// hang is a source that minds no context.
type hang struct{ release chan struct{} }

func (hang) Name() string { return "hang" }

func (h hang) Sample(context.Context) (Sample, error) {
	<-h.release
	return Sample{}, nil
}

func TestWaitIsNotBlockedByAHangingSource(t *testing.T) {
	for _, tc := range []struct {
		name              string
		deadline, took    time.Duration
		outcome           Outcome
		wantErr, sourceIs string
	}{
		{"floor", time.Minute, 5 * time.Second, Floor, "no answer within 1s", "hang"},
		{"deadline", 3 * time.Second, 3 * time.Second, Deadline, "no answer within 1s", "hang"},
		{"deadline before the first answer", time.Second / 2, time.Second / 2, Deadline, "not sampled yet", "hang"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := hang{make(chan struct{})}
				defer close(h.release)
				d, err := New(Config{Sources: []Source{h}})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), tc.deadline)
				defer cancel()
				r := d.Wait(ctx, time.Now().Add(time.Second))
				if r.Outcome != tc.outcome || r.Took != tc.took || r.Sources[0].Err != tc.wantErr {
					t.Errorf("got %+v, want %s after %v with %q", r, tc.outcome, tc.took, tc.wantErr)
				}
			})
		})
	}
}

func TestNewNamesWhatIsWrong(t *testing.T) {
	ok := newFake("a", busyUntil(0, 0))
	for _, tc := range []struct {
		cfg  Config
		want string
	}{
		{Config{Quiet: -1}, "Quiet is -1ns, must be positive"},
		{Config{Interval: -time.Second}, "Interval is -1s"},
		{Config{Floor: -time.Second}, "Floor is -1s"},
		{Config{SampleTimeout: -time.Second}, "SampleTimeout is -1s"},
		{Config{Interval: time.Second}, "Interval is 1s, must be at most Quiet (500ms)"},
		{Config{Sources: []Source{ok, nil}}, "Sources[1] is nil"},
		{Config{Sources: []Source{ok, newFake("a", nil)}}, `Sources[1] is named "a", must have a name that no other`},
		{Config{Sources: []Source{newFake("", nil)}}, `Sources[0] is named ""`},
	} {
		if _, err := New(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("New(%+v): got %v, want %q", tc.cfg, err, tc.want)
		}
	}
}
