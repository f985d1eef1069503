package lifecycle_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

func wantVerdict(t *testing.T, got, want lifecycle.Verdict) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("verdict:\n%+v\nwant:\n%+v", got, want)
	}
}

// after is the moment of a rig's time.
func (r *rig) after(d time.Duration) time.Time { return r.start.Add(d) }

func TestHookWithdrawsThenSettlesThenReleases(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		time.Sleep(time.Minute)
		a := r.await(r.hook())

		r.calls.want(t,
			"0s set Pending",
			"0s set Online advertised",
			"1m0s set Draining",
			"1m0s synced",
			"1m0s drain, settled in 1s",
			"1m1s quiet",
			"1m1s set Released",
		)
		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"1m0s Online -> Draining: prestop hook",
			"1m1s Draining -> Released: prestop hook: drained in 1s, nothing in flight",
		)
		want := lifecycle.Verdict{
			Outcome: lifecycle.Drained, Cause: lifecycle.CauseHook, Withdrawn: true, Settle: time.Second,
			Started: r.after(time.Minute), Released: r.after(time.Minute + time.Second), Deadline: r.after(time.Minute + 25*time.Second),
		}
		wantVerdict(t, a.Verdict, want)
		if st := r.Status(); st.Verdict == nil {
			t.Error("the status has no verdict")
		} else {
			wantVerdict(t, *st.Verdict, want)
		}
		wantVerdict(t, *r.reg.desired.Verdict, want)
		if got := a.Total(); got != time.Second {
			t.Errorf("Total %s", got)
		}
	})
}

func TestDrainLastsAsLongAsRequestsDo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 8 * time.Second
		r.app.result = lifecycle.DrainResult{Sources: []lifecycle.SourceResult{{Name: "sockdiag", Peak: 4}}}
		r.ready(true)
		hook := r.hook()
		if got, want := r.Status().Deadline, r.after(25*time.Second); !got.Equal(want) {
			t.Errorf("while it drains the deadline of the release is %s after the start, want 25s", got.Sub(r.start))
		}
		wantVerdict(t, r.await(hook).Verdict, lifecycle.Verdict{
			Outcome: lifecycle.Drained, Cause: lifecycle.CauseHook, Withdrawn: true, Settle: time.Second, Drain: 7*time.Second + quiet,
			Started: r.start, Released: r.after(8*time.Second + quiet), Deadline: r.after(25 * time.Second), Sources: r.app.result.Sources,
		})
		if got := r.Status().Deadline; !got.IsZero() {
			t.Errorf("after the release the status still has the deadline %s", got)
		}
	})
}

func TestNothingToSettleForConsumersThatDoNotKnowTheInstance(t *testing.T) {
	for name, before := range map[string]func(*rig){
		"never advertised":      func(r *rig) { time.Sleep(time.Minute) },
		"withdrawn a while ago": func(r *rig) { r.ready(true); r.ready(false); time.Sleep(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				before(r)
				a := r.await(r.hook())
				if a.Settle != 0 || a.Drain != quiet || a.Total() != quiet {
					t.Errorf("settle %s, drain %s, total %s: want only the quiet period, %s", a.Settle, a.Drain, a.Total(), quiet)
				}
			})
		})
	}
}

