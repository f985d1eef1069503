package probe

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// fake answers the nth run, from 1, as it is told, and records when each began, since the rig's start.
type fake struct {
	t      *testing.T
	answer func(ctx context.Context, n int) (verdict, string, error)
	start  time.Time

	mu    sync.Mutex
	runs  []time.Duration
	under bool
}

func (f *fake) probe(ctx context.Context) (verdict, string, error) {
	f.mu.Lock()
	if f.under {
		f.t.Error("two runs of one probe at once")
	}
	f.under = true
	f.runs = append(f.runs, time.Since(f.start))
	n := len(f.runs)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		f.under = false
		f.mu.Unlock()
	}()
	return f.answer(ctx, n)
}

func (f *fake) times() []time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.runs)
}

// gaps are the times from one run to the next.
func (f *fake) gaps() []time.Duration {
	runs := f.times()
	gaps := []time.Duration{}
	for i := range len(runs) - 1 {
		gaps = append(gaps, runs[i+1]-runs[i])
	}
	return gaps
}

// says answers with one letter a run, the last for ever: S success, W warning, F failure, E can't be carried out (three attempts).
func says(letters string) func(context.Context, int) (verdict, string, error) {
	letters = strings.ReplaceAll(letters, "E", "EEE")
	return func(_ context.Context, n int) (verdict, string, error) {
		switch letters[min(n, len(letters))-1] {
		case 'S':
			return success, fmt.Sprint("fine ", n), nil
		case 'W':
			return warning, "well", nil
		case 'F':
			return failure, "bad", nil
		}
		return unknown, "", errors.New("no such port")
	}
}

// takes answers with success after a while, or when it is stopped.
func takes(d time.Duration) func(context.Context, int) (verdict, string, error) {
	return func(ctx context.Context, _ int) (verdict, string, error) {
		select {
		case <-time.After(d):
			return success, "", nil
		case <-ctx.Done():
			return failure, "stopped", nil
		}
	}
}

type rig struct {
	*Prober
	t *testing.T
	fake
	fakes   [kinds]*fake
	changes []string
	logs    *observer.ObservedLogs
	stop    context.CancelFunc
	ended   chan error
}

type answers map[Kind]func(context.Context, int) (verdict, string, error)

// newRig has a probe of each kind that has an answer; specs that are nil get a period of 1 s. It doesn't run yet.
func newRig(t *testing.T, specs map[Kind]Spec, answer answers) *rig {
	t.Helper()
	r := &rig{t: t, ended: make(chan error, 1)}
	core, logs := observer.New(zap.DebugLevel)
	r.logs = logs
	cfg := Config{Name: "app", Logger: zap.New(core)}
	cfg.OnChange = func(s State) { r.changes = append(r.changes, short(s)) }
	for kind, field := range map[Kind]**Spec{Startup: &cfg.Startup, Liveness: &cfg.Liveness, Readiness: &cfg.Readiness} {
		if answer[kind] == nil {
			continue
		}
		spec := specs[kind]
		if spec.PeriodSeconds == 0 {
			spec.PeriodSeconds = 1
		}
		spec.TCPSocket = &TCPSocket{Port: Port{Number: 1}}
		*field = &spec
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Prober = p
	for kind, a := range answer {
		r.fakes[kind] = &fake{t: t, answer: a, start: time.Now()}
		p.probes[kind].handler = r.fakes[kind]
	}
	return r
}

// run runs until the test's end, or stop.
func (r *rig) run() *rig {
	ctx, cancel := context.WithCancel(r.t.Context())
	r.stop = cancel
	go func() { r.ended <- r.Run(ctx) }()
	return r
}

// until waits, in the bubble's time, for what must come before an hour is over.
func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	for range 360_000 {
		synctest.Wait()
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	r.t.Fatalf("never: %s; %s", what, short(r.State()))
}

// ran waits for a probe's nth run to have its result.
func (r *rig) ran(kind Kind, n int) {
	r.t.Helper()
	r.until(fmt.Sprintf("run %d of %v", n, kind), func() bool { return len(r.fakes[kind].times()) >= n })
}

func (r *rig) want(state string) {
	r.t.Helper()
	if got := short(r.State()); got != state {
		r.t.Errorf("state is %q, want %q", got, state)
	}
}

// short has a word for what is true.
func short(s State) string {
	words := []string{}
	for _, w := range []struct {
		is   bool
		word string
	}{{s.Started, "started"}, {s.Live, "live"}, {s.Ready, "ready"}} {
		if w.is {
			words = append(words, w.word)
		}
	}
	return strings.Join(words, " ")
}

// bubble is synctest.Test, with Run ended at its end and seen to return nil.
func bubble(t *testing.T, specs map[Kind]Spec, answer answers, test func(t *testing.T, r *rig)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, specs, answer)
		r.run()
		defer func() {
			r.stop()
			if err := <-r.ended; err != nil {
				t.Errorf("Run returned %v", err)
			}
		}()
		test(t, r)
	})
}

