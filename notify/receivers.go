package notify

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"usher.dev/usher/internal/api"
)

const (
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
)

// Counters are of the receivers of one kind.
type Counters struct {
	Delivered atomic.Int64
	// Failed are events that were given up.
	Failed atomic.Int64
}

// Receivers are told of each event.
type Receivers struct {
	hub  *Hub
	log  *zap.Logger
	list []*receiver

	mu      sync.Mutex
	changed chan struct{} // closed and replaced whenever a receiver has handled an event

	Webhooks, Commands, StateFile Counters
}

// receiver is one of them.
type receiver struct {
	name     string
	counters *Counters
	events   []api.EventType // nil: all
	handle   func(context.Context, api.Event) error
	// patience is the age of an event at which it is no longer tried again; 0: there is one attempt.
	patience time.Duration
	// newest says that only the newest event matters, and is tried again until there is a newer one.
	newest bool

	handled uint64 // ID of the last event handled; guarded by Receivers.mu
}

// finalError is one that another attempt won't mend.
type finalError struct{ error }

func (e finalError) Unwrap() error { return e.error }

// Config of Receivers.
type Config struct {
	Settings
	Hub *Hub // what they are told of
	// Dial connects to a webhook; nil: as net.Dialer does. A drain that counts connections must know these for its own.
	Dial   func(ctx context.Context, network, address string) (net.Conn, error)
	Logger *zap.Logger
}

// New checks the settings and what they need of the machine: that commands and the state file's folder are there. It
// starts nothing.
func New(cfg Config) (*Receivers, error) {
	s := cfg.Settings
	if err := s.Validate(); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	rs := &Receivers{hub: cfg.Hub, log: cfg.Logger, changed: make(chan struct{})}
	for _, w := range s.Webhooks {
		rs.list = append(rs.list, rs.webhook(w, webhookTransport(cfg.Dial)))
	}
	for i, c := range s.Commands {
		r, err := rs.command(c)
		if err != nil {
			return nil, fmt.Errorf("notify.commands[%d].command: %w", i, err)
		}
		rs.list = append(rs.list, r)
	}
	if s.StateFile != "" {
		r, err := rs.stateFile(s.StateFile)
		if err != nil {
			return nil, fmt.Errorf("notify.stateFile %q: %w", s.StateFile, err)
		}
		rs.list = append(rs.list, r)
	}
	return rs, nil
}

// Run tells the receivers, each in its own goroutine, one event at a time. It ends with ctx; and when the hub is closed,
// once they have all events. It is called once.
func (rs *Receivers) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, r := range rs.list {
		wg.Go(func() { rs.follow(ctx, r) })
	}
	wg.Wait()
	return nil
}

// Announced waits until every receiver has had, or refused for good, every event published before the call. When ctx ends
// first, the error names those that haven't.
func (rs *Receivers) Announced(ctx context.Context) error {
	last := rs.hub.newest().ID
	for {
		var late []string
		rs.mu.Lock()
		changed := rs.changed
		for _, r := range rs.list {
			if r.handled < last {
				late = append(late, r.name)
			}
		}
		rs.mu.Unlock()
		if len(late) == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s to be told: %w", strings.Join(late, ", "), context.Cause(ctx))
		}
	}
}

// follow goes through the events, one after the other.
func (rs *Receivers) follow(ctx context.Context, r *receiver) {
	var pos uint64
	for ctx.Err() == nil {
		e, ok, more := rs.hub.after(pos)
		if !ok {
			if more == nil {
				return
			}
			select {
			case <-more:
			case <-ctx.Done():
			}
			continue
		}
		switch {
		case r.newest:
			e = rs.hub.newest()
		case e.Missed:
			lost := e.ID - pos - 1
			r.counters.Failed.Add(int64(lost))
			rs.log.Warn("receiver fell behind, events are lost to it", zap.String("receiver", r.name), zap.Uint64("events", lost))
		}
		if len(r.events) == 0 || slices.Contains(r.events, e.Type) {
			rs.deliver(ctx, r, e)
		}
		pos = e.ID
		rs.mu.Lock()
		r.handled = pos
		close(rs.changed)
		rs.changed = make(chan struct{})
		rs.mu.Unlock()
	}
}

// deliver returns once the event is delivered or given up.
func (rs *Receivers) deliver(ctx context.Context, r *receiver, e api.Event) {
	log := rs.log.With(zap.String("receiver", r.name), zap.String("event", string(e.Type)), zap.Uint64("id", e.ID))
	for attempt := 1; ; attempt++ {
		err := r.handle(ctx, e)
		if err == nil {
			r.counters.Delivered.Add(1)
			log.Debug("told", zap.Int("attempt", attempt))
			return
		}
		if r.newest && attempt == 1 { // which may never be given up
			log.Warn("could not be told, tried again until it is or there is something newer", zap.Error(err))
		}
		log.Debug("could not be told", zap.Int("attempt", attempt), zap.Error(err))
		if !rs.again(ctx, r, e, attempt, err) {
			r.counters.Failed.Add(1)
			log.Warn("could not be told, given up", zap.Int("attempts", attempt), zap.Error(err))
			return
		}
	}
}

// again waits for the next attempt; false if there is none.
func (rs *Receivers) again(ctx context.Context, r *receiver, e api.Event, attempt int, err error) bool {
	d := min(firstBackoff<<min(attempt-1, 10), maxBackoff)
	pause := d/2 + rand.N(d)
	if errors.As(err, new(finalError)) || !r.newest && time.Since(e.Time)+pause > r.patience {
		return false
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		overtaken, more := rs.hub.overtaken(e.ID, r.newest)
		if overtaken {
			return false
		}
		select {
		case <-timer.C:
			return true
		case <-more:
		case <-ctx.Done():
			return false
		}
	}
}

// overtaken says whether what comes after an event leaves no time for it: a shutdown; or anything, where only the newest
// matters. more is closed when the answer may be another.
func (h *Hub) overtaken(id uint64, byAnything bool) (overtaken bool, more <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range h.ring {
		overtaken = overtaken || e.ID > id && (byAnything || e.Type == api.EventDraining)
	}
	if h.closed {
		return overtaken, nil
	}
	return overtaken, h.changed
}
