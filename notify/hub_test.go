package notify

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
)

// publish is n events that differ, from number from on.
func publish(h *Hub, from, n int) {
	for i := from; i < from+n; i++ {
		types := []api.EventType{api.EventOnline, api.EventOffline}
		h.Publish(api.Event{Type: types[i%2], State: "s", Cause: fmt.Sprint(i)})
	}
}

// stream is a client of a hub's stream that reads only what it is asked to.
type stream struct {
	t    *testing.T
	resp *http.Response
	in   *bufio.Reader
	last string // the id seen last
}

func serve(t *testing.T, h *Hub) *httptest.Server {
	srv := httptest.NewServer(h)
	t.Cleanup(func() {
		h.Close()
		srv.Close()
	})
	return srv
}

func get(t *testing.T, url, lastID string) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if lastID != "" {
		req.Header.Set("Last-Event-ID", lastID)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func follow(t *testing.T, url, lastID string) *stream {
	t.Helper()
	resp := get(t, url, lastID)
	if resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "text/event-stream" {
		body, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s, %s: %s", resp.Status, resp.Header.Get("Content-Type"), body)
	}
	return &stream{t: t, resp: resp, in: bufio.NewReader(resp.Body), last: lastID}
}

// next is the next event; false at the stream's clean end.
func (s *stream) next() (e api.Event, ok bool) {
	s.t.Helper()
	var id, typ, data string
	for {
		line, err := s.in.ReadString('\n')
		if err == io.EOF && line == "" {
			return e, false
		}
		if err != nil {
			s.t.Fatalf("reading the stream: %v", err)
		}
		switch name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); name {
		case "id":
			id = value
		case "event":
			typ = value
		case "data":
			data = value
		case "":
			if data == "" {
				continue
			}
			if err := json.Unmarshal([]byte(data), &e); err != nil {
				s.t.Fatalf("%q: %v", data, err)
			}
			if want := fmt.Sprintf("%s-%d", e.Run, e.ID); id != want || typ != string(e.Type) {
				s.t.Errorf("id %q, event %q with %s", id, typ, data)
			}
			s.last = id
			return e, true
		}
	}
}

// expect takes as many events, and wants these causes.
func (s *stream) expect(from, n int) {
	s.t.Helper()
	for i := from; i < from+n; i++ {
		if e, ok := s.next(); !ok || e.Cause != fmt.Sprint(i) || e.Missed {
			s.t.Fatalf("got %+v, %t; want event %d", e, ok, i)
		}
	}
}

func TestStreamBeginsWithTheStateAndGoesOn(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	early := follow(t, srv.URL, "")
	publish(h, 0, 1)
	early.expect(0, 1)
	publish(h, 1, 2)
	early.expect(1, 2)
	late := follow(t, srv.URL, "")
	late.expect(2, 1)
	publish(h, 3, 1)
	early.expect(3, 1)
	late.expect(3, 1)
}

func TestStreamResumesAfterTheLastEvent(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	publish(h, 0, 1)
	s := follow(t, srv.URL, "")
	s.expect(0, 1)
	s.resp.Body.Close()
	publish(h, 1, 5)
	s = follow(t, srv.URL, s.last)
	s.expect(1, 5)
	s.resp.Body.Close()
	byQuery := follow(t, srv.URL+"?lastEventId="+s.last, "")
	byBoth := follow(t, srv.URL+"?lastEventId="+h.run+"-1", s.last) // the header is the newer one
	publish(h, 6, 1)
	byQuery.expect(6, 1)
	byBoth.expect(6, 1)
}

func TestResumingWithAnUnknownEventTellsTheStateAndThatEventsAreMissed(t *testing.T) {
	for name, id := range map[string]string{"of another run": "OTHER-3", "not given yet": "RUN-1000", "fallen out": "RUN-1"} {
		t.Run(name, func(t *testing.T) {
			h := NewHub()
			srv := serve(t, h)
			publish(h, 0, ringSize+5)
			s := follow(t, srv.URL, strings.Replace(id, "RUN", h.run, 1))
			if e, _ := s.next(); !e.Missed || e.Cause != fmt.Sprint(ringSize+4) {
				t.Fatalf("got %+v, want the newest event, marked", e)
			}
			publish(h, ringSize+5, 1)
			s.expect(ringSize+5, 1)
		})
	}
}

