package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log"
	"net"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
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
		// connections of four runs.
		connections int32
		proto       string
		version     uint16
		curve       tls.CurveID
	}{
		{"Go's defaults", func(*tls.Config) {}, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
		{"TLS 1.2 alone", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, 4, "HTTP/2.0", tls.VersionTLS12, tls.CurveP256},
		{"TLS 1.3 alone", func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
		{"an old cipher alone", func(c *tls.Config) {
			c.MaxVersion = tls.VersionTLS12
			c.CipherSuites = []uint16{tls.TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA}
			c.NextProtos = []string{"http/1.1"} // HTTP/2 forbids such ciphers
		}, 4, "HTTP/1.1", tls.VersionTLS12, tls.CurveP256},
		{"P-256 alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP256} }, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
		{"X25519 alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, 5, "HTTP/2.0", tls.VersionTLS13, tls.X25519},
		{"X25519 and TLS 1.2 alone", func(c *tls.Config) {
			c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, []tls.CurveID{tls.X25519}
		}, 5, "HTTP/2.0", tls.VersionTLS12, tls.X25519},
		{"a post-quantum hybrid alone", func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519MLKEM768} }, 5, "HTTP/2.0", tls.VersionTLS13, tls.X25519MLKEM768},
		{"HTTP/2 alone, which it demands", func(c *tls.Config) { c.NextProtos = []string{"h2"} }, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
		{"HTTP/1.1 alone", func(c *tls.Config) { c.NextProtos = []string{"http/1.1"} }, 4, "HTTP/1.1", tls.VersionTLS13, tls.CurveP256},
		{"no sessions", func(c *tls.Config) { c.SessionTicketsDisabled = true }, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
		{"a certificate if the client has one", func(c *tls.Config) { c.ClientAuth = tls.RequestClientCert }, 4, "HTTP/2.0", tls.VersionTLS13, tls.CurveP256},
	} {
		t.Run(tc.server, func(t *testing.T) {
			app := secureApp(t, tc.change)
			run, dialled := askSecurely(app.Listener.Addr().String())
			for range 4 {
				if got, output, err := run(t.Context()); got != success || output != "hello" || err != nil {
					t.Fatalf("got %v, %q, %v", got, output, err)
				}
			}
			if n := dialled.Load(); n != tc.connections {
				t.Errorf("%d connections for 4 runs, want %d", n, tc.connections)
			}
			for _, r := range app.requests() {
				// Of a resumed TLS 1.2 session there is no curve.
				if r.Proto != tc.proto || r.TLS.Version != tc.version || r.TLS.CurveID != tc.curve && !(r.TLS.DidResume && r.TLS.Version == tls.VersionTLS12) {
					t.Errorf("%s over %s with %v, want %s over %s with %v",
						r.Proto, tls.VersionName(r.TLS.Version), r.TLS.CurveID, tc.proto, tls.VersionName(tc.version), tc.curve)
				}
			}
		})
	}
}

func TestResumesSessionsButEachTenthIsFull(t *testing.T) {
	for name, version := range map[string]uint16{"TLS 1.2": tls.VersionTLS12, "TLS 1.3": tls.VersionTLS13} {
		for _, proto := range []string{"h2", "http/1.1"} {
			t.Run(name+", "+proto, func(t *testing.T) {
				app := secureApp(t, func(c *tls.Config) { c.MaxVersion, c.NextProtos = version, []string{proto} })
				run, _ := askSecurely(app.Listener.Addr().String())
				for range 21 {
					if got, output, err := run(t.Context()); got != success {
						t.Fatal(got, output, err)
					}
				}
				var full []int
				for i, r := range app.requests() {
					if !r.TLS.DidResume {
						full = append(full, i)
					}
				}
				if !slices.Equal(full, []int{0, 10, 20}) {
					t.Errorf("full handshakes were those of the runs %v, want 0, 10 and 20", full)
				}
			})
		}
	}
}

// TestServerThatLostItsCertificateFails at the tenth run at the latest, and then at each, as the failureThreshold needs it.
func TestServerThatLostItsCertificateFails(t *testing.T) {
	var lost atomic.Bool
	app := secureApp(t, func(c *tls.Config) {
		c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
			if lost.Load() {
				return &tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("lost") }}, nil
			}
			return nil, nil
		}
	})
	run, _ := askSecurely(app.Listener.Addr().String())
	if got, output, err := run(t.Context()); got != success {
		t.Fatal(got, output, err)
	}
	lost.Store(true)
	var failures int
	for i := range fullEvery + 2 {
		got, output, err := run(t.Context())
		switch {
		case got == failure && err == nil && strings.Contains(output, "remote error: tls"):
			failures++
		case failures > 0 || i == fullEvery:
			t.Fatalf("run %d: got %v, %q, %v", i, got, output, err)
		}
	}
	lost.Store(false)
	if got, output, err := run(t.Context()); failures < 3 || got != success {
		t.Errorf("%d failures, and once it has a certificate again %v, %q, %v", failures, got, output, err)
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

func TestServerThatRefusesEveryHandshakeIsAskedTwice(t *testing.T) {
	app := secureApp(t, func(c *tls.Config) {
		c.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return nil, errors.New("no") }
	})
	run, dialled := askSecurely(app.Listener.Addr().String())
	for i := range int32(3) {
		if got, output, err := run(t.Context()); got != failure || err != nil || !strings.Contains(output, "remote error: tls: internal error") || dialled.Load() != 2*(i+1) {
			t.Errorf("got %v, %q, %v after %d connections", got, output, err, dialled.Load())
		}
	}
}

func TestServerThatRefusesResumptionIsUp(t *testing.T) {
	app := secureApp(t, func(c *tls.Config) {
		c.GetConfigForClient = func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
			if slices.Contains(hello.Extensions, 41) { // pre_shared_key
				return nil, errors.New("I don't know you")
			}
			return nil, nil
		}
	})
	run, dialled := askSecurely(app.Listener.Addr().String())
	for range 3 {
		if got, output, err := run(t.Context()); got != success {
			t.Fatal(got, output, err)
		}
	}
	if n := dialled.Load(); n != 5 {
		t.Errorf("%d connections, want one, and two for each run that had a session", n)
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

func TestHandshakeTimeoutIsNotTheAnswers(t *testing.T) {
	config := pairOf(t)
	synctest.Test(t, func(t *testing.T) {
		h := newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(1), time.Minute, func(context.Context, string, string) (net.Conn, error) {
			mine, theirs := net.Pipe()
			go func() {
				conn := tls.Server(theirs, config)
				_, _ = conn.Read(make([]byte, 1<<10))
				time.Sleep(handshakeTimeout + time.Second)
				io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				io.Copy(io.Discard, theirs)
			}()
			return mine, nil
		})
		if got, output, err := h.probe(t.Context()); got != success || output != "ok" {
			t.Errorf("got %v, %q, %v", got, output, err)
		}
	})
}

func TestHandshakeIsNotWaitedForLongerThanTheKubeletDoes(t *testing.T) {
	for _, tc := range []struct {
		timeout, took time.Duration
		output        string
	}{
		{time.Minute, 10 * time.Second, "TLS handshake timeout"},
		{3 * time.Second, 3 * time.Second, "Client.Timeout exceeded"},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(1), tc.timeout, func(context.Context, string, string) (net.Conn, error) {
				mine, theirs := net.Pipe()
				go io.Copy(io.Discard, theirs)
				return mine, nil
			})
			began := time.Now()
			got, output, err := h.probe(t.Context())
			if took := time.Since(began); got != failure || err != nil || took != tc.took || !strings.Contains(output, tc.output) {
				t.Errorf("got %v, %q, %v after %v, want %q after %v", got, output, err, took, tc.output, tc.took)
			}
		})
	}
}
