package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/notify"
)

func connect(t *testing.T, address string) *Client {
	t.Helper()
	c, err := New(Config{Address: address})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestAddress(t *testing.T) {
	for address, good := range map[string]bool{
		"": true, "http://127.0.0.1:7401": true, "http://127.0.0.1:7401/": true, "http://[::1]:7401": true, "unix:///run/usher/agent.sock": true,
		"127.0.0.1:7401": false, "https://127.0.0.1:7401": false, "http://127.0.0.1": false, "http://127.0.0.1:7401/x": false,
		"http://u:p@h:1": false, "unix://agent.sock": false, "unix:agent.sock": false, "/run/agent.sock": false, "http://h:1?x": false, ":": false,
		"http://h:65536": false, "http://h:0": false,
	} {
		_, err := New(Config{Address: address})
		if good != (err == nil) || err != nil && (!strings.Contains(err.Error(), fmt.Sprintf("%q", address)) || !strings.Contains(err.Error(), "unix:///")) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// scissors cut every connection after a number of bytes.
type scissors struct {
	net.Listener
	after atomic.Int64
	cuts  atomic.Int64
}

type cutConn struct {
	net.Conn
	s    *scissors
	left int64
}

func (s *scissors) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &cutConn{c, s, s.after.Add(29)}, nil
}

func (c *cutConn) Write(p []byte) (int, error) {
	if int64(len(p)) > c.left {
		n, _ := c.Conn.Write(p[:c.left])
		c.left = 0
		c.s.cuts.Add(1)
		c.Conn.Close()
		return n, net.ErrClosed
	}
	c.left -= int64(len(p))
	return c.Conn.Write(p)
}

// The connection breaks in the middle of headers, ids and data, a few bytes later each time.
func TestEachEventComesOnceAndInOrderThoughConnectionsAreCut(t *testing.T) {
	const events = 60
	hub := notify.NewHub()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &scissors{Listener: inner}
	s.after.Store(300)
	srv := &httptest.Server{Listener: s, Config: &http.Server{Handler: hub}}
	srv.Start()
	defer srv.Close()
	defer hub.Close()
	hub.Publish(Event{Type: EventOnline, State: "0"})
	want := uint64(1)
	for e, err := range connect(t, srv.URL).Events(t.Context()) {
		if err != nil {
			continue // cut in the header
		}
		if e.ID != want || e.State != fmt.Sprint(want-1) || e.Missed {
			t.Fatalf("got %+v, want event %d", e, want)
		}
		if want == events {
			break
		}
		if want++; want%10 == 2 {
			for i := want; i < want+10; i++ {
				hub.Publish(Event{Type: EventOnline, State: fmt.Sprint(i - 1)})
			}
		}
	}
	if n := s.cuts.Load(); n < 10 {
		t.Errorf("only %d cuts", n)
	}
}

func TestEventsGoOnAcrossARestartOfTheAgent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "agent.sock")
	c := connect(t, "unix://"+socket)
	start := func(state string) (stop func()) {
		ln, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		hub := notify.NewHub()
		hub.Publish(Event{Type: EventOnline, State: state})
		srv := &http.Server{Handler: hub}
		go srv.Serve(ln)
		return func() {
			hub.Publish(Event{Type: EventReleased, State: state})
			hub.Close()
			srv.Shutdown(context.Background())
		}
	}
	var stop func()
	var got []string
	unreachable := 0
	for e, err := range c.Events(t.Context()) {
		if err != nil {
			if unreachable++; unreachable == 1 {
				stop = start("first")
			} else if len(got) == 2 {
				stop = start("second")
			}
			continue
		}
		got = append(got, fmt.Sprintf("%s %s %t", e.Type, e.State, e.Missed))
		if len(got) == 1 {
			go stop()
		}
		if len(got) == 3 {
			break
		}
	}
	stop()
	if want := []string{"online first false", "released first false", "online second true"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// The agent that is meant never answers: what counts is who ends the loop, and when.
func TestEventsEndWithTheirContextAndWithTheLoop(t *testing.T) {
	hub := notify.NewHub()
	srv := httptest.NewServer(hub)
	defer srv.Close()
	defer hub.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	hub.Publish(Event{Type: EventOnline})
	for e, err := range connect(t, srv.URL).Events(ctx) {
		if err != nil || e.Type != EventOnline {
			t.Fatalf("%+v, %v", e, err)
		}
		cancel()
	}
	for range connect(t, srv.URL).Events(t.Context()) {
		break
	}
	for deadline := time.Now().Add(10 * time.Second); hub.Streams() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a stream outlives its loop")
		}
	}
}