func TestSettleTimeCountsFromWhenConsumersCouldLearn(t *testing.T) {
	for _, tc := range []struct {
		name                    string
		before                  func(*rig)
		withdraw, settle, total time.Duration
	}{
		{"withdrawn a moment ago", func(r *rig) {
			r.ready(true)
			time.Sleep(time.Minute)
			r.ready(false)
			time.Sleep(200 * ms)
		}, 0, 800 * ms, 800 * ms},
		{"the registry did it late, a moment ago", func(r *rig) {
			r.ready(true)
			r.reg.hang(nil)
			r.ready(false)
			time.Sleep(time.Minute)
			r.reg.answer()
			time.Sleep(200 * ms)
		}, 0, 800 * ms, 800 * ms},
		{"the registry has not done it yet", func(r *rig) {
			r.ready(true)
			r.reg.hang(nil)
			r.ready(false)
			time.Sleep(time.Minute)
			time.AfterFunc(300*ms, r.reg.answer)
		}, 300 * ms, s, 1300 * ms},
		{"an agent before this one may have advertised until a moment ago", func(*rig) { time.Sleep(200 * ms) }, 0, 800 * ms, 800 * ms},
		{"the registry never said whether it had advertised", func(r *rig) {
			time.Sleep(time.Minute)
			r.reg.hang(nil)
			r.ready(true)
			r.ready(false)
			time.Sleep(200 * ms)
			r.reg.answer()
		}, 0, 800 * ms, 800 * ms},
		{"nor does it when the hook comes", func(r *rig) {
			r.reg.hang(nil)
			r.ready(true)
			time.AfterFunc(300*ms, r.reg.answer)
		}, 300 * ms, s, 1300 * ms},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				tc.before(r)
				a := r.await(r.hook())
				if a.Withdraw != tc.withdraw || a.Settle != tc.settle || a.Total() != tc.total {
					t.Errorf("withdraw %s, settle %s, total %s; want %s, %s, %s", a.Withdraw, a.Settle, a.Total(), tc.withdraw, tc.settle, tc.total)
				}
			})
		})
	}
}

func TestRestartedAgentSettlesForTheRecordsOfTheOneBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.see(func(o *lifecycle.Observation) {
			o.Pod = lifecycle.Pod{Known: true, Terminating: true, Deadline: time.Now().Add(30 * s), Grace: 30 * s}
			o.Endpoints = []lifecycle.Endpoint{{Service: "web"}}
		})
		if a := r.await(r.hook()); a.Settle != s || a.Total() != s {
			t.Errorf("settle %s, total %s: want 1s", a.Settle, a.Total())
		}
	})
}

func TestRegistryThatNeverAnsweredMayHaveRecords(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, func(r *rig, _ *lifecycle.Config) { r.reg.hangs = true })
		r.RegistryChanged(lifecycle.RegistryStatus{Err: "no answer", Updated: time.Now()})
		time.Sleep(time.Minute)
		time.AfterFunc(300*ms, r.reg.answer)
		if a := r.await(r.hook()); a.Withdraw != 300*ms || a.Settle != s {
			t.Errorf("withdraw %s, settle %s: want 300ms, 1s", a.Withdraw, a.Settle)
		}
	})
}

func TestHookCallsJoin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 5 * time.Second
		r.ready(true)
		first, second := r.hook(), r.hook()
		time.Sleep(2 * time.Second)
		third := r.hook()
		a, b, c := r.await(first), r.await(second), r.await(third)
		time.Sleep(time.Second)
		late := r.await(r.hook())

		for _, x := range []answer{b, c, late} {
			wantVerdict(t, x.Verdict, a.Verdict)
		}
		if a.at != 5*time.Second+quiet || b.at != a.at || c.at != a.at || late.at != a.at+time.Second {
			t.Errorf("answered at %s, %s, %s and %s", a.at, b.at, c.at, late.at)
		}
		if got := strings.Count(r.calls.String(), "drain,"); got != 1 {
			t.Errorf("%d drains, want 1", got)
		}
	})
}

func TestCallerThatGoesAwayDoesNotEndTheDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 5 * time.Second
		r.ready(true)
		gone := errors.New("client went away")
		ctx, cancel := context.WithCancelCause(t.Context())
		hook := r.stop(ctx, lifecycle.CauseHook)
		time.Sleep(time.Second)
		cancel(gone)
		if a := <-hook; !errors.Is(a.err, gone) || a.at != time.Second {
			t.Errorf("the caller got %v at %s", a.err, a.at)
		}
		r.wantState(lifecycle.Draining)
		if a := r.await(r.hook()); a.Outcome != lifecycle.Drained || a.at != 5*time.Second+quiet {
			t.Errorf("%s at %s", a.Outcome, a.at)
		}
	})
}

