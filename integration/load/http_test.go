package load

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.uber.org/zap"

	"usher.dev/usher/integration/app/wire"
)

// fixedRegistry is a watching whose watches are scripted: each is a list of batches, after which it closes if told to.
type fixedRegistry struct {
	watches chan endpoints.WatchChannel
}

func (f *fixedRegistry) NewWatchChannel(ctx context.Context) (endpoints.WatchChannel, error) {
	select {
	case ch := <-f.watches:
		return ch, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func add(key, addr string) *endpoints.Update {
	return &endpoints.Update{Op: endpoints.Add, Key: key, Endpoint: endpoints.Endpoint{Addr: addr}}
}

func startFollower(t *testing.T, first ...*endpoints.Update) (*follower, chan []*endpoints.Update, chan<- endpoints.WatchChannel) {
	t.Helper()
	ch := make(chan []*endpoints.Update, 1)
	ch <- first
	reg := &fixedRegistry{watches: make(chan endpoints.WatchChannel, 1)}
	reg.watches <- ch
	f := &follower{target: "t", source: reg, log: zap.NewNop(), seen: make(chan struct{}), byKey: map[string]*instance{}}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	// As NewManager's watch does when its context ends.
	closed := sync.OnceFunc(func() { close(ch) })
	go func() { defer close(done); f.run(ctx) }()
	t.Cleanup(func() { cancel(); closed(); <-done })
	<-f.seen
	return f, ch, reg.watches
}

func (f *follower) addresses() map[string]bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	m := map[string]bool{}
	for _, i := range f.list {
		m[i.addr] = true
	}
	return m
}

func TestFollowerMissesNoDeletionWhenItsWatchEnds(t *testing.T) {
	f := &follower{target: "t", log: zap.NewNop(), seen: make(chan struct{}), byKey: map[string]*instance{}}
	first := make(chan []*endpoints.Update, 1)
	second := make(chan []*endpoints.Update, 1)
	reg := &fixedRegistry{watches: make(chan endpoints.WatchChannel, 2)}
	f.source = reg
	first <- []*endpoints.Update{add("t/a", "a:1"), add("t/b", "b:1")}
	reg.watches <- first
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.run(ctx) }()
	<-f.seen
	b := f.byKey["t/b"]

	// While no watch stands, a goes and c comes.
	second <- []*endpoints.Update{add("t/b", "b:1"), add("t/c", "c:1")}
	reg.watches <- second
	close(first)
	eventually(t, "the second read replaces the first", func() bool {
		m := f.addresses()
		return len(m) == 2 && m["b:1"] && m["c:1"]
	})
	if f.byKey["t/b"] != b {
		t.Error("b was there all the time, and lost its connections")
	}
	second <- []*endpoints.Update{{Op: endpoints.Delete, Key: "t/b"}, add("t/c", "c:2")}
	eventually(t, "a deletion and a changed address are followed", func() bool {
		m := f.addresses()
		return len(m) == 1 && m["c:2"]
	})
	if !b.gone.Load() {
		t.Error("b left, and does not know")
	}
	cancel()
	close(second)
	<-done
	if n := len(f.addresses()); n != 0 {
		t.Errorf("%d instances are kept after the end", n)
	}
}

func TestFollowerTakesInstancesInTurn(t *testing.T) {
	f, _, _ := startFollower(t, add("t/a", "a:1"), add("t/b", "b:1"), add("t/c", "c:1"))
	seen := map[string]int{}
	for range 30 {
		i := f.acquire()
		seen[i.addr]++
		i.release()
	}
	for addr, n := range seen {
		if n != 10 || len(seen) != 3 {
			t.Errorf("%s was taken %d of 30 times, want 10: %v", addr, n, seen)
		}
	}
}

// connCounter serves the sample application's HTTP paths and counts connections.
type connCounter struct {
	*httptest.Server
	opened, open atomic.Int64
	requests     atomic.Int64
}

func newConnCounter(t *testing.T, h http.HandlerFunc) *connCounter {
	t.Helper()
	c := &connCounter{}
	c.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c.requests.Add(1)
		io.Copy(io.Discard, r.Body)
		h(w, r)
	}))
	c.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		switch s {
		case http.StateNew:
			c.opened.Add(1)
			c.open.Add(1)
		case http.StateClosed:
			c.open.Add(-1)
		}
	}
	c.Start()
	t.Cleanup(c.Close)
	return c
}

