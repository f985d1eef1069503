// Package client is for Go applications that run beside an Usher agent: they follow what is decided about their instance,
// and say how they are.
//
//	c, err := client.New(client.Config{Address: os.Getenv("USHER_AGENT")}) // "" is http://127.0.0.1:7401
//	...
//	for e, err := range c.Events(ctx) {
//		switch {
//		case err != nil: // the agent can't be reached right now; the loop goes on when it can
//		case e.Type == client.EventDraining:
//			jobs.StopTaking()
//		}
//	}
//
// It uses the standard library only. Nothing in it needs the agent to be there: every call returns an error when it isn't,
// and what runs for long comes back by itself.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
)

const (
	// callTimeout bounds every call but Events: the agent is in the same pod and answers at once, or isn't there.
	callTimeout = 5 * time.Second
	// maxAnswer is far more than any answer has.
	maxAnswer = 4 << 20

	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
)

// What is said and answered, as the agent has it in JSON.
type (
	// Event is one change of what is decided: Type, State, Cause and Time; Deadline with draining, Verdict with released.
	Event     = api.Event
	EventType = api.EventType
	// Verdict is how a shutdown ended: Outcome, Message, InFlight, the milliseconds of each step, and what each source saw.
	Verdict       = api.Verdict
	SourceVerdict = api.SourceVerdict
	Outcome       = api.Outcome
	// Availability is liveness or readiness: State, Cause, and Since.
	Availability = api.Availability
	// Worker is what one process says of itself: State, Role, Cause, and TTLSeconds, for how long that stands.
	Worker = api.Worker
	// Hold keeps the instance offline: Reason, Actor, and Expires, an hour from now unless given.
	Hold = api.Hold
	// Health is Status, one of those below, with Components by name.
	Health = api.Health
	// Status is the agent's account of itself: State, Endpoints, Registry, Problems, the Trail of decisions, and more.
	Status = api.Status
)

// The statuses of a [Health]. Degraded is of a component that fails and that the application can do without.
const (
	HealthUp           = api.HealthUp
	HealthDegraded     = api.HealthDegraded
	HealthDown         = api.HealthDown
	HealthOutOfService = api.HealthOutOfService
	HealthUnknown      = api.HealthUnknown
)

// The types of events.
const (
	EventOnline   = api.EventOnline
	EventOffline  = api.EventOffline
	EventDraining = api.EventDraining
	EventReleased = api.EventReleased
	EventHeld     = api.EventHeld
	EventResumed  = api.EventResumed
)

// The states and roles of a [Worker].
const (
	WorkerReady    = api.WorkerReady
	WorkerNotReady = api.WorkerNotReady
	RoleMaster     = api.RoleMaster
	RoleWorker     = api.RoleWorker
)

// Error is an answer of the agent that isn't 2xx.
type Error struct {
	Code    int // of HTTP
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("the agent answered %d: %s", e.Code, e.Message) }

// Config says where the agent is.
type Config struct {
	// Address of the agent's control listener: http://HOST:PORT, or unix:///path/to/agent.sock. Default
	// http://127.0.0.1:7401.
	Address string
}

// Client talks to one agent. It may be used by several goroutines at a time.
type Client struct {
	base string
	http *http.Client
}

// New checks the address. It doesn't contact the agent.
func New(cfg Config) (*Client, error) {
	if cfg.Address == "" {
		cfg.Address = "http://" + api.DefaultControlAddress
	}
	bad := fmt.Errorf("client: Address %q: want http://HOST:PORT, or unix:///path/to/agent.sock", cfg.Address)
	u, err := url.Parse(cfg.Address)
	if err != nil || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return nil, bad
	}
	// No proxy, since the agent is in the same pod; and idle connections don't outlive the agent's own patience.
	transport := &http.Transport{MaxIdleConnsPerHost: 1, IdleConnTimeout: 30 * time.Second}
	c := &Client{http: &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	switch {
	case u.Scheme == "http" && u.Hostname() != "" && err == nil && port > 0 && strings.Trim(u.Path, "/") == "":
		c.base = "http://" + u.Host
	case u.Scheme == "unix" && u.Host == "" && filepath.IsAbs(u.Path):
		c.base = "http://agent"
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", u.Path)
		}
	default:
		return nil, bad
	}
	return c, nil
}

