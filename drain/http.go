package drain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// DefaultHTTPTimeout of one request of the http source.
	DefaultHTTPTimeout = time.Second
	// maxHTTPBody is far above any count, and below what would hurt the agent's memory.
	maxHTTPBody = 64 << 10
)

// HTTPConfig configures the http source.
type HTTPConfig struct {
	// URL that answers 200 with the count of requests in flight.
	URL string
	// Field is the path of the count in a JSON answer: names, and indices of arrays, joined by dots
	// ("server.requests.active", "measurements.0.value"). Empty: the whole body is the number.
	Field string
	// Timeout of one request; default 1 s.
	Timeout time.Duration
	// Own is told of the connections, so that the sources which look at connections leave them out; nil: nobody is.
	Own *Own
}

// HTTP asks the application itself, by HTTP, how many requests it has in flight: exact, where the application knows.
type HTTP struct {
	cfg    HTTPConfig
	path   []string
	client *http.Client
}

// NewHTTP checks cfg. It doesn't contact the application.
func NewHTTP(cfg HTTPConfig) (*HTTP, error) {
	if err := checkURL(cfg.URL); err != nil {
		return nil, fmt.Errorf("http source: %w", err)
	}
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("http source: Timeout is %v, must be positive (0 means the default, %v)", cfg.Timeout, DefaultHTTPTimeout)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultHTTPTimeout
	}
	h := &HTTP{cfg: cfg}
	if cfg.Field != "" {
		h.path = strings.Split(cfg.Field, ".")
		for _, name := range h.path {
			if name == "" {
				return nil, fmt.Errorf("http source: Field is %q, must be names joined by single dots", cfg.Field)
			}
		}
	}
	h.client = newClient(cfg.Timeout, cfg.Own)
	return h, nil
}

func checkURL(s string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("URL: %w", err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		return fmt.Errorf("URL is %q, must be http://HOST[:PORT]/PATH or https://", s)
	}
	return nil
}

// newClient is for asking the application beside.
func newClient(timeout time.Duration, own *Own) *http.Client {
	dial := (&net.Dialer{}).DialContext
	if own != nil {
		dial = own.Dial(dial)
	}
	return &http.Client{
		Timeout: timeout,
		// No proxy, since the application is on this host. No keep-alive: a connection that asks again and again would
		// look to the sockdiag source like a client that has not let go. No compression, which only costs CPU here.
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, DisableCompression: true},
		// What another place says is not this application's count.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Name is "http".
func (h *HTTP) Name() string { return "http" }

// Sample asks once.
func (h *HTTP) Sample(ctx context.Context) (Sample, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.cfg.URL, nil)
	if err != nil {
		return Sample{}, fmt.Errorf("asking for the requests in flight: %w", err)
	}
	// Some endpoints, drain/inflight's among them, have both.
	accept := "text/plain,*/*;q=0.1"
	if len(h.path) > 0 {
		accept = "application/json,*/*;q=0.1"
	}
	req.Header.Set("Accept", accept)
	resp, err := h.client.Do(req)
	if err != nil {
		return Sample{}, fmt.Errorf("asking for the requests in flight: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Sample{}, fmt.Errorf("%s answered %s, must be 200", h.cfg.URL, resp.Status)
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxHTTPBody+1))
	if err != nil {
		return Sample{}, fmt.Errorf("reading the answer of %s: %w", h.cfg.URL, err)
	}
	if len(body) > maxHTTPBody {
		return Sample{}, fmt.Errorf("%s answered more than %d bytes", h.cfg.URL, maxHTTPBody)
	}
	n, err := h.count(body)
	if err != nil {
		return Sample{}, fmt.Errorf("%s: %w", h.cfg.URL, err)
	}
	return Sample{InFlight: n}, nil
}

func (h *HTTP) count(body []byte) (int, error) {
	text := strings.TrimSpace(string(body))
	if len(h.path) > 0 {
		var v any
		d := json.NewDecoder(strings.NewReader(text))
		d.UseNumber()
		if err := d.Decode(&v); err != nil {
			return 0, fmt.Errorf("the answer is not JSON: %w", err)
		}
		for _, name := range h.path {
			next, err := child(v, name)
			if err != nil {
				return 0, fmt.Errorf("field %s: %w", h.cfg.Field, err)
			}
			v = next
		}
		number, ok := v.(json.Number)
		if !ok {
			return 0, fmt.Errorf("field %s is not a number", h.cfg.Field)
		}
		text = number.String()
	}
	// Metrics libraries write counts as floats.
	f, err := strconv.ParseFloat(text, 64)
	if err != nil || f != math.Trunc(f) || f < 0 || f > math.MaxInt32 {
		return 0, fmt.Errorf("the count is %q, must be a whole number from 0 to %d", shorten(text), math.MaxInt32)
	}
	return int(f), nil
}

func child(v any, name string) (any, error) {
	switch v := v.(type) {
	case map[string]any:
		if next, ok := v[name]; ok {
			return next, nil
		}
		return nil, fmt.Errorf("there is no %q", name)
	case []any:
		i, err := strconv.Atoi(name)
		if err != nil || i < 0 || i >= len(v) {
			return nil, fmt.Errorf("%q must be an index below %d", name, len(v))
		}
		return v[i], nil
	}
	return nil, errors.New("the path goes on below a value that is neither object nor array")
}

func shorten(s string) string { return shortenTo(s, 40) }

func shortenTo(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return s[:most] + "..."
}
