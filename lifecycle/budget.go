package lifecycle

import (
	"fmt"
	"strings"
	"time"
)

// DefaultGrace is terminationGracePeriodSeconds of a Pod whose spec says nothing, and the figure used while the own Pod
// has never been seen.
const DefaultGrace = 30 * time.Second

// Budget divides the grace period. The package comment has the timeline.
type Budget struct {
	// Withdraw bounds the wait for the registry before settling begins; retries go on behind it. Default 2 s.
	Withdraw time.Duration
	// Guard bounds how long a withdrawal is held back while too few other instances are there; half of the time until the
	// release does too. Default 10 s.
	Guard time.Duration
	// Settle is how long consumers take to learn of a withdrawal. Default 1 s.
	Settle time.Duration
	// Reserve is what the application keeps of the grace for its own shutdown, at most a third of it. Default 5 s.
	Reserve time.Duration
}

// DefaultBudget is for readers that watch etcd.
func DefaultBudget() Budget {
	return Budget{Guard: 10 * time.Second, Withdraw: 2 * time.Second, Settle: time.Second, Reserve: 5 * time.Second}
}

// Validate refuses numbers that make no sense in any pod.
func (b Budget) Validate() error {
	for _, f := range []struct {
		name  string
		value time.Duration
		zero  bool
	}{{"min-available-timeout", b.Guard, true}, {"withdraw", b.Withdraw, false}, {"settle", b.Settle, true}, {"reserve", b.Reserve, true}} {
		if f.value < 0 || f.value == 0 && !f.zero {
			want := "a duration above zero, such as 1s"
			if f.zero {
				want = "zero or a duration above it, such as 1s"
			}
			return fmt.Errorf("%s %s: want %s", f.name, f.value, want)
		}
	}
	return nil
}

// Fit refuses a budget for which a pod's grace period is too short, and says which number to change. quiet is the
// shortest drain there is; it may overlap the settle time. Withdraw needs no room of its own: it takes milliseconds, and
// when it takes longer the drain is the shorter for it.
func (b Budget) Fit(grace, quiet time.Duration) error {
	room := grace - b.reserve(grace)
	var needs, lower []string
	for _, f := range []struct {
		name  string
		value time.Duration
	}{{"settle", b.Settle}, {"the quiet period", quiet}} {
		if f.value > room {
			needs = append(needs, fmt.Sprintf("%s needs %s", f.name, f.value))
			lower = append(lower, f.name)
		}
	}
	if len(needs) == 0 {
		return nil
	}
	least := max(b.Settle, quiet)
	least = min(least+b.Reserve, least+(least+1)/2) // so that least fits beside the reserve, or beside a third
	return fmt.Errorf("terminationGracePeriodSeconds (the pod's, or the shortest of its probes') is %d; less %s that the application keeps, %s are left, but %s: "+
		"raise terminationGracePeriodSeconds to at least %d, or lower %s to at most %s",
		int64(grace/time.Second), b.reserve(grace), room, strings.Join(needs, " and "),
		int64((least+time.Second-1)/time.Second), strings.Join(lower, " and "), room)
}

func (b Budget) reserve(grace time.Duration) time.Duration { return min(b.Reserve, grace/3) }

// releaseBy is the latest moment of the release, for a SIGKILL at deadline that is known of since now.
func (b Budget) releaseBy(now, deadline time.Time) time.Time {
	return deadline.Add(-b.reserve(max(0, deadline.Sub(now))))
}
