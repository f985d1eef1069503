package drain

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// DefaultPrometheusTimeout of one scrape.
	DefaultPrometheusTimeout = time.Second
	// maxScrape bounds what one scrape may send, and so how long it can be read for. Pages of a few MB exist.
	maxScrape = 8 << 20
	// maxScrapeLine is the most of a scrape that is held at once.
	maxScrapeLine = 16 << 10
	// maxSimilar is how many metrics an error suggests.
	maxSimilar = 3
)

// PrometheusConfig configures the prometheus source.
type PrometheusConfig struct {
	// URL of the application's metrics, http://HOST[:PORT]/PATH or https://.
	URL string
	// Metric selects series of a gauge as PromQL does: its name, and matchers of labels (= != =~ !~) if need be:
	//
	//	http_requests_in_flight{handler="/api",code!~"5.."}
	//
	// A regular expression must match the whole value; a label that a series has not is the empty string. The gauge must
	// not count the scrape itself: it would never be zero.
	Metric string
	// Timeout of one scrape; default 1 s.
	Timeout time.Duration
	// Own is told of the connections, so that the sources which look at connections leave them out; nil: nobody is.
	Own *Own
}

// Prometheus sums a gauge of requests in flight that the application shows to Prometheus.
//
// Series are whole numbers from 0 up, or the sum is unknown: a negative one says that the application counts more ends
// than starts, so its other figures can't be trusted either, and a fraction or NaN is no count. No series is unknown,
// since a name or matcher that is wrong looks the same; but a gauge that is declared (# TYPE) and has no series at all is
// zero, as some client libraries show one whose labels have not been used yet. Others, Go's among them, show nothing
// then: there the application has to create the series as it starts.
//
// The reader is this package's own, and looks only at lines that start with the metric's name. expfmt, which clients of
// Prometheus use, builds all families of the page for one number: of a page of 10,000 series (730 kB) that took 39 ms
// and 9.1 MB, this reader 0.5 ms and 44 kB.
type Prometheus struct {
	cfg    PrometheusConfig
	sel    selector
	client *http.Client
}

// NewPrometheus checks cfg. It doesn't contact the application.
func NewPrometheus(cfg PrometheusConfig) (*Prometheus, error) {
	if err := checkURL(cfg.URL); err != nil {
		return nil, fmt.Errorf("prometheus source: %w", err)
	}
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("prometheus source: Timeout is %v, must be positive (0 means the default, %v)", cfg.Timeout, DefaultPrometheusTimeout)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultPrometheusTimeout
	}
	sel, err := parseSelector(cfg.Metric)
	if err != nil {
		return nil, fmt.Errorf("prometheus source: Metric is %q: %w", cfg.Metric, err)
	}
	return &Prometheus{cfg: cfg, sel: sel, client: newClient(cfg.Timeout, cfg.Own)}, nil
}

// Name is "prometheus".
func (p *Prometheus) Name() string { return "prometheus" }

// Sample scrapes once.
func (p *Prometheus) Sample(ctx context.Context) (Sample, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.cfg.URL, nil)
	if err != nil {
		return Sample{}, fmt.Errorf("scraping the application: %w", err)
	}
	req.Header.Set("Accept", "text/plain;version=0.0.4,application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1")
	resp, err := p.client.Do(req)
	if err != nil {
		return Sample{}, fmt.Errorf("scraping the application: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return Sample{}, fmt.Errorf("%s answered %s, must be 200", p.cfg.URL, resp.Status)
	}
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if encoding := resp.Header.Get("Content-Encoding"); encoding != "" || kind == "application/vnd.google.protobuf" {
		return Sample{}, fmt.Errorf("%s answered %s %s, must be the plain text format, which was asked for", p.cfg.URL, kind, encoding)
	}
	n, err := p.sel.sum(resp.Body, kind == "application/openmetrics-text")
	if err != nil {
		return Sample{}, fmt.Errorf("%s: %w", p.cfg.URL, err)
	}
	return Sample{InFlight: n}, nil
}