func TestEventsOfARunBeforeAreMissedEvenIfThisOneHasNoneYet(t *testing.T) {
	h := NewHub()
	s := follow(t, serve(t, h).URL, "OTHER-3")
	publish(h, 0, 2)
	if e, _ := s.next(); !e.Missed || e.Cause != "0" {
		t.Fatalf("got %+v, want the first event, marked", e)
	}
	s.expect(1, 1)
}

func TestRingHoldsExactlyWhatItSays(t *testing.T) {
	h := NewHub()
	publish(h, 0, ringSize+1)
	if e, ok, _ := h.after(1); !ok || e.Missed || e.Cause != "1" {
		t.Errorf("after the oldest but one: %+v, %t", e, ok)
	}
	if e, ok, _ := h.after(0); !ok || !e.Missed || e.Cause != fmt.Sprint(ringSize) {
		t.Errorf("after one that is gone: %+v, %t", e, ok)
	}
	if len(h.ring) != ringSize || cap(h.ring) > 2*ringSize {
		t.Errorf("%d events, room for %d", len(h.ring), cap(h.ring))
	}
}

func TestAStateIsToldOnce(t *testing.T) {
	h := NewHub()
	for _, e := range []api.Event{
		{Type: api.EventOnline, State: "Online", Cause: "a"},
		{Type: api.EventOnline, State: "Online", Cause: "b"},
		{Type: api.EventHeld, State: "Offline"},
		{Type: api.EventOffline, State: "Offline"},
		{Type: api.EventOffline, State: "Offline"},
		{Type: api.EventOnline, State: "Online", Cause: "c", ID: 77, Run: "other", Missed: true},
	} {
		h.Publish(e)
	}
	var got []string
	for i, e := range h.ring {
		got = append(got, string(e.Type)+e.Cause)
		if e.ID != uint64(i+1) || e.Run != h.run || e.Time.IsZero() || e.Missed {
			t.Errorf("%+v", e)
		}
	}
	if want := []string{"onlinea", "held", "offline", "onlinec"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestBadRequestsAreNamed(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	for _, tc := range []struct{ method, id, want string }{
		{"GET", "x", `400 Last-Event-ID \"x\": want an id`},
		{"GET", "-1", "400 Last-Event-ID"},
		{"GET", "run-", "400 Last-Event-ID"},
		{"GET", "run-x", "400 Last-Event-ID"},
		{"GET", "run--1", "400 Last-Event-ID"},
		{"GET", "run-18446744073709551616", "400 Last-Event-ID"},
		{"GET", "r<n-1", "400 Last-Event-ID"},
		{"GET", strings.Repeat("x", 5000) + "-1", "400 Last-Event-ID"},
		{"POST", "", "405 method POST: want GET"},
		{"HEAD", "", "405 "},
	} {
		req, _ := http.NewRequestWithContext(t.Context(), tc.method, srv.URL, nil)
		req.Header.Set("Last-Event-ID", tc.id)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		got := fmt.Sprint(resp.StatusCode, " ", strings.TrimPrefix(string(body), `{"error":"`))
		if !strings.HasPrefix(got, tc.want) || len(got) > 300 || strings.Count(got, "\n") > 1 {
			t.Errorf("%s with %.20q: got %q, want %q", tc.method, tc.id, got, tc.want)
		}
	}
	if n := h.Streams(); n != 0 {
		t.Errorf("%d streams are counted", n)
	}
}

// A reader that reads nothing while far more than a socket holds is published gets in order what the ring still has,
// is told once of each gap, and ends with the newest event; publishing waits for nobody.
func TestSlowReaderIsToldOfEveryGap(t *testing.T) {
	h := NewHub()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ConnState = func(c net.Conn, s http.ConnState) {
		if s == http.StateNew {
			c.(*net.TCPConn).SetWriteBuffer(4 << 10)
		}
	}
	srv.Start()
	defer srv.Close()
	s := follow(t, srv.URL, "")
	cause := strings.Repeat("x", 8<<10)
	const events = 20 * ringSize
	for i := range events {
		h.Publish(api.Event{Type: api.EventOnline, State: fmt.Sprint(i), Cause: cause})
	}
	h.Close()
	last, gaps := uint64(0), 0
	for {
		e, ok := s.next()
		if !ok {
			break
		}
		if e.Missed != (e.ID != last+1) || e.ID <= last {
			t.Fatalf("event %d, missed %t, after %d", e.ID, e.Missed, last)
		}
		if e.Missed {
			gaps++
		}
		last = e.ID
	}
	if last != events || gaps == 0 {
		t.Errorf("the last event is %d of %d, %d gaps", last, events, gaps)
	}
}

// stuck is a connection's far end that takes nothing more from a moment on.
type stuck struct {
	header    http.Header
	deadline  time.Time
	mu        sync.Mutex
	full      bool
	text      strings.Builder
	deadlines []time.Duration
}

func (s *stuck) Header() http.Header { return s.header }
func (s *stuck) WriteHeader(int)     {}
func (s *stuck) FlushError() error   { return nil }
func (s *stuck) SetWriteDeadline(d time.Time) error {
	s.deadline = d
	s.deadlines = append(s.deadlines, time.Until(d))
	return nil
}

func (s *stuck) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full {
		time.Sleep(time.Until(s.deadline))
		return 0, context.DeadlineExceeded
	}
	return s.text.Write(p)
}

func TestSilentStreamIsKeptAliveAndAStuckClientLetGo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := NewHub()
		w := &stuck{header: http.Header{}}
		began := time.Now()
		var took time.Duration
		go func() {
			h.ServeHTTP(w, httptest.NewRequest("GET", api.EventsPath, nil))
			took = time.Since(began)
		}()
		time.Sleep(10 * time.Second)
		h.Publish(api.Event{Type: api.EventOnline, State: "Online"})
		time.Sleep(31 * time.Second)
		w.mu.Lock()
		if got := w.text.String(); !strings.HasPrefix(got, "retry: 1000\n\nid: ") || !strings.HasSuffix(got, "}\n\n: \n\n: \n\n") || strings.Count(got, ": \n\n") != 2 {
			t.Errorf("got %q", got)
		}
		w.full = true
		w.mu.Unlock()
		time.Sleep(time.Minute)
		synctest.Wait()
		if want := 60 * time.Second; took != want { // the keep-alive due at 55 s, and 5 s to write it
			t.Errorf("the stream ended after %s, want %s", took, want)
		}
		if h.Streams() != 0 {
			t.Error("the stream still counts")
		}
		for _, d := range w.deadlines {
			if d != writeTimeout {
				t.Errorf("a write had %s", d)
			}
		}
	})
}

