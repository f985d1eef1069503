package bench

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestDistributionTakesSamplesByNearestRank(t *testing.T) {
	var d []time.Duration
	for i := 200; i >= 1; i-- { // unsorted input
		d = append(d, time.Duration(i)*time.Millisecond)
	}
	if got, want := durations(d), (Dist{N: 200, Median: 0.1, P99: 0.198}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := durations(nil); got != (Dist{}) {
		t.Errorf("no samples: got %+v", got)
	}
}

func TestTargetIsHeldAgainstRatioOrMedian(t *testing.T) {
	for _, c := range []struct {
		name string
		row  Row
		met  bool
	}{
		{"ratio at the target", Row{Ours: one(3), Raw: one(2), Target: 1.5}, true},
		{"ratio above it", Row{Ours: one(3.1), Raw: one(2), Target: 1.5}, false},
		{"a ratio doesn't look at the figure", Row{Ours: one(0.5), Raw: one(0.1), Target: 2}, false},
		{"median at the target", Row{Ours: Dist{N: 9, Median: 5, P99: 50}, Target: 5}, true},
		{"median above it", Row{Ours: Dist{N: 9, Median: 5.1}, Target: 5}, false},
		{"no target", Row{Ours: one(1e9)}, true},
		{"a target without a figure", Row{Target: 5}, false},
	} {
		if c.row.Met() != c.met {
			t.Errorf("%s: met is %t", c.name, c.row.Met())
		}
	}
}

func TestReportMarksWhatIsMissed(t *testing.T) {
	r := Report{
		Rows: []Row{
			{Figure: "fast", Unit: Seconds, Ours: Dist{N: 200, Median: 0.003, P99: 0.005}, Raw: Dist{N: 200, Median: 0.002, P99: 0.004}, Target: 1.5},
			{Figure: "big", Unit: Bytes, Ours: one(31e6), Target: 30e6},
			{Figure: "idle", Unit: Share, Ours: Dist{N: 5, Median: 0.0005, P99: 0.0006}},
		},
		Notes: []string{"A note."},
	}
	var table, markdown strings.Builder
	if err := r.Table(&table); err != nil {
		t.Fatal(err)
	}
	if err := r.Markdown(&markdown); err != nil {
		t.Fatal(err)
	}
	// Columns are lined up with spaces; what counts is what stands in them.
	fields := func(s string) string { return strings.Join(strings.Fields(s), " ") }
	if got, want := fields(table.String()), "FIGURE RAW MEDIAN P99 OURS MEDIAN P99 RATIO AT MOST TARGET "+
		"fast 2.00 ms 4.00 ms 3.00 ms 5.00 ms 1.50 x 1.5 x met "+
		"big 31.0 MB 30.0 MB MISSED "+
		"idle 0.050 % 0.060 % A note."; got != want {
		t.Errorf("table:\n%s\nwant %s", table.String(), want)
	}
	if got, want := markdown.String(), `| figure | raw median | p99 | ours median | p99 | ratio | at most | target |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |
| fast | 2.00 ms | 4.00 ms | 3.00 ms | 5.00 ms | 1.50 x | 1.5 x | met |
| big |  |  | 31.0 MB |  |  | 30.0 MB | **MISSED** |
| idle |  |  | 0.050 % | 0.060 % |  |  |  |

A note.
`; got != want {
		t.Errorf("markdown:\n%s\nwant\n%s", got, want)
	}
	if missed := r.Missed(); len(missed) != 1 || missed[0].Figure != "big" {
		t.Errorf("missed: %+v", missed)
	}
}

func TestRollupIsReadInBytes(t *testing.T) {
	rss, anon, err := parseRollup("55aa-7fff ---p 00000000 00:00 0   [rollup]\nRss:   27000 kB\nPss_Anon:  1 kB\nAnonymous:  6000 kB\n")
	if err != nil || rss != 27000*1024 || anon != 6000*1024 {
		t.Errorf("rss %d, anonymous %d, %v", rss, anon, err)
	}
	if _, _, err := parseRollup("Rss: 1 kB\n"); err == nil {
		t.Error("a text without Anonymous was taken")
	}
}

func TestOwnProcessCanBeMeasured(t *testing.T) {
	before, err := cpuTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		after, err := cpuTime(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after > before {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("busy for 10 s, and the CPU time stays %s", after)
		}
	}
	rss, anon, err := memory(os.Getpid())
	if err != nil || anon <= 0 || rss < anon {
		t.Errorf("rss %d, anonymous %d, %v", rss, anon, err)
	}
}

func TestUnitsAreShownAsPeopleReadThem(t *testing.T) {
	for _, c := range []struct {
		unit  Unit
		value float64
		want  string
	}{
		{Seconds, 0.0123, "12.30 ms"}, {Bytes, 31e6, "31.0 MB"}, {Share, 0.5, "50.000 %"}, {Octets, 1234, "1234 B"}, {Count, 7, "7"},
	} {
		if got := c.unit.format(c.value); got != c.want {
			t.Errorf("unit %d: got %q, want %q", c.unit, got, c.want)
		}
	}
}
