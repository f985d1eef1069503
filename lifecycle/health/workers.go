package health

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle/health/probe"
)

const (
	// forgetAfter is how long a worker that fell silent is still listed, for whoever looks for it. Processes that die and come
	// back under other ids would fill the list otherwise.
	forgetAfter = 10 * time.Minute
	// maxCause is how much of a cause, or of a probe's output, is kept, in bytes.
	maxCause = 1024
	// maxNamed is how many of the workers that are missing a cause names.
	maxNamed = 3
)

// Why a worker's report is refused.
var (
	errNoWorkers = errors.New("no workers are expected: set health.workers in the agent's configuration")
	errProbed    = errors.New("is probed by the agent (health.workers.probes), so it can't report itself")
	errTooMany   = fmt.Errorf("%d workers are known already, which is the most there may be: DELETE those that are gone", maxWorkers)
	errUnknown   = errors.New("no such worker")
)

// worker is one process.
type worker struct {
	state, role, cause string // state is READY, NOT_READY or SILENT
	ttl                time.Duration
	since              time.Time // of the state
	expires            time.Time // zero for one that is probed
	prober             *probe.Prober
}

func (w *worker) ready() bool { return w.state == api.WorkerReady }

// workers are all that are known. Health's mutex guards it.
type workers struct {
	settings *Workers        // nil: none are expected
	ids      map[string]bool // the required ones; nil when only their number counts
	known    map[string]*worker
	// next is when the next word expires or a silent worker is forgotten; zero: nothing is to come. It may be too early.
	next time.Time
	// master says that one was heard since the container's start.
	master bool
	silent int // how many are

	live, up           string // statuses, for liveness and readiness
	liveCause, upCause string
	// short is how many are missing for the quorum, and for the master's consent. What may make up for them: unprobed are those
	// whose probe is silent, unheard the others of whom nothing was heard.
	short, unprobed, unheard int
}

func newWorkers(s *Workers) workers {
	ws := workers{settings: s, known: map[string]*worker{}}
	if s != nil && s.Required == 0 {
		ws.ids = map[string]bool{}
		for _, id := range s.ids() {
			ws.ids[id] = true
		}
	}
	return ws
}

// report takes a word in. changed is false if it only renews the one before; sooner: Run has to wake for it earlier.
func (ws *workers) report(id string, said api.Worker, now time.Time) (changed, sooner bool, err error) {
	if ws.settings == nil {
		return false, false, errNoWorkers
	}
	w, known := ws.known[id]
	switch {
	case known && w.prober != nil:
		return false, false, fmt.Errorf("worker %s %w", id, errProbed)
	case !known && len(ws.known) >= maxWorkers && !ws.makeRoom():
		return false, false, fmt.Errorf("worker %s: %w", id, errTooMany)
	case !known:
		w = &worker{}
		ws.known[id] = w
	}
	ttl := said.TTLSeconds
	if ttl == 0 {
		ttl = int(ws.settings.ttl() / time.Second)
	}
	changed = w.state != said.State || w.role != said.Role || w.cause != said.Cause
	if w.state != said.State {
		w.since = now
	}
	w.state, w.role, w.cause = said.State, said.Role, said.Cause
	w.ttl = time.Duration(ttl) * time.Second
	w.expires = now.Add(w.ttl)
	ws.master = ws.master || w.role == api.RoleMaster
	return changed, ws.soonest(w.expires), nil
}

// makeRoom forgets the worker that has been silent for longest, if there is one.
func (ws *workers) makeRoom() bool {
	if ws.silent == 0 {
		return false
	}
	var oldest string
	for id, w := range ws.known {
		if w.state == api.WorkerSilent && (oldest == "" || w.since.Before(ws.known[oldest].since)) {
			oldest = id
		}
	}
	delete(ws.known, oldest)
	return oldest != ""
}

func (ws *workers) remove(id string) error {
	w, known := ws.known[id]
	switch {
	case !known:
		return fmt.Errorf("worker %s: %w", id, errUnknown)
	case w.prober != nil:
		return fmt.Errorf("worker %s %w", id, errProbed)
	}
	delete(ws.known, id)
	return nil
}

// soonest moves next to t if that is earlier.
func (ws *workers) soonest(t time.Time) (sooner bool) {
	sooner = ws.next.IsZero() || t.Before(ws.next)
	if sooner {
		ws.next = t
	}
	return sooner
}

// expire finds who fell silent, and forgets those who did long ago. changed is false if next came too early for either.
func (ws *workers) expire(now time.Time) (silent []string, changed bool) {
	ws.next = time.Time{}
	for id, w := range ws.known {
		if w.prober != nil {
			continue
		}
		if w.state != api.WorkerSilent && !now.Before(w.expires) {
			w.state, w.since = api.WorkerSilent, w.expires
			silent = append(silent, id)
		}
		switch forget := w.expires.Add(forgetAfter); {
		case w.state != api.WorkerSilent:
			ws.soonest(w.expires)
		case !now.Before(forget):
			delete(ws.known, id)
			changed = true
		default:
			ws.soonest(forget)
		}
	}
	slices.Sort(silent)
	return silent, changed || len(silent) > 0
}

