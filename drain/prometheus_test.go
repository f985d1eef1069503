package drain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const page = `# HELP http_requests_in_flight Requests being answered. # TYPE is not declared here
# TYPE http_requests_in_flight gauge
http_requests_in_flight{handler="/api",code=""} 3
http_requests_in_flight{handler="/api",code="500"} 4 1700000000000
  http_requests_in_flight { handler = "/a \"b\" \\ c\nd" , code="200", }  5
http_requests_in_flight_total{handler="/api"} 1000
# TYPE bare gauge
bare 2
# TYPE empty gauge
# TYPE requests counter
requests 12
# TYPE latency_seconds histogram
latency_seconds_bucket{le="+Inf"} 9
latency_seconds_sum 1.5
latency_seconds_count 9
# TYPE batch_count gauge
batch_count 6
# TYPE batch histogram
# TYPE no_number gauge
no_number NaN
# TYPE infinite gauge
infinite +Inf
# TYPE half gauge
half 0.5
# TYPE drift gauge
drift{a="1"} -1
drift{a="2"} 1
# TYPE huge gauge
huge 3e9
# TYPE two gauge
two{a="1"} 2e9
two{a="2"} 2e9
untyped 8
{"with.dots",a="b"} 7
# TYPE quoted gauge
quoted{"with.dots"="b"} 7
# TYPE broken gauge
broken{a="b" 7
# TYPE broken2 gauge
broken2{a=b} 7
# TYPE broken3 gauge
broken3{a="b\t"} 7
# TYPE broken4 gauge
broken4{a="b
# TYPE broken5 gauge
broken5{a="b"}
# TYPE broken6 gauge
broken6 7 now
# TYPE broken7 gauge
broken7{="b"} 1
garbage that is nobody's {{{ business
`

func TestPrometheusSums(t *testing.T) {
	for _, tc := range []struct {
		metric  string
		want    int
		wantErr string
	}{
		{metric: "http_requests_in_flight", want: 12},
		{metric: ` http_requests_in_flight { handler = "/api" , } `, want: 7},
		{metric: `http_requests_in_flight{}`, want: 12},
		{metric: `http_requests_in_flight{handler="/api",code!~"5.."}`, want: 3},
		{metric: `http_requests_in_flight{handler="/api",code!="500"}`, want: 3},
		{metric: `http_requests_in_flight{handler=~"/a.*",handler!="/api"}`, want: 5},
		{metric: `http_requests_in_flight{code=""}`, want: 3},
		{metric: `http_requests_in_flight{absent=""}`, want: 12},
		{metric: `http_requests_in_flight{handler='/a "b" \\ c` + `\n` + `d'}`, want: 5},
		{metric: "http_requests_in_flight{handler=~`/a \"b\" . c.d`}", want: 5},
		{metric: `http_requests_in_flight{code=~"50|20"}`, wantErr: `none of the 3 series of http_requests_in_flight matches http_requests_in_flight{code=~"50|20"}, http_requests_in_flight{handler="/api",code=""} does not: mend the matchers, or`},
		{metric: `http_requests_in_flight{absent!=""}`, wantErr: "none of the 3 series"},
		{metric: "bare", want: 2},
		{metric: "untyped", want: 8},
		{metric: "empty", want: 0},
		{metric: `empty{a="b"}`, want: 0},
		{metric: `quoted{"with.dots"="b"}`, want: 7},
		{metric: "batch_count", want: 6},
		{metric: "requests", wantErr: "requests is of a counter, must be a gauge: only that one falls again when requests end (similar gauges: http_requests_in_flight)"},
		{metric: "latency_seconds_count", wantErr: "latency_seconds_count is of a histogram, must be a gauge"},
		{metric: "http_server_in_flight_requests", wantErr: "there is no metric http_server_in_flight_requests (similar gauges: http_requests_in_flight): mend the name, or"},
		{metric: "unlike_anything", wantErr: "there is no metric unlike_anything: mend the name"},
		{metric: "http_requests", wantErr: "there is no metric http_requests ("},
		{metric: "no_number", wantErr: `a count is "NaN", must be a whole number from 0 to 2147483647: no_number NaN`},
		{metric: "infinite", wantErr: `a count is "+Inf"`},
		{metric: "half", wantErr: `a count is "0.5"`},
		{metric: "drift", wantErr: `a count is "-1", must be a whole number from 0 to 2147483647: drift{a="1"} -1`},
		{metric: `drift{a="2"}`, want: 1},
		{metric: "huge", wantErr: `a count is "3e9"`},
		{metric: "two", wantErr: "the sum of two is 4e+09, must be at most"},
		{metric: "broken", wantErr: `neither , nor } after the label a: broken{a="b" 7`},
		{metric: "broken2", wantErr: "the value of the label a is not quoted"},
		{metric: "broken3", wantErr: `the value of the label a has the escape \t`},
		{metric: "broken4", wantErr: "the value of the label a has no end"},
		{metric: "broken5", wantErr: "a series has no value"},
		{metric: "broken6", wantErr: `"now" is no time stamp`},
		{metric: "broken7", wantErr: "no label's name before"},
	} {
		t.Run(tc.metric, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, page) }))
			defer srv.Close()
			checkScrape(t, srv.URL, tc.metric, tc.want, tc.wantErr)
		})
	}
}

