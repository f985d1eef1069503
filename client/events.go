package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
)

const (
	// silence is how long a stream says nothing before it counts as lost: three keep-alives of the agent.
	silence = 45 * time.Second
	// maxLine of a stream; an event has some 2 KB.
	maxLine = 1 << 20
)

var errSilent = fmt.Errorf("nothing heard for %s", silence)

// Events are what is decided about this instance: first how it stands, then each change once and in order, across losses of
// the connection, until ctx ends or the loop is left. When the agent was restarted, or kept the events no longer,
// [Event.Missed] says that some are missing; the event is how the instance stands then. What the application has said of
// itself is to be said again then, as a new agent doesn't know it.
//
// An error says that the agent can't be reached at the moment. It comes without an event, once an attempt, and the next
// attempt follows after a pause of 50 ms at first and 3 s at most. A connection that ends and comes back at once is no
// error.
func (c *Client) Events(ctx context.Context) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		f := follower{client: c, yield: yield}
		failures := 0
		for ctx.Err() == nil && !f.left {
			had, began := f.received, time.Now()
			err := f.follow(ctx)
			if f.left || ctx.Err() != nil || err != nil && !yield(Event{}, err) {
				return
			}
			failures++
			if f.received > had || time.Since(began) > maxBackoff {
				failures = 1
			}
			if !wait(ctx, backoff(failures)) {
				return
			}
		}
	}
}

// follower is one loop over the events.
type follower struct {
	client   *Client
	yield    func(Event, error) bool
	left     bool // the loop
	last     Event
	lastID   string // of the wire
	received int
}

// follow is one connection, from the last event on. A stream that ends, in whatever way, is no error: there will be another.
func (f *follower) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	alive := time.AfterFunc(silence, func() { cancel(errSilent) })
	defer alive.Stop()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.client.base+api.EventsPath, nil)
	if err != nil {
		return fmt.Errorf("following events: %w", err)
	}
	req.Header.Set("Accept", "text/event-stream")
	if f.lastID != "" {
		req.Header.Set("Last-Event-ID", f.lastID)
	}
	resp, err := f.client.http.Do(req)
	if err != nil {
		if c := context.Cause(ctx); errors.Is(c, errSilent) {
			err = c
		}
		return fmt.Errorf("following events: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, maxLine)) // what there is of it
		return fmt.Errorf("following events: %w", refusal(resp, text))
	}
	if t := resp.Header.Get("Content-Type"); !strings.HasPrefix(t, "text/event-stream") {
		return fmt.Errorf("following events: the answer is %q, want text/event-stream: is that the agent's control listener?", t)
	}
	return f.read(resp.Body, alive)
}

// read takes events as the HTML standard says (section 9.2.6), as far as the agent makes use of it: what has no empty line
// behind it didn't come whole, and doesn't count.
func (f *follower) read(body io.Reader, alive *time.Timer) error {
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxLine)
	var id string
	var data []byte
	for lines.Scan() {
		alive.Reset(silence)
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case name == "id":
			id = value
		case name == "data":
			data = append(data, value...)
		case lines.Text() == "" && data != nil:
			var e Event
			if err := json.Unmarshal(data, &e); err != nil {
				return fmt.Errorf("following events: %q makes no sense: %w", id, err)
			}
			data = nil
			if e.Run == f.last.Run && e.ID <= f.last.ID {
				continue
			}
			f.last, f.lastID = e, id
			f.received++
			alive.Stop() // the loop's body may take its time
			if f.left = !f.yield(e, nil); f.left {
				return nil
			}
			alive.Reset(silence)
		}
	}
	if err := lines.Err(); errors.Is(err, bufio.ErrTooLong) {
		return fmt.Errorf("following events: a line of more than %d bytes: %w", maxLine, err)
	}
	return nil
}
