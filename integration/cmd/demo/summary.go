package main

import (
	"fmt"
	"io"
	"maps"
	"net"
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
	begun   time.Time         // of the rollout
	rollout time.Duration     // until the last old pod was gone
	pods    []*pod            // the replaced ones
	names   map[string]string // of all pods, by address
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
	row("requests", "%s: %s over HTTP keep-alive, %s over gRPC; %s of them asked for 2 s", thousands(r.report.Sent),
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
			text := fmt.Sprintf("%+9.3f s  %s %s to %s: %s after %s", f.Scheduled.Add(f.Latency).Sub(r.begun).Seconds(), f.Protocol, f.Kind,
				r.name(f.Instance), f.Class, human(f.Latency))
			fmt.Fprintln(w, p.with(red, cut(text, width)))
			fmt.Fprintln(w, cut(strings.Repeat(" ", 13)+strings.Join(strings.Fields(f.Err), " "), width))
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

// name is the pod behind an address, if one is known.
func (r result) name(instance string) string {
	if instance == "" {
		return "no instance"
	}
	if ip, _, err := net.SplitHostPort(instance); err == nil && r.names[ip] != "" {
		return short(r.names[ip])
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

// whyColumns is what the other columns leave.
const whyColumns = width - (10 + 4*(2+8) + 2 + 9 + 2 + 11 + 2)

// why says what the wait was for.
func (p *pod) why() string {
	v := p.verdict
	if v == nil {
		if p.logErr != nil {
			return cut(p.logErr.Error(), whyColumns)
		}
		return "not seen in its agent's log"
	}
	switch v.outcome {
	case lifecycle.Drained:
		if last := p.lastAnswer(); last > v.withdraw+v.settle {
			return fmt.Sprintf("last answer, then quiet for %s", human(max(0, v.total-last)))
		}
		return "settle time: consumers learn of it"
	case lifecycle.TimedOut:
		return fmt.Sprintf("timed out with %d in flight", v.inFlight)
	case lifecycle.Unmeasured:
		return "in flight unknown: the floor"
	}
	return "settle time: nothing to wait for"
}