func (c *connCounter) addr() string { return c.Listener.Addr().String() }

func TestConnectionsOfAnInstanceThatLeftAreClosedOnceTheirRequestsAreDone(t *testing.T) {
	release := make(chan struct{})
	c := newConnCounter(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == wire.SlowPath {
			<-release
		}
	})
	f, updates, _ := startFollower(t, add("t/a", c.addr()))
	s := httpRoute(f).shared
	var wg sync.WaitGroup
	slow := make([]outcome, 3)
	for i := range slow {
		wg.Go(func() { slow[i] = s.send(t.Context(), Share{Kind: Slow}) })
	}
	eventually(t, "3 slow requests have arrived", func() bool { return c.requests.Load() == 3 })
	if o := s.send(t.Context(), Share{Kind: Fast}); o.err != nil {
		t.Fatal(o.err)
	}
	if n := c.open.Load(); n != 4 {
		t.Fatalf("%d connections are open, want 3 busy and 1 idle", n)
	}
	updates <- []*endpoints.Update{{Op: endpoints.Delete, Key: "t/a"}}
	eventually(t, "the idle one is closed", func() bool { return c.open.Load() == 3 })
	close(release)
	wg.Wait()
	for _, o := range slow {
		if o.err != nil {
			t.Errorf("a request in flight was cut: %v", o.err)
		}
	}
	eventually(t, "the others are closed too", func() bool { return c.open.Load() == 0 })
	if o := s.send(t.Context(), Share{Kind: Fast}); !errors.Is(o.err, errNoInstance) {
		t.Errorf("a request with an empty registry: %v, want %v", o.err, errNoInstance)
	}
}

func TestWorkerStaysOnItsConnectionAndMovesOnInTime(t *testing.T) {
	a := newConnCounter(t, func(http.ResponseWriter, *http.Request) {})
	b := newConnCounter(t, func(http.ResponseWriter, *http.Request) {})
	f, updates, _ := startFollower(t, add("t/a", a.addr()))
	w, done := httpRoute(f).worker()
	send := func(n int) {
		t.Helper()
		for range n {
			if o := w.send(t.Context(), Share{Kind: Fast}); o.err != nil {
				t.Fatal(o.err)
			}
		}
	}
	send(stay)
	if a.opened.Load() != 1 || a.requests.Load() != stay {
		t.Errorf("%d requests on %d connections, want %d on 1", a.requests.Load(), a.opened.Load(), stay)
	}
	updates <- []*endpoints.Update{add("t/b", b.addr())}
	eventually(t, "both are known", func() bool { return len(f.addresses()) == 2 })
	send(2 * stay)
	if b.requests.Load() != stay || b.opened.Load() != 1 {
		t.Errorf("b got %d requests on %d connections, want %d on 1", b.requests.Load(), b.opened.Load(), stay)
	}
	// One in the middle of a stay: its instance leaves, and the next request goes elsewhere.
	send(1)
	at, other := a, b
	if w.(*httpWorker).at.addr == b.addr() {
		at, other = b, a
	}
	before := at.requests.Load()
	key := map[*connCounter]string{a: "t/a", b: "t/b"}[at]
	updates <- []*endpoints.Update{{Op: endpoints.Delete, Key: key}}
	eventually(t, "one is left", func() bool { return len(f.addresses()) == 1 })
	send(5)
	if at.requests.Load() != before {
		t.Error("a request went to an instance that had left")
	}
	eventually(t, "the connection to it is closed", func() bool { return at.open.Load() == 0 })
	done()
	eventually(t, "the worker's last connection is closed", func() bool { return other.open.Load() == 0 })
}

// cutter answers the first request of each connection, and ends the connection when a second one arrives.
type cutter struct {
	net.Listener
	requests atomic.Int64
}

func newCutter(t *testing.T, reset bool) *cutter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cutter{Listener: l}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				r := bufio.NewReader(conn)
				for n := range 2 {
					req, err := http.ReadRequest(r)
					if err != nil {
						return
					}
					io.Copy(io.Discard, req.Body)
					c.requests.Add(1)
					if n == 0 {
						io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")
					} else if reset {
						conn.(*net.TCPConn).SetLinger(0)
					}
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return c
}

