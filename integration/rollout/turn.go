package rollout

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"usher.dev/usher/integration/load"
)

// clock is how a time of the day is shown.
const clock = "15:04:05.000"

// Turn is one rollout of one way.
type Turn struct {
	// Took runs from the patch until the last old pod had ended and all new ones were registered.
	Took time.Duration
	// Load is the whole turn's. It was sent for Sending, and its last answers came after that.
	Load    load.Report
	Sending time.Duration
	Stops   []Stop

	begun time.Time
	old   []*pod
}

func (t Turn) String() string {
	median, worst := spread(t.Stops)
	return fmt.Sprintf("%d requests, %s failed; SIGTERM came %s after the last answer, at worst %s",
		t.Load.Sent, how(t.Load.Failed, t.Load.Classes), seconds(median), seconds(worst))
}

// Stop is the end of one pod.
type Stop struct {
	Pod string
	// After is the time from its deletion to SIGTERM.
	After time.Duration
	// Needed is the time from its deletion until its last request was answered, or would have been.
	Needed time.Duration
	// Owed is how many answers the application owed at SIGTERM, as it counts them itself.
	Owed int
}

// Beyond is how much longer the pod lingered than its requests took. A pod that was ended too soon lingered for no time.
func (s Stop) Beyond() time.Duration { return max(0, s.After-s.Needed) }

func (p *pod) stop() Stop {
	last := p.answered
	for _, f := range p.failed {
		// What was sent to a dead application is lost, but nothing that it could have been given time for.
		if end := f.Scheduled.Add(lasts(f.Kind)); f.Scheduled.Before(p.ended) && end.After(last) {
			last = end
		}
	}
	return Stop{Pod: p.name, After: p.ended.Sub(p.deleted), Needed: max(0, last.Sub(p.deleted)), Owed: p.owed}
}

// lasts is how long a request of that kind takes to answer.
func lasts(k load.Kind) time.Duration {
	switch k {
	case load.Slow:
		return 2 * time.Second
	case load.VerySlow:
		return 8 * time.Second
	}
	return time.Millisecond
}

// spread of the time beyond the longest request.
func spread(stops []Stop) (median, worst time.Duration) {
	beyond := make([]time.Duration, len(stops))
	for i, s := range stops {
		beyond[i] = s.Beyond()
	}
	return middle(beyond)
}

// middle is the median, which is one of them, and the largest.
func middle(of []time.Duration) (median, worst time.Duration) {
	if len(of) == 0 {
		return 0, 0
	}
	of = slices.Sorted(slices.Values(of))
	return of[(len(of)-1)/2], of[len(of)-1]
}

// traffic is a load under way.
type traffic struct {
	generator *load.Generator
	stop      context.CancelFunc
	ended     chan struct{}
	report    load.Report // once ended is closed
}

// send begins to send to the site's instances. A load that can't begin ends everything, by fail.
func (s *site) send(ctx context.Context, fail context.CancelCauseFunc) (*traffic, error) {
	g, err := load.New(load.Config{
		Endpoints: []string{s.stack.RegistryEndpoint()}, HTTPTarget: s.namespace + "/http", GRPCTarget: s.namespace + "/grpc",
		Rate: rate, Workers: workers, Mix: mix(), OnResult: s.result,
	})
	if err != nil {
		return nil, err
	}
	sending, stop := context.WithCancel(ctx)
	t := &traffic{generator: g, stop: stop, ended: make(chan struct{})}
	go func() {
		defer close(t.ended)
		var err error
		if t.report, err = g.Run(sending); err != nil {
			fail(fmt.Errorf("%s: %w", s.way.Name, err))
		}
	}()
	return t, nil
}

// account is the evidence of what went wrong: every pod that has lost a request since the last account, or lingered in this
// turn, with all that was seen of it. It is empty when all went well.
func (s *site) account(t Turn) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(s.pods)) {
		p := s.pods[name]
		failed := p.failed[p.told:]
		p.told = len(p.failed)
		if len(failed) == 0 && !(slices.Contains(t.old, p) && p.stop().Beyond() > Most) {
			continue
		}
		from := t.begun
		if p.deleted.IsZero() {
			fmt.Fprintf(&b, "pod %s (%s), which nobody has deleted; times count from the patch at %s\n", p.name, p.ip, from.Format(clock))
		} else {
			from = p.deleted
			st := p.stop()
			fmt.Fprintf(&b, "pod %s (%s), deleted at %s: SIGTERM after %s, its requests needed %s, it owed %d answers; times count from its deletion\n",
				p.name, p.ip, from.Format(clock), seconds(st.After), seconds(st.Needed), st.Owed)
		}
		for _, f := range failed {
			fmt.Fprintf(&b, "  failed: %s\n", describe(f, from))
		}
		slices.SortStableFunc(p.log, func(a, b line) int { return a.at.Compare(b.at) })
		for _, l := range p.log {
			fmt.Fprintf(&b, "  %+9.3f s  %-5s  %s\n", l.at.Sub(from).Seconds(), l.container, l.text)
		}
	}
	for _, f := range s.strays {
		fmt.Fprintf(&b, "failed at no pod that is known, times count from the patch at %s: %s\n", t.begun.Format(clock), describe(f, t.begun))
	}
	s.strays = nil
	return strings.TrimSuffix(b.String(), "\n")
}

// describe is one failed request, with its times counted from a moment.
func describe(r load.Result, from time.Time) string {
	return fmt.Sprintf("%s %s to %s, sent at %+.3f s, failed at %+.3f s: %s: %s", r.Protocol, r.Kind, r.Instance,
		r.Scheduled.Sub(from).Seconds(), r.Scheduled.Add(r.Latency).Sub(from).Seconds(), r.Class, r.Err)
}
