package inflight_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"usher.dev/usher/drain"
	"usher.dev/usher/drain/inflight"
)

func newCounter(t *testing.T, cfg inflight.Config) *inflight.Counter {
	t.Helper()
	c, err := inflight.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// serve runs handler behind c's Middleware.
func serve(t *testing.T, c *inflight.Counter, http2 bool, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewUnstartedServer(c.Middleware(handler))
	if http2 {
		srv.EnableHTTP2 = true
		srv.StartTLS()
	} else {
		srv.Start()
	}
	t.Cleanup(srv.Close)
	return srv
}

func get(t *testing.T, srv *httptest.Server, path string) string {
	t.Helper()
	resp, err := srv.Client().Get(srv.URL + path)
	if err != nil {
		t.Error(err)
		return ""
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Error(err)
	}
	return string(body)
}

// become waits for the count, which follows what clients see by a moment.
func become(t *testing.T, c *inflight.Counter, want int) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); c.InFlight() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d in flight, want %d", c.InFlight(), want)
		}
	}
}

func check(t *testing.T, c *inflight.Counter, want int) {
	t.Helper()
	if got := c.InFlight(); got != want {
		t.Errorf("%d in flight, want %d", got, want)
	}
}

func bothProtocols(t *testing.T, test func(t *testing.T, http2 bool)) {
	t.Run("HTTP/1.1", func(t *testing.T) { test(t, false) })
	t.Run("HTTP/2", func(t *testing.T) { test(t, true) })
}

func TestCountsRequestsThatAreBeingAnswered(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		c := newCounter(t, inflight.Config{})
		arrived, release := make(chan struct{}), make(chan struct{})
		srv := serve(t, c, http2, func(w http.ResponseWriter, r *http.Request) {
			arrived <- struct{}{}
			<-release
			io.WriteString(w, r.Proto)
		})
		check(t, c, 0)
		const clients = 20
		var answers sync.WaitGroup
		for i := range clients {
			answers.Go(func() {
				if got, want := get(t, srv, "/"), map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[http2]; got != want {
					t.Errorf("answered %q, want %q", got, want)
				}
			})
			<-arrived
			check(t, c, i+1)
		}
		for left := clients - 1; left >= 0; left-- {
			release <- struct{}{}
			become(t, c, left)
		}
		answers.Wait()
	})
}

// TestCountsUntilALargeAnswerIsWritten: 64 MB are more than the sockets' and the server's buffers hold, and 16 MB more than
// the window that a stream of HTTP/2 has.
func TestCountsUntilALargeAnswerIsWritten(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		c := newCounter(t, inflight.Config{})
		size := map[bool]int{false: 64 << 20, true: 16 << 20}[http2]
		srv := serve(t, c, http2, func(w http.ResponseWriter, r *http.Request) {
			chunk := make([]byte, 1<<20)
			for range size / len(chunk) {
				if _, err := w.Write(chunk); err != nil {
					t.Error(err)
				}
			}
		})
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		check(t, c, 1)
		if n, err := io.CopyN(io.Discard, resp.Body, int64(size/2)); err != nil {
			t.Fatal(n, err)
		}
		check(t, c, 1)
		if n, err := io.Copy(io.Discard, resp.Body); n != int64(size/2) || err != nil {
			t.Fatal(n, err)
		}
		become(t, c, 0)
	})
}

func TestCountsUntilAClientHasGone(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		c := newCounter(t, inflight.Config{})
		srv := serve(t, c, http2, func(w http.ResponseWriter, r *http.Request) {
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		})
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		check(t, c, 1)
		resp.Body.Close()
		become(t, c, 0)
	})
}

func TestPanicEndsTheCount(t *testing.T) {
	for _, with := range []any{http.ErrAbortHandler, "a bug"} {
		c := newCounter(t, inflight.Config{})
		handler := c.Middleware(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			check(t, c, 1)
			panic(with)
		}))
		func() {
			defer func() {
				if got := recover(); got != with {
					t.Errorf("recovered %v, want %v", got, with)
				}
			}()
			handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/", nil))
		}()
		check(t, c, 0)
	}
}

// upgrade opens a connection that the server has taken over.
func upgrade(t *testing.T, srv *httptest.Server) (net.Conn, *bufio.Reader) {
	t.Helper()
	nc, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	fmt.Fprintf(nc, "GET /chat HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(nc)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %+v, %v, want 101", resp, err)
	}
	return nc, r
}