func checkScrape(t *testing.T, url, metric string, want int, wantErr string) {
	t.Helper()
	p, err := NewPrometheus(PrometheusConfig{URL: url, Metric: metric, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Sample(t.Context())
	if wantErr != "" {
		if err == nil || !strings.Contains(err.Error(), wantErr) {
			t.Fatalf("got %+v, %v\nwant an error with %q", got, err, wantErr)
		}
		return
	}
	if err != nil || got != (Sample{InFlight: want}) {
		t.Fatalf("got %+v, %v, want %d in flight", got, err, want)
	}
}

func TestPrometheusRefusesAnswersThatAreNotWholePages(t *testing.T) {
	const openMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"
	comment := "#" + strings.Repeat(" ", 126) + "\n"
	for _, tc := range []struct {
		name    string
		header  http.Header
		status  int
		body    string
		wantErr string
		want    int
	}{
		{name: "text", body: "x 1\n", want: 1},
		{name: "no last line feed", body: "x 1", wantErr: "a line is cut off"},
		{name: "cut in the name", body: "x 1\nx", wantErr: "a line is cut off"},
		{name: "another metric's line cut off", body: "x 1\ny", want: 1},
		{name: "OpenMetrics", header: http.Header{"Content-Type": {openMetrics}}, body: "x 1\n# EOF\n", want: 1},
		{name: "OpenMetrics without a last line feed", header: http.Header{"Content-Type": {openMetrics}}, body: "x 1\n# EOF", want: 1},
		{name: "OpenMetrics cut off", header: http.Header{"Content-Type": {openMetrics}}, body: "x 1\n", wantErr: "has no # EOF"},
		{name: "an exemplar", header: http.Header{"Content-Type": {openMetrics}}, body: "x 1 # {trace=\"a\"} 0.5\n# EOF\n", want: 1},
		{name: "OpenMetrics' counter", header: http.Header{"Content-Type": {openMetrics}}, body: "# TYPE y counter\ny_total 1\nx 1\n# EOF\n", want: 1},
		{name: "nothing", wantErr: "there is no metric x"},
		{name: "HTML", body: "<html>x 1</html>\n", wantErr: "there is no metric x"},
		{name: "another status", status: 503, body: "x 0\n", wantErr: "503 Service Unavailable, must be 200"},
		{name: "protobuf", header: http.Header{"Content-Type": {"application/vnd.google.protobuf; encoding=delimited"}}, body: "x 1\n", wantErr: "must be the plain text format"},
		{name: "gzip", header: http.Header{"Content-Encoding": {"gzip"}}, body: "x 1\n", wantErr: "must be the plain text format"},
		{name: "less than announced", header: http.Header{"Content-Length": {"100"}}, body: "x 1\n", wantErr: "reading the page: unexpected EOF"},
		{name: "long lines of others", body: "y{a=\"" + strings.Repeat("x", 3*maxScrapeLine) + "\"} 1\n# " + strings.Repeat("x", 2*maxScrapeLine) + "\nx 1\n", want: 1},
		{name: "a long line of its own", body: `x{a="` + strings.Repeat("x", maxScrapeLine) + "\"} 1\n", wantErr: "longer than 16384 bytes: x{a=\"xxx"},
		{name: "the longest page", body: "x 1\n" + strings.Repeat(comment, (maxScrape-4)/len(comment)), want: 1},
		{name: "a page without end", body: "x 1\n" + strings.Repeat(comment, maxScrape/len(comment)), wantErr: "longer than 8388608 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				for name, values := range tc.header {
					w.Header()[name] = values
				}
				if tc.status != 0 {
					w.WriteHeader(tc.status)
				}
				io.WriteString(w, tc.body)
			}))
			defer srv.Close()
			checkScrape(t, srv.URL, "x", tc.want, tc.wantErr)
		})
	}
}