func TestDeletionBeginsTheSameShutdownAndAHookJoinsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 3 * time.Second
		r.ready(true)
		r.deleted(30 * time.Second)
		time.Sleep(70 * time.Millisecond)
		a := r.await(r.hook())

		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Draining: pod terminating",
			"3.5s Draining -> Released: pod terminating: drained in 3.5s, nothing in flight",
		)
		if a.Cause != lifecycle.CauseTerminating || !a.Started.Equal(r.start) {
			t.Errorf("verdict: %+v", a.Verdict)
		}
	})
}

func TestSignalJoinsAndIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = 3 * time.Second
		r.ready(true)
		hook := r.hook()
		time.Sleep(time.Second)
		a := r.await(r.stop(t.Context(), lifecycle.CauseSignal))
		wantVerdict(t, r.await(hook).Verdict, a.Verdict)
		time.Sleep(time.Hour)
		r.restarted()

		r.changes.want(t,
			"0s Pending -> Online: endpoint ready in service web",
			"0s Online -> Draining: prestop hook",
			"3.5s Draining -> Released: prestop hook: drained in 3.5s, nothing in flight",
			"3.5s Released -> Stopped: SIGTERM",
		)
	})
}

func TestSignalAfterTheReleaseReturnsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		hook := r.await(r.hook())
		time.Sleep(time.Second)
		a := r.await(r.stop(t.Context(), lifecycle.CauseSignal))
		if a.at != 2*time.Second {
			t.Errorf("answered at %s", a.at)
		}
		wantVerdict(t, a.Verdict, hook.Verdict)
		r.wantState(lifecycle.Stopped)
		if d := r.reg.desired; d.State != lifecycle.Stopped || d.Verdict == nil {
			t.Errorf("the registry was told %s, verdict %v", d.State, d.Verdict)
		}
	})
}

func TestSignalAloneDrainsToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		a := r.await(r.stop(t.Context(), lifecycle.CauseSignal))
		if a.Outcome != lifecycle.Drained || a.Cause != lifecycle.CauseSignal {
			t.Errorf("verdict: %+v", a.Verdict)
		}
		r.wantState(lifecycle.Stopped)
	})
}

func TestSignalBeforeThePodIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.await(r.stop(t.Context(), lifecycle.CauseSignal))
		r.changes.want(t,
			"0s Pending -> Draining: SIGTERM",
			"1s Draining -> Released: SIGTERM: drained in 1s, nothing in flight",
			"1s Released -> Stopped: SIGTERM",
		)
		r.calls.want(t, "0s synced", "0s drain, settled in 1s", "1s quiet")
	})
}

func TestStopSaysSoWhenTheAgentHasStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = time.Hour
		r.ready(true)
		hook := r.hook()
		r.endRun()
		if err := <-r.runErr; err != nil {
			t.Errorf("Run: %v", err)
		}
		for _, c := range []<-chan answer{hook, r.hook()} {
			if a := <-c; a.err == nil || a.err.Error() != "waiting for the shutdown: the agent has stopped" {
				t.Errorf("Stop: %v", a.err)
			}
		}
		synctest.Wait()
		if got := r.calls.String(); !strings.Contains(got, "drain ended: context canceled") {
			t.Errorf("the drain goes on without anybody to hear of it:\n%s", got)
		}
	})
}

func TestRegistrarThatHangsCostsAtMostItsShare(t *testing.T) {
	for _, tc := range []struct {
		name          string
		back          time.Duration // when the registry answers again; 0: never
		withdrawn     bool
		err           string
		releasedAfter time.Duration
	}{
		{"for ever", 0, false, "etcd: connection refused", 5*time.Second + quiet + 2*time.Second},
		{"and is back within its share", time.Second, true, "", time.Second + 5*time.Second + quiet},
		{"and is back during the drain", 3 * time.Second, true, "", 5*time.Second + quiet + 2*time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.app.busy = 5 * time.Second
				r.ready(true)
				r.reg.hang(errors.New("etcd: connection refused"))
				hook := r.hook()
				if tc.back > 0 {
					time.Sleep(tc.back)
					r.reg.answer()
				}
				a := r.await(hook)
				if a.Withdrawn != tc.withdrawn || a.WithdrawError != tc.err || a.Outcome != lifecycle.Drained || a.at != tc.releasedAfter {
					t.Errorf("withdrawn %t, error %q, %s at %s; want %t, %q, at %s", a.Withdrawn, a.WithdrawError, a.Outcome, a.at, tc.withdrawn, tc.err, tc.releasedAfter)
				}
				if a.Withdraw > 2*time.Second {
					t.Errorf("withdrawing took %s", a.Withdraw)
				}
				if !tc.withdrawn && !strings.HasSuffix(a.Message(), "the registry could not be told: etcd: connection refused") {
					t.Errorf("message %q", a.Message())
				}
			})
		})
	}
}

