package main

import (
	"bytes"
	"errors"
	"flag"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"usher.dev/usher/integration/load"
	"usher.dev/usher/lifecycle"
)

var begun = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func at(ms int) time.Time { return begun.Add(time.Duration(ms) * time.Millisecond) }

const (
	oldPod = "shop-6d4f8c9b7d-x2x9p"
	newPod = "shop-7c9b5d6f48-lm2kq"
)

// rollout is one pod replaced by another; told shuffles what the sources may tell in any order.
func rollout(told ...fact) *timeline {
	y := newTimeline()
	y.add(fact{at(-9000), "old", podSeen{oldPod, "10.0.0.1"}})
	y.add(fact{at(-8000), "old", podReady{}})
	y.add(fact{at(-7990), "old", recordPut{"demo/http/old"}})
	y.add(fact{at(-7989), "old", ledgerSays{"Online", "endpoint ready in service shop"}})
	y.begin(begun, "rollout begins")
	for _, f := range told {
		y.add(f)
	}
	return y
}

func whole() []fact {
	return []fact{
		{at(40), "new", podSeen{newPod, ""}},
		{at(700), "new", ledgerSays{"Pending", "agent started"}},
		{at(1200), "new", podReady{}},
		{at(1209), "new", recordPut{"demo/http/new"}},
		{at(1210), "new", ledgerSays{"Online", "endpoint ready in service shop"}},
		{at(1300), "old", podDeleted{30 * time.Second}},
		{at(1306), "old", recordDeleted{"demo/http/old"}},
		{at(1307), "old", ledgerSays{"Draining", "prestop hook"}},
		{at(1309), "old", inFlight{4}},
		{at(1400), "", answered{oldPod}},
		{at(3280), "", answered{oldPod}},
		{at(3360), "old", ledgerSays{"Released", "prestop hook: drained"}},
		{at(3420), "old", released{verdict{lifecycle.Drained, 2060 * time.Millisecond, 6 * time.Millisecond, time.Second, 1054 * time.Millisecond, 0}}},
		{at(3500), "old", ledgerSays{"Stopped", "SIGTERM"}},
		{at(3501), "old", ledgerGone{}},
		{at(3800), "old", appEnded{143}},
		{at(4300), "old", podGone{}},
	}
}

func text(lines []line) []string {
	var out []string
	for _, l := range lines {
		out = append(out, l.format(begun, false))
	}
	return out
}

