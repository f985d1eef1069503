package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"os"
	"sync"
	"time"
)

const (
	// handshakeTimeout is http.DefaultTransport's, from which the kubelet takes it.
	handshakeTimeout = 10 * time.Second
	// fullEvery handshake is a full one, counted from one to the next. See session.
	fullEvery = 10
)

// tlsClient shakes hands as the kubelet does, which verifies nothing (probe/http/http.go: New), at about half of what that
// costs:
//   - It offers P-256 alone, which TLS 1.3 makes everyone have (RFC 8446, 9.1). Go's first choice, a hybrid with a post-quantum
//     key exchange, costs more than all else in a handshake, to keep what a probe asks from those who record it for later.
//   - It resumes the session of the run before, which spares both sides the certificate.
//
// A server that refuses this is asked again at once, on a new connection, with all that the kubelet would offer and nothing to
// resume. Only its refusal of that counts.
type tlsClient struct {
	p256, whole *tls.Config
	// wants is what the server last agreed to.
	wants *tls.Config
}

func newTLSClient(host string) tlsClient {
	var c tlsClient
	c.whole = &tls.Config{
		ServerName: host, InsecureSkipVerify: true, ClientSessionCache: &session{}, NextProtos: []string{"h2", "http/1.1"},
	}
	c.p256 = c.whole.Clone()
	c.p256.CurvePreferences = []tls.CurveID{tls.CurveP256}
	c.wants = c.p256
	return c
}

// tlsConn has shaken hands. Its last part and what is written next wait in the cork until that is removed.
type tlsConn struct {
	*tls.Conn
	cork *corked
}

// connect gives a connection that ends with ctx until stop is called.
func (c *tlsClient) connect(ctx context.Context, dial Dial, addr string) (conn *tlsConn, stop func() bool, err error) {
	conn, stop, err = handshake(ctx, dial, addr, c.wants)
	if refused := new(net.OpError); errors.As(err, &refused) && refused.Op == "remote error" {
		if conn, stop, err = handshake(ctx, dial, addr, c.whole); err == nil {
			c.wants = c.whole
		}
	}
	return conn, stop, err
}

func handshake(ctx context.Context, dial Dial, addr string, cfg *tls.Config) (*tlsConn, func() bool, error) {
	raw, err := dial(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	cork := &corked{Conn: raw}
	conn := &tlsConn{tls.Client(cork, cfg), cork}
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout)) // before interruptible's, which may be at once
	stop := interruptible(ctx, raw)
	err = conn.HandshakeContext(context.Background()) // ctx would cost a goroutine
	if errors.Is(err, os.ErrDeadlineExceeded) && ctx.Err() == nil {
		err = errors.New("TLS handshake timeout") // not "i/o timeout", which doesn't say of what
	}
	_ = raw.SetDeadline(time.Time{})
	if err == nil {
		err = ctx.Err() // whose deadline may just have been taken away
	}
	if err != nil {
		_ = cork.flush() // the alert, if there is one
		stop()
		_ = raw.Close()
		return nil, nil, err
	}
	return conn, stop, nil
}

// session is the newest of a server. It is given out fullEvery-1 times: a server that resumes sessions needs no certificate, so
// that one which has lost its own would never be noticed. A full handshake that fails leaves no session behind, and the next
// one is full again, so that failures add up to failureThreshold. After a resumption that fails crypto/tls puts nil.
type session struct {
	mu    sync.Mutex // with HTTP/2 the connection's goroutine puts
	state *tls.ClientSessionState
	given int
}

// Get is tls.ClientSessionCache's.
func (s *session) Get(string) (*tls.ClientSessionState, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.given++; s.given >= fullEvery {
		s.state = nil
	}
	if s.state == nil {
		s.given = 0
	}
	return s.state, s.state != nil
}

// Put is tls.ClientSessionCache's.
func (s *session) Put(_ string, state *tls.ClientSessionState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.state = state
}

// corked holds back what is written until an answer to it is to be read, so that messages that follow one another take one
// system call and one packet. It is for one goroutine, until it is removed.
type corked struct {
	net.Conn
	pending []byte
	removed bool
}

// Write is net.Conn's; it can't fail before remove.
func (c *corked) Write(p []byte) (int, error) {
	if c.removed {
		return c.Conn.Write(p)
	}
	c.pending = append(c.pending, p...)
	return len(p), nil
}

func (c *corked) Read(p []byte) (int, error) {
	if err := c.flush(); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

// remove writes what is held back; nothing will be any more.
func (c *corked) remove() error {
	c.removed = true
	return c.flush()
}

func (c *corked) flush() error {
	if len(c.pending) == 0 {
		return nil
	}
	_, err := c.Conn.Write(c.pending)
	c.pending = c.pending[:0]
	return err
}
