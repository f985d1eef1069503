package main

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// maxCallers bounds the connections of the hook listener, and so the memory that strangers can take: about 35 KiB for each.
// The kubelet has a few open at most: hooks, probes and, from elsewhere, scrapes of the metrics.
const maxCallers = 128

// answerTimeout is how long a caller may take to read an answer, and to send a body that nobody reads.
const answerTimeout = 5 * time.Second

// callers is a listener that has at most max connections open. When all are taken, the address that has the most of them loses
// its newest one: a flood from one pod, which has one address or two, displaces itself and never the kubelet's call, new
// or waiting.
type callers struct {
	net.Listener
	max int

	mu   sync.Mutex
	n    int
	open map[netip.Addr][]*caller // oldest first
}

func limitCallers(l net.Listener, most int) *callers {
	return &callers{Listener: l, max: most, open: map[netip.Addr][]*caller{}}
}

type caller struct {
	net.Conn
	of   *callers
	from netip.Addr
}

func (l *callers) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &caller{Conn: conn, of: l}
		if a, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
			c.from = a.Addr().Unmap()
		}
		out := l.add(c)
		if out != nil {
			out.Close()
		}
		if out != c {
			return c, nil
		}
	}
}

// add returns the one that has to go for c, if any; it may be c.
func (l *callers) add(c *caller) (out *caller) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.open[c.from] = append(l.open[c.from], c)
	if l.n++; l.n <= l.max {
		return nil
	}
	most := l.open[c.from]
	for _, conns := range l.open {
		if len(conns) > len(most) {
			most = conns
		}
	}
	return most[len(most)-1]
}

func (c *caller) Close() error {
	l := c.of
	l.mu.Lock()
	conns := l.open[c.from]
	for i, o := range conns {
		if o == c {
			l.n--
			if conns = append(conns[:i], conns[i+1:]...); len(conns) == 0 {
				delete(l.open, c.from)
			} else {
				l.open[c.from] = conns
			}
			break
		}
	}
	l.mu.Unlock()
	return c.Conn.Close()
}

// hurried gives a caller answerTimeout to take its answer; a handler that waits, waits before it calls answer, which gives
// the time anew. The server's own timeouts can't do that: they would cut a long drain.
func hurried(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		rc := http.NewResponseController(w)
		_ = rc.SetWriteDeadline(time.Now().Add(answerTimeout))
		next.ServeHTTP(w, r)
		// The server reads what is left of the body. With the next request it sets its own deadline again.
		_ = rc.SetReadDeadline(time.Now().Add(answerTimeout))
	})
}
