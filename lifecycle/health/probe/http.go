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
	h.client = http.Client{CheckRedirect: checkRedirect, Transport: &transport{dial: dial, tls: http.Transport{
		// Proxy is nil, which is none, whatever the environment says.
		// Resuming the session of the run before, unlike the kubelet, saves a third of the CPU time of a handshake.
		TLSClientConfig:    &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1)},
		DisableKeepAlives:  true,
		DisableCompression: true, // no Accept-Encoding
		DialContext:        dial,
		// The other two are as in http.DefaultTransport, from which the kubelet takes them.
		ForceAttemptHTTP2:   true,
		TLSHandshakeTimeout: 10 * time.Second,
	}}}
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

// maxRead of a plain http connection, in bytes (http.Transport.MaxResponseHeaderBytes: its default for the header).
const maxRead = 10 << 20

// transport makes each request over a connection of its own. One of plain http is written and its answer read by the caller's
// goroutine: http.Transport has two more for each connection, whose stacks and wake-ups cost as much again as all the rest of
// a run. What goes over the connection is net/http's in either case. It is for one request after the other, whose
// answer's body was closed before the next one.
type transport struct {
	// tls is for https, where HTTP/2 may be agreed on.
	tls  http.Transport
	dial Dial
	in   *bufio.Reader
	out  *bufio.Writer
}

// RoundTrip is http.RoundTripper's. Closing the answer's body closes the connection.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "http" {
		return t.tls.RoundTrip(req)
	}
	ctx := req.Context()
	port := req.URL.Port()
	if port == "" {
		port = "80"
	}
	conn, err := t.dial(ctx, "tcp", net.JoinHostPort(req.URL.Hostname(), port))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	res, err := t.exchange(req, conn)
	if err != nil {
		stop()
		_ = conn.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	res.Body = &body{res.Body, ctx, conn, stop}
	return res, nil
}

func (t *transport) exchange(req *http.Request, conn net.Conn) (*http.Response, error) {
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
	for {
		res, err := http.ReadResponse(t.in, req)
		// 100, 102 and 103 go before the answer.
		if err != nil || res.StatusCode < 100 || res.StatusCode > 199 || res.StatusCode == http.StatusSwitchingProtocols {
			return res, err
		}
	}
}

// body is an answer's.
type body struct {
	io.Reader
	ctx  context.Context
	conn net.Conn
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
