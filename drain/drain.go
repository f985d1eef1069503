// Package drain waits until an application that has been taken out of service owes nobody an answer, and no longer.
//
//	     Source.Sample (sockdiag, http, ...)     one goroutine a source, every Interval
//	               |
//	start ---------+---- settle ----- notBefore ------------------------ ctx's deadline
//	  |                                  |                                      |
//	  |   all sources at zero, nothing   |  released here at the earliest:      |  released here at the
//	  |   arriving, for Quiet: may pass  |  quiet (or floor, when a source      |  latest: deadline, with
//	  |   while the settle time does     |  is unknown)                         |  what was still in flight
//
// A fixed sleep is too short for the slow request and too long for all others, so the wait is driven by what is in
// flight. A source never guesses: what it can't read is unknown, not zero. An unknown source costs time (Config.Floor),
// so that a broken measurement does not cut requests off, and can't hold the pod past its deadline either.
package drain

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// Defaults of Config.
const (
	DefaultQuiet         = 500 * time.Millisecond
	DefaultInterval      = 50 * time.Millisecond
	DefaultFloor         = 5 * time.Second
	DefaultSampleTimeout = time.Second
)

// Sample is what a source saw at one moment.
type Sample struct {
	// InFlight is the number of answers still owed, connections that may be owed one (Unsure) included.
	InFlight int
	// Unsure is how many of InFlight could not be told from idle ones. A source drops them once its patience is over.
	Unsure int
	// Connections is the number of open connections, idle ones included; 0 when the source can't know.
	Connections int
	// Probes is how many of InFlight look like a probe of the kubelet. They are waited for like all others, but don't
	// start the quiet period anew: else a probe every second, whose answer takes half of one, would hold any drain to its
	// deadline.
	Probes int
	// Activity grows whenever something arrived on a connection that was known before: some client has not let go yet,
	// even if every answer was given between two samples. It never falls. New connections don't count, since the
	// kubelet's probes open one each time.
	Activity uint64
}

// Source measures what is in flight. An error means unknown, never zero. Sample is called from one goroutine at a time.
type Source interface {
	Name() string
	Sample(ctx context.Context) (Sample, error)
}

// Pacer is a Source that costs CPU time to sample. After each sample the Drainer asks it how long to leave it alone.
type Pacer interface {
	Source
	Pause() time.Duration
}

// Config of a Drainer. The zero value of a duration means its default.
type Config struct {
	// Sources must all agree that nothing is in flight. With none, Wait waits for the settle time only.
	Sources []Source
	// Quiet is for how long all sources must have agreed; default 500 ms.
	Quiet time.Duration
	// Interval is the time from the start of one sample to the start of the next, unless a source wants a longer one
	// (Pacer); default 50 ms.
	Interval time.Duration
	// Floor is how long, from the start of the wait, a source may be unknown before the wait goes on without it;
	// default 5 s.
	Floor time.Duration
	// SampleTimeout is how long a source may take to answer before it is unknown; default 1 s.
	SampleTimeout time.Duration
	// OnSample, when set, is told after every sample how the wait stands. It is called from Wait's goroutine and must
	// not block.
	OnSample func(Progress)
	// Logger; default none.
	Logger *zap.Logger
}

// Drainer waits for requests in flight to end. It holds no state between waits; make it with New.
type Drainer struct {
	cfg Config
	log *zap.Logger
}

// New checks cfg and fills in its defaults.
func New(cfg Config) (*Drainer, error) {
	for _, f := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"Quiet", &cfg.Quiet, DefaultQuiet},
		{"Interval", &cfg.Interval, DefaultInterval},
		{"Floor", &cfg.Floor, DefaultFloor},
		{"SampleTimeout", &cfg.SampleTimeout, DefaultSampleTimeout},
	} {
		if *f.value < 0 {
			return nil, fmt.Errorf("drain: %s is %v, must be positive (0 means the default, %v)", f.name, *f.value, f.def)
		}
		if *f.value == 0 {
			*f.value = f.def
		}
	}
	if cfg.Interval > cfg.Quiet {
		return nil, fmt.Errorf("drain: Interval is %v, must be at most Quiet (%v): a quiet period needs more than one sample", cfg.Interval, cfg.Quiet)
	}
	seen := map[string]bool{}
	for i, s := range cfg.Sources {
		if s == nil {
			return nil, fmt.Errorf("drain: Sources[%d] is nil, must be a source", i)
		}
		name := s.Name()
		if name == "" || seen[name] {
			return nil, fmt.Errorf("drain: Sources[%d] is named %q, must have a name that no other source has", i, name)
		}
		seen[name] = true
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	return &Drainer{cfg: cfg, log: cfg.Logger}, nil
}