// TestPrometheusReadsTheGoClient is with the handler that Go applications have, in both formats.
func TestPrometheusReadsTheGoClient(t *testing.T) {
	reg := prometheus.NewRegistry()
	inFlight := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "http_requests_in_flight", Help: "Being\nanswered. \\o/"}, []string{"handler", "code"})
	total := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "http_requests_total"}, []string{"handler"})
	seconds := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "http_seconds", Buckets: []float64{1}})
	inFlightNow := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "now"}, func() float64 { return 1e6 })
	reg.MustRegister(inFlight, total, seconds, inFlightNow)
	srv := httptest.NewServer(nil)
	defer srv.Close()
	both := func(metric string, want int, wantErr string) {
		t.Helper()
		for _, openMetrics := range []bool{false, true} {
			handler := promhttp.HandlerFor(reg, promhttp.HandlerOpts{EnableOpenMetrics: openMetrics})
			srv.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if openMetrics {
					r.Header.Set("Accept", "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8")
				}
				handler.ServeHTTP(w, r)
				if is := strings.HasPrefix(w.Header().Get("Content-Type"), "application/openmetrics-text"); is != openMetrics {
					t.Errorf("the handler answered %s", w.Header().Get("Content-Type"))
				}
			})
			checkScrape(t, srv.URL, metric, want, wantErr)
		}
	}
	both("http_requests_in_flight", 0, "there is no metric http_requests_in_flight")
	awkward := "/a \"quoted\" \\ and\nbroken, } path"
	inFlight.WithLabelValues("/api", "").Set(0)
	both("http_requests_in_flight", 0, "")
	inFlight.WithLabelValues("/api", "").Add(2)
	inFlight.WithLabelValues(awkward, "200").Add(40)
	total.WithLabelValues("/api").(prometheus.ExemplarAdder).AddWithExemplar(7, prometheus.Labels{"trace": "http_requests_in_flight"})
	seconds.Observe(0.5)
	both("http_requests_in_flight", 42, "")
	both(`http_requests_in_flight{handler!~"/a.*path"}`, 2, "")
	both(fmt.Sprintf("http_requests_in_flight{handler=%q}", awkward), 40, "")
	both("now", 1000000, "")
	both("http_requests_total", 0, "is of a counter, must be a gauge")
	both("http_seconds_count", 0, "is of a histogram, must be a gauge")
	inFlight.WithLabelValues("/api", "").Sub(3)
	both("http_requests_in_flight", 0, `a count is "-1`)
}

