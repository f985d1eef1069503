package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"usher.dev/usher/integration/load"
	"usher.dev/usher/lifecycle"
)

// shownFailures is how many failed requests are shown word for word.
const shownFailures = 5

// result is what a whole demonstration came to.
type result struct {
	report  load.Report
	begun   time.Time     // of the rollout
	rollout time.Duration // until the last old pod was gone
	pods    []*pod        // the replaced ones
}

// exit is the program's exit status.
func (r result) exit() int {
	if r.report.Failed > 0 || r.report.Sent == 0 {
		return 1
	}
	return 0
}

// lastLine says it all. The longest preStop is left out if no agent's verdict was seen.
func (r result) lastLine() string {
	text := fmt.Sprintf("demo: %s, %s failed, longest request %s", plural(int(r.report.Sent), "request"), thousands(r.report.Failed), human(r.longest()))
	var longest time.Duration
	for _, p := range r.pods {
		if p.verdict != nil {
			longest = max(longest, p.verdict.total)
		}
	}
	if longest > 0 {
		text += ", longest preStop " + human(longest)
	}
	return text
}

// longest counts failed requests too, as far as the report has them.
func (r result) longest() time.Duration {
	d := r.report.Longest.Latency
	for _, f := range r.report.Failures {
		d = max(d, f.Latency)
	}
	return d
}

func (r result) summary(w io.Writer, p paint) {
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s  %s\n", p.with(dim, pad(name, 8)), fmt.Sprintf(format, args...))
	}
	var slow int64
	by := map[load.Protocol]int64{}
	for _, k := range r.report.Kinds {
		by[k.Protocol] += k.Sent
		if k.Kind == load.Slow {
			slow += k.Sent
		}
	}
	row("requests", "%s: %s over HTTP keep-alive, %s over gRPC; %s of them took 2 s", thousands(r.report.Sent),
		thousands(by[load.HTTP]), thousands(by[load.GRPC]), thousands(slow))
	if r.report.Failed == 0 {
		row("failed", "%s", p.with(green, "0"))
	} else {
		row("failed", "%s", p.with(red, thousands(r.report.Failed)+": "+r.classes()))
	}
	l := r.report.Longest
	row("longest", "%s (%s %s, answered by %s); median %s", human(l.Latency), l.Protocol, l.Kind, short(l.Pod), human(r.report.Latency.P50))
	row("rollout", "%s for %s", human(r.rollout), plural(len(r.pods), "pod"))

	if r.report.Failed > 0 {
		fmt.Fprintln(w)
		shown := r.report.Failures[:min(shownFailures, len(r.report.Failures))]
		for _, f := range shown {
			// The error may have line breaks.
			text := fmt.Sprintf("%+.3f s  %s %s to %s failed after %s, %s: %s", f.Scheduled.Sub(r.begun).Seconds(), f.Protocol, f.Kind,
				r.name(f.Instance), human(f.Latency), f.Class, strings.Join(strings.Fields(f.Err), " "))
			fmt.Fprintln(w, p.with(red, cut("  "+text, width)))
		}
		if more := r.report.Failed - int64(len(shown)); more > 0 {
			fmt.Fprintf(w, "  and %s more\n", thousands(more))
		}
	}

	fmt.Fprintln(w)
	fmt.Fprintln(w, p.with(dim, fmt.Sprintf("%-10s  %8s  %8s  %8s  %8s  %9s  %11s  %s",
		"pod", "preStop", "withdraw", "settle", "drain", "in flight", "last answer", "why it took that long")))
	for _, pod := range r.pods {
		fmt.Fprintln(w, pod.row())
	}
}

// classes are the failures by their class.
func (r result) classes() string {
	var parts []string
	for _, c := range slices.Sorted(maps.Keys(r.report.Classes)) {
		parts = append(parts, fmt.Sprintf("%s %s", thousands(r.report.Classes[c]), c))
	}
	return strings.Join(parts, ", ")
}

// name is the pod behind an address, if it is one of those replaced.
func (r result) name(instance string) string {
	if instance == "" {
		return "no instance"
	}
	for _, p := range r.pods {
		if p.ip != "" && strings.HasPrefix(instance, p.ip+":") {
			return short(p.name)
		}
	}
	return instance
}

// row is a pod's part of the table. A dash is what was not seen.
func (p *pod) row() string {
	total, withdraw, settle, drain, flight, last := "-", "-", "-", "-", "-", "-"
	if v := p.verdict; v != nil {
		total, withdraw, settle, drain = human(v.total), human(v.withdraw), human(v.settle), human(v.drain)
	}
	if p.inFlight != nil {
		flight = thousands(int64(*p.inFlight))
	}
	if d := p.lastAnswer(); d > 0 {
		last = human(d)
	}
	return fmt.Sprintf("%-10s  %8s  %8s  %8s  %8s  %9s  %11s  %s", pad(short(p.name), 10), total, withdraw, settle, drain, flight, last, p.why())
}

// why says what the wait was for.
func (p *pod) why() string {
	v := p.verdict
	if v == nil {
		return "its agent's log was not seen"
	}
	switch v.outcome {
	case lifecycle.Drained:
		if last := p.lastAnswer(); last > v.withdraw+v.settle {
			return fmt.Sprintf("the last answer, then %s quiet", human(max(0, v.total-last)))
		}
		return "consumers' time to learn, then quiet"
	case lifecycle.TimedOut:
		return fmt.Sprintf("timed out with %d in flight", v.inFlight)
	case lifecycle.Unmeasured:
		return "in-flight count unknown: waited the floor"
	}
	return "settle time only: no in-flight source"
}
