package lifecycle_test

import (
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/lifecycle"
)

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
			Started: r.start.Add(time.Minute), Released: r.start.Add(time.Minute + time.Second), Deadline: r.start.Add(time.Minute + 25*time.Second),
		}
		if a.at != time.Minute+time.Second {
			t.Errorf("released at %s", a.at)
		}
		wantVerdict(t, a.Verdict, want)
	})
}

func wantVerdict(t *testing.T, got, want lifecycle.Verdict) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("verdict:\n%+v\nwant:\n%+v", got, want)
	}
}
