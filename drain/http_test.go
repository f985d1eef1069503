package drain

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
)

func TestHTTPCounts(t *testing.T) {
	for _, tc := range []struct {
		name, field, body string
		status            int
		want              int
		wantErr           string
	}{
		{name: "a bare number", body: " 3\n", want: 3},
		{name: "zero", body: "0", want: 0},
		{name: "a count as metrics libraries write it", body: "12.0", want: 12},
		{name: "a field", field: "active", body: `{"active": 4}`, want: 4},
		{name: "a nested field", field: "server.requests.active", body: `{"server":{"requests":{"active":5}}}`, want: 5},
		{name: "an array's element", field: "measurements.1.value", body: `{"measurements":[{"value":1},{"value":6.0}]}`, want: 6},
		{name: "a negative number", body: "-1", wantErr: `"-1", must be a whole number`},
		{name: "a fraction", body: "1.5", wantErr: `"1.5", must be a whole number`},
		{name: "no number", body: "none", wantErr: `"none", must be a whole number`},
		{name: "NaN", body: "NaN", wantErr: "must be a whole number"},
		{name: "infinity", body: "Inf", wantErr: "must be a whole number"},
		{name: "nothing", body: "", wantErr: `"", must be a whole number`},
		{name: "a long text", body: strings.Repeat("x", 1000), wantErr: strings.Repeat("x", 40) + "..."},
		{name: "a field that is not there", field: "a.b", body: `{"a":{"c":1}}`, wantErr: `field a.b: there is no "b"`},
		{name: "a field of the wrong kind", field: "a", body: `{"a":"1"}`, wantErr: "field a is not a number"},
		{name: "a path that leads nowhere", field: "a.b", body: `{"a":1}`, wantErr: "neither object nor array"},
		{name: "an index out of range", field: "a.2", body: `{"a":[1,2]}`, wantErr: `"2" must be an index below 2`},
		{name: "a negative field", field: "a", body: `{"a":-2}`, wantErr: `"-2", must be a whole number`},
		{name: "no JSON", field: "a", body: "<html>", wantErr: "not JSON"},
		{name: "another status", status: 503, body: "0", wantErr: "503 Service Unavailable, must be 200"},
		{name: "no content", status: 204, wantErr: "204 No Content, must be 200"},
		{name: "a body without end", body: strings.Repeat(" ", maxHTTPBody) + "0", wantErr: "more than 65536 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if tc.status != 0 {
					w.WriteHeader(tc.status)
				}
				fmt.Fprint(w, tc.body)
			}))
			defer srv.Close()
			h, err := NewHTTP(HTTPConfig{URL: srv.URL, Field: tc.field})
			if err != nil {
				t.Fatal(err)
			}
			got, err := h.Sample(t.Context())
			if tc.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tc.wantErr) {
					t.Fatalf("got %+v, %v, want an error with %q", got, err, tc.wantErr)
				}
				return
			}
			if err != nil || got != (Sample{InFlight: tc.want}) {
				t.Fatalf("got %+v, %v, want %d in flight", got, err, tc.want)
			}
		})
	}
}

func TestHTTPSaysWhichFormatItWants(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.Header.Get("Accept"), "application/json") {
			fmt.Fprint(w, `{"inFlight":2}`)
		} else {
			fmt.Fprint(w, "1")
		}
	}))
	defer srv.Close()
	for field, want := range map[string]int{"": 1, "inFlight": 2} {
		h, err := NewHTTP(HTTPConfig{URL: srv.URL, Field: field})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := h.Sample(t.Context()); err != nil || got.InFlight != want {
			t.Errorf("field %q: got %+v, %v, want %d in flight", field, got, err, want)
		}
	}
}

func TestHTTPDoesNotFollowRedirects(t *testing.T) {
	var asked atomic.Bool
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Store(true)
		fmt.Fprint(w, "0")
	}))
	defer other.Close()
	srv := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	defer srv.Close()
	h, err := NewHTTP(HTTPConfig{URL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := h.Sample(t.Context()); err == nil || asked.Load() {
		t.Errorf("got %+v, %v (other server asked: %v), want an error", got, err, asked.Load())
	}
}

func TestHTTPLeavesNoConnectionOpen(t *testing.T) {
	var opened atomic.Int32
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "0") }))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	defer srv.Close()
	h, err := NewHTTP(HTTPConfig{URL: srv.URL})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := h.Sample(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if got := opened.Load(); got != 3 {
		t.Errorf("%d connections for 3 samples, want 3: a kept one is activity to the sockdiag source", got)
	}
}

func TestHTTPMindsItsTimeLimits(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { <-release }))
	defer srv.Close()
	defer close(release)
	h, err := NewHTTP(HTTPConfig{URL: srv.URL, Timeout: 1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Sample(t.Context()); err == nil {
		t.Error("no error from a server that does not answer within Timeout")
	}
	h, err = NewHTTP(HTTPConfig{URL: srv.URL, Timeout: 1 << 60})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := h.Sample(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestNewHTTPNamesWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		cfg  HTTPConfig
		want string
	}{
		{HTTPConfig{}, `URL is "", must be http://`},
		{HTTPConfig{URL: "localhost:8080/inflight"}, `URL is "localhost:8080/inflight", must be http://`},
		{HTTPConfig{URL: "ftp://localhost/"}, `URL is "ftp://localhost/"`},
		{HTTPConfig{URL: "http://:8080/"}, `URL is "http://:8080/"`},
		{HTTPConfig{URL: "http://[::1/"}, "URL: "},
		{HTTPConfig{URL: "http://localhost/", Field: "a..b"}, `Field is "a..b", must be names joined by single dots`},
		{HTTPConfig{URL: "http://localhost/", Timeout: -1}, "Timeout is -1ns, must be positive"},
	} {
		if _, err := NewHTTP(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("NewHTTP(%+v): got %v, want %q", tc.cfg, err, tc.want)
		}
	}
}