// Outcome says why a wait ended.
type Outcome string

const (
	// Quiet: every source agreed on zero for the quiet period.
	Quiet Outcome = "quiet"
	// Floor: those that could be read agreed; for the others the floor was waited out.
	Floor Outcome = "floor"
	// Deadline: time ran out before they agreed. InFlight is what was left.
	Deadline Outcome = "deadline"
	// Forced: the wait's context was cancelled for a reason other than time, which Result.Cause holds.
	Forced Outcome = "forced"
	// Skipped: there was no source to ask, so only the settle time was waited.
	Skipped Outcome = "skipped"
)

// Result of a wait.
type Result struct {
	Outcome Outcome
	// Cause is why the context ended, for Deadline and Forced; nil otherwise.
	Cause error
	Took  time.Duration
	// InFlight and Unsure at the end: the largest that any source said, since sources look at the same requests, each in
	// its own way, and a sum would count those twice. Of a source that was unknown at the end it is what it last knew.
	InFlight, Unsure int
	// Sources in the order of Config.Sources.
	Sources []SourceResult
}

// SourceResult is one source's last word.
type SourceResult struct {
	Name string
	// InFlight, Unsure and Connections as last known.
	InFlight, Unsure, Connections int
	// Peak and PeakUnsure are the most that were seen in flight, and unsure, at once.
	Peak, PeakUnsure int
	// Samples is how many times the source could be read.
	Samples int
	// Err is why the source is unknown; empty when it is known.
	Err string
}

// Progress is the state of a wait that goes on; the figures mean the same as in Result.
type Progress struct {
	Elapsed          time.Duration
	InFlight, Unsure int
	Sources          []SourceResult
}

var errNotSampled = errors.New("not sampled yet")

// report is what one call of Sample came to.
type report struct {
	source     int
	start, end time.Time
	sample     Sample
	err        error
	calm       calm
}

// calm is for how long one source has seen nothing in flight.
type calm struct {
	activity uint64
	// since is when the first of the latest unbroken row of quiet samples ended, and seen when the last of them started.
	// What lies between is certain. since is zero when the source is unknown or not quiet, and seen also while there is
	// nothing in flight but what may be probes.
	since, seen time.Time
}

func (c *calm) note(r report) {
	moved := r.sample.Activity != c.activity
	c.activity = r.sample.Activity
	switch {
	case r.err != nil || r.sample.InFlight > r.sample.Probes:
		c.since, c.seen = time.Time{}, time.Time{}
		return
	case moved || c.since.IsZero():
		c.since = r.end
	}
	c.seen = time.Time{}
	if r.sample.InFlight == 0 {
		c.seen = r.start
	}
}

// standing is what Wait knows about one source.
type standing struct {
	SourceResult
	err  error
	calm calm
}

// Wait returns when nothing has been in flight for the quiet period and notBefore has passed, or when ctx ends: its deadline
// is the wait's, and it may be cancelled with a cause at any moment. The quiet period may overlap the settle time that
// notBefore ends: settle is for requests that consumers still send, quiet is proof that none came, and the proof needs
// no repeating. So an idle instance is released at notBefore, not a quiet period later.
func (d *Drainer) Wait(ctx context.Context, notBefore time.Time) Result {
	start := time.Now()
	states := make([]standing, len(d.cfg.Sources))
	finish := func(o Outcome) Result {
		p := progress(start, states)
		r := Result{Outcome: o, Took: p.Elapsed, InFlight: p.InFlight, Unsure: p.Unsure, Sources: p.Sources}
		if o == Deadline || o == Forced {
			r.Cause = context.Cause(ctx)
		}
		return r
	}
	interrupted := func() Result {
		if errors.Is(context.Cause(ctx), context.DeadlineExceeded) || errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return finish(Deadline)
		}
		return finish(Forced)
	}

	if len(states) == 0 {
		settled := time.NewTimer(time.Until(notBefore))
		defer settled.Stop()
		select {
		case <-settled.C:
			return finish(Skipped)
		case <-ctx.Done():
			return interrupted()
		}
	}

	sampling, stop := context.WithCancel(ctx)
	defer stop()
	reports := make(chan report)
	for i, s := range d.cfg.Sources {
		states[i].Name = s.Name()
		states[i].fail(errNotSampled)
		go d.sample(sampling, i, s, notBefore, reports)
	}
	// A source that hangs reports nothing more, so the end of its floor needs a timer.
	floor := latest(start.Add(d.cfg.Floor), notBefore)
	floorOver := time.NewTimer(time.Until(floor))
	defer floorOver.Stop()
	for {
		select {
		case <-ctx.Done():
			return interrupted()
		case <-floorOver.C:
		case r := <-reports:
			d.note(&states[r.source], r)
			if d.cfg.OnSample != nil {
				d.cfg.OnSample(progress(start, states))
			}
		}
		if o, done := d.decide(states, time.Now(), notBefore, floor); done {
			return finish(o)
		}
	}
}

