package bench

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Dist is how a figure is distributed.
type Dist struct {
	N           int
	Median, P99 float64
}

// distribution of samples. Quantiles are by nearest rank, so each is a sample that was seen.
func distribution[T cmp.Ordered](samples []T, number func(T) float64) Dist {
	if len(samples) == 0 {
		return Dist{}
	}
	s := slices.Sorted(slices.Values(samples))
	rank := func(q float64) float64 { return number(s[int(math.Ceil(q*float64(len(s))))-1]) }
	return Dist{N: len(s), Median: rank(0.5), P99: rank(0.99)}
}

func durations(d []time.Duration) Dist { return distribution(d, time.Duration.Seconds) }
func one(v float64) Dist               { return Dist{N: 1, Median: v, P99: v} }

// over is how a property of processes is distributed.
func over(costs []cost, property func(cost) float64) Dist {
	values := make([]float64, len(costs))
	for i, c := range costs {
		values[i] = property(c)
	}
	return distribution(values, func(v float64) float64 { return v })
}

func rss(c []cost) Dist    { return over(c, func(c cost) float64 { return float64(c.rss) }) }
func anon(c []cost) Dist   { return over(c, func(c cost) float64 { return float64(c.anon) }) }
func shares(c []cost) Dist { return over(c, func(c cost) float64 { return c.cpu }) }

// Unit is what a figure is counted in.
type Unit int

const (
	Seconds Unit = iota // shown as milliseconds
	Bytes               // shown as MB, of 10^6 bytes
	Share               // of one core, shown as per cent
	Octets              // bytes where MB are too much
	Count
)

func (u Unit) format(v float64) string {
	switch u {
	case Seconds:
		return fmt.Sprintf("%.2f ms", v*1000)
	case Bytes:
		return fmt.Sprintf("%.1f MB", v/1e6)
	case Octets:
		return fmt.Sprintf("%.0f B", v)
	case Count:
		return fmt.Sprintf("%.0f", v)
	default:
		return fmt.Sprintf("%.3f %%", v*100)
	}
}

// Row is one figure.
type Row struct {
	Figure string
	Unit   Unit
	Ours   Dist
	// Raw is what the same takes without Usher. N is 0 where there is nothing to compare, in Ours where a figure is of the
	// bare API server or etcd alone.
	Raw Dist
	// Target is the most that the median may be, or, with Raw, the most that the ratio of the medians may be. 0: there is
	// no target, the figure explains another one.
	Target float64
}

// Ratio is that of the medians; 0 when one of them is missing.
func (r Row) Ratio() float64 {
	if r.Raw.N == 0 || r.Ours.N == 0 {
		return 0
	}
	return r.Ours.Median / r.Raw.Median
}

// Met says whether the target is met. A figure without a target meets it.
func (r Row) Met() bool {
	switch {
	case r.Target == 0:
		return true
	case r.Ours.N == 0:
		return false
	case r.Raw.N > 0:
		return r.Ratio() <= r.Target
	}
	return r.Ours.Median <= r.Target
}

// cells are the columns of the table.
func (r Row) cells() []string {
	pair := func(d Dist) []string {
		switch {
		case d.N == 0:
			return []string{"", ""}
		case d.N == 1:
			return []string{r.Unit.format(d.Median), ""}
		}
		return []string{r.Unit.format(d.Median), r.Unit.format(d.P99)}
	}
	ratio, target, result := "", "", ""
	if r.Ratio() > 0 {
		ratio = fmt.Sprintf("%.2f x", r.Ratio())
	}
	switch {
	case r.Target == 0:
	case r.Raw.N > 0:
		target = fmt.Sprintf("%g x", r.Target)
	default:
		target = r.Unit.format(r.Target)
	}
	switch {
	case r.Target == 0:
	case r.Met():
		result = "met"
	default:
		result = "MISSED"
	}
	return slices.Concat([]string{r.Figure}, pair(r.Raw), pair(r.Ours), []string{ratio, target, result})
}

// Report is the result of a run.
type Report struct {
	Rows []Row
	// Notes say what was compared with what, and on what machine.
	Notes []string
}

// Missed are the figures that miss their target.
func (r Report) Missed() []Row {
	return slices.DeleteFunc(slices.Clone(r.Rows), Row.Met)
}

// header names the cells of a Row.
func header() []string {
	return []string{"figure", "raw median", "p99", "ours median", "p99", "ratio", "at most", "target"}
}

// Table writes the report for a terminal.
func (r Report) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.ToUpper(strings.Join(header(), "\t")))
	for _, row := range r.Rows {
		fmt.Fprintln(t, strings.Join(row.cells(), "\t"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for _, n := range r.Notes {
		if _, err := fmt.Fprintf(w, "\n%s\n", n); err != nil {
			return err
		}
	}
	return nil
}

// Markdown writes the report for a README.
func (r Report) Markdown(w io.Writer) error {
	line := func(cells []string) string { return "| " + strings.Join(cells, " | ") + " |\n" }
	var b strings.Builder
	b.WriteString(line(header()))
	b.WriteString("| --- " + strings.Repeat("| ---: ", len(header())-2) + "| --- |\n")
	for _, row := range r.Rows {
		cells := row.cells()
		if !row.Met() {
			cells[len(cells)-1] = "**" + cells[len(cells)-1] + "**"
		}
		b.WriteString(line(cells))
	}
	for _, n := range r.Notes {
		b.WriteString("\n" + n + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}
