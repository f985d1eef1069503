package watcher

import (
	"sync"
	"time"
)

// serverClock bounds the difference between the API server's clock and this machine's.
//
// An answer with the header `Date: d` was written between the moments sent and received on this machine, and d is
// truncated to the second, so
//
//	d - received <= server clock - own clock <= d + 1 s - sent
//
// The interval narrows with each answer, as its requests fall on other parts of the second.
//
// Own time is counted by the monotonic clock from base on, so a step of this machine's clock doesn't matter.
type serverClock struct {
	base time.Time

	mu      sync.Mutex
	known   bool
	lo, hi  time.Duration
	updated time.Time
}

// maxDrift is how fast two clocks may run apart: 100 ppm is beyond what crystals and NTP's slewing of well-kept ones do,
// and a faster one shows as a contradiction, which starts the interval anew.
const maxDrift = 100e-6

func newServerClock(base time.Time) *serverClock { return &serverClock{base: base} }

func (c *serverClock) observe(sent, received, date time.Time) {
	// date has no monotonic reading, so this is the difference of wall clocks at base plus the time since.
	sinceBase := date.Sub(c.base.Round(0))
	lo := sinceBase - received.Sub(c.base)
	hi := sinceBase + time.Second - sent.Sub(c.base)

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.known {
		drift := time.Duration(float64(received.Sub(c.updated)) * maxDrift)
		l, h := max(lo, c.lo-drift), min(hi, c.hi+drift)
		if l <= h {
			lo, hi = l, h
		}
		// Else one of the clocks was set: only the newest answer counts.
	}
	c.known, c.lo, c.hi, c.updated = true, lo, hi, received
}

// skew is the server's clock minus the own one. As long as the answers allow for no difference there is none: nodes
// keep their clocks by NTP. Else it is the upper bound, which makes deadlines early rather than late.
func (c *serverClock) skew() (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.lo <= 0 && c.hi >= 0 {
		return 0, c.known
	}
	return c.hi, c.known
}

// local is the moment on this machine's clock, with a monotonic reading, at which the server's clock shows t.
func (c *serverClock) local(t time.Time) time.Time {
	skew, _ := c.skew()
	return c.base.Add(t.Sub(c.base.Round(0)) - skew)
}
