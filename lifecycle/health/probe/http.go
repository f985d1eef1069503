package probe

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// maxRedirects that are followed (probe/http/http.go: RedirectChecker).
const maxRedirects = 10

// httpHandler is probe/http/http.go and request.go.
type httpHandler struct {
	url     url.URL
	host    string
	port    func() (int, error)
	header  http.Header
	timeout time.Duration
	client  http.Client
	output  capture
}

func newHTTPHandler(spec HTTPGet, host, agent string, port func() (int, error), timeout time.Duration, dial Dial) *httpHandler {
	if spec.Host != "" {
		host = spec.Host
	}
	h := &httpHandler{host: host, port: port, header: http.Header{}, timeout: timeout}
	// A path that can't be parsed is passed along as it is (request.go: formatURL).
	if u, err := url.Parse(spec.Path); err == nil {
		h.url = *u
	} else {
		h.url.Path = spec.Path
	}
	h.url.Scheme = strings.ToLower(spec.Scheme)
	for _, header := range spec.HTTPHeaders {
		h.header.Add(header.Name, header.Value)
	}
	if _, ok := h.header["User-Agent"]; !ok {
		h.header.Set("User-Agent", agent)
	}
	if _, ok := h.header["Accept"]; !ok {
		h.header.Set("Accept", "*/*")
	} else if h.header.Get("Accept") == "" {
		h.header.Del("Accept")
	}
	h.client = http.Client{CheckRedirect: checkRedirect, Transport: newTransport(host, dial)}
	return h
}

// checkRedirect follows none to another host, whose answer would say nothing of this application.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= maxRedirects {
		return fmt.Errorf("stopped after %d redirects", maxRedirects)
	}
	return nil
}

func (h *httpHandler) probe(ctx context.Context) (verdict, string, error) {
	port, err := h.port()
	if err != nil {
		return unknown, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	u := h.url
	u.Host = net.JoinHostPort(h.host, strconv.Itoa(port))
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return unknown, "", err
	}
	req.Header = h.header
	req.Host = h.header.Get("Host")
	res, err := h.client.Do(req)
	if err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			// The words are those of http.Client.Timeout, which the kubelet sets.
			return failure, err.Error() + " (Client.Timeout exceeded while awaiting headers)", nil
		}
		return failure, err.Error(), nil
	}
	defer res.Body.Close()
	h.output.reset()
	if _, err := h.output.ReadFrom(io.LimitReader(res.Body, maxOutput)); err != nil {
		// A body that breaks off is no failure to the kubelet: DoHTTPProbe returns it as an error, which isn't counted.
		return unknown, "", fmt.Errorf("reading the body of status %d: %w", res.StatusCode, err)
	}
	switch {
	case res.StatusCode >= 400 || res.StatusCode < 200:
		// Without the body, which may have what is nobody's business (http.go: DoHTTPProbe, kubernetes#99425).
		return failure, fmt.Sprintf("HTTP probe failed with statuscode: %d", res.StatusCode), nil
	case res.StatusCode >= 300:
		return warning, "Probe terminated redirects, Response body: " + h.output.String(), nil
	}
	return success, h.output.String(), nil
}

// maxRead of a connection with HTTP/1.1, in bytes (http.Transport.MaxResponseHeaderBytes: its default for the header).
const maxRead = 10 << 20

// transport makes each request over a connection of its own. With HTTP/1.1 it is written and its answer read by the caller's
// goroutine: http.Transport has two more for each connection, whose stacks and wake-ups cost as much again as all the rest of
// a run. What goes over the connection is net/http's in either case. It is for one request after the other, whose
// answer's body was closed before the next one.
type transport struct {
	dial Dial
	tls  tlsClient
	in   *bufio.Reader
	out  *bufio.Writer
	// http2 speaks over the connection that has shaken hands, which is the context's value of shaken.
	http2 http.Transport
}

type shaken struct{}

func newTransport(host string, dial Dial) *transport {
	return &transport{dial: dial, tls: newTLSClient(host), http2: http.Transport{
		DisableKeepAlives:  true,
		DisableCompression: true, // no Accept-Encoding
		ForceAttemptHTTP2:  true,
		DialTLSContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return ctx.Value(shaken{}).(*tls.Conn), nil
		},
	}}
}

// RoundTrip is http.RoundTripper's. Closing the answer's body closes the connection.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.roundTrip(req)
	if err != nil && req.Context().Err() != nil {
		err = req.Context().Err()
	}
	return res, err
}

