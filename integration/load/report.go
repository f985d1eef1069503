package load

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// maxFailures is how many failures are kept word for word.
const maxFailures = 20

// Report is what was sent and what became of it.
type Report struct {
	Started time.Time     `json:"started"`
	Elapsed time.Duration `json:"elapsed_ns"`
	Counts
	// InFlight is 0 in the report that Run returns.
	InFlight  int64            `json:"in_flight"`
	Classes   map[Class]int64  `json:"classes"`
	Kinds     []KindReport     `json:"kinds"`
	Instances []InstanceReport `json:"instances"`
	// Latency is that of the answered requests, all kinds together.
	Latency Quantiles `json:"latency"`
	// Longest is the answered request that took longest; the zero Result if none was answered.
	Longest Result `json:"longest"`
	// Failures are the first 20.
	Failures []Result `json:"failures"`
}

// Counts are numbers of requests. When none is in flight, Sent = Answered + Failed.
type Counts struct {
	Sent     int64 `json:"sent"`
	Answered int64 `json:"answered"`
	Failed   int64 `json:"failed"`
}

// KindReport is one kind over one protocol.
type KindReport struct {
	Protocol Protocol `json:"protocol"`
	Kind     Kind     `json:"kind"`
	Counts
	// Latency is that of the answered requests, to three digits; Max is exact.
	Latency Quantiles `json:"latency"`
}

// InstanceReport is one address over one protocol. Failures that reached no instance have an empty address.
type InstanceReport struct {
	Protocol Protocol `json:"protocol"`
	Instance string   `json:"instance"`
	// Pod is the name that its last answer gave.
	Pod      string `json:"pod"`
	Answered int64  `json:"answered"`
	Failed   int64  `json:"failed"`
}

// Quantiles of latencies.
type Quantiles struct {
	P50  time.Duration `json:"p50_ns"`
	P90  time.Duration `json:"p90_ns"`
	P99  time.Duration `json:"p99_ns"`
	P999 time.Duration `json:"p999_ns"`
	Max  time.Duration `json:"max_ns"`
}

type kindKey struct {
	protocol Protocol
	kind     Kind
}

type instanceKey struct {
	protocol Protocol
	instance string
}

type kindTally struct {
	Counts
	latency *hdrhistogram.Histogram // microseconds
	max     time.Duration
}

// tally counts. Its lock is held for a few additions only.
type tally struct {
	limit int64 // the largest latency that a histogram holds, in microseconds

	mu        sync.Mutex
	started   time.Time
	ended     time.Time
	kinds     map[kindKey]*kindTally
	instances map[instanceKey]*InstanceReport
	classes   map[Class]int64
	longest   Result
	failures  []Result
}

func newTally(timeout time.Duration) *tally {
	return &tally{
		// Late launches add to the latency, hence twice.
		limit:     max(2, (2 * timeout).Microseconds()),
		kinds:     map[kindKey]*kindTally{},
		instances: map[instanceKey]*InstanceReport{},
		classes:   map[Class]int64{},
	}
}

func (t *tally) begin(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.started = now
}

func (t *tally) end(now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = now
}

// of is called with the lock held.
func (t *tally) of(p Protocol, k Kind) *kindTally {
	key := kindKey{p, k}
	kt := t.kinds[key]
	if kt == nil {
		kt = &kindTally{latency: hdrhistogram.New(1, t.limit, 3)}
		t.kinds[key] = kt
	}
	return kt
}

func (t *tally) sent(p Protocol, k Kind) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.of(p, k).Sent++
}

func (t *tally) add(r Result) {
	t.mu.Lock()
	defer t.mu.Unlock()
	kt := t.of(r.Protocol, r.Kind)
	key := instanceKey{r.Protocol, r.Instance}
	in := t.instances[key]
	if in == nil {
		in = &InstanceReport{Protocol: r.Protocol, Instance: r.Instance}
		t.instances[key] = in
	}
	if r.Class != "" {
		kt.Failed++
		in.Failed++
		t.classes[r.Class]++
		if len(t.failures) < maxFailures {
			t.failures = append(t.failures, r)
		}
		return
	}
	kt.Answered++
	in.Answered++
	in.Pod = r.Pod
	kt.max = max(kt.max, r.Latency)
	if r.Latency > t.longest.Latency {
		t.longest = r
	}
	// Within limits by construction.
	_ = kt.latency.RecordValue(min(max(r.Latency.Microseconds(), 1), t.limit))
}

