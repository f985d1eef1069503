package main

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"usher.dev/usher/lifecycle"
)

// hold is how long a line waits before it is printed. What is seen in one place explains what is seen in another: the
// agent's log says how a drain went that the ledger says is over.
const hold = 300 * time.Millisecond

// fact is one thing that a source saw, at the moment when it arrived here.
type fact struct {
	at  time.Time
	uid string // the pod's
	is  any    // one of the types below
}

type (
	podSeen       struct{ name, ip string }
	podReady      struct{} // its endpoint, in the EndpointSlice
	podDeleted    struct{ grace time.Duration }
	appEnded      struct{ code int32 }
	podGone       struct{}
	recordPut     struct{ key string } // a consumer record
	recordDeleted struct{ key string }
	ledgerSays    struct{ state, cause string }
	ledgerGone    struct{}
	inFlight      struct{ n int } // as the application counts
	released      struct{ verdict verdict }
	logUnread     struct{ err error }
	answered      struct{ pod string } // its name: an answer knows no uid
)

// verdict is what an agent's log says of a shutdown.
type verdict struct {
	outcome                        lifecycle.Outcome
	total, withdraw, settle, drain time.Duration
	inFlight                       int
}

// pod is all that is known of one. Times are zero until they are known.
type pod struct {
	name, ip string
	old      bool // there when the rollout began
	state    string
	keys     map[string]bool // its consumer records

	seen, ready, registered, deleted, withdrawn, ended, gone time.Time

	inFlight *int // when its records were deleted
	verdict  *verdict
	logErr   error     // why there is no verdict
	answer   time.Time // its last one
	lastLine time.Time
}

// line is a line of the timeline. Its text is written when it is printed, from what is known by then.
type line struct {
	at      time.Time
	pod     *pod // nil: of the whole rollout
	state   string
	changed bool // to state, by this line
	text    func() string
	since   time.Duration // since the pod's last line; negative: it is the first
}

// timeline makes lines of facts. Before begin nothing is shown, but all is remembered.
type timeline struct {
	begun   time.Time
	pods    map[string]*pod
	byName  map[string]*pod
	waiting []line
}

func newTimeline() *timeline { return &timeline{pods: map[string]*pod{}, byName: map[string]*pod{}} }

// begin starts the rollout: the pods that are there now are the old ones.
func (t *timeline) begin(at time.Time, text string) {
	t.begun = at
	for _, p := range t.pods {
		p.old = p.gone.IsZero()
	}
	t.waiting = append(t.waiting, line{at: at, text: func() string { return text }})
}

// add takes a fact in. An agent is a watcher of Kubernetes like the one here, and at times so much faster that what it did
// is seen before its reason: that is one line then.
func (t *timeline) add(f fact) {
	if a, ok := f.is.(answered); ok {
		if p := t.byName[a.pod]; p != nil && f.at.After(p.answer) {
			p.answer = f.at
		}
		return
	}
	p := t.pods[f.uid]
	if p == nil {
		p = &pod{name: f.uid, keys: map[string]bool{}}
		t.pods[f.uid] = p
	}
	show := func(text func() string) {
		t.show(line{at: f.at, pod: p, state: p.state, text: text})
	}
	say := func(text string) { show(func() string { return text }) }
	switch is := f.is.(type) {
	case podSeen:
		p.name = is.name
		t.byName[is.name] = p
		p.ip = cmp.Or(is.ip, p.ip)
		if first(&p.seen, f.at) {
			say("created by the Deployment")
		}
	case podReady:
		if first(&p.ready, f.at) && p.registered.IsZero() {
			say("endpoint ready in Kubernetes")
		}
	case podDeleted:
		if first(&p.deleted, f.at) && p.withdrawn.IsZero() {
			say(fmt.Sprintf("deleted by the rollout, grace period %.0f s", is.grace.Seconds()))
		}
	case recordPut:
		p.keys[is.key] = true
		first(&p.registered, f.at)
	case recordDeleted:
		delete(p.keys, is.key)
		first(&p.withdrawn, f.at)
	case inFlight:
		p.inFlight = &is.n
	case released:
		p.verdict = &is.verdict
	case logUnread:
		p.logErr = is.err
	case ledgerSays:
		if is.state != p.state {
			p.state = is.state
			t.show(line{at: f.at, pod: p, state: is.state, changed: true, text: func() string { return p.explain(is) }})
		}
	case ledgerGone:
		switch {
		case p.deleted.IsZero():
			p.state = ""
			say("its ledger record is gone")
		case p.state != lifecycle.Stopped.String():
			// The agent seldom has the time to write its last state down.
			p.state = lifecycle.Stopped.String()
			t.show(line{at: f.at, pod: p, state: p.state, changed: true, text: func() string { return stopped }})
		}
	case appEnded:
		if first(&p.ended, f.at) {
			say("Kubernetes reports the application's end: " + exitCode(is.code))
		}
	case podGone:
		if first(&p.gone, f.at) {
			show(func() string {
				if p.deleted.IsZero() {
					return "pod gone"
				}
				return fmt.Sprintf("pod gone, %s after its deletion", human(p.gone.Sub(p.deleted)))
			})
		}
	}
}