// decide is the rule of the wait. floor is not before notBefore.
func (d *Drainer) decide(states []standing, now, notBefore, floor time.Time) (Outcome, bool) {
	o := Quiet
	for i := range states {
		s := &states[i]
		switch {
		case s.err != nil:
			if now.Before(floor) {
				return "", false
			}
			o = Floor
		// Sampled after the settle time: what came in its last moments has been looked at.
		case s.calm.seen.IsZero() || s.calm.seen.Sub(s.calm.since) < d.cfg.Quiet || s.calm.seen.Before(notBefore):
			return "", false
		}
	}
	return o, true
}

func (d *Drainer) note(s *standing, r report) {
	if r.err != nil {
		if s.err == nil || errors.Is(s.err, errNotSampled) {
			d.log.Warn("in-flight source unknown", zap.String("source", s.Name), zap.Error(r.err))
		}
		s.fail(r.err)
		return
	}
	if s.err != nil && !errors.Is(s.err, errNotSampled) {
		d.log.Info("in-flight source known again", zap.String("source", s.Name))
	}
	s.err, s.Err, s.calm = nil, "", r.calm
	s.InFlight, s.Unsure, s.Connections = r.sample.InFlight, r.sample.Unsure, r.sample.Connections
	s.Peak, s.PeakUnsure = max(s.Peak, s.InFlight), max(s.PeakUnsure, s.Unsure)
	s.Samples++
}

func (s *standing) fail(err error) {
	s.err, s.Err, s.calm = err, err.Error(), calm{}
}

func progress(start time.Time, states []standing) Progress {
	p := Progress{Elapsed: time.Since(start), Sources: make([]SourceResult, 0, len(states))}
	for i := range states {
		s := states[i].SourceResult
		p.InFlight, p.Unsure = max(p.InFlight, s.InFlight), max(p.Unsure, s.Unsure)
		p.Sources = append(p.Sources, s)
	}
	return p
}

// sample asks one source until ctx ends. A call that hangs is reported as unknown and left to itself, and the source is
// asked again only when it has returned.
func (d *Drainer) sample(ctx context.Context, i int, s Source, notBefore time.Time, reports chan<- report) {
	send := func(r report) {
		select {
		case reports <- r:
		case <-ctx.Done():
		}
	}
	var c calm
	for ctx.Err() == nil {
		start := time.Now()
		call, cancel := context.WithTimeout(ctx, d.cfg.SampleTimeout)
		done := make(chan report, 1)
		go func() {
			sample, err := s.Sample(call)
			if err == nil && (sample.InFlight < 0 || sample.Unsure < 0) {
				err = fmt.Errorf("%d in flight, %d unsure: must not be negative", sample.InFlight, sample.Unsure)
			}
			done <- report{source: i, start: start, end: time.Now(), sample: sample, err: err}
		}()
		select {
		case r := <-done:
			c.note(r)
			r.calm = c
			send(r)
		case <-call.Done():
			// A source that minds its context answers now, with a better error than ours.
			c = calm{activity: c.activity}
			if ctx.Err() == nil {
				send(report{source: i, err: fmt.Errorf("no answer within %v", d.cfg.SampleTimeout)})
			}
			select {
			case <-done:
			case <-ctx.Done():
			}
		}
		cancel()

		pause := time.NewTimer(time.Until(d.next(s, c, start, notBefore)))
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

// next is when a source whose last sample began at start is asked again: so that a sample falls on the end of the settle
// time, and one on the end of the quiet period, and no more often than the source wants.
func (d *Drainer) next(s Source, c calm, start, notBefore time.Time) time.Time {
	now := time.Now()
	next := start.Add(d.cfg.Interval)
	if p, ok := s.(Pacer); ok {
		next = latest(next, now.Add(p.Pause()))
	}
	if quiet := c.since.Add(d.cfg.Quiet); !c.since.IsZero() && quiet.After(next) {
		steps := quiet.Sub(start) / next.Sub(start)
		next = start.Add(quiet.Sub(start) / steps)
	}
	if now.Before(notBefore) && notBefore.Before(next) {
		next = notBefore
	}
	return next
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