func TestInitialValues(t *testing.T) {
	// kubelet/prober/worker.go: newWorker; kubelet/prober/prober_manager.go: isContainerStarted, UpdatePodStatus.
	never := takes(24 * time.Hour)
	for _, tc := range []struct {
		kinds string
		want  string
	}{
		{"startup", "live"},
		{"liveness", "started live ready"},
		{"readiness", "started live"},
		{"startup liveness", "live"},
		{"startup readiness", "live"},
		{"liveness readiness", "started live"},
		{"startup liveness readiness", "live"},
	} {
		t.Run(tc.kinds, func(t *testing.T) {
			a := answers{}
			for kind := range Kind(kinds) {
				if strings.Contains(tc.kinds, kind.String()) {
					a[kind] = never
				}
			}
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, nil, a)
				r.want(tc.want)
				r.run()
				synctest.Wait()
				r.want(tc.want)
				if !slices.Equal(r.changes, []string{tc.want}) {
					t.Errorf("OnChange was called with %q at the start, want %q", r.changes, tc.want)
				}
				r.stop()
				<-r.ended
			})
		})
	}
}

// TestResultsCount feeds results and compares what the state is after each: S, F, W, E as in says; 1 and 0 for true and false.
func TestResultsCount(t *testing.T) {
	for _, tc := range []struct {
		rule           string
		kind           Kind
		success, fails int32
		results, want  string
	}{
		{"worker.go: the first success turns readiness", Readiness, 1, 3, "FS", "01"},
		{"worker.go: below failureThreshold the state is unchanged", Readiness, 1, 3, "SFFSFFF", "1111110"},
		{"worker.go: below successThreshold the state is unchanged", Readiness, 3, 1, "SSFSSSFS", "00000100"},
		{"worker.go: results are counted in a row", Readiness, 2, 2, "SSFSFSFFSS", "0111111001"},
		{"worker.go: one failure is enough at failureThreshold 1", Readiness, 1, 1, "SFSF", "1010"},
		{"defaults.go: three failures by default", Readiness, 0, 0, "SFFF", "1110"},
		{"prober.go: a warning is a success", Readiness, 1, 1, "FWF", "010"},
		{"worker.go: an error is thrown away, and breaks no row", Readiness, 2, 2, "SESEEFEF", "00111110"},
		{"worker.go: nothing but errors leaves the initial value: readiness", Readiness, 1, 1, "EEE", "000"},
		{"worker.go: nothing but errors leaves the initial value: liveness", Liveness, 1, 1, "EEE", "111"},
		{"worker.go: liveness is true until failureThreshold", Liveness, 1, 3, "FFSFFF", "111110"},
		{"departure: liveness is probed on and heals", Liveness, 1, 2, "FFFSFF", "100110"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			spec := Spec{SuccessThreshold: tc.success, FailureThreshold: tc.fails}
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, map[Kind]Spec{tc.kind: spec}, answers{tc.kind: says("S")})
				got := ""
				for i, letter := range tc.results {
					f := finished{pr: r.probes[tc.kind], at: time.Now()}
					f.verdict, f.output, f.err = says(string(letter))(t.Context(), i+1)
					r.observe(f)
					s := r.State()
					if is := tc.kind == Readiness && s.Ready || tc.kind == Liveness && s.Live; is {
						got += "1"
					} else {
						got += "0"
					}
				}
				if got != tc.want {
					t.Errorf("%s: got %s, want %s", tc.results, got, tc.want)
				}
			})
		})
	}
}