// scrape is what is known of a page while it is read.
type scrape struct {
	sel *selector
	// kind is the metric's type as declared; exact says that the declaration was of its very name.
	kind     string
	exact    bool
	series   int
	matching int
	sum      float64
	// other is a series of the metric that did not match, for the error.
	other   string
	similar []similar
}

// similar is another gauge of the page, and how many words of the wanted name it shares.
type similar struct {
	name  string
	words int
}

// sum reads a page in the text format, or OpenMetrics', whose last line tells that nothing is missing.
func (s *selector) sum(page io.Reader, openMetrics bool) (int, error) {
	limited := &io.LimitedReader{R: page, N: maxScrape + 1}
	lines := bufio.NewReaderSize(limited, maxScrapeLine)
	seen := scrape{sel: s}
	complete := !openMetrics
	for {
		line, err := lines.ReadSlice('\n')
		cut := err != nil
		if limited.N == 0 {
			return 0, fmt.Errorf("the page is longer than %d bytes", maxScrape)
		}
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, bufio.ErrBufferFull) {
			return 0, fmt.Errorf("reading the page: %w", err)
		}
		if openMetrics && bytes.Equal(bytes.TrimSuffix(line, []byte("\n")), []byte("# EOF")) {
			complete = true
			break
		}
		if err := seen.line(bytes.TrimLeft(line, " \t"), cut); err != nil {
			return 0, err
		}
		for errors.Is(err, bufio.ErrBufferFull) {
			_, err = lines.ReadSlice('\n')
		}
		if errors.Is(err, io.EOF) {
			break
		}
	}
	if !complete {
		return 0, errors.New("the page is cut off: it has no # EOF")
	}
	return seen.result()
}

// line looks at one line, blanks before it taken off. cut says that its end is missing.
func (s *scrape) line(line []byte, cut bool) error {
	if len(line) > 0 && line[0] == '#' {
		if !cut {
			s.declaration(line)
		}
		return nil
	}
	n := len(s.sel.name)
	if len(line) < n || string(line[:n]) != s.sel.name || len(line) > n && strings.IndexByte("{ \t\n", line[n]) < 0 {
		return nil
	}
	text := strings.TrimSpace(string(line))
	if cut {
		return fmt.Errorf("a line is cut off or longer than %d bytes: %s", maxScrapeLine, shortenTo(text, maxShown))
	}
	if err := s.sample(text[n:]); err != nil {
		return fmt.Errorf("%w: %s", err, shortenTo(text, maxShown))
	}
	return nil
}

// maxShown is how much of a line, or of what a command printed, goes into an error.
const maxShown = 200

// declaration reads "# TYPE name type".
func (s *scrape) declaration(line []byte) {
	words := bytes.Fields(line[1:])
	if len(words) != 3 || string(words[0]) != "TYPE" {
		return
	}
	kind := string(words[2])
	suffix, ours := strings.CutPrefix(s.sel.name, string(words[1]))
	switch {
	case ours && suffix == "":
		s.kind, s.exact = kind, true
	case ours && slices.Contains(suffixes(kind), suffix):
		if !s.exact {
			s.kind = kind
		}
	case isGauge(kind):
		shared := 0
		for word := range bytes.FieldsFuncSeq(words[1], betweenWords) {
			if slices.Contains(s.sel.words, string(word)) {
				shared++
			}
		}
		if shared == 0 || len(s.similar) == maxSimilar && s.similar[maxSimilar-1].words >= shared {
			return
		}
		s.similar = append(s.similar, similar{string(words[1]), shared})
		slices.SortStableFunc(s.similar, func(a, b similar) int { return b.words - a.words })
		s.similar = s.similar[:min(len(s.similar), maxSimilar)]
	}
}