// fake is an agent without a socket, as those don't go with synctest's time.
type fake func(*http.Request) (*http.Response, error)

func (f fake) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func answer(code int, contentType string, body io.Reader) *http.Response {
	return &http.Response{StatusCode: code, Header: http.Header{"Content-Type": {contentType}}, Body: io.NopCloser(body)}
}

// aborted is a body that ends with its request.
type aborted struct {
	io.Reader
	ctx context.Context
}

func (a aborted) Read(p []byte) (int, error) {
	if n, err := a.Reader.Read(p); err == nil {
		return n, nil
	}
	<-a.ctx.Done()
	return 0, a.ctx.Err()
}

func TestErrorsComeOnceAnAttemptAndAttemptsBackOff(t *testing.T) {
	long := make([]byte, 2*maxLine)
	for want, answers := range map[string]fake{
		"connection refused": func(*http.Request) (*http.Response, error) { return nil, errors.New("connection refused") },
		"answered 503: 64 clients": func(*http.Request) (*http.Response, error) {
			return answer(503, "application/json", strings.NewReader(`{"error":"64 clients"}`)), nil
		},
		"text/event-stream": func(*http.Request) (*http.Response, error) {
			return answer(200, "text/html", strings.NewReader("hello")), nil
		},
		"makes no sense": func(*http.Request) (*http.Response, error) {
			return answer(200, "text/event-stream", strings.NewReader("id: a-1\ndata: {\n\n")), nil
		},
		"a line of more than": func(*http.Request) (*http.Response, error) {
			return answer(200, "text/event-stream", bytes.NewReader(long)), nil
		},
	} {
		t.Run(want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := connect(t, "")
				c.http.Transport = answers
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				n := 0
				for e, err := range c.Events(ctx) {
					if n++; err == nil || !strings.Contains(err.Error(), want) || e.ID != 0 {
						t.Fatalf("%+v, %v", e, err)
					}
				}
				if n < 20 || n > 70 { // 1 s to 3 s each, once it is backed off
					t.Errorf("%d attempts in a minute", n)
				}
			})
		})
	}
}

func TestSilentStreamIsGivenUpForANewOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "")
		var ids []string
		c.http.Transport = fake(func(r *http.Request) (*http.Response, error) {
			ids = append(ids, r.Header.Get("Last-Event-ID"))
			text := fmt.Sprintf("retry: 1\n\n: \n\nid: a-%d\nevent: online\ndata: {\"id\":%d,\"run\":\"a\"}\n\n", len(ids), len(ids))
			return answer(200, "text/event-stream", aborted{strings.NewReader(text), r.Context()}), nil
		})
		began := time.Now()
		for e, err := range c.Events(t.Context()) {
			if err != nil {
				t.Fatal(err)
			}
			if e.ID == 1 {
				time.Sleep(time.Hour) // a slow loop is not a silent agent
			}
			if e.ID == 3 {
				break
			}
		}
		if took := time.Since(began); took < time.Hour+2*silence || took > time.Hour+2*silence+time.Second || !slices.Equal(ids, []string{"", "a-1", "a-2"}) {
			t.Errorf("took %s, asked with %q", took, ids)
		}
	})
}

func TestStreamThatRepeatsItselfIsReadOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "")
		c.http.Transport = fake(func(r *http.Request) (*http.Response, error) {
			text := ""
			for _, e := range []string{"a 1", "a 2", "a 1", "a 2", "b 1", "b 2"} {
				run, id, _ := strings.Cut(e, " ")
				text += fmt.Sprintf("id:%s-%s\ndata:{\"id\":%s,\ndata:\"run\":%q}\n\n", run, id, id, run)
			}
			return answer(200, "text/event-stream", strings.NewReader(text)), nil
		})
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		var got []string
		for e, err := range c.Events(ctx) {
			got = append(got, fmt.Sprintf("%s%d%v", e.Run, e.ID, err))
		}
		if want := []string{"a1<nil>", "a2<nil>", "b1<nil>", "b2<nil>"}; !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// agent records what is said to it.