func TestTimelineOfARollout(t *testing.T) {
	want := strings.Split(strings.Trim(`
 +0.000 s  rollout begins
 +0.040 s  new  shop-lm2kq                      created by the Deployment
 +0.700 s  new  shop-lm2kq  Pending    +660 ms  agent is up, the endpoint is not ready yet
 +1.200 s  new  shop-lm2kq  Pending    +500 ms  endpoint ready in Kubernetes
 +1.210 s  new  shop-lm2kq  Online      +10 ms  registered 9.0 ms after its endpoint turned ready
 +1.300 s  old  shop-x2x9p  Online              deleted by the rollout, grace period 30 s
 +1.307 s  old  shop-x2x9p  Draining     +7 ms  deregistered 6.0 ms after deletion, 4 requests in flight
 +3.360 s  old  shop-x2x9p  Released  +2053 ms  drained in 2.06 s, last answer at 1.98 s; SIGTERM may come
 +3.500 s  old  shop-x2x9p  Stopped    +140 ms  agent stops, after the application
 +3.800 s  old  shop-x2x9p  Stopped    +300 ms  Kubernetes reports the application's end: SIGTERM (143)
 +4.300 s  old  shop-x2x9p  Stopped    +500 ms  pod gone, 3.00 s after its deletion
`, "\n"), "\n")
	got := text(rollout(whole()...).due(time.Time{}))
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestLinesWaitForWhatExplainsThem(t *testing.T) {
	y := rollout(fact{at(1307), "old", ledgerSays{"Draining", "prestop hook"}})
	if got := y.due(at(1307).Add(hold - 1)); len(got) != 1 {
		t.Errorf("%d lines before the time is up, want the first one only", len(got))
	}
	y.add(fact{at(1309), "old", inFlight{4}})
	got := text(y.due(at(1307).Add(hold)))
	if len(got) != 1 || !strings.Contains(got[0], "4 requests in flight") {
		t.Errorf("got %q, want the requests in flight that were told later", got)
	}
	if got := y.due(time.Time{}); len(got) != 0 {
		t.Errorf("%d lines come twice", len(got))
	}
}

func TestLinesComeInTheOrderOfTheirTimes(t *testing.T) {
	facts := whole()
	want := text(rollout(facts...).due(time.Time{}))
	// The sources are not in step: the etcd watch may tell before the Kubernetes watch.
	slices.SortStableFunc(facts, func(a, b fact) int { return strings.Compare(a.uid, b.uid) })
	if got := text(rollout(facts...).due(time.Time{})); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestDeregistrationSeenBeforeTheDeletion(t *testing.T) {
	got := text(rollout(
		fact{at(1306), "old", recordDeleted{"demo/http/old"}},
		fact{at(1307), "old", ledgerSays{"Draining", "pod terminating"}},
		fact{at(1308), "old", inFlight{1234}},
		fact{at(1310), "old", podDeleted{30 * time.Second}},
	).due(time.Time{}))
	if len(got) != 2 || !strings.HasSuffix(got[1], "deleted and deregistered at once, 1,234 requests in flight") {
		t.Errorf("got %q, want one line for both", got)
	}
}

func TestRegistrationSeenBeforeTheReadyEndpoint(t *testing.T) {
	got := text(rollout(
		fact{at(40), "new", podSeen{newPod, ""}},
		fact{at(1209), "new", recordPut{"demo/http/new"}},
		fact{at(1210), "new", ledgerSays{"Online", "endpoint ready in service shop"}},
		fact{at(1212), "new", podReady{}},
	).due(time.Time{}))
	if len(got) != 3 || !strings.HasSuffix(got[2], "registered as its endpoint turned ready") {
		t.Errorf("got %q, want one line for both", got)
	}
}

func TestNoFigureWithoutAMeasurement(t *testing.T) {
	digits := regexp.MustCompile(`[0-9]`)
	for state, facts := range map[string][]fact{
		"Online":   {{at(1), "new", ledgerSays{"Online", "ready"}}},
		"Draining": {{at(1), "new", ledgerSays{"Draining", "prestop hook"}}},
		"Released": {{at(1), "new", ledgerSays{"Released", "prestop hook"}}},
	} {
		lines := rollout(facts...).due(time.Time{})
		if got := lines[1].text(); digits.MatchString(got) {
			t.Errorf("%s, of which nothing is known, reads %q", state, got)
		}
	}
	p := &pod{name: oldPod}
	if got := strings.Fields(p.row())[1:7]; !slices.Equal(got, []string{"-", "-", "-", "-", "-", "-"}) {
		t.Errorf("a pod of which nothing is known has the figures %q", got)
	}
	p.logErr = errors.New("its agent's log: no such container")
	if got := p.row(); !strings.HasSuffix(got, "its agent's log: no such container") {
		t.Errorf("%q doesn't say why there are no figures", got)
	}
}

func TestALostLedgerRecordIsNoEnd(t *testing.T) {
	y := rollout(fact{at(10), "old", ledgerGone{}}, fact{at(20), "old", ledgerSays{"Online", "endpoint ready in service shop"}})
	got := text(y.due(time.Time{}))
	if len(got) != 3 || strings.Contains(got[1], "Stopped") || !strings.Contains(got[2], "Online") {
		t.Errorf("got %q, want a record that is gone, then Online again", got)
	}
}

func TestTheRolloutIsOverWhenTheLastOldPodIsGone(t *testing.T) {
	facts := whole()
	y := rollout(facts[:len(facts)-1]...)
	if _, ok := y.replaced(1, 1); ok {
		t.Error("over, with an old pod there")
	}
	y.add(facts[len(facts)-1])
	if _, ok := y.replaced(2, 1); ok {
		t.Error("over, with one of two records of the new pod missing")
	}
	if when, ok := y.replaced(1, 1); !ok || !when.Equal(at(4300)) {
		t.Errorf("over: %v at %v, want true at %v", ok, when, at(4300))
	}
}

func TestNoLineIsTooWide(t *testing.T) {
	for _, p := range []struct {
		ms   int
		unit time.Duration
	}{{0, time.Millisecond}, {100_000, 11 * time.Millisecond}} {
		v := verdict{lifecycle.Drained, 1950 * p.unit, 900 * p.unit, 900 * p.unit, 900 * p.unit, 1234}
		for _, outcome := range []lifecycle.Outcome{lifecycle.Drained, lifecycle.TimedOut, lifecycle.Unmeasured, lifecycle.Skipped} {
			v.outcome = outcome
			y := newTimeline()
			for _, f := range whole() {
				f.at = f.at.Add(time.Duration(p.ms) * time.Millisecond)
				if _, ok := f.is.(released); ok {
					f.is = released{v}
				}
				if n, ok := f.is.(inFlight); ok {
					n.n = 1234
					f.is = n
				}
				y.add(f)
				if y.begun.IsZero() {
					y.begin(begun, "rollout begins")
				}
			}
			y.add(fact{at(p.ms + 9000), "new", podSeen{"a-service-with-a-long-name-7c9b5d6f48-lm2kq", ""}})
			for _, l := range y.due(time.Time{}) {
				got := l.format(begun, false)
				if utf8.RuneCountInString(got) > width {
					t.Errorf("%d columns, want at most %d: %s", utf8.RuneCountInString(got), width, got)
				}
				if strings.HasSuffix(got, "...") {
					t.Errorf("a line of ordinary length is cut off: %s", got)
				}
			}
			for _, p := range y.pods {
				if got := p.row(); utf8.RuneCountInString(got) > width {
					t.Errorf("%d columns, want at most %d: %s", utf8.RuneCountInString(got), width, got)
				}
			}
		}
	}
}

func outcome(failed int64) result {
	y := rollout(whole()...)
	r := result{
		report: load.Report{
			Counts:  load.Counts{Sent: 12345, Answered: 12345 - failed, Failed: failed},
			Kinds:   []load.KindReport{{Protocol: load.HTTP, Kind: load.Fast, Counts: load.Counts{Sent: 12000}}, {Protocol: load.GRPC, Kind: load.Slow, Counts: load.Counts{Sent: 345}}},
			Latency: load.Quantiles{P50: 2 * time.Millisecond},
			Longest: load.Result{Protocol: load.GRPC, Kind: load.Slow, Pod: newPod, Latency: 2014 * time.Millisecond},
		},
		begun: begun, rollout: 4300 * time.Millisecond, names: y.names(),
	}
	y.due(time.Time{})
	r.pods = y.old()
	for range min(failed, 20) {
		r.report.Failures = append(r.report.Failures, load.Result{
			Protocol: load.HTTP, Kind: load.Fast, Instance: "10.0.0.1:8080", Scheduled: at(3300), Latency: 3 * time.Millisecond, Class: load.Reset,
			Err: "read tcp 10.0.0.9:1234->10.0.0.1:8080:\nread: connection reset by peer, " + strings.Repeat("and so on, ", 9),
		})
	}
	if failed > 0 {
		r.report.Classes = map[load.Class]int64{load.Reset: failed - 1, load.EOF: 1}
	}
	return r
}

func TestSummaryOfASuccess(t *testing.T) {
	r := outcome(0)
	var b bytes.Buffer
	r.summary(&b, false)
	want := `requests  12,345: 12,000 over HTTP keep-alive, 345 over gRPC; 345 of them asked for 2 s
failed    0
longest   2.01 s (grpc slow, answered by shop-lm2kq); median 2.0 ms
rollout   4.30 s for 1 pod

pod          preStop  withdraw    settle     drain  in flight  last answer  why it took that long
shop-x2x9p    2.06 s    6.0 ms    1.00 s    1.05 s          4       1.98 s  last answer, then quiet for 80 ms
`
	if got := b.String(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if got, want := r.lastLine(), "demo: 12,345 requests, 0 failed, longest request 2.01 s, longest preStop 2.06 s"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if r.exit() != 0 {
		t.Errorf("exit status %d, want 0", r.exit())
	}
}

func TestSummaryOfAFailure(t *testing.T) {
	r := outcome(23)
	r.report.Failures[7].Latency = 30 * time.Second
	var b bytes.Buffer
	r.summary(&b, false)
	for _, want := range []string{
		"failed    23: 1 eof, 22 reset\n",
		"   +3.303 s  http fast to shop-x2x9p: reset after 3.0 ms\n" +
			"             read tcp 10.0.0.9:1234->10.0.0.1:8080: read: connection reset by peer, and so on, and so on, a...\n",
		"  and 18 more\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("%q is missing in\n%s", want, b.String())
		}
	}
	for line := range strings.Lines(b.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
			t.Errorf("%d columns, want at most %d: %s", n, width, line)
		}
	}
	if got, want := r.lastLine(), "demo: 12,345 requests, 23 failed, longest request 30.00 s, longest preStop 2.06 s"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if r.exit() != 1 {
		t.Errorf("exit status %d, want 1", r.exit())
	}
}

func TestNothingSentIsNoSuccess(t *testing.T) {
	if (result{}).exit() == 0 {
		t.Error("exit status 0 without one request")
	}
}

func TestWhyAPreStopTookItsTime(t *testing.T) {
	pods := rollout(whole()...).old()
	p := pods[0]
	for _, c := range []struct {
		outcome lifecycle.Outcome
		answer  time.Time
		want    string
	}{
		{lifecycle.Drained, at(3280), "last answer, then quiet for 80 ms"},
		{lifecycle.Drained, at(1400), "settle time: consumers learn of it"},
		{lifecycle.TimedOut, at(3280), "timed out with 3 in flight"},
		{lifecycle.Unmeasured, at(3280), "in flight unknown: the floor"},
		{lifecycle.Skipped, at(3280), "settle time: nothing to wait for"},
	} {
		p.verdict.outcome, p.verdict.inFlight, p.answer = c.outcome, 3, c.answer
		if got := p.why(); got != c.want {
			t.Errorf("%s, last answer at %v: %q, want %q", c.outcome, c.answer.Sub(begun), got, c.want)
		}
	}
}

func TestOnlyAReleasedEntryOfTheLogIsAVerdict(t *testing.T) {
	const entry = `{"level":"info","time":"2026-01-02T03:04:05.6Z","msg":"released","verdict":"drained in 2.06s, nothing in flight","outcome":"drained","cause":"prestop hook","total":"2.06s","withdraw":"6.1ms","settle":"1s","drain":"1.0539s","inFlight":0,"unsure":0}`
	got, ok := parseReleased([]byte(entry))
	want := verdict{lifecycle.Drained, 2060 * time.Millisecond, 6100 * time.Microsecond, time.Second, 1053900 * time.Microsecond, 0}
	if !ok || got != want {
		t.Errorf("got %+v, %v; want %+v", got, ok, want)
	}
	for _, other := range []string{"", "released", `{"msg":"registered"}`, `{"msg":"released"}`, strings.Replace(entry, "2.06s\",\"w", "soon\",\"w", 1), entry[:40]} {
		if v, ok := parseReleased([]byte(other)); ok {
			t.Errorf("%q is taken for the verdict %+v", other, v)
		}
	}
}

func TestColoursAreAskedFor(t *testing.T) {
	l := rollout(whole()...).due(time.Time{})[4]
	if plain := l.format(begun, false); strings.Contains(plain, "\x1b") {
		t.Errorf("%q has escape sequences", plain)
	}
	codes := regexp.MustCompile(`\x1b\[[0-9;]*m`)
	coloured := l.format(begun, true)
	if codes.ReplaceAllString(coloured, "") != l.format(begun, false) || !strings.Contains(coloured, "\x1b[32mOnline  \x1b[0m") {
		t.Errorf("%q: want the plain line, with Online in green", coloured)
	}
}

func TestScreenWithoutATerminalIsPlainLines(t *testing.T) {
	var b bytes.Buffer
	s := &screen{w: &b, columns: func() int { return 0 }, begun: time.Now()}
	s.Write([]byte("building etcd\nbuilding etcd: 30s\n"))
	s.show("12 requests")
	s.println("a line")
	s.end()
	if got := regexp.MustCompile(`(?m)^ *\+[0-9.]+ s`).ReplaceAllString(b.String(), "T"); got != "T  building etcd\nT  building etcd: 30s\na line\n" {
		t.Errorf("got %q", got)
	}
}

func TestStatusStaysBelowTheLines(t *testing.T) {
	var b bytes.Buffer
	s := &screen{w: &b, tty: true, columns: func() int { return 11 }}
	s.show("12 requests, 0 failed")
	s.println("a line")
	s.show("")
	if got, want := b.String(), "12 requ...\r\x1b[Ka line\n12 requ...\r\x1b[K"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestStepsSayOnceThatTheyWereTaken(t *testing.T) {
	var b bytes.Buffer
	s := &screen{w: &b, tty: true, columns: func() int { return 80 }}
	s.Write([]byte("building etcd\nbuilding etcd: 30s\nbuilt etcd in 42s\nstarting\n"))
	s.end()
	// What was overwritten is gone from a terminal.
	var got []string
	for row := range strings.SplitSeq(b.String(), "\n") {
		got = append(got, strings.TrimSpace(row[strings.LastIndex(row, "\x1b[K")+len("\x1b[K"):]))
	}
	if want := []string{"building etcd", "starting", ""}; !slices.Equal(got, want) {
		t.Errorf("%q stays on the terminal, want %q", got, want)
	}
}

func TestFigures(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0.0 ms", 9040 * time.Microsecond: "9.0 ms", 9990 * time.Microsecond: "10.0 ms", 12600 * time.Microsecond: "13 ms",
		999400 * time.Microsecond: "999 ms", 999600 * time.Microsecond: "1.00 s", 2014 * time.Millisecond: "2.01 s", 83 * time.Second: "1m23s",
	} {
		if got := human(d); got != want {
			t.Errorf("%v reads %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		if got := thousands(n); got != want {
			t.Errorf("%d reads %q, want %q", n, got, want)
		}
	}
	for name, want := range map[string]string{oldPod: "shop-x2x9p", "web-0": "web-0", "": ""} {
		if got := short(name); got != want {
			t.Errorf("%s is short %q, want %q", name, got, want)
		}
	}
}

func TestCommandLine(t *testing.T) {
	if keep, err := parse(nil); keep || err != nil {
		t.Errorf("no arguments: %v, %v", keep, err)
	}
	if keep, err := parse([]string{"--keep"}); !keep || err != nil {
		t.Errorf("--keep: %v, %v", keep, err)
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v, want ErrHelp", err)
	}
	for _, args := range [][]string{{"--kep"}, {"up"}, {"--keep=perhaps"}} {
		_, err := parse(args)
		if err == nil || !strings.Contains(err.Error(), "the only flag is --keep") {
			t.Errorf("%q: %v, want an error that names the flag that there is", args, err)
		}
	}
}