const switched = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"

func TestHijackedConnectionCountsUntilItIsClosed(t *testing.T) {
	for name, hijack := range map[string]func(http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error){
		"by assertion": func(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) { return w.(http.Hijacker).Hijack() },
		"by ResponseController": func(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) {
			return http.NewResponseController(w).Hijack()
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCounter(t, inflight.Config{})
			conns := make(chan net.Conn, 1)
			srv := serve(t, c, false, func(w http.ResponseWriter, r *http.Request) {
				nc, rw, err := hijack(w)
				if err != nil {
					t.Error(err)
					return
				}
				rw.WriteString(switched)
				rw.Flush()
				conns <- nc
			})
			client, _ := upgrade(t, srv)
			nc := <-conns
			// The server answers others meanwhile, and the handler has long returned when it is done with them.
			for range 10 {
				client2, _ := upgrade(t, srv)
				(<-conns).Close()
				client2.Close()
			}
			become(t, c, 1)
			if _, ok := nc.(interface{ NetConn() net.Conn }).NetConn().(*net.TCPConn); !ok {
				t.Error("NetConn is not the connection itself")
			}
			if err := nc.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Error(err)
			}
			if rest, err := io.ReadAll(client); err != nil || len(rest) > 0 {
				t.Errorf("got %q, %v after the server closed for writing", rest, err)
			}
			check(t, c, 1)
			for range 2 {
				nc.Close()
				check(t, c, 0)
			}
		})
	}
}

// TestUpgradesThroughAProxyCount: httputil.ReverseProxy is a hijacker as they are in use.
func TestUpgradesThroughAProxyCount(t *testing.T) {
	c, backends := newCounter(t, inflight.Config{}), newCounter(t, inflight.Config{})
	backend := serve(t, backends, false, func(w http.ResponseWriter, r *http.Request) {
		nc, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer nc.Close()
		io.WriteString(nc, switched)
		io.Copy(nc, rw)
	})
	to, err := url.Parse(backend.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(to)
	srv := serve(t, c, false, proxy.ServeHTTP)
	client, r := upgrade(t, srv)
	fmt.Fprintln(client, "hello")
	if got, err := r.ReadString('\n'); got != "hello\n" || err != nil {
		t.Fatalf("echoed %q, %v", got, err)
	}
	check(t, c, 1)
	check(t, backends, 1)
	client.Close()
	become(t, backends, 0)
	become(t, c, 0)
}

func TestHijackThatFailsIsNoHijack(t *testing.T) {
	c := newCounter(t, inflight.Config{})
	srv := serve(t, c, true, func(w http.ResponseWriter, r *http.Request) {
		if _, _, err := w.(http.Hijacker).Hijack(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("hijacking HTTP/2: got %v, want ErrNotSupported", err)
		}
	})
	get(t, srv, "/")
	become(t, c, 0)
}

func TestHandlersKeepWhatTheServerOffers(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		c := newCounter(t, inflight.Config{})
		read := make(chan struct{})
		srv := serve(t, c, http2, func(w http.ResponseWriter, r *http.Request) {
			io.WriteString(w, "by assertion\n")
			w.(http.Flusher).Flush()
			<-read
			rc := http.NewResponseController(w)
			if err := errors.Join(rc.SetReadDeadline(time.Now().Add(time.Hour)), rc.SetWriteDeadline(time.Now().Add(time.Hour))); err != nil {
				t.Errorf("deadlines: %v", err)
			}
			io.WriteString(w, "by ResponseController\n")
			if err := rc.Flush(); err != nil {
				t.Error(err)
			}
			<-read
			// The answer is as long as it is, whatever io.Copy finds.
			if n, err := io.Copy(w, strings.NewReader("by io.Copy\n")); n != 11 || err != nil {
				t.Error(n, err)
			}
		})
		resp, err := srv.Client().Get(srv.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		r := bufio.NewReader(resp.Body)
		for _, want := range []string{"by assertion\n", "by ResponseController\n"} {
			if got, err := r.ReadString('\n'); got != want || err != nil {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
			check(t, c, 1)
			read <- struct{}{}
		}
		if rest, err := io.ReadAll(r); string(rest) != "by io.Copy\n" || err != nil {
			t.Errorf("got %q, %v", rest, err)
		}
		become(t, c, 0)
	})
	// A writer that can't flush is told from one that can.
	c := newCounter(t, inflight.Config{})
	c.Middleware(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := http.NewResponseController(w).Flush(); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("flushing what can't be flushed: got %v, want ErrNotSupported", err)
		}
	})).ServeHTTP(struct{ http.ResponseWriter }{httptest.NewRecorder()}, httptest.NewRequest("GET", "/", nil))
}

