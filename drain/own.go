package drain

import (
	"context"
	"net"
	"net/netip"
	"sync"
)

// Own knows the connections that this process itself has open to the application, so that the sources which look at
// connections leave them out: a scrape of the application's port on a kept connection would otherwise look like a client
// that has not let go. The zero value is ready; it must not be copied. It is safe for concurrent use.
type Own struct {
	mu    sync.Mutex
	local map[netip.AddrPort]struct{}
}

// Dial wraps a dialler, as http.Transport.DialContext takes it, so that o knows its connections until they are closed.
func (o *Own) Dial(dial func(ctx context.Context, network, address string) (net.Conn, error)) func(ctx context.Context, network, address string) (net.Conn, error) {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		tcp, ok := c.LocalAddr().(*net.TCPAddr)
		if !ok {
			return c, nil
		}
		at := tcp.AddrPort()
		at = netip.AddrPortFrom(at.Addr().Unmap().WithZone(""), at.Port())
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.local == nil {
			o.local = map[netip.AddrPort]struct{}{}
		}
		o.local[at] = struct{}{}
		return &ownConn{Conn: c, forget: sync.OnceFunc(func() {
			o.mu.Lock()
			defer o.mu.Unlock()
			delete(o.local, at)
		})}, nil
	}
}

// has tells whether the other end of a connection is one of o's.
func (o *Own) has(peer netip.AddrPort) bool {
	if o == nil {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	_, ok := o.local[peer]
	return ok
}

type ownConn struct {
	net.Conn
	forget func()
}

// Close forgets before the port can be another's.
func (c *ownConn) Close() error {
	c.forget()
	return c.Conn.Close()
}