func TestPrometheusMindsItsContext(t *testing.T) {
	release := make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "x 1\n")
		w.(http.Flusher).Flush()
		<-release
	}))
	defer srv.Close()
	defer close(release)
	p, err := NewPrometheus(PrometheusConfig{URL: srv.URL, Metric: "x", Timeout: 1})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := p.Sample(t.Context()); err == nil {
		t.Errorf("got %+v from a page that has no end within Timeout", got)
	}
	p, err = NewPrometheus(PrometheusConfig{URL: srv.URL, Metric: "x", Timeout: 1 << 60})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Sample(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

func TestNewPrometheusNamesWhatIsWrong(t *testing.T) {
	const url = "http://localhost:8080/metrics"
	for _, tc := range []struct {
		cfg  PrometheusConfig
		want string
	}{
		{PrometheusConfig{Metric: "x"}, `prometheus source: URL is "", must be http://`},
		{PrometheusConfig{URL: url}, `Metric is "": must be a gauge's name`},
		{PrometheusConfig{URL: url, Metric: "x", Timeout: -1}, "Timeout is -1ns, must be positive"},
		{PrometheusConfig{URL: url, Metric: "1x"}, `Metric is "1x": must be a gauge's name`},
		{PrometheusConfig{URL: url, Metric: `{__name__="x"}`}, "must be a gauge's name"},
		{PrometheusConfig{URL: url, Metric: "sum(x)"}, `"(x)" follows the name`},
		{PrometheusConfig{URL: url, Metric: "x > 1"}, `"> 1" follows the name`},
		{PrometheusConfig{URL: url, Metric: `x{a="b"}[5m]`}, `"[5m]" follows the matchers`},
		{PrometheusConfig{URL: url, Metric: "x{"}, "no label's name before"},
		{PrometheusConfig{URL: url, Metric: "x{a}"}, "no =, !=, =~ or !~ after a"},
		{PrometheusConfig{URL: url, Metric: `x{a>"b"}`}, "no =, !=, =~ or !~ after a"},
		{PrometheusConfig{URL: url, Metric: `x{a=b}`}, "the value of a must be in quotes"},
		{PrometheusConfig{URL: url, Metric: `x{a="b}`}, "the value of a must be in quotes, closed"},
		{PrometheusConfig{URL: url, Metric: `x{a='b\'}`}, "the value of a has no end"},
		{PrometheusConfig{URL: url, Metric: `x{a='b\`}, "the value of a has no end"},
		{PrometheusConfig{URL: url, Metric: `x{a='\q'}`}, "the value of a has an escape"},
		{PrometheusConfig{URL: url, Metric: `x{a="b" c="d"}`}, "neither , nor } after the value of a"},
		{PrometheusConfig{URL: url, Metric: `x{a=~"("}`}, "the value of a is no regular expression"},
		{PrometheusConfig{URL: url, Metric: `x{__name__="y"}`}, "the name goes before the braces"},
	} {
		if _, err := NewPrometheus(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("NewPrometheus(%+v):\ngot %v\nwant %q", tc.cfg, err, tc.want)
		}
	}
}

// FuzzPrometheus: whatever a page says, the answer is a count or an error.
func FuzzPrometheus(f *testing.F) {
	f.Add(`http_requests_in_flight{handler="/api",code!~"5.."}`, page, false)
	f.Add("quoted{'a'=~`b`}", page+"# EOF", true)
	f.Add(`x{a='\'"\\'}`, `x{a="'\"\\"} 1 2 # {} 1`, false)
	f.Fuzz(func(t *testing.T, metric, page string, openMetrics bool) {
		s, err := parseSelector(metric)
		if err != nil {
			return
		}
		if n, err := s.sum(strings.NewReader(page), openMetrics); n < 0 || n > 0 && err != nil {
			t.Errorf("%s: got %d, %v", metric, n, err)
		}
	})
}