func TestRunsEveryPeriod(t *testing.T) {
	bubble(t, map[Kind]Spec{Liveness: {PeriodSeconds: 7}}, answers{Liveness: says("S")}, func(t *testing.T, r *rig) {
		r.ran(Liveness, 5)
		if gaps, want := r.fakes[Liveness].gaps(), slices.Repeat([]time.Duration{7 * time.Second}, 4); !slices.Equal(gaps, want) {
			t.Errorf("runs came after %v, want %v", gaps, want)
		}
	})
}

func TestStartIsJitteredOverOneSecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 64
		quarters := map[time.Duration]int{}
		for range n {
			r := newRig(t, map[Kind]Spec{Liveness: {PeriodSeconds: 100}}, answers{Liveness: says("S")})
			r.run()
			r.ran(Liveness, 1)
			first := r.fakes[Liveness].times()[0]
			if first >= time.Second {
				t.Errorf("first run after %v, want it within a second", first)
			}
			if first%(250*time.Millisecond) != 125*time.Millisecond {
				t.Errorf("first run after %v, want it in the middle of a quarter, so that probes share wake-ups", first)
			}
			quarters[first/(250*time.Millisecond)]++
			r.stop()
			<-r.ended
		}
		// A quarter that none of 64 falls into has a probability of 1 in 100 million.
		if len(quarters) < 4 {
			t.Errorf("first runs by quarter of the second: %v, want some in each", quarters)
		}
	})
}

func TestInitialDelayIsCheckedAtEachTick(t *testing.T) {
	// worker.go: the worker ticks from its start on, and does nothing while the delay lasts.
	bubble(t, map[Kind]Spec{Liveness: {PeriodSeconds: 10, InitialDelaySeconds: 25}}, answers{Liveness: says("S")}, func(t *testing.T, r *rig) {
		r.ran(Liveness, 3)
		runs := r.fakes[Liveness].times()
		if runs[0] < 25*time.Second || runs[0] >= 35*time.Second {
			t.Errorf("first run after %v, want the first tick from 25 s on", runs[0])
		}
		if runs[1]-runs[0] != 10*time.Second {
			t.Errorf("second run %v after the first, want 10 s", runs[1]-runs[0])
		}
	})
}

func TestStartupHoldsTheOthersBack(t *testing.T) {
	// worker.go: "Disable other probes until container has started", "Stop probing for startup once container has started".
	specs := map[Kind]Spec{Startup: {PeriodSeconds: 10, FailureThreshold: 30}, Liveness: {PeriodSeconds: 1}, Readiness: {PeriodSeconds: 3}}
	bubble(t, specs, answers{Startup: says("FFFS"), Liveness: says("S"), Readiness: says("S")}, func(t *testing.T, r *rig) {
		r.ran(Startup, 3)
		r.want("live")
		if n := len(r.fakes[Liveness].times()) + len(r.fakes[Readiness].times()); n > 0 {
			t.Errorf("%d runs of liveness and readiness before startup succeeded", n)
		}
		r.ran(Startup, 4)
		synctest.Wait()
		r.want("started live ready")
		// prober_manager.go: UpdatePodStatus doesn't wait for readiness' next tick.
		if started, ready := r.fakes[Startup].times()[3], r.fakes[Readiness].times()[0]; ready != started {
			t.Errorf("readiness first ran %v after startup's success, want at once", ready-started)
		}
		r.ran(Liveness, 50)
		r.ran(Readiness, 4)
		if n := len(r.fakes[Startup].times()); n != 4 {
			t.Errorf("%d runs of startup, want none after its success", n)
		}
		for _, gap := range r.fakes[Readiness].gaps() {
			if gap != 3*time.Second {
				t.Errorf("readiness ran %v after, want its period of 3 s to count from the run at once", gap)
			}
		}
		if want := []string{"live", "started live", "started live ready"}; !slices.Equal(r.changes, want) {
			t.Errorf("changes %q, want %q", r.changes, want)
		}
	})
}

func TestStartupFailedForGoodIsNotLive(t *testing.T) {
	bubble(t, map[Kind]Spec{Startup: {FailureThreshold: 3}}, answers{Startup: says("FFFFS"), Readiness: says("S")}, func(t *testing.T, r *rig) {
		r.ran(Startup, 2)
		synctest.Wait()
		r.want("live")
		r.ran(Startup, 3)
		synctest.Wait()
		r.want("")
		if got := r.State().Results[Startup]; got.OK || got.Streak != 3 || got.Output != "bad" {
			t.Errorf("result %+v", got)
		}
		r.ran(Startup, 5)
		r.until("ready", func() bool { return r.State().Ready })
		r.want("started live ready")
	})
}