// stopped is what the end of an agent means: the kubelet ends native sidecars after the application.
const stopped = "agent stops, after the application"

// first notes a moment, unless one is noted already.
func first(t *time.Time, at time.Time) bool {
	if !t.IsZero() {
		return false
	}
	*t = at
	return true
}

func (t *timeline) show(l line) {
	if !t.begun.IsZero() {
		t.waiting = append(t.waiting, l)
	}
}

// due takes the lines that have waited long enough, in the order of their times. A zero now takes all.
func (t *timeline) due(now time.Time) []line {
	slices.SortStableFunc(t.waiting, func(a, b line) int { return a.at.Compare(b.at) })
	n := len(t.waiting)
	if !now.IsZero() {
		n = 0
		for n < len(t.waiting) && now.Sub(t.waiting[n].at) >= hold {
			n++
		}
	}
	out := slices.Clone(t.waiting[:n])
	t.waiting = t.waiting[n:]
	for i := range out {
		l := &out[i]
		l.since = -1
		if l.pod == nil {
			continue
		}
		if !l.pod.lastLine.IsZero() {
			l.since = l.at.Sub(l.pod.lastLine)
		}
		l.pod.lastLine = l.at
	}
	return out
}

// explain says what a new state in the ledger means.
func (p *pod) explain(is ledgerSays) string {
	switch is.state {
	case lifecycle.Pending.String():
		return "agent is up, the endpoint is not ready yet"
	case lifecycle.Online.String():
		switch {
		case p.registered.IsZero() || p.ready.IsZero():
			return is.cause
		case p.registered.Before(p.ready):
			return "registered as its endpoint turned ready"
		}
		return fmt.Sprintf("registered %s after its endpoint turned ready", human(p.registered.Sub(p.ready)))
	case lifecycle.Draining.String():
		text := "deregistered"
		switch {
		case p.withdrawn.IsZero():
			text = "to be deregistered"
		case p.deleted.IsZero():
		case p.withdrawn.After(p.deleted):
			text += fmt.Sprintf(" %s after deletion", human(p.withdrawn.Sub(p.deleted)))
		default:
			text = "deleted and deregistered at once"
		}
		if p.inFlight != nil {
			text += fmt.Sprintf(", %s in flight", plural(*p.inFlight, "request"))
		}
		return text
	case lifecycle.Released.String():
		v := p.verdict
		if v == nil {
			return "SIGTERM may come"
		}
		text := fmt.Sprintf("%s in %s", v.outcome, human(v.total))
		if v.outcome == lifecycle.TimedOut {
			text = fmt.Sprintf("timed out after %s with %d in flight", human(v.total), v.inFlight)
		} else if last := p.lastAnswer(); last > 0 {
			text += fmt.Sprintf(", last answer at %s", human(last))
		}
		return text + "; SIGTERM may come"
	case lifecycle.Stopped.String():
		return stopped
	}
	return is.cause
}

// lastAnswer is when the last request was answered, counted from the deletion of the pod; 0 when that was before its
// records were deleted.
func (p *pod) lastAnswer() time.Duration {
	if p.withdrawn.IsZero() || p.deleted.IsZero() || !p.answer.After(p.withdrawn) {
		return 0
	}
	return p.answer.Sub(p.deleted)
}

// online counts the pods that have as many consumer records as they should.
func (t *timeline) online(records int, old bool) int {
	n := 0
	for _, p := range t.pods {
		if p.old == old && p.gone.IsZero() && p.state == lifecycle.Online.String() && len(p.keys) == records {
			n++
		}
	}
	return n
}

// replaced says when the last old pod was gone and so many new ones had been registered, if that is so by now.
func (t *timeline) replaced(records, pods int) (time.Time, bool) {
	var last time.Time
	for _, p := range t.pods {
		at := p.registered
		if p.old {
			at = p.gone
			if at.IsZero() {
				return time.Time{}, false
			}
		}
		if at.After(last) {
			last = at
		}
	}
	return last, t.online(records, false) == pods
}

// names are the pods by their addresses.
func (t *timeline) names() map[string]string {
	m := map[string]string{}
	for _, p := range t.pods {
		m[p.ip] = p.name
	}
	return m
}

// old are the pods that were replaced, in the order of their deletion.
func (t *timeline) old() []*pod {
	var out []*pod
	for _, p := range t.pods {
		if p.old {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *pod) int { return cmp.Or(a.deleted.Compare(b.deleted), cmp.Compare(a.name, b.name)) })
	return out
}

func exitCode(code int32) string {
	const bySIGTERM = 128 + 15
	if code == bySIGTERM {
		return "SIGTERM (143)"
	}
	return fmt.Sprintf("exit code %d", code)
}
