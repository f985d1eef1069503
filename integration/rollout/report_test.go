package rollout

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/integration/load"
)

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// sample is a report of one turn for each way, with a loss of 100 requests for all but Usher.
func sample() Report {
	var r Report
	for i, w := range Ways() {
		t := Turn{Took: ms(20_000), Sending: ms(20_000), Load: load.Report{Counts: load.Counts{Sent: 8000, Answered: 8000}}}
		for n := range replicas {
			t.Stops = append(t.Stops, Stop{After: ms(8000 + 1000*i + 100*n), Needed: ms(8000)})
		}
		if w.Ours {
			t.Stops = []Stop{{After: ms(8700), Needed: ms(8000)}, {After: ms(1500), Needed: ms(0)}}
		} else {
			t.Load.Answered, t.Load.Failed, t.Load.Classes = 7900, 100, map[load.Class]int64{load.Reset: 60, load.EOF: 40}
		}
		r.Results = append(r.Results, Result{Way: w, Turns: []Turn{t}})
	}
	return r
}

func TestTablesHaveEveryWayAndHowItFailed(t *testing.T) {
	r := sample()
	for name, write := range map[string]func(io.Writer) error{"table": r.Table, "markdown": r.Markdown} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(b.String(), "\n")
		for _, w := range Ways() {
			i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(strings.TrimPrefix(l, "| "), w.Title) })
			want := "100 (eof 40, reset 60)"
			if w.Ours {
				want = "0.70 s"
			}
			if i < 0 || !strings.Contains(lines[i], want) {
				t.Errorf("%s: no line of %q with %q in\n%s", name, w.Title, want, b.String())
			}
		}
		if !strings.Contains(b.String(), "400 to 400 requests/s") {
			t.Errorf("%s doesn't say the load:\n%s", name, b.String())
		}
	}
}

func TestChartHasEveryWayAndFitsItsFigures(t *testing.T) {
	var b bytes.Buffer
	if err := sample().SVG(&b); err != nil {
		t.Fatal(err)
	}
	text := b.String()
	for _, w := range Ways() {
		if !strings.Contains(text, ">"+w.Title+"<") {
			t.Errorf("no text %q in the chart", w.Title)
		}
	}
	for _, want := range []string{"0.7 s, worst 1.5 s", "100<", "prefers-color-scheme:dark"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in the chart", want)
		}
	}
	for d := xml.NewDecoder(&b); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the chart is no XML: %v", err)
		}
	}
}

func TestChartSaysOfLossesWithoutLingeringThatTheyWereCutOff(t *testing.T) {
	r := sample()
	for i := range r.Results[0].Turns[0].Stops {
		r.Results[0].Turns[0].Stops[i].After = 0
	}
	var b bytes.Buffer
	if err := r.SVG(&b); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(b.String(), ">none: cut off<"); n != 1 {
		t.Errorf("%d ways were cut off, want 1", n)
	}
}

func TestChartOfNothingLostAndNothingWasted(t *testing.T) {
	if err := (Report{Results: []Result{{Way: Ways()[0], Turns: []Turn{{}}}}}).SVG(io.Discard); err != nil {
		t.Error(err)
	}
}