// TestShortAnswersKeepTheirLength: a middleware that flushed them would have them chunked.
func TestShortAnswersKeepTheirLength(t *testing.T) {
	c := newCounter(t, inflight.Config{})
	srv := serve(t, c, false, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "short") })
	resp, err := srv.Client().Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.ContentLength != 5 {
		t.Errorf("Content-Length is %d, want 5", resp.ContentLength)
	}
}

func TestSkippedRequestsDontCount(t *testing.T) {
	c := newCounter(t, inflight.Config{Skip: func(r *http.Request) bool { return r.URL.Path == "/healthz" }})
	srv := serve(t, c, false, func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, c.InFlight()) })
	for path, want := range map[string]string{"/healthz": "0", "/": "1", "/healthz/more": "1"} {
		if got := get(t, srv, path); got != want {
			t.Errorf("%s: %s in flight, want %s", path, got, want)
		}
		become(t, c, 0)
	}
}

// other is a middleware's writer.
type other struct{ http.ResponseWriter }

func (o other) Unwrap() http.ResponseWriter { return o.ResponseWriter }

func TestServesTheCountToTheHTTPSource(t *testing.T) {
	bothProtocols(t, func(t *testing.T, http2 bool) {
		c := newCounter(t, inflight.Config{})
		arrived, release := make(chan struct{}), make(chan struct{})
		app := func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/inflight" {
				c.ServeHTTP(other{w}, r)
				return
			}
			arrived <- struct{}{}
			<-release
		}
		srv := serve(t, c, http2, app)
		// The source knows no certificate of the test's; what it sends is what matters.
		plain := serve(t, c, false, app)
		for want := range 3 {
			for _, field := range []string{"", "inFlight"} {
				source, err := drain.NewHTTP(drain.HTTPConfig{URL: plain.URL + "/inflight", Field: field, Timeout: time.Minute})
				if err != nil {
					t.Fatal(err)
				}
				if got, err := source.Sample(t.Context()); err != nil || got != (drain.Sample{InFlight: want}) {
					t.Errorf("field %q: got %+v, %v, want %d in flight", field, got, err, want)
				}
			}
			if got := get(t, srv, "/inflight"); got != fmt.Sprintln(want) {
				t.Errorf("served %q, want %d", got, want)
			}
			go srv.Client().Get(srv.URL)
			<-arrived
		}
		close(release)
		become(t, c, 0)
	})
}

func TestCountIsReadOnly(t *testing.T) {
	c := newCounter(t, inflight.Config{})
	rec := httptest.NewRecorder()
	c.ServeHTTP(rec, httptest.NewRequest("POST", "/inflight", nil))
	if rec.Code != http.StatusMethodNotAllowed || rec.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: got %d, Allow %q", rec.Code, rec.Header().Get("Allow"))
	}
}

func TestBeginCountsUntilItsEnd(t *testing.T) {
	c := newCounter(t, inflight.Config{})
	first, second := c.Begin(), c.Begin()
	check(t, c, 2)
	first()
	first()
	check(t, c, 1)
	second()
	check(t, c, 0)
}

func TestCountIsZeroAfterManyAtOnce(t *testing.T) {
	c := newCounter(t, inflight.Config{})
	srv := serve(t, c, false, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/panic":
			panic(http.ErrAbortHandler)
		case "/hijack":
			if nc, _, err := http.NewResponseController(w).Hijack(); err == nil {
				nc.Close()
			}
		}
	})
	var clients sync.WaitGroup
	for i := range 16 {
		clients.Go(func() {
			for range 25 {
				if resp, err := srv.Client().Get(srv.URL + []string{"/", "/panic", "/hijack", "/"}[i%4]); err == nil {
					resp.Body.Close()
				}
			}
		})
	}
	clients.Wait()
	become(t, c, 0)
}
