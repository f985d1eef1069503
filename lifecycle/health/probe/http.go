package probe

import (
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
	url    url.URL
	host   string
	port   func() (int, error)
	header http.Header
	client http.Client
	output capture
}

func newHTTPHandler(spec HTTPGet, host, agent string, port func() (int, error), timeout time.Duration, dial Dial) *httpHandler {
	if spec.Host != "" {
		host = spec.Host
	}
	h := &httpHandler{host: host, port: port, header: http.Header{}}
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
	h.client = http.Client{
		Timeout: timeout,
		// Proxy is nil, which is none, whatever the environment says.
		Transport: &http.Transport{
			// Resuming the session of the run before, unlike the kubelet, saves a third of the CPU time of a handshake.
			TLSClientConfig:    &tls.Config{InsecureSkipVerify: true, ClientSessionCache: tls.NewLRUClientSessionCache(1)},
			DisableKeepAlives:  true,
			DisableCompression: true, // no Accept-Encoding
			DialContext:        dial,
			// The other two are as in http.DefaultTransport, from which the kubelet takes them.
			ForceAttemptHTTP2:   true,
			TLSHandshakeTimeout: 10 * time.Second,
		},
		CheckRedirect: checkRedirect,
	}
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