func TestReadinessIsProbedAtOnceAfterItIsLost(t *testing.T) {
	// prober_manager.go: UpdatePodStatus, upon the change.
	bubble(t, map[Kind]Spec{Readiness: {PeriodSeconds: 60, FailureThreshold: 2}}, answers{Readiness: says("SFFSFFF")}, func(t *testing.T, r *rig) {
		r.ran(Readiness, 8)
		const period = 60 * time.Second
		if gaps, want := r.fakes[Readiness].gaps(), []time.Duration{period, period, 0, period, period, 0, period}; !slices.Equal(gaps, want) {
			t.Errorf("runs came after %v, want %v", gaps, want)
		}
		if want := []string{"started live", "started live ready", "started live", "started live ready", "started live"}; !slices.Equal(r.changes, want) {
			t.Errorf("changes %q, want %q", r.changes, want)
		}
	})
}

func TestRestartedGivesInitialValuesAndDelaysAgain(t *testing.T) {
	specs := map[Kind]Spec{
		Startup:   {InitialDelaySeconds: 20},
		Liveness:  {FailureThreshold: 1},
		Readiness: {SuccessThreshold: 2},
	}
	bubble(t, specs, answers{Startup: says("S"), Liveness: says("F"), Readiness: says("S")}, func(t *testing.T, r *rig) {
		r.until("ready and broken", func() bool { return short(r.State()) == "started ready" })
		at := time.Since(r.fakes[Startup].start)
		before := len(r.fakes[Readiness].times())
		r.Restarted()
		synctest.Wait()
		r.want("live")
		if n := len(r.State().Results); n != 0 {
			t.Errorf("%d results of the container before", n)
		}
		r.ran(Startup, 2)
		if delay := r.fakes[Startup].times()[1] - at; delay < 20*time.Second || delay >= 21*time.Second {
			t.Errorf("startup ran %v after the restart, want the first tick from 20 s on", delay)
		}
		// Departure: successes of the container before don't count.
		r.until("ready", func() bool { return r.State().Ready })
		if n := len(r.fakes[Readiness].times()) - before; n < 2 {
			t.Errorf("ready after %d successes, want two since the restart", n)
		}
	})
}

