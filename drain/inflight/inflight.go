// Package inflight counts, inside a Go application, the requests that it has not answered yet, and serves the count to the
// agent beside it.
//
//	client --- GET /orders -----> Middleware --- +1 ---> the application's handler --- returns or panics --> -1
//	                                                        `- hijacks (WebSocket) ---- closes the connection --> -1
//	client --- gRPC ------------> grpcinflight.Handler, from an RPC's begin to its end
//	agent  --- GET /inflight ---> Counter.ServeHTTP: 2, or {"inFlight":2}
//
// It is exact where the agent's own measurement, which looks at sockets, has to guess: streams of HTTP/2 and gRPC, answers
// that are being computed while nothing moves, WebSockets. The agent is told where to ask:
//
//	--in-flight-source=http --in-flight-url=http://127.0.0.1:8080/inflight
//
// A handler that has returned may have left its last bytes to the server, which sends them as fast as the client reads: up
// to 6 KB with HTTP/1.1, 4 KB with HTTP/2, and with gRPC 64 KB and the last message (the buffers of net/http and grpc-go).
// The agent's quiet period (500 ms) is for these; where clients read slowly, the source sockdiag, asked too, sees what has
// not been sent.
package inflight

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// Config of a Counter.
type Config struct {
	// Skip, when set, says which requests don't count, such as probes, which go on while the application drains, and
	// streams that no client minds to lose. Requests that ServeHTTP answers need not be skipped. It is called
	// concurrently.
	Skip func(*http.Request) bool
}

// Counter counts what is in flight; make it with New. All its methods may be called concurrently.
type Counter struct {
	skip  func(*http.Request) bool
	count atomic.Int64
}

// New returns a counter at zero.
func New(cfg Config) (*Counter, error) {
	c := &Counter{skip: cfg.Skip}
	if c.skip == nil {
		c.skip = func(*http.Request) bool { return false }
	}
	return c, nil
}

// InFlight is how many requests are in flight.
func (c *Counter) InFlight() int { return int(c.count.Load()) }

// Begin counts one more, a job of a queue for instance, until end is called. Further calls of end do nothing.
func (c *Counter) Begin() (end func()) {
	c.count.Add(1)
	return sync.OnceFunc(func() { c.count.Add(-1) })
}

// Middleware counts each request until next has returned or panicked; one whose connection next has hijacked, until that
// connection is closed. It goes outside all middleware that writes answers.
func (c *Counter) Middleware(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if c.skip(r) {
			next.ServeHTTP(rw, r)
			return
		}
		w := &writer{ResponseWriter: rw, counter: c, end: c.Begin()}
		defer func() {
			if !w.hijacked {
				w.end()
			}
		}()
		next.ServeHTTP(w, r)
	})
}

// ServeHTTP answers the count: {"inFlight":N} when the request's Accept names application/json, N alone otherwise. Its own
// requests don't count, within Middleware or not.
func (c *Counter) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		rw.Header().Set("Allow", "GET, HEAD")
		http.Error(rw, "the count can be read only", http.StatusMethodNotAllowed)
		return
	}
	c.uncount(rw)
	header, n := rw.Header(), strconv.Itoa(c.InFlight())
	header.Set("Cache-Control", "no-store")
	if strings.Contains(r.Header.Get("Accept"), "application/json") {
		header.Set("Content-Type", "application/json")
		fmt.Fprintf(rw, "{\"inFlight\":%s}\n", n)
		return
	}
	header.Set("Content-Type", "text/plain; charset=utf-8")
	fmt.Fprintln(rw, n)
}

// uncount ends the count of the request that rw answers, which it finds even if other middleware has wrapped rw.
func (c *Counter) uncount(rw http.ResponseWriter) {
	for {
		if w, ok := rw.(*writer); ok && w.counter == c {
			w.end()
		}
		u, ok := rw.(interface{ Unwrap() http.ResponseWriter })
		if !ok {
			return
		}
		rw = u.Unwrap()
	}
}

// writer sees a connection being hijacked. It has the methods that handlers look for without http.ResponseController, which
// finds all others by Unwrap.
type writer struct {
	http.ResponseWriter
	counter  *Counter
	end      func()
	hijacked bool
}

func (w *writer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *writer) Flush() { _ = w.FlushError() }

func (w *writer) FlushError() error { return http.NewResponseController(w.ResponseWriter).Flush() }

// ReadFrom keeps sendfile within reach of io.Copy.
func (w *writer) ReadFrom(r io.Reader) (int64, error) { return io.Copy(w.ResponseWriter, r) }

func (w *writer) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	w.hijacked = true
	counted := &conn{Conn: nc, end: w.end}
	if half, ok := nc.(halfCloser); ok {
		return &halfConn{conn: counted, halfCloser: half}, rw, nil
	}
	return counted, rw, nil
}

// conn is a hijacked connection, which counts until it is closed.
type conn struct {
	net.Conn
	end func()
}

func (c *conn) Close() error {
	defer c.end()
	return c.Conn.Close()
}

// NetConn is the connection itself, by the name that tls.Conn has for it. Closing that one does not end the count.
func (c *conn) NetConn() net.Conn { return c.Conn }

type halfCloser interface{ CloseWrite() error }

// halfConn can be closed for writing alone, as TCP and TLS connections can, which proxies need.
type halfConn struct {
	*conn
	halfCloser
}