func TestStreamsAreBounded(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	publish(h, 0, 1)
	var streams []*stream
	for range maxStreams {
		s := follow(t, srv.URL, "")
		s.expect(0, 1)
		streams = append(streams, s)
	}
	for range 1000 {
		resp := get(t, srv.URL, "")
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(body), "64 clients") || resp.Header.Get("Retry-After") == "" {
			t.Fatalf("%s %s", resp.Status, body)
		}
	}
	publish(h, 1, 1)
	for _, s := range streams {
		s.expect(1, 1)
	}
	streams[0].resp.Body.Close()
	until(t, "a client that left makes room", func() bool { return h.Streams() == maxStreams-1 })
	follow(t, srv.URL, "").expect(1, 1)
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never came: %s", what)
		}
	}
}

func TestClosedHubTellsWhatItHasAndEnds(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	publish(h, 0, 1)
	s := follow(t, srv.URL, "")
	s.expect(0, 1)
	publish(h, 1, 3)
	h.Close()
	publish(h, 4, 1)
	s.expect(1, 3)
	if e, ok := s.next(); ok {
		t.Errorf("%+v after the end", e)
	}
	back := follow(t, srv.URL, h.run+"-2")
	back.expect(2, 2)
	if _, ok := back.next(); ok {
		t.Error("a stream of a closed hub goes on")
	}
	if err := srv.Config.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestManyReadersGetEachEventOnceWhileManyPublish(t *testing.T) {
	h := NewHub()
	srv := serve(t, h)
	const publishers, each, readers = 4, 50, 8
	var wg sync.WaitGroup
	for range readers {
		s := follow(t, srv.URL, "")
		wg.Go(func() {
			for want := uint64(1); want <= publishers*each; want++ {
				if e, ok := s.next(); !ok || e.ID != want {
					t.Errorf("got %d, %t; want %d", e.ID, ok, want)
					return
				}
			}
		})
	}
	for p := range publishers {
		wg.Go(func() {
			for i := range each {
				h.Publish(api.Event{Type: api.EventOnline, State: fmt.Sprint(p, i)})
			}
		})
	}
	wg.Wait()
}