// restarted drops whoever was last heard of before the new container.
func (ws *workers) restarted(void func(time.Time) bool) {
	ws.master = false
	maps.DeleteFunc(ws.known, func(_ string, w *worker) bool { return w.prober == nil && void(w.expires.Add(-w.ttl)) })
	for _, w := range ws.known {
		ws.master = ws.master || w.role == api.RoleMaster
		if w.prober != nil {
			w.state, w.cause = api.WorkerNotReady, notYet(probe.Readiness)
		}
	}
}

// summarize makes the two statuses.
func (ws *workers) summarize() {
	ws.live, ws.liveCause, ws.up, ws.upCause, ws.silent = api.HealthUnknown, "", api.HealthUp, "", 0
	ws.short, ws.unprobed, ws.unheard = 0, 0, 0
	if ws.settings == nil {
		return
	}
	var missing []string // of those that are required
	ready, heard, masterReady := 0, false, false
	for id, w := range ws.known {
		if w.state == api.WorkerSilent {
			ws.silent++
		}
		if w.role == api.RoleMaster {
			heard = heard || w.state != api.WorkerSilent
			masterReady = masterReady || w.ready()
		}
		switch required := ws.ids[id] || ws.ids == nil && w.role != api.RoleMaster; {
		case required && w.ready():
			ready++
		case required:
			missing = append(missing, id)
			if w.prober != nil && silent(w.prober) {
				ws.unprobed++
			}
		}
	}
	reported := ready + len(missing) // and what was expected of probes
	for id := range ws.ids {
		if _, ok := ws.known[id]; !ok {
			missing = append(missing, id)
		}
	}
	if ws.master {
		ws.live = api.HealthUp
		if !heard {
			ws.live, ws.liveCause = api.HealthDown, "the master worker is gone or silent"
		}
	}
	required, quorum := ws.settings.required()
	if ready < required {
		ws.up = api.HealthDegraded
		ws.upCause = withCause(fmt.Sprintf("%d of %d workers ready", ready, required), ws.why(missing))
		if ready < quorum {
			ws.up = api.HealthDown
			if quorum < required {
				ws.upCause = fmt.Sprintf("%s; the quorum is %d", ws.upCause, quorum)
			}
		}
	}
	ws.short, ws.unheard = quorum-ready, max(0, required-reported)
	if ws.master && !masterReady {
		ws.short = maxWorkers + 1 // that can't be made up for
		ws.up, ws.upCause = api.HealthDown, "the master worker is not ready"
	}
}

// open says whether those that have not been heard could make up for what is missing, given how long it is since the start: a
// worker that an agent before this one heard has its TTL to be heard again.
func (ws *workers) open(since time.Duration) bool {
	couldBe := ws.unprobed
	if since < ws.settings.ttl() {
		couldBe += ws.unheard
	}
	return ws.short <= couldBe
}

// why names some of the workers that are missing.
func (ws *workers) why(missing []string) string {
	slices.Sort(missing)
	var parts []string
	for _, id := range missing[:min(len(missing), maxNamed)] {
		if w, known := ws.known[id]; known {
			parts = append(parts, withCause(id+" is "+w.state, w.cause))
		} else {
			parts = append(parts, id+" hasn't reported")
		}
	}
	if more := len(missing) - len(parts); more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(parts, ", ")
}

func (ws *workers) status(a aspect) (status, cause string) {
	if a == asLiveness || a == overall && failing(ws.live) {
		return ws.live, ws.liveCause
	}
	return ws.up, ws.upCause
}

// expected are the ids of workers that are known or required.
func (ws *workers) expected() []string {
	ids := slices.AppendSeq(slices.Collect(maps.Keys(ws.known)), maps.Keys(ws.ids))
	slices.Sort(ids)
	return slices.Compact(ids)
}

func (w *worker) answer(id string) api.Worker {
	return api.Worker{
		ID: id, State: w.state, Role: w.role, Cause: w.cause, TTLSeconds: int(w.ttl / time.Second), Since: w.since, Expires: w.expires,
	}
}

func (h *Health) workerProbed(w *worker, s probe.State) {
	h.mu.Lock()
	defer h.mu.Unlock()
	state, cause := api.WorkerReady, ""
	if !s.Ready {
		state, cause = api.WorkerNotReady, notYet(probe.Readiness)
		if r, ok := s.Results[probe.Readiness]; ok {
			cause = "readiness probe failed: " + cut(r.Output)
		}
	}
	if w.state != state {
		w.since = time.Now()
	}
	w.state, w.cause = state, cause
	h.evaluate(time.Now())
}

// cut keeps a text's beginning, in whole characters.
func cut(s string) string {
	if len(s) <= maxCause {
		return s
	}
	return strings.ToValidUTF8(s[:maxCause-len("…")], "") + "…"
}