func TestRegistrarThatHangsDoesNotOutliveTheDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.ready(true)
		r.reg.hang(nil)
		r.deleted(1500 * time.Millisecond)
		a := r.await(r.hook())
		if a.at != time.Second || a.Outcome != lifecycle.TimedOut || a.Withdrawn || a.Settle != 0 || a.Withdraw != time.Second {
			t.Errorf("released at %s: %+v", a.at, a.Verdict)
		}
	})
}

func TestDrainThatBlocksEndsInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.app.busy = time.Hour
		r.ready(true)
		a := r.await(r.hook())
		if a.Outcome != lifecycle.TimedOut || a.InFlight != 3 || a.Unsure != 1 || a.at != 25*time.Second {
			t.Errorf("released at %s: %+v", a.at, a.Verdict)
		}
		const want = "timed out after 25s with 3 in flight (1 of them unsure)"
		if got := a.Message(); got != want {
			t.Errorf("message %q, want %q", got, want)
		}
		if got := r.calls.String(); !strings.Contains(got, "25s drain ended: out of time") {
			t.Errorf("calls:\n%s", got)
		}
	})
}

func TestDrainerSeesADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := make(chan error, 1)
		r := newRig(t, func(_ *rig, c *lifecycle.Config) {
			c.Drainer = drainFunc(func(ctx context.Context) lifecycle.DrainResult {
				<-ctx.Done()
				seen <- context.Cause(ctx)
				return lifecycle.DrainResult{Outcome: lifecycle.TimedOut}
			})
		})
		r.await(r.hook())
		if err := <-seen; !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cause %v, want one that is context.DeadlineExceeded", err)
		}
	})
}

type drainFunc func(context.Context) lifecycle.DrainResult

func (f drainFunc) Wait(ctx context.Context, _ time.Time) lifecycle.DrainResult { return f(ctx) }

