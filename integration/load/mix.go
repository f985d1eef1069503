package load

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Kind is what a request asks for.
type Kind string

// The kinds.
const (
	Fast     Kind = "fast"
	Slow     Kind = "slow"
	VerySlow Kind = "very-slow"
	Stream   Kind = "stream"
)

// usualFor is how long an answer of each kind takes when its share doesn't say.
func usualFor(k Kind) (time.Duration, bool) {
	switch k {
	case Fast:
		return time.Millisecond, true
	case Slow, Stream:
		return 2 * time.Second, true
	case VerySlow:
		return 8 * time.Second, true
	}
	return 0, false
}

// Share is one kind's part of the requests.
type Share struct {
	Kind Kind
	// Weight is relative to the other shares' weights; a share of weight 0 is not sent.
	Weight int
	// For is how long the answer takes (a stream: lasts); 0: 1 ms for fast, 2 s for slow and stream, 8 s for very slow.
	For time.Duration
}

// DefaultMix is 94 fast, 4 slow, 1 very slow, 1 stream in a hundred.
func DefaultMix() []Share {
	return []Share{{Kind: Fast, Weight: 94}, {Kind: Slow, Weight: 4}, {Kind: VerySlow, Weight: 1}, {Kind: Stream, Weight: 1}}
}

// ParseMix reads a mix written as fast=94,slow=4,very-slow:10s=1: kind, optionally a colon and how long the answer takes,
// and its weight.
func ParseMix(text string) ([]Share, error) {
	var mix []Share
	for part := range strings.SplitSeq(text, ",") {
		name, weight, ok := strings.Cut(strings.TrimSpace(part), "=")
		s := Share{}
		kind, dur, timed := strings.Cut(name, ":")
		s.Kind = Kind(kind)
		var err error
		if s.Weight, err = strconv.Atoi(weight); !ok || err != nil {
			return nil, fmt.Errorf("mix: %q: give kind=weight or kind:duration=weight, such as slow:2s=4", part)
		}
		if timed {
			if s.For, err = time.ParseDuration(dur); err != nil || s.For <= 0 {
				return nil, fmt.Errorf("mix: %q: %q is no positive duration, such as 2s", part, dur)
			}
		}
		mix = append(mix, s)
	}
	return mix, nil
}

// checkMix returns the mix with all durations filled in, and the sum of its weights.
func checkMix(mix []Share, timeout time.Duration) (filled []Share, total int, err error) {
	seen := map[Kind]bool{}
	for _, s := range mix {
		usual, known := usualFor(s.Kind)
		if s.For == 0 {
			s.For = usual
		}
		switch {
		case !known:
			return nil, 0, fmt.Errorf("kind %q is unknown: give fast, slow, very-slow or stream", s.Kind)
		case seen[s.Kind]:
			return nil, 0, fmt.Errorf("kind %q is given twice", s.Kind)
		case s.Weight < 0 || s.Weight > 1_000_000:
			return nil, 0, fmt.Errorf("the weight of %s is %d: give 0 to 1000000", s.Kind, s.Weight)
		case s.For < 0:
			return nil, 0, fmt.Errorf("%s for %v: give a positive duration", s.Kind, s.For)
		case s.Weight > 0 && s.For >= timeout:
			return nil, 0, fmt.Errorf("%s takes %v, and Timeout is %v: every one would fail; give a longer Timeout", s.Kind, s.For, timeout)
		}
		seen[s.Kind] = true
		total += s.Weight
		filled = append(filled, s)
	}
	if total == 0 {
		return nil, 0, errors.New("the weights add up to 0: nothing would be sent")
	}
	return filled, total, nil
}

// choose returns the share at position n of the weights laid end to end.
func choose(mix []Share, n int) Share {
	for _, s := range mix {
		if n -= s.Weight; n < 0 {
			return s
		}
	}
	return mix[len(mix)-1]
}

// checkTarget refuses what would not read as one target in the URL etcd:///<target>.
func checkTarget(target string) error {
	switch {
	case strings.HasSuffix(target, "/"):
		return errors.New("ends in a slash: give the key without it")
	case strings.ContainsAny(target, "?#% "):
		return errors.New("has a ?, #, % or space in it, which the URL etcd:///<target> cannot carry")
	}
	return nil
}
