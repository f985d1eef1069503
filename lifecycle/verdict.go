package lifecycle

import (
	"fmt"
	"strings"
	"time"
)

// Outcome is how a shutdown ended.
type Outcome string

const (
	Drained    Outcome = "drained"    // nothing was in flight for the quiet period
	TimedOut   Outcome = "timed-out"  // the deadline came first
	Unmeasured Outcome = "unmeasured" // a source failed, and the floor was waited out instead
	Forced     Outcome = "forced"     // somebody ended the wait
	Skipped    Outcome = "skipped"    // no source is configured: only the settle time was waited out
)

// DrainResult is what a Drainer found.
type DrainResult struct {
	Outcome  Outcome
	InFlight int // at the end
	Unsure   int // of InFlight, how many might have been idle
	Sources  []SourceResult
}

// SourceResult is what one of a Drainer's sources said last.
type SourceResult struct {
	Name                                string
	InFlight, Unsure, Connections, Peak int
	Err                                 string
}

// Verdict is the account of one shutdown.
type Verdict struct {
	Outcome           Outcome
	Cause             string
	Started, Released time.Time
	Deadline          time.Time // of the release, the reserve already taken off

	// Guard is how long the withdrawal was held back for the sake of the service, before all else, and GuardError why it
	// went on with too few others.
	Guard      time.Duration
	GuardError string

	Withdraw, Settle, Drain time.Duration
	Withdrawn               bool   // the registry was told before the release
	WithdrawError           string // why not

	InFlight, Unsure int
	Sources          []SourceResult
	ForcedBy         string // who or what ended the wait; Forced only
	AnnounceError    string // who could not be told of the shutdown
}

// Total is the time from the first trigger to the release.
func (v Verdict) Total() time.Duration { return v.Released.Sub(v.Started) }

// Message is the verdict in one sentence.
func (v Verdict) Message() string {
	var b strings.Builder
	total := v.Total().Round(time.Millisecond)
	switch v.Outcome {
	case Drained:
		fmt.Fprintf(&b, "drained in %s, nothing in flight", total)
	case TimedOut:
		fmt.Fprintf(&b, "timed out after %s with %d in flight", total, v.InFlight)
		if v.Unsure > 0 {
			fmt.Fprintf(&b, " (%d of them unsure)", v.Unsure)
		}
	case Forced:
		fmt.Fprintf(&b, "forced by %s after %s with %d in flight", v.ForcedBy, total, v.InFlight)
	case Unmeasured:
		fmt.Fprintf(&b, "released after %s without knowing what was in flight", total)
	case Skipped:
		fmt.Fprintf(&b, "released after %s, nothing to wait for", total)
	}
	if !v.Withdrawn {
		fmt.Fprintf(&b, "; the registry could not be told: %s", v.WithdrawError)
	}
	if v.GuardError != "" {
		fmt.Fprintf(&b, "; withdrawn after %s although %s", v.Guard.Round(time.Millisecond), v.GuardError)
	}
	if v.AnnounceError != "" {
		fmt.Fprintf(&b, "; not all could be told: %s", v.AnnounceError)
	}
	for _, s := range v.Sources {
		if s.Err != "" {
			fmt.Fprintf(&b, "; source %s: %s", s.Name, s.Err)
		}
	}
	return b.String()
}