func (t *transport) roundTrip(req *http.Request) (*http.Response, error) {
	ctx := req.Context()
	port, plain := req.URL.Port(), req.URL.Scheme == "http"
	switch {
	case port == "" && plain:
		port = "80"
	case port == "":
		port = "443"
	}
	addr := net.JoinHostPort(req.URL.Hostname(), port)
	if plain {
		conn, err := t.dial(ctx, "tcp", addr)
		if err != nil {
			return nil, err
		}
		return t.exchange(req, conn, interruptible(ctx, conn))
	}
	conn, stop, err := t.tls.connect(ctx, t.dial, addr)
	if err != nil {
		return nil, err
	}
	if conn.ConnectionState().NegotiatedProtocol == "h2" {
		return t.exchangeHTTP2(req, conn, stop)
	}
	return t.exchange(req, conn, stop)
}

// interruptible makes conn's reads and writes end with ctx, until stop is called.
func interruptible(ctx context.Context, conn net.Conn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}

// exchange is one of HTTP/1.1.
func (t *transport) exchange(req *http.Request, conn net.Conn, stop func() bool) (*http.Response, error) {
	res, err := t.ask(req, conn)
	if err != nil {
		stop()
		_ = conn.Close()
		return nil, err
	}
	res.Body = &body{res.Body, req.Context(), conn, stop}
	return res, nil
}

func (t *transport) ask(req *http.Request, conn net.Conn) (*http.Response, error) {
	if t.in == nil {
		t.in, t.out = bufio.NewReaderSize(nil, 1<<10), bufio.NewWriterSize(nil, 1<<10)
	}
	t.in.Reset(&io.LimitedReader{R: conn, N: maxRead})
	t.out.Reset(conn)
	closing := *req
	closing.Close = true
	if err := closing.Write(t.out); err != nil {
		return nil, err
	}
	if err := t.out.Flush(); err != nil {
		return nil, err
	}
	if conn, ok := conn.(*tlsConn); ok {
		if err := conn.cork.remove(); err != nil {
			return nil, err
		}
	}
	for {
		res, err := http.ReadResponse(t.in, req)
		// 100, 102 and 103 go before the answer.
		if err != nil || res.StatusCode < 100 || res.StatusCode > 199 || res.StatusCode == http.StatusSwitchingProtocols {
			return res, err
		}
	}
}

// exchangeHTTP2 is left to net/http, goroutines and all: it is no small thing.
func (t *transport) exchangeHTTP2(req *http.Request, conn *tlsConn, stop func() bool) (*http.Response, error) {
	err := conn.cork.remove()
	var res *http.Response
	if err == nil {
		res, err = t.http2.RoundTrip(req.WithContext(context.WithValue(req.Context(), shaken{}, conn.Conn)))
	}
	if err != nil {
		stop()
		_ = conn.Close()
		return nil, err
	}
	res.Request = req
	res.Body = &body{res.Body, req.Context(), both{res.Body, conn}, stop}
	return res, nil
}

// both are closed.
type both [2]io.Closer

func (b both) Close() error { return errors.Join(b[0].Close(), b[1].Close()) }

// body is an answer's.
type body struct {
	io.Reader
	ctx  context.Context
	conn io.Closer
	stop func() bool
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil && !errors.Is(err, io.EOF) && b.ctx.Err() != nil {
		err = b.ctx.Err()
	}
	return n, err
}

// Close doesn't read what is left.
func (b *body) Close() error {
	b.stop()
	return b.conn.Close()
}

// capture keeps the first maxOutput bytes that it reads and drops the rest. A run after the other uses the same memory.
type capture struct {
	buf  []byte
	last string
}

func (c *capture) reset() { c.buf = c.buf[:0] }

// String makes no new string if it would be the same as the last time, as it mostly is.
func (c *capture) String() string {
	if string(c.buf) != c.last {
		c.last = string(c.buf)
	}
	return c.last
}

// ReadFrom reads to the end.
func (c *capture) ReadFrom(r io.Reader) (int64, error) {
	var total int64
	var dropped [512]byte
	for {
		if len(c.buf) == cap(c.buf) && len(c.buf) < maxOutput {
			grown := make([]byte, len(c.buf), min(max(512, 2*cap(c.buf)), maxOutput))
			copy(grown, c.buf)
			c.buf = grown
		}
		into := dropped[:]
		if len(c.buf) < maxOutput {
			into = c.buf[len(c.buf):cap(c.buf)]
		}
		n, err := r.Read(into)
		total += int64(n)
		if len(c.buf) < maxOutput {
			c.buf = c.buf[:len(c.buf)+n]
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// Write is there for io.Copy, which calls ReadFrom instead.
func (c *capture) Write(p []byte) (int, error) {
	keep := p[:min(len(p), maxOutput-len(c.buf))]
	c.buf = append(c.buf, keep...)
	return len(p), nil
}