// SetReadiness says whether the application takes requests. cause is for people: it is shown wherever the state is.
func (c *Client) SetReadiness(ctx context.Context, accepting bool, cause string) error {
	a := Availability{State: "REFUSING_TRAFFIC", Cause: cause}
	if accepting {
		a.State = "ACCEPTING_TRAFFIC"
	}
	return c.call(ctx, http.MethodPut, api.AvailabilityPath+"readiness", a, nil)
}

// SetLiveness says whether the application can go on by itself (correct), or needs a restart.
func (c *Client) SetLiveness(ctx context.Context, correct bool, cause string) error {
	a := Availability{State: "BROKEN", Cause: cause}
	if correct {
		a.State = "CORRECT"
	}
	return c.call(ctx, http.MethodPut, api.AvailabilityPath+"liveness", a, nil)
}

// Hold keeps the instance offline until Resume, or until h.Expires.
func (c *Client) Hold(ctx context.Context, h Hold) error {
	return c.call(ctx, http.MethodPut, api.HoldPath, h, nil)
}

// Resume ends a hold.
func (c *Client) Resume(ctx context.Context) error {
	return c.call(ctx, http.MethodDelete, api.HoldPath, nil, nil)
}

// Status is the agent's account of itself.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.call(ctx, http.MethodGet, api.StatusPath, nil, &s)
}

// Health is that of a group, of a component ("database", "readiness/database"), or of the whole (""). That it isn't UP is
// no error.
func (c *Client) Health(ctx context.Context, group string) (Health, error) {
	path := api.HealthPath
	for part := range strings.SplitSeq(group, "/") {
		if part != "" {
			path += "/" + url.PathEscape(part)
		}
	}
	var h Health
	err := c.call(ctx, http.MethodGet, path, nil, &h)
	if h.Status != "" {
		err = nil // the code stands for the status
	}
	return h, err
}

// SetWorker says once how one process of several is that serve one instance.
func (c *Client) SetWorker(ctx context.Context, id string, w Worker) error {
	return c.call(ctx, http.MethodPut, api.WorkersPath+url.PathEscape(id), w, nil)
}

// Worker says what current returns, at once and then three times in each TTL, until ctx ends; then it takes the worker out
// and returns nil. For one process of several that serve one instance: id is what tells it from the others, and the TTL,
// 10 s unless current says otherwise, is how long the instance counts on it after it has died.
//
// An agent that can't be reached, or is not yet well, is tried again. An error is a refusal that trying again won't mend.
func (c *Client) Worker(ctx context.Context, id string, current func() Worker) error {
	failures := 0
	for {
		w := current()
		if w.TTLSeconds == 0 {
			w.TTLSeconds = 10
		}
		pause := max(time.Duration(w.TTLSeconds)*time.Second/3, firstBackoff)
		err := c.SetWorker(ctx, id, w)
		failures++
		if err == nil {
			failures = 0
		} else if refused := (*Error)(nil); errors.As(err, &refused) && refused.Code < 500 && refused.Code != http.StatusTooManyRequests {
			return fmt.Errorf("worker %q: %w", id, err)
		} else {
			pause = min(pause, backoff(failures))
		}
		if !wait(ctx, pause) {
			break
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	c.call(last, http.MethodDelete, api.WorkersPath+url.PathEscape(id), nil, nil) // else its TTL takes it out
	return nil
}

// call sends in as JSON unless it is nil, and reads out from the answer, even from one that is an error as well.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("%s %s: %w", method, path, err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("asking the agent: %w", err) // which names method and address
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("%s %s: reading the answer: %w", method, path, err)
	}
	if out != nil {
		err = json.Unmarshal(text, out)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %w", method, path, refusal(resp, text))
	}
	if err != nil {
		return fmt.Errorf("%s %s: the answer makes no sense: %w", method, path, err)
	}
	return nil
}

// refusal is an answer that isn't 2xx.
func refusal(resp *http.Response, text []byte) *Error {
	var body api.Error
	if json.Unmarshal(text, &body) != nil || body.Error == "" {
		const most = 200
		body.Error = strings.TrimSpace(string(text[:min(len(text), most)]))
	}
	if body.Error == "" {
		body.Error = http.StatusText(resp.StatusCode)
	}
	return &Error{resp.StatusCode, body.Error}
}

// backoff is the jittered pause after so many failures in a row.
func backoff(failures int) time.Duration {
	d := min(firstBackoff<<min(failures-1, 10), maxBackoff)
	return d/2 + rand.N(d)
}

// wait says whether all of d passed before ctx ended.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
