package lifecycle_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/lifecycle"
)

const s, ms = time.Second, time.Millisecond

func TestBudgetValidate(t *testing.T) {
	for _, tc := range []struct {
		b    lifecycle.Budget
		want string
	}{
		{lifecycle.DefaultBudget(), ""},
		{lifecycle.Budget{Withdraw: 1}, ""},
		{lifecycle.Budget{}, "withdraw 0s: want a duration above zero, such as 1s"},
		{lifecycle.Budget{Withdraw: -s}, "withdraw -1s: want a duration above zero, such as 1s"},
		{lifecycle.Budget{Withdraw: s, Settle: -s}, "settle -1s: want zero or a duration above it, such as 1s"},
		{lifecycle.Budget{Withdraw: s, Reserve: -ms}, "reserve -1ms: want zero or a duration above it, such as 1s"},
	} {
		if got := text(tc.b.Validate()); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.b, got, tc.want)
		}
	}
}

func TestBudgetFit(t *testing.T) {
	for _, tc := range []struct {
		settle, reserve, quiet, grace time.Duration
		want                          string
	}{
		{s, 5 * s, 500 * ms, 30 * s, ""},
		{s, 5 * s, 500 * ms, 2 * s, ""},
		{20 * s, 5 * s, 500 * ms, 25 * s, ""},
		{2 * s, 5 * s, 500 * ms, 3 * s, ""},
		{
			s, 5 * s, 500 * ms, 1 * s,
			"terminationGracePeriodSeconds (the pod's, or the shortest of its probes') is 1; less 333.333333ms that the application keeps, 666.666667ms are left, but settle needs 1s: " +
				"raise terminationGracePeriodSeconds to at least 2, or lower settle to at most 666.666667ms",
		},
		{
			20 * s, 5 * s, 500 * ms, 24 * s,
			"terminationGracePeriodSeconds (the pod's, or the shortest of its probes') is 24; less 5s that the application keeps, 19s are left, but settle needs 20s: " +
				"raise terminationGracePeriodSeconds to at least 25, or lower settle to at most 19s",
		},
		{
			0, 5 * s, 4 * s, 5 * s,
			"terminationGracePeriodSeconds (the pod's, or the shortest of its probes') is 5; less 1.666666666s that the application keeps, 3.333333334s are left, but the quiet period needs 4s: " +
				"raise terminationGracePeriodSeconds to at least 6, or lower the quiet period to at most 3.333333334s",
		},
		{
			2 * s, 0, 3 * s, s,
			"terminationGracePeriodSeconds (the pod's, or the shortest of its probes') is 1; less 0s that the application keeps, 1s are left, but settle needs 2s and the quiet period needs 3s: " +
				"raise terminationGracePeriodSeconds to at least 3, or lower settle and the quiet period to at most 1s",
		},
	} {
		b := lifecycle.Budget{Withdraw: 2 * s, Settle: tc.settle, Reserve: tc.reserve}
		if got := text(b.Fit(tc.grace, tc.quiet)); got != tc.want {
			t.Errorf("settle %s, reserve %s, quiet %s, grace %s:\n%q, want\n%q", tc.settle, tc.reserve, tc.quiet, tc.grace, got, tc.want)
		}
	}
}

func TestBudgetFitNamesTheLeastGraceThatFits(t *testing.T) {
	for settle := 100 * ms; settle < 40*s; settle += 700 * ms {
		b := lifecycle.Budget{Withdraw: s, Settle: settle, Reserve: 5 * s}
		least := time.Duration(0)
		for b.Fit(least, 0) != nil {
			least += s
		}
		advice := fmt.Sprintf("to at least %d,", least/s)
		if got := text(b.Fit(least-s, 0)); !strings.Contains(got, advice) {
			t.Errorf("settle %s: %s fits, but the advice is %q", settle, least, got)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