type agent struct {
	mu     sync.Mutex
	calls  []string
	answer func(n int) (code int, body string)
}

func (a *agent) RoundTrip(r *http.Request) (*http.Response, error) {
	if err := r.Context().Err(); err != nil {
		return nil, err
	}
	body := ""
	if r.Body != nil {
		text, _ := io.ReadAll(r.Body)
		body = " " + string(text)
	}
	a.mu.Lock()
	a.calls = append(a.calls, r.Method+" "+r.URL.EscapedPath()+body)
	code, text := 200, "{}"
	if a.answer != nil {
		code, text = a.answer(len(a.calls))
	}
	a.mu.Unlock()
	if code == 0 {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}
	return answer(code, "application/json", strings.NewReader(text)), nil
}

func TestCallsAreWhatTheAgentTakes(t *testing.T) {
	for want, call := range map[string]func(ctx context.Context, c *Client) error{
		`PUT /v1/availability/readiness {"state":"REFUSING_TRAFFIC","cause":"warming up"}`: func(ctx context.Context, c *Client) error { return c.SetReadiness(ctx, false, "warming up") },
		`PUT /v1/availability/readiness {"state":"ACCEPTING_TRAFFIC"}`:                     func(ctx context.Context, c *Client) error { return c.SetReadiness(ctx, true, "") },
		`PUT /v1/availability/liveness {"state":"BROKEN","cause":"deadlock"}`:              func(ctx context.Context, c *Client) error { return c.SetLiveness(ctx, false, "deadlock") },
		`PUT /v1/availability/liveness {"state":"CORRECT"}`:                                func(ctx context.Context, c *Client) error { return c.SetLiveness(ctx, true, "") },
		`PUT /v1/hold {"reason":"upgrade","actor":"me"}`:                                   func(ctx context.Context, c *Client) error { return c.Hold(ctx, Hold{Reason: "upgrade", Actor: "me"}) },
		`DELETE /v1/hold`: func(ctx context.Context, c *Client) error { return c.Resume(ctx) },
		`GET /v1/status`:  func(ctx context.Context, c *Client) error { _, err := c.Status(ctx); return err },
		`GET /health`:     func(ctx context.Context, c *Client) error { _, err := c.Health(ctx, ""); return err },
		`GET /health/readiness/data%20base`: func(ctx context.Context, c *Client) error {
			_, err := c.Health(ctx, "readiness/data base")
			return err
		},
		`PUT /v1/workers/a%2Fb {"state":"READY","role":"master"}`: func(ctx context.Context, c *Client) error {
			return c.SetWorker(ctx, "a/b", Worker{State: WorkerReady, Role: RoleMaster})
		},
	} {
		c := connect(t, "")
		a := &agent{}
		c.http.Transport = a
		if err := call(t.Context(), c); err != nil || len(a.calls) != 1 || a.calls[0] != want {
			t.Errorf("got %q, %v; want %q", a.calls, err, want)
		}
		a.answer = func(int) (int, string) { return 400, `{"error":"no such thing"}` }
		err := call(t.Context(), c)
		var refused *Error
		if !errors.As(err, &refused) || refused.Code != 400 || refused.Message != "no such thing" || !strings.Contains(err.Error(), want[strings.Index(want, "/"):][:7]) {
			t.Errorf("%s, refused: %v", want, err)
		}
	}
}