func betweenWords(r rune) bool { return r == '_' || r == ':' }

func isGauge(kind string) bool { return kind == "gauge" || kind == "untyped" || kind == "unknown" }

// suffixes are what a family of kind appends to its name for its series: a histogram x has x_count.
func suffixes(kind string) []string {
	switch kind {
	case "counter":
		return []string{"_total", "_created"}
	case "histogram":
		return []string{"_bucket", "_count", "_sum", "_created"}
	case "gaugehistogram":
		return []string{"_bucket", "_gcount", "_gsum"}
	case "summary":
		return []string{"_count", "_sum", "_created"}
	case "info":
		return []string{"_info"}
	}
	return nil
}

// sample reads a series of the metric from after its name on.
func (s *scrape) sample(rest string) error {
	s.series++
	c := cursor{rest}
	values := make([]string, len(s.sel.matchers))
	c.blanks()
	labels := c.rest
	if c.take("{") {
		for {
			c.blanks()
			if c.take("}") {
				break
			}
			label, err := c.label()
			if err != nil {
				return err
			}
			if c.blanks(); !c.take("=") {
				return fmt.Errorf("no = after the label %s", label)
			}
			c.blanks()
			value, err := c.value()
			if err != nil {
				return fmt.Errorf("the value of the label %s %w", label, err)
			}
			for i := range s.sel.matchers {
				if s.sel.matchers[i].label == label {
					values[i] = value
				}
			}
			if c.blanks(); !c.take(",") && !strings.HasPrefix(c.rest, "}") {
				return fmt.Errorf("neither , nor } after the label %s", label)
			}
		}
	}
	labels = strings.TrimSuffix(labels, c.rest)
	for i := range s.sel.matchers {
		if !s.sel.matchers[i].match(values[i]) {
			if s.other == "" {
				s.other = s.sel.name + labels
			}
			return nil
		}
	}
	// A time stamp may follow, or an exemplar.
	words := strings.Fields(c.rest)
	if len(words) == 0 {
		return errors.New("a series has no value")
	}
	if len(words) > 1 && !strings.HasPrefix(words[1], "#") {
		if _, err := strconv.ParseFloat(words[1], 64); err != nil {
			return fmt.Errorf("%q is no time stamp", shorten(words[1]))
		}
	}
	v, err := strconv.ParseFloat(words[0], 64)
	if err != nil || v != math.Trunc(v) || v < 0 || v > math.MaxInt32 {
		return fmt.Errorf("a count is %q, must be a whole number from 0 to %d", shorten(words[0]), math.MaxInt32)
	}
	s.matching++
	s.sum += v
	return nil
}

func (s *scrape) result() (int, error) {
	switch {
	case s.kind != "" && !isGauge(s.kind):
		return 0, fmt.Errorf("%s is of a %s, must be a gauge: only that one falls again when requests end%s", s.sel.name, s.kind, s.suggestion())
	case s.matching > 0 && s.sum > math.MaxInt32:
		return 0, fmt.Errorf("the sum of %s is %v, must be at most %d", s.sel.name, s.sum, math.MaxInt32)
	case s.matching > 0:
		return int(s.sum), nil
	case s.series > 0:
		return 0, fmt.Errorf("none of the %d series of %s matches %s, %s does not: mend the matchers, or have the application "+
			"create the series as it starts", s.series, s.sel.name, s.sel.text, shortenTo(s.other, maxShown))
	case s.exact:
		return 0, nil
	}
	return 0, fmt.Errorf("there is no metric %s%s: mend the name, or, if it shows up with the first request only, have the "+
		"application create its series as it starts", s.sel.name, s.suggestion())
}

func (s *scrape) suggestion() string {
	if len(s.similar) == 0 {
		return ""
	}
	var names []string
	for _, o := range s.similar {
		names = append(names, o.name)
	}
	return " (similar gauges: " + strings.Join(names, ", ") + ")"
}