func TestRunOfTheContainerBeforeDoesNotCount(t *testing.T) {
	answer := func(ctx context.Context, n int) (verdict, string, error) {
		if n == 1 {
			<-ctx.Done()
			return success, "of the container before", nil
		}
		return takes(time.Second)(ctx, n)
	}
	bubble(t, map[Kind]Spec{Readiness: {PeriodSeconds: 60}}, answers{Readiness: answer}, func(t *testing.T, r *rig) {
		r.ran(Readiness, 1)
		time.Sleep(time.Second)
		at := time.Since(r.fakes[Readiness].start)
		r.Restarted()
		synctest.Wait()
		r.want("started live")
		// prober_manager.go: UpdatePodStatus; not twice at once, though.
		if runs := r.fakes[Readiness].times(); len(runs) != 2 || runs[1] != at {
			t.Errorf("runs at %v, want one more, at once", runs)
		}
		if got := r.State().Results; len(got) != 0 {
			t.Errorf("results %+v before the new container has any", got)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		r.want("started live ready")
	})
}

func TestRestartedDuringTheJitteredStart(t *testing.T) {
	bubble(t, map[Kind]Spec{Readiness: {PeriodSeconds: 1000}}, answers{Readiness: says("S")}, func(t *testing.T, r *rig) {
		r.Restarted()
		synctest.Wait()
		r.ran(Readiness, 2)
		if gaps := r.fakes[Readiness].gaps(); gaps[0] != 1000*time.Second {
			t.Errorf("second run after %v, want a period", gaps[0])
		}
	})
}

func TestSlowProbeQueuesNoRuns(t *testing.T) {
	// worker.go: one goroutine, whose ticker keeps one tick.
	slow := func(ctx context.Context, n int) (verdict, string, error) {
		if n == 2 {
			return takes(3500*time.Millisecond)(ctx, n)
		}
		return success, "", nil
	}
	bubble(t, nil, answers{Liveness: slow}, func(t *testing.T, r *rig) {
		r.ran(Liveness, 5)
		want := []time.Duration{time.Second, 3500 * time.Millisecond, 500 * time.Millisecond, time.Second}
		if gaps := r.fakes[Liveness].gaps(); !slices.Equal(gaps, want) {
			t.Errorf("runs came after %v, want %v: the tick that was missed at once, and then as ever", gaps, want)
		}
		if got := r.State().Results[Liveness]; got.Took != 0 || got.Streak != 5 {
			t.Errorf("result %+v", got)
		}
	})
}

func TestWhatCanNotBeCarriedOutIsTriedThreeTimesAndNotCounted(t *testing.T) {
	// prober.go: runProbeWithRetries.
	bubble(t, map[Kind]Spec{Readiness: {PeriodSeconds: 60}}, answers{Readiness: says("SEF")}, func(t *testing.T, r *rig) {
		r.ran(Readiness, 4)
		synctest.Wait()
		if gaps, want := r.fakes[Readiness].gaps(), []time.Duration{60 * time.Second, 0, 0}; !slices.Equal(gaps, want) {
			t.Errorf("runs came after %v, want %v", gaps, want)
		}
		r.want("started live ready")
		if got := r.State().Results[Readiness]; got.OK || got.Streak != 0 || got.Output != "no such port" {
			t.Errorf("result %+v", got)
		}
	})
	bubble(t, nil, answers{Readiness: func(ctx context.Context, n int) (verdict, string, error) {
		if n < 3 {
			return unknown, "", errors.New("not yet")
		}
		return success, "", nil
	}}, func(t *testing.T, r *rig) {
		r.ran(Readiness, 3)
		synctest.Wait()
		r.want("started live ready")
	})
}

func TestResultSaysHowLongItTook(t *testing.T) {
	bubble(t, map[Kind]Spec{Liveness: {PeriodSeconds: 60}}, answers{Liveness: takes(300 * time.Millisecond)}, func(t *testing.T, r *rig) {
		r.until("a result", func() bool { return len(r.State().Results) > 0 })
		f := r.fakes[Liveness]
		got := r.State().Results[Liveness]
		want := Result{OK: true, Took: 300 * time.Millisecond, Time: f.start.Add(f.times()[0] + 300*time.Millisecond), Streak: 1}
		if !got.Time.Equal(want.Time) || got.Took != want.Took || got.Streak != want.Streak || !got.OK {
			t.Errorf("result %+v, want %+v", got, want)
		}
	})
}

func TestRunEndsWithoutWaitingForTheProbes(t *testing.T) {
	never := takes(time.Hour)
	bubble(t, nil, answers{Liveness: never, Readiness: never}, func(t *testing.T, r *rig) {
		r.ran(Liveness, 1)
		r.ran(Readiness, 1)
		at := time.Now()
		r.stop()
		err := <-r.ended
		if took := time.Since(at); err != nil || took != 0 {
			t.Errorf("Run returned %v after %v, want nil at once", err, took)
		}
		r.ended <- err
		r.want("started live")
	})
}

func TestStateIsNobodyElses(t *testing.T) {
	bubble(t, nil, answers{Liveness: says("S")}, func(t *testing.T, r *rig) {
		r.ran(Liveness, 1)
		synctest.Wait()
		clear(r.State().Results)
		if len(r.State().Results) != 1 {
			t.Error("clearing the map of a State cleared the Prober's")
		}
	})
}

func TestLogHasEachTurnOnce(t *testing.T) {
	bubble(t, map[Kind]Spec{Readiness: {FailureThreshold: 2}}, answers{Readiness: says("SSSFFFFEEWWS")}, func(t *testing.T, r *rig) {
		r.ran(Readiness, 20)
		synctest.Wait()
		var got []string
		for _, line := range r.logs.All() {
			if line.Level > zap.DebugLevel {
				got = append(got, line.Level.String()+" "+line.Message)
			}
		}
		want := []string{
			"info probe succeeds", "info probes turn the state",
			"warn probe fails", "warn probes turn the state",
			"warn probe can't be carried out: it counts neither as success nor as failure",
			"warn probe succeeds with a warning", "info probes turn the state",
			"info probe succeeds",
		}
		if !slices.Equal(got, want) {
			t.Errorf("log:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	})
}