func TestReleaseComesAReserveBeforeTheDeadline(t *testing.T) {
	for _, tc := range []struct {
		name  string
		begin func(*rig) <-chan answer
		want  time.Duration // of the release
		late  time.Duration // that its deadline was over by
	}{
		{"full grace", func(r *rig) <-chan answer { r.deleted(30 * s); return r.hook() }, 25 * s, 0},
		{"hook without deletion has the Pod's grace", func(r *rig) <-chan answer {
			r.see(func(o *lifecycle.Observation) { o.Pod.Grace = 60 * s })
			return r.hook()
		}, 55 * s, 0},
		{"kubectl delete --grace-period=5: the reserve is at most a third", func(r *rig) <-chan answer { r.deleted(5 * s); return r.hook() }, 5*s - 5*s/3, 0},
		{"longer grace than the Pod's", func(r *rig) <-chan answer { r.deleted(60 * s); return r.hook() }, 55 * s, 0},
		{"hook first, then a shorter deletion", func(r *rig) <-chan answer {
			h := r.hook()
			time.Sleep(2 * s)
			r.deleted(12 * s)
			return h
		}, 2*s + 8*s, 0},
		{"second, shorter delete under way", func(r *rig) <-chan answer {
			r.deleted(30 * s)
			h := r.hook()
			time.Sleep(10 * s)
			r.deleted(3 * s)
			return h
		}, 12 * s, 0},
		{"second delete that is due at once", func(r *rig) <-chan answer {
			r.deleted(30 * s)
			h := r.hook()
			time.Sleep(10 * s)
			r.deleted(-s)
			return h
		}, 10 * s, s},
		{"a deadline never moves later", func(r *rig) <-chan answer {
			h := r.hook()
			time.Sleep(s)
			r.deleted(60 * s)
			r.deleted(90 * s)
			return h
		}, 25 * s, 0},
		{"nor does the release by a smaller reserve", func(r *rig) <-chan answer {
			r.deleted(30 * s)
			h := r.hook()
			time.Sleep(24 * s)
			r.deleted(5500 * time.Millisecond) // 500 ms sooner, of which a third is less than the 5 s until then
			return h
		}, 25 * s, 0},
		{"deletion without a deadline", func(r *rig) <-chan answer {
			r.see(func(o *lifecycle.Observation) { o.Pod.Terminating = true })
			return r.hook()
		}, 25 * s, 0},
		{"deletion that is over already", func(r *rig) <-chan answer { r.deleted(-10 * s); return r.hook() }, 0, 10 * s},
		{"refreshed observations change nothing", func(r *rig) <-chan answer {
			h := r.hook()
			time.Sleep(10 * s)
			r.ready(false)
			return h
		}, 25 * s, 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.app.busy = time.Hour
				r.ready(true)
				a := r.await(tc.begin(r))
				if a.at != tc.want || a.Outcome != lifecycle.TimedOut || !a.Deadline.Equal(r.after(tc.want-tc.late)) {
					t.Errorf("%s at %s, deadline %s; want at %s, deadline %s", a.Outcome, a.at, a.Deadline.Sub(r.start), tc.want, tc.want-tc.late)
				}
			})
		})
	}
}

func TestUnknownPodHasTheDefaultGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.app.busy = time.Hour
		a := r.await(r.hook())
		if want := lifecycle.DefaultGrace - 5*time.Second; a.at != want {
			t.Errorf("released at %s, want %s: %+v", a.at, want, a.Verdict)
		}
		r.calls.want(t, "0s synced", "0s drain, settled in 1s", "25s drain ended: out of time")
	})
}

func TestPodSeenDuringTheShutdownShortensIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := bareRig(t)
		r.app.busy = time.Hour
		hook := r.hook()
		time.Sleep(3 * time.Second)
		r.see(func(o *lifecycle.Observation) {
			o.Pod = lifecycle.Pod{Known: true, Grace: 9 * time.Second}
			o.Endpoints = []lifecycle.Endpoint{{Service: "web"}}
		})
		// 6 s are left, and the application keeps a third of what was left when that was seen.
		if a := r.await(hook); a.at != 7*time.Second {
			t.Errorf("released at %s, want 7s", a.at)
		}
	})
}

func TestVerdictMessages(t *testing.T) {
	start := time.Now()
	for _, tc := range []struct {
		v    lifecycle.Verdict
		want string
	}{
		{lifecycle.Verdict{Outcome: lifecycle.Drained, Withdrawn: true}, "drained in 1.5s, nothing in flight"},
		{lifecycle.Verdict{Outcome: lifecycle.TimedOut, Withdrawn: true, InFlight: 2}, "timed out after 1.5s with 2 in flight"},
		{lifecycle.Verdict{Outcome: lifecycle.Skipped, Withdrawn: true}, "released after 1.5s, nothing to wait for"},
		{
			lifecycle.Verdict{Outcome: lifecycle.Unmeasured, WithdrawError: "no lease", Sources: []lifecycle.SourceResult{{Name: "http", Err: "refused"}, {Name: "sockdiag"}}},
			"released after 1.5s without knowing what was in flight; the registry could not be told: no lease; source http: refused",
		},
	} {
		tc.v.Started, tc.v.Released = start, start.Add(1500*time.Millisecond+300*time.Microsecond)
		if got := tc.v.Message(); got != tc.want {
			t.Errorf("%q, want %q", got, tc.want)
		}
	}
}
