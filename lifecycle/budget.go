package lifecycle

import (
	"fmt"
	"time"
)

// DefaultGrace is terminationGracePeriodSeconds of a Pod whose spec says nothing, and the figure used while the own Pod
// has never been seen.
const DefaultGrace = 30 * time.Second

// Budget divides the grace period. The package comment has the timeline.
type Budget struct {
	// Withdraw bounds the wait for the registry before settling begins; retries go on behind it. Default 2 s.
	Withdraw time.Duration
	// Settle is how long consumers take to learn of a withdrawal. Default 1 s.
	Settle time.Duration
	// Reserve is what the application keeps of the grace for its own shutdown, at most a third of it. Default 5 s.
	Reserve time.Duration
}

// DefaultBudget is for readers that watch etcd.
func DefaultBudget() Budget {
	return Budget{Withdraw: 2 * time.Second, Settle: time.Second, Reserve: 5 * time.Second}
}

// Validate refuses numbers that make no sense in any pod.
func (b Budget) Validate() error {
	for _, f := range []struct {
		name  string
		value time.Duration
		zero  bool
	}{{"withdraw", b.Withdraw, false}, {"settle", b.Settle, true}, {"reserve", b.Reserve, true}} {
		if f.value < 0 || f.value == 0 && !f.zero {
			return fmt.Errorf("%s %s: want a duration above zero, such as 1s", f.name, f.value)
		}
	}
	return nil
}

// Fit refuses a budget for which a pod's grace period is too short, and says which number to change. quiet is the
// shortest drain there is.
func (b Budget) Fit(grace, quiet time.Duration) error {
	least := max(b.Settle, quiet)
	if room := grace - b.reserve(grace); least > room {
		return fmt.Errorf("terminationGracePeriodSeconds is %s, of which the application keeps %s, but settle %s and quiet period %s need %s: "+
			"raise terminationGracePeriodSeconds to at least %d, or lower settle or the quiet period",
			grace, b.reserve(grace), b.Settle, quiet, least, int64((least*3/2).Seconds())+1)
	}
	return nil
}

func (b Budget) reserve(grace time.Duration) time.Duration { return min(b.Reserve, grace/3) }

// releaseBy is the latest moment of the release, for a SIGKILL at deadline that is known of since now.
func (b Budget) releaseBy(now, deadline time.Time) time.Time {
	return deadline.Add(-b.reserve(max(0, deadline.Sub(now))))
}