func TestRequestOnAConnectionThatDiesIsFailedAndNotSentAgain(t *testing.T) {
	for _, c := range []struct {
		name  string
		reset bool
		class Class
	}{{"reset", true, Reset}, {"closed", false, EOF}} {
		t.Run(c.name, func(t *testing.T) {
			srv := newCutter(t, c.reset)
			tr := newTransport()
			defer tr.CloseIdleConnections()
			addr := srv.Addr().String()
			if o := post(t.Context(), tr, addr, Share{Kind: Fast}); o.err != nil {
				t.Fatal(o.err)
			}
			o := post(t.Context(), tr, addr, Share{Kind: Fast})
			if o.err == nil || classify(o.err) != c.class {
				t.Errorf("a request on a connection that was %s: %v, want a failure of class %s", c.name, o.err, c.class)
			}
			if n := srv.requests.Load(); n != 2 {
				t.Errorf("the server got %d requests, want the 2 that were sent", n)
			}
		})
		t.Run(c.name+", a replayable request would hide it", func(t *testing.T) {
			srv := newCutter(t, c.reset)
			tr := newTransport()
			defer tr.CloseIdleConnections()
			for range 2 {
				resp, err := (&http.Client{Transport: tr}).Get("http://" + srv.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			if n := srv.requests.Load(); n != 3 {
				t.Errorf("the server got %d requests, want 3: 2 sent, 1 of them twice", n)
			}
		})
	}
}

// These are the conditions of net/http's shouldRetryRequest and isReplayable, the second attempt when nothing was written
// among them, which depends on timing too much to be provoked.
func TestRequestMeetsNoConditionForASecondAttempt(t *testing.T) {
	for _, kind := range []Kind{Fast, Slow, VerySlow, Stream} {
		req, err := newRequest(t.Context(), "127.0.0.1:1", Share{Kind: kind, For: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		if req.Method != http.MethodPost || req.Body == nil || req.GetBody != nil || req.ContentLength <= 0 || len(req.Header) > 0 {
			t.Errorf("%s: method %s, GetBody %v, length %d, header %v: net/http may send it twice",
				kind, req.Method, req.GetBody != nil, req.ContentLength, req.Header)
		}
	}
}

func TestAnswersThatAreNoAnswers(t *testing.T) {
	const status = `status 503: {"why":"tired"}`
	for name, c := range map[string]struct {
		kind    Kind
		handler http.HandlerFunc
		class   Class
		text    string
	}{
		"status": {Fast, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, `{"why":"tired"}`, http.StatusServiceUnavailable)
		}, Status, status},
		"redirect": {Fast, func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, wire.SlowPath, http.StatusSeeOther)
		}, Status, "status 303"},
		"body cut short": {Fast, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			io.WriteString(w, "half")
		}, EOF, "unexpected EOF"},
		"stream aborted": {Stream, func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "pod\n")
			http.NewResponseController(w).Flush()
			panic(http.ErrAbortHandler)
		}, EOF, "EOF"},
		"stream without its end": {Stream, func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "pod\n")
		}, EOF, errTruncated.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			srv := newConnCounter(t, c.handler)
			tr := newTransport()
			defer tr.CloseIdleConnections()
			o := post(t.Context(), tr, srv.addr(), Share{Kind: c.kind})
			if o.err == nil || classify(o.err) != c.class || !strings.Contains(o.err.Error(), c.text) {
				t.Errorf("%v, want class %s and the words %q", o.err, c.class, c.text)
			}
			if o.instance != srv.addr() {
				t.Errorf("instance %q, want %q", o.instance, srv.addr())
			}
		})
	}
}

func TestTimeoutAndRefusalAreToldApart(t *testing.T) {
	block := make(chan struct{})
	srv := newConnCounter(t, func(http.ResponseWriter, *http.Request) { <-block })
	defer close(block)
	tr := newTransport()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if o := post(ctx, tr, srv.addr(), Share{Kind: Fast}); classify(o.err) != Timeout {
		t.Errorf("no answer: %v, want class %s", o.err, Timeout)
	}
	if o := post(t.Context(), tr, nobody, Share{Kind: Fast}); classify(o.err) != Refused {
		t.Errorf("nobody listens: %v, want class %s", o.err, Refused)
	}
}
