package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"usher.dev/usher/lifecycle"
)

// width is the most columns that a line takes.
const width = 110

// ANSI codes: foreground colours of the 16 that every terminal has, in its user's own shades.
const (
	bold   = "1"
	dim    = "2"
	red    = "31"
	green  = "32"
	yellow = "33"
	blue   = "34"
	cyan   = "36"
)

// paint colours text if it is to be coloured.
type paint bool

func (p paint) with(code, text string) string {
	if !bool(p) || code == "" || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func stateColour(state string) string {
	switch state {
	case lifecycle.Pending.String():
		return blue
	case lifecycle.Online.String():
		return green
	case lifecycle.Draining.String():
		return yellow
	case lifecycle.Released.String():
		return cyan
	case lifecycle.Offline.String():
		return red
	}
	return dim
}

// header names the timeline's columns.
func header(p paint) string {
	return p.with(dim, fmt.Sprintf("%9s  %-3s  %-10s  %-8s  %8s  %s", "time", "", "pod", "state", "took", "what happened"))
}

// legend says what the states mean.
func legend(p paint) string {
	var b strings.Builder
	for _, s := range []struct {
		state lifecycle.State
		means string
	}{
		{lifecycle.Online, "in the registry: consumers send it requests"},
		{lifecycle.Draining, "out of the registry, it answers the requests that it still has; SIGTERM waits"},
		{lifecycle.Released, "owes no answer any more: SIGTERM may come"},
	} {
		fmt.Fprintf(&b, "  %s  %s\n", p.with(stateColour(s.state.String()), pad(s.state.String(), 8)), s.means)
	}
	return b.String()
}

// format is one line of the timeline.
func (l line) format(begun time.Time, p paint) string {
	at := fmt.Sprintf("%+.3f s", l.at.Sub(begun).Seconds())
	if l.pod == nil {
		return fmt.Sprintf("%9s  %s", at, p.with(bold, l.text()))
	}
	age, since := "new", ""
	if l.pod.old {
		age = "old"
	}
	if l.since >= 0 {
		since = fmt.Sprintf("+%d ms", l.since.Milliseconds())
	}
	state := pad(l.state, 8)
	if l.changed {
		state = p.with(stateColour(l.state), state)
	} else {
		state = p.with(dim, state)
	}
	const before = 9 + 2 + 3 + 2 + 10 + 2 + 8 + 2 + 8 + 2
	return fmt.Sprintf("%9s  %s  %s  %s  %s  %s", at, age, pad(short(l.pod.name), 10), state,
		p.with(dim, fmt.Sprintf("%8s", since)), cut(l.text(), width-before))
}

// short is a pod's name without its ReplicaSet's hash.
func short(name string) string {
	parts := strings.Split(name, "-")
	if len(parts) < 3 {
		return name
	}
	return strings.Join(append(parts[:len(parts)-2:len(parts)-2], parts[len(parts)-1]), "-")
}

// pad fills up or cuts off to n columns.
func pad(text string, n int) string { return fmt.Sprintf("%-*s", n, cut(text, n)) }

// cut takes at most n columns; the project's texts and Kubernetes' names have one column a rune.
func cut(text string, n int) string {
	if r := []rune(text); len(r) > n {
		return string(r[:max(0, n-3)]) + "..."
	}
	return text
}

// human is a duration to the digits that a person compares.
func human(d time.Duration) string {
	switch ms := d.Round(time.Millisecond); {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case ms < time.Second:
		return fmt.Sprintf("%d ms", ms.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return d.Round(time.Second).String()
}

// plural is a number and what is counted.
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return thousands(int64(n)) + " " + one + "s"
}

// thousands groups digits.
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}