func TestAnswersAreRead(t *testing.T) {
	c := connect(t, "")
	a := &agent{}
	c.http.Transport = a
	a.answer = func(int) (int, string) { return 200, `{"pod":"api-0","state":"Online","unknown":1}` }
	if s, err := c.Status(t.Context()); err != nil || s.Pod != "api-0" {
		t.Errorf("%+v, %v", s, err)
	}
	a.answer = func(int) (int, string) { return 503, `{"status":"DOWN","components":{"db":{"status":"DOWN"}}}` }
	if h, err := c.Health(t.Context(), "readiness"); err != nil || h.Status != "DOWN" || h.Components["db"].Status != "DOWN" {
		t.Errorf("%+v, %v", h, err)
	}
	for body, want := range map[string]string{"<html>": "answered 502: <html>", "": "answered 502: Bad Gateway", strings.Repeat("x", 1000): strings.Repeat("x", 200)} {
		a.answer = func(int) (int, string) { return 502, body }
		if _, err := c.Health(t.Context(), ""); err == nil || !strings.Contains(err.Error(), want) || len(err.Error()) > 300 {
			t.Errorf("%v, want %q", err, want)
		}
	}
	a.answer = func(int) (int, string) { return 200, `<html>` }
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "makes no sense") {
		t.Error(err)
	}
}

func TestCallGivesUpOnAnAgentThatDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "")
		c.http.Transport = &agent{answer: func(int) (int, string) { return 0, "" }}
		began := time.Now()
		err := c.SetReadiness(t.Context(), true, "")
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(began) != callTimeout {
			t.Errorf("%v after %s", err, time.Since(began))
		}
	})
}

func TestWorkerSaysAgainBeforeItsTTLEndsAndLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "")
		a := &agent{}
		c.http.Transport = a
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		state := atomic.Value{}
		state.Store(WorkerNotReady)
		go func() {
			done <- c.Worker(ctx, "w1", func() Worker { return Worker{State: state.Load().(string)} })
		}()
		time.Sleep(time.Second)
		state.Store(WorkerReady)
		time.Sleep(6 * time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		want := []string{
			`PUT /v1/workers/w1 {"state":"NOT_READY","ttlSeconds":10}`, `PUT /v1/workers/w1 {"state":"READY","ttlSeconds":10}`,
			`PUT /v1/workers/w1 {"state":"READY","ttlSeconds":10}`, `DELETE /v1/workers/w1`,
		}
		if !slices.Equal(a.calls, want) {
			t.Errorf("got %q", a.calls)
		}
	})
}

func TestWorkerGoesOnWhenTheAgentIsAwayAndEndsWhenItIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := connect(t, "")
		a := &agent{answer: func(n int) (int, string) {
			switch n {
			case 1, 2, 3:
				return 503, `{"error":"starting"}`
			case 4:
				return 200, "{}"
			}
			return 422, `{"error":"no such role"}`
		}}
		c.http.Transport = a
		began := time.Now()
		err := c.Worker(t.Context(), "w1", func() Worker { return Worker{State: WorkerReady, TTLSeconds: 30} })
		var refused *Error
		if !errors.As(err, &refused) || refused.Code != 422 || !strings.Contains(err.Error(), `worker "w1"`) || len(a.calls) != 5 {
			t.Errorf("%v after %q", err, a.calls)
		}
		if took := time.Since(began); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("took %s, want a third of the TTL and three short pauses", took)
		}
	})
}

// What notify and client know of each other is the wire: nothing of it may get lost.
func TestEventArrivesWhole(t *testing.T) {
	hub := notify.NewHub()
	srv := httptest.NewServer(hub)
	defer srv.Close()
	defer hub.Close()
	target, _ := url.Parse(srv.URL)
	proxy := httptest.NewServer(httputil.NewSingleHostReverseProxy(target)) // which must not hold events back
	defer proxy.Close()
	at := time.Now().Round(0).UTC()
	sent := Event{
		Type: EventReleased, State: "Released", Cause: "line\nbreak \u2028 <&>", Time: at, Deadline: &at,
		Verdict: &api.Verdict{Outcome: api.TimedOut, Message: "m", InFlight: 3, Sources: []api.SourceVerdict{{Name: "s"}}},
	}
	hub.Publish(sent)
	for _, address := range []string{srv.URL, proxy.URL} {
		for got, err := range connect(t, address).Events(t.Context()) {
			sent.ID, sent.Run = 1, got.Run
			g, _ := json.Marshal(got)
			w, _ := json.Marshal(sent)
			if err != nil || got.Run == "" || string(g) != string(w) {
				t.Errorf("got  %s, %v\nsent %s", g, err, w)
			}
			break
		}
	}
}