func (t *tally) report() Report {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := Report{
		Started:   t.started,
		Classes:   maps.Clone(t.classes),
		Kinds:     []KindReport{},
		Instances: []InstanceReport{},
		Longest:   t.longest,
		Failures:  append([]Result{}, t.failures...),
	}
	switch {
	case !t.ended.IsZero():
		r.Elapsed = t.ended.Sub(t.started)
	case !t.started.IsZero():
		r.Elapsed = time.Since(t.started)
	}
	all := hdrhistogram.New(1, t.limit, 3)
	var most time.Duration
	for key, kt := range t.kinds {
		r.Sent += kt.Sent
		r.Answered += kt.Answered
		r.Failed += kt.Failed
		r.Kinds = append(r.Kinds, KindReport{key.protocol, key.kind, kt.Counts, quantiles(kt.latency, kt.max)})
		all.Merge(kt.latency)
		most = max(most, kt.max)
	}
	r.InFlight = r.Sent - r.Answered - r.Failed
	r.Latency = quantiles(all, most)
	for _, in := range t.instances {
		r.Instances = append(r.Instances, *in)
	}
	slices.SortFunc(r.Kinds, func(a, b KindReport) int {
		return cmp.Or(-cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(order(a.Kind), order(b.Kind)))
	})
	slices.SortFunc(r.Instances, func(a, b InstanceReport) int {
		return cmp.Or(-cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Instance, b.Instance))
	})
	return r
}

func order(k Kind) int { return slices.Index([]Kind{Fast, Slow, VerySlow, Stream}, k) }

func quantiles(h *hdrhistogram.Histogram, most time.Duration) Quantiles {
	at := func(q float64) time.Duration {
		// A histogram's value is the upper end of a range that the exact maximum may lie inside.
		return min(time.Duration(h.ValueAtQuantile(q))*time.Microsecond, most)
	}
	return Quantiles{P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: most}
}

// String is the report as a short table.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%d requests in %s: %d answered, %d failed", r.Sent, human(r.Elapsed), r.Answered, r.Failed)
	if r.InFlight > 0 {
		fmt.Fprintf(&b, ", %d in flight", r.InFlight)
	}
	if r.Answered > 0 {
		fmt.Fprintf(&b, "; longest answered %s (%s %s, %s)", human(r.Longest.Latency), r.Longest.Protocol, r.Longest.Kind, cmp.Or(r.Longest.Pod, r.Longest.Instance))
	}
	b.WriteString("\n\n")
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "protocol\tkind\tsent\tanswered\tfailed\tp50\tp90\tp99\tp99.9\tmax\t\n")
	for _, k := range r.Kinds {
		l := k.Latency
		fmt.Fprintf(w, "%s\t%s\t%d\t%d\t%d\t%s\t%s\t%s\t%s\t%s\t\n", k.Protocol, k.Kind, k.Sent, k.Answered, k.Failed,
			human(l.P50), human(l.P90), human(l.P99), human(l.P999), human(l.Max))
	}
	w.Flush()
	b.WriteByte('\n')
	w = tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "protocol\tinstance\tpod\tanswered\tfailed\t\n")
	for _, i := range r.Instances {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t\n", i.Protocol, cmp.Or(i.Instance, "none"), cmp.Or(i.Pod, "-"), i.Answered, i.Failed)
	}
	w.Flush()
	if r.Failed == 0 {
		return b.String()
	}
	b.WriteString("\nfailed:")
	for _, c := range slices.Sorted(maps.Keys(r.Classes)) {
		fmt.Fprintf(&b, " %s %d", c, r.Classes[c])
	}
	b.WriteByte('\n')
	for _, f := range r.Failures {
		fmt.Fprintf(&b, "  +%s after %s  %s %s  %s  %s: %s\n", human(f.Scheduled.Sub(r.Started)), human(f.Latency),
			f.Protocol, f.Kind, cmp.Or(f.Instance, "no instance"), f.Class, f.Err)
	}
	if more := r.Failed - int64(len(r.Failures)); more > 0 {
		fmt.Fprintf(&b, "  and %d more\n", more)
	}
	return b.String()
}

// human rounds a duration to what a reader cares about.
func human(d time.Duration) string {
	switch {
	case d >= 10*time.Second:
		d = d.Round(100 * time.Millisecond)
	case d >= time.Second:
		d = d.Round(10 * time.Millisecond)
	case d >= 10*time.Millisecond:
		d = d.Round(100 * time.Microsecond)
	default:
		d = d.Round(10 * time.Microsecond)
	}
	return d.String()
}