func TestMissedNamesLossLingeringAndABlindMeasurement(t *testing.T) {
	ours := func(r *Report) *Turn { return &r.Results[len(r.Results)-1].Turns[0] }
	for name, c := range map[string]struct {
		change func(*Report)
		want   string // empty: nothing is missed
	}{
		"a good run":   {func(*Report) {}, ""},
		"a loss":       {func(r *Report) { ours(r).Load.Failed = 2 }, "usher lost 2 requests"},
		"lingering":    {func(r *Report) { ours(r).Stops[1].After = ms(1501) }, "usher let a pod linger for 1.50 s"},
		"seeing none":  {func(r *Report) { r.Results[0].Turns[0].Load.Failed = 0 }, "ttl lost no request"},
		"slow machine": {func(r *Report) { ours(r).Sending = ms(40_000) }, "usher got 200 requests/s, want at least 300"},
	} {
		r := sample()
		c.change(&r)
		got := strings.Join(r.Missed(), "; ")
		if c.want == "" && got != "" || c.want != "" && !strings.HasPrefix(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

func TestBeyondIsFromTheLastAnswerOrWhenItWouldHaveCome(t *testing.T) {
	t0 := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	at := func(n int) time.Time { return t0.Add(ms(n)) }
	lost := func(sent int, k load.Kind) load.Result {
		return load.Result{Kind: k, Scheduled: at(sent), Class: load.EOF}
	}
	for name, c := range map[string]struct {
		pod  pod
		want time.Duration
	}{
		"idle since before its deletion": {pod{answered: at(-500), ended: at(1000)}, ms(1000)},
		"the last answer came later":     {pod{answered: at(7400), ended: at(8000)}, ms(600)},
		"cut off":                        {pod{answered: at(400), ended: at(5000), failed: []load.Result{lost(-1000, load.VerySlow)}}, 0},
		"cut off what had been done":     {pod{answered: at(400), ended: at(5000), failed: []load.Result{lost(-1000, load.Slow)}}, ms(4000)},
		"sent after its end":             {pod{answered: at(400), ended: at(500), failed: []load.Result{lost(600, load.VerySlow)}}, ms(100)},
	} {
		c.pod.deleted = t0
		if got := c.pod.stop().Beyond(); got != c.want {
			t.Errorf("%s: %s beyond, want %s", name, got, c.want)
		}
	}
}

func TestKindsLastAsLongAsTheyAreSaidTo(t *testing.T) {
	for _, s := range mix() {
		if s.For != 0 {
			t.Errorf("%s lasts %s, and not as long as lasts says", s.Kind, s.For)
		}
	}
}

func TestMedianAndWorst(t *testing.T) {
	for _, c := range []struct {
		of            []time.Duration
		median, worst time.Duration
	}{
		{nil, 0, 0},
		{[]time.Duration{ms(3)}, ms(3), ms(3)},
		{[]time.Duration{ms(9), ms(1), ms(4), ms(2)}, ms(2), ms(9)},
		{[]time.Duration{ms(9), ms(1), ms(4)}, ms(4), ms(9)},
	} {
		if m, w := middle(c.of); m != c.median || w != c.worst {
			t.Errorf("%v: %s, %s, want %s, %s", c.of, m, w, c.median, c.worst)
		}
	}
}

func TestWaysAreMadeFromTheExampleAsItStands(t *testing.T) {
	for _, w := range Ways() {
		svc, dep, err := example(t.Context(), "there")
		if err != nil {
			t.Fatal(err)
		}
		if svc.Name != service || dep.Name != service || app(dep).Name != service || dep.Spec.Template.Spec.InitContainers[0].Name != agent {
			t.Fatalf("the example's names: %s, %s, %s", svc.Name, dep.Name, app(dep).Name)
		}
		if app(dep).Lifecycle == nil || *dep.Spec.Template.Spec.TerminationGracePeriodSeconds != 30 {
			t.Fatal("the example has no hook, or another grace period than the report says")
		}
		before := dep.DeepCopy()
		w.edit(dep, "there")
		same := len(before.Spec.Template.Spec.InitContainers) == len(dep.Spec.Template.Spec.InitContainers) &&
			before.Spec.Template.Spec.String() == dep.Spec.Template.Spec.String()
		if same != w.Ours {
			t.Errorf("%s: as the example stands: %v", w.Name, same)
		}
		registers := strings.Join(app(dep).Args, " ")
		for _, c := range dep.Spec.Template.Spec.InitContainers {
			registers += strings.Join(c.Args, " ")
		}
		for _, target := range []string{"there/http", "there/grpc"} {
			if !strings.Contains(registers, "="+target) {
				t.Errorf("%s: nobody registers %s: %s", w.Name, target, registers)
			}
		}
	}
}

func TestSelectKeepsTheOrderAndNamesWhatItDoesNotKnow(t *testing.T) {
	got, err := Select([]string{"usher", "ttl"})
	if err != nil || len(got) != 2 || got[0].Name != "ttl" || got[1].Name != "usher" {
		t.Errorf("%v, %v", got, err)
	}
	if all, err := Select(nil); err != nil || len(all) != len(Ways()) {
		t.Errorf("%d ways, %v", len(all), err)
	}
	if _, err := Select([]string{"prayer"}); err == nil || !strings.Contains(err.Error(), `way "prayer" is unknown: want some of ttl,no-hook`) {
		t.Error(err)
	}
}

func TestLeaksAreTold(t *testing.T) {
	before := Vitals{Goroutines: 40, Files: 14, Memory: 24e6}
	for name, c := range map[string]struct {
		after Vitals
		want  bool
	}{
		"as before":  {before, false},
		"by chance":  {Vitals{44, 16, 27e6}, false},
		"goroutines": {Vitals{46, 14, 24e6}, true},
		"files":      {Vitals{40, 20, 24e6}, true},
		"memory":     {Vitals{40, 14, 33e6}, true},
	} {
		e := Endurance{Before: before, After: c.after, Load: load.Report{Counts: load.Counts{Sent: 1, Answered: 1}}}
		if got := len(e.Missed()) > 0; got != c.want {
			t.Errorf("%s: a leak: %v, want %v", name, got, c.want)
		}
	}
}
