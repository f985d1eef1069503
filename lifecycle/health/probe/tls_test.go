package probe

import (
	"context"
	"crypto/tls"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"sync/atomic"
	"testing"
)

// secureApp is one with the TLS settings that change makes.
func secureApp(t *testing.T, change func(*tls.Config)) *webApp {
	return newWebApp(t, func(s *httptest.Server) {
		s.EnableHTTP2 = true
		s.TLS = &tls.Config{}
		s.Config.ErrorLog = log.New(io.Discard, "", 0) // it is told of every handshake that fails
		change(s.TLS)
		s.StartTLS()
	})
}

// askSecurely gives a run, which may be repeated, and how many connections it made so far.
func askSecurely(addr string) (run func(context.Context) (verdict, string, error), dialled *atomic.Int32) {
	dialled = new(atomic.Int32)
	h := newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(1), patience, func(ctx context.Context, network, _ string) (net.Conn, error) {
		dialled.Add(1)
		return dialer().DialContext(ctx, network, addr)
	})
	return h.probe, dialled
}

func TestProbesAnyServerThatTheKubeletCould(t *testing.T) {
	for _, tc := range []struct {
		server string
		change func(*tls.Config)
		proto  string
		ver    uint16
	}{
		{"Go's defaults", func(*tls.Config) {}, "HTTP/2.0", tls.VersionTLS13},
		{"TLS 1.2 alone", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, "HTTP/2.0", tls.VersionTLS12},
		{"TLS 1.3 alone", func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, "HTTP/2.0", tls.VersionTLS13},
		{"an old cipher alone", func(c *tls.Config) {
			c.MaxVersion = tls.VersionTLS12
			c.CipherSuites = []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA}
			c.NextProtos = []string{"http/1.1"} // HTTP/2 forbids such ciphers
		}, "HTTP/1.1", tls.VersionTLS12},
		{"P-256 alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }, "HTTP/2.0", tls.VersionTLS13},
		{"X25519 alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, "HTTP/2.0", tls.VersionTLS13},
		{"X25519 and TLS 1.2 alone", func(c *tls.Config) {
			c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, []tls.CurveID{tls.X25519}
		}, "HTTP/2.0", tls.VersionTLS12},
		{"a post-quantum hybrid alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768} }, "HTTP/2.0", tls.VersionTLS13},
		{"HTTP/2 alone, which it demands", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, "HTTP/2.0", tls.VersionTLS13},
		{"HTTP/1.1 alone", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, "HTTP/1.1", tls.VersionTLS13},
		{"no sessions", func(c *tls.Config) { c.SessionTicketsDisabled = true }, "HTTP/2.0", tls.VersionTLS13},
		{"a certificate if the client has one", func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert }, "HTTP/2.0", tls.VersionTLS13},
	} {
		t.Run(tc.server, func(t *testing.T) {
			app := secureApp(t, tc.change)
			run, dialled := askSecurely(app.Listener.Addr().String())
			for range 4 {
				if got, output, err := run(t.Context()); got != success || output != "hello" || err != nil {
					t.Fatalf("got %v, %q, %v", got, output, err)
				}
			}
			if n := dialled.Load(); n != 4 {
				t.Errorf("%d connections for 4 runs", n)
			}
			for _, r := range app.requests() {
				if r.Proto != tc.proto || r.TLS.Version != tc.ver {
					t.Errorf("%s over %s, want %s over %s", r.Proto, tls.VersionName(r.TLS.Version), tc.proto, tls.VersionName(tc.ver))
				}
			}
		})
	}
}

func TestServerRestartedWithAnotherCertificateIsUp(t *testing.T) {
	first := secureApp(t, func(*tls.Config) {})
	second := secureApp(t, func(c *tls.Config) { c.SetSessionTicketKeys([][32]byte{{1}}) })
	addr := first.Listener.Addr().String()
	h := newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(1), patience, func(ctx context.Context, network, _ string) (net.Conn, error) {
		return dialer().DialContext(ctx, network, addr)
	})
	for i := range 4 {
		if i == 2 {
			addr = second.Listener.Addr().String()
		}
		if got, output, err := h.probe(t.Context()); got != success {
			t.Fatalf("run %d: %v, %q, %v", i, got, output, err)
		}
	}
	if r := second.requests(); len(r) != 2 || r[0].TLS.DidResume || !r[1].TLS.DidResume {
		t.Error("the second server's session isn't what was resumed")
	}
}

// rawServer hands each connection to serve.
func rawServer(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

func TestHandshakeThatBreaksOffIsAFailure(t *testing.T) {
	run, dialled := askSecurely(rawServer(t, func(conn net.Conn) { io.ReadFull(conn, make([]byte, 100)) }))
	if got, _, err := run(t.Context()); got != failure || err != nil || dialled.Load() != 1 {
		t.Errorf("got %v, %v with %d connections; want a failure with one: nothing was refused", got, err, dialled.Load())
	}
}

// received counts the bytes that were read.
type received struct {
	net.Conn
	n int
}

func (r *received) Read(p []byte) (int, error) {
	n, err := r.Conn.Read(p)
	r.n += n
	return n, err
}

// pairOf is a certificate with its key.
func pairOf(t *testing.T) *tls.Config {
	t.Helper()
	s := httptest.NewUnstartedServer(nil)
	s.StartTLS()
	s.Close()
	return &tls.Config{Certificates: s.TLS.Certificates}
}

func TestConnectionIsClosedAsTLSWantsIt(t *testing.T) {
	config, notified := pairOf(t), make(chan bool, 1)
	run, _ := askSecurely(rawServer(t, func(raw net.Conn) {
		counted := &received{Conn: raw}
		conn := tls.Server(counted, config)
		_, _ = conn.Read(make([]byte, 1<<10))
		io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		before := counted.n
		_, err := conn.Read(make([]byte, 1))
		notified <- err == io.EOF && counted.n > before
	}))
	if got, output, err := run(t.Context()); got != success || output != "ok" {
		t.Fatal(got, output, err)
	}
	if !<-notified {
		t.Error("the server got no close_notify")
	}
}
