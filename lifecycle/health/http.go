package health

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health/probe"
)

// Routes adds the handlers: those that read to both, those that change something to control alone. Either may be nil.
func (h *Health) Routes(hook, control *http.ServeMux) {
	for _, l := range []struct {
		mux        *http.ServeMux
		authorized func(*http.Request) bool
	}{{hook, h.cfg.Authorized}, {control, func(*http.Request) bool { return true }}} {
		if l.mux == nil {
			continue
		}
		show := func(w http.ResponseWriter, r *http.Request) { h.show(w, r, l.authorized(r)) }
		l.mux.HandleFunc(api.HealthPath, show)
		l.mux.HandleFunc(api.HealthPath+"/{path...}", show)
	}
	if control != nil {
		control.HandleFunc(api.AvailabilityPath+"{state...}", h.availability)
		control.HandleFunc(api.WorkersPath+"{id...}", h.worker)
	}
}

// show answers for a group, a component, or all. As in Spring Boot, the first part of the path is a group if there is one of
// that name, and parts that the caller may not see don't exist.
func (h *Health) show(w http.ResponseWriter, r *http.Request, authorized bool) {
	if !method(w, r, http.MethodGet, http.MethodHead) {
		return
	}
	var parts []string
	if path := strings.Trim(r.PathValue("path"), "/"); path != "" {
		parts = strings.Split(path, "/")
	}
	g := h.groups.primary
	if len(parts) > 0 && h.groups.named[parts[0]] != nil {
		g, parts = h.groups.named[parts[0]], parts[1:]
	}
	sees := func(show string) bool { return show == Always || show == WhenAuthorized && authorized }
	d := description{components: sees(g.showComponents), details: sees(g.showDetails)}
	if !d.components && len(parts) > 0 {
		refuse(w, http.StatusNotFound, "no such group, or its components aren't shown to this caller")
		return
	}

	h.mu.Lock()
	h.expire(time.Now())
	answer, found := h.describeBelow(g, view{aspect: g.aspect}, parts, d)
	h.mu.Unlock()
	if !found {
		refuse(w, http.StatusNotFound, fmt.Sprintf("no group or component %.200q; GET %s names those that there are", r.PathValue("path"), api.HealthPath))
		return
	}
	if g == h.groups.primary && len(parts) == 0 {
		answer.Groups = h.groups.names()
	}
	code := g.code(answer.Status)
	if _, verbose := r.URL.Query()["verbose"]; verbose {
		name := g.name
		if g == h.groups.primary {
			name = strings.TrimPrefix(api.HealthPath, "/")
		}
		checks := make([]Check, 0, len(answer.Components))
		for _, c := range slices.Sorted(maps.Keys(answer.Components)) {
			check := Check{Name: c}
			switch status := answer.Components[c].Status; {
			case failing(status):
				check.Err = errors.New(status)
			case status == api.HealthDegraded:
				check.note = "degraded"
			}
			checks = append(checks, check)
		}
		verboseText(w, strings.Join(append([]string{name}, parts...), "/"), code, checks, nil, true)
		return
	}
	write(w, code, answer)
}

// description is what of a member is told.
type description struct{ components, details bool }

// describeBelow follows a path into a group.
func (h *Health) describeBelow(g *group, v view, path []string, d description) (api.Health, bool) {
	if g.aspect != overall {
		v.aspect = g.aspect
	}
	if len(path) == 0 {
		return h.describeGroup(g, v, d), true
	}
	m, ok := g.find(path[0])
	switch {
	case !ok:
		return api.Health{}, false
	case m.kind == ofGroup:
		return h.describeBelow(m.group, v, path[1:], d)
	case m.kind == ofWorkers && len(path) == 2:
		return h.describeWorker(path[1], d)
	case len(path) > 1:
		return api.Health{}, false
	}
	return h.describe(m, v, d), true
}

func (h *Health) describeGroup(g *group, v view, d description) api.Health {
	var out api.Health
	out.Status, _ = h.groupStatus(g, v)
	if d.components {
		out.Components = make(map[string]api.Health, len(g.members))
		for _, m := range g.members {
			out.Components[m.name] = h.describe(m, v, d)
		}
	}
	return out
}

func (h *Health) describe(m member, v view, d description) api.Health {
	if m.kind == ofGroup {
		out, _ := h.describeBelow(m.group, v, nil, d)
		return out
	}
	var out api.Health
	status, cause := h.memberStatus(m, v)
	out.Status = status
	if m.kind == ofWorkers && d.components {
		out.Components = map[string]api.Health{}
		for _, id := range h.workers.expected() {
			out.Components[id], _ = h.describeWorker(id, d)
		}
	}
	if !d.details {
		return out
	}
	details := map[string]any{}
	put := func(name string, value any, isZero bool) {
		if !isZero {
			details[name] = value
		}
	}
	switch m.kind {
	case ofLiveness:
		putWord(put, h.liveness)
	case ofReadiness:
		putWord(put, h.readiness)
	case ofLifecycle:
		put("state", h.lifecycle.State, h.lifecycle.State == "")
		put("cause", h.lifecycle.Cause, h.lifecycle.Cause == "")
	case ofComponent:
		c := h.components[m.name]
		_, cause := c.status(v.aspect) // without the name
		put("cause", cause, cause == "")
		put("critical", c.critical(), false)
		now := c.prober.State()
		for _, k := range []probe.Kind{probe.Startup, probe.Liveness, probe.Readiness} {
			if r, ok := now.Results[k]; ok {
				put(k.String(), result{r.OK, cut(r.Output), r.Time, r.Took.Milliseconds(), r.Streak}, false)
			}
		}
	case ofWorkers:
		put("cause", cause, cause == "")
		required, quorum := h.workers.settings.required()
		put("required", required, false)
		put("quorum", quorum, false)
	}
	if len(details) > 0 {
		out.Details = details
	}
	return out
}

// result of a probe, as shown.
type result struct {
	OK     bool      `json:"ok"`
	Output string    `json:"output"`
	Time   time.Time `json:"time"`
	TookMs int64     `json:"tookMs"`
	Streak int       `json:"streak"`
}

func putWord[S ~string](put func(string, any, bool), w word[S]) {
	put("state", w.state, w.state == "")
	put("cause", w.cause, w.cause == "")
	put("since", w.since, w.since.IsZero())
}

func (h *Health) describeWorker(id string, d description) (api.Health, bool) {
	w, known := h.workers.known[id]
	if !known {
		out := api.Health{Status: api.HealthOutOfService}
		if d.details {
			out.Details = map[string]any{"cause": "hasn't reported"}
		}
		return out, h.workers.ids[id]
	}
	out := api.Health{Status: map[string]string{
		api.WorkerReady: api.HealthUp, api.WorkerNotReady: api.HealthOutOfService, api.WorkerSilent: api.HealthDown,
	}[w.state]}
	if d.details {
		out.Details = map[string]any{"state": w.state, "role": w.role, "since": w.since}
		if w.cause != "" {
			out.Details["cause"] = w.cause
		}
		if !w.expires.IsZero() {
			out.Details["expires"] = w.expires
		}
	}
	return out, true
}

// availability reads and sets the two states.
func (h *Health) availability(w http.ResponseWriter, r *http.Request) {
	which := r.PathValue("state")
	if which != liveness && which != readiness {
		refuse(w, http.StatusNotFound, fmt.Sprintf("%.100q is no state; want %s%s or %s%s", which, api.AvailabilityPath, liveness, api.AvailabilityPath, readiness))
		return
	}
	if !method(w, r, http.MethodGet, http.MethodPut) {
		return
	}
	if r.Method == http.MethodPut {
		var said api.Availability
		if !read(w, r, api.Fields{"state": &said.State, "cause": &said.Cause}) {
			return
		}
		good, bad := string(lifecycle.Correct), string(lifecycle.Broken)
		if which == readiness {
			good, bad = string(lifecycle.AcceptingTraffic), string(lifecycle.RefusingTraffic)
		}
		if said.State != good && said.State != bad {
			refuse(w, http.StatusBadRequest, fmt.Sprintf("state: %.100q; want %s or %s", said.State, good, bad))
			return
		}
		if which == liveness {
			h.setLiveness(lifecycle.LivenessState(said.State), said.Cause)
		} else {
			h.setReadiness(lifecycle.ReadinessState(said.State), said.Cause)
		}
	}
	a := h.Effective()
	out := api.Availability{State: string(a.Liveness.State), Cause: a.Liveness.Cause, Since: a.Liveness.Since}
	if which == readiness {
		out = api.Availability{State: string(a.Readiness.State), Cause: a.Readiness.Cause, Since: a.Readiness.Since}
	}
	if out.State == "" {
		out.State = api.HealthUnknown
	}
	write(w, http.StatusOK, out)
}

// worker takes and shows reports.
func (h *Health) worker(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if id == "" {
		if method(w, r, http.MethodGet) {
			h.mu.Lock()
			h.expire(time.Now())
			all := make([]api.Worker, 0, len(h.workers.known))
			for _, id := range slices.Sorted(maps.Keys(h.workers.known)) {
				all = append(all, h.workers.known[id].answer(id))
			}
			h.mu.Unlock()
			write(w, http.StatusOK, all)
		}
		return
	}
	if !token(id) {
		refuse(w, http.StatusBadRequest, fmt.Sprintf("worker id %.80q: %s", id, wantToken))
		return
	}
	if !method(w, r, http.MethodGet, http.MethodPut, http.MethodDelete) {
		return
	}
	said := api.Worker{Role: api.RoleWorker}
	if r.Method == http.MethodPut {
		if !read(w, r, api.Fields{"state": &said.State, "role": &said.Role, "cause": &said.Cause, "ttlSeconds": &said.TTLSeconds}) {
			return
		}
		said.Cause = cut(said.Cause)
		problem := ""
		switch {
		case said.State != api.WorkerReady && said.State != api.WorkerNotReady:
			problem = fmt.Sprintf("state: %.100q; want %s or %s", said.State, api.WorkerReady, api.WorkerNotReady)
		case said.Role != api.RoleMaster && said.Role != api.RoleWorker:
			problem = fmt.Sprintf("role: %.100q; want %s or %s", said.Role, api.RoleMaster, api.RoleWorker)
		case said.TTLSeconds < 0 || said.TTLSeconds > maxTTLSeconds:
			problem = fmt.Sprintf("ttlSeconds: %d; want 1 to %d", said.TTLSeconds, maxTTLSeconds)
		}
		if problem != "" {
			refuse(w, http.StatusBadRequest, problem)
			return
		}
	}
	answer, err := h.ask(r.Method, id, said)
	switch {
	case errors.Is(err, errUnknown):
		refuse(w, http.StatusNotFound, err.Error())
	case err != nil:
		refuse(w, http.StatusConflict, err.Error())
	case r.Method == http.MethodDelete:
		w.WriteHeader(http.StatusNoContent)
	default:
		write(w, http.StatusOK, answer)
	}
}

// ask is one request for one worker.
func (h *Health) ask(method, id string, said api.Worker) (api.Worker, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.expire(now)
	switch method {
	case http.MethodPut:
		changed, sooner, err := h.workers.report(id, said, now)
		if err != nil {
			return api.Worker{}, err
		}
		if changed {
			h.evaluate(now)
		} else if sooner {
			h.poke()
		}
	case http.MethodDelete:
		if err := h.workers.remove(id); err != nil {
			return api.Worker{}, err
		}
		h.evaluate(now)
		return api.Worker{}, nil
	}
	w, ok := h.workers.known[id]
	if !ok {
		return api.Worker{}, fmt.Errorf("worker %s: %w", id, errUnknown)
	}
	return w.answer(id), nil
}

// read takes in a body, or refuses it.
func read(w http.ResponseWriter, r *http.Request, into api.Fields) bool {
	err := into.Read(w, r)
	if bad := new(api.BodyError); errors.As(err, &bad) {
		refuse(w, bad.Code, err.Error())
	}
	return err == nil
}

func method(w http.ResponseWriter, r *http.Request, allowed ...string) bool {
	if slices.Contains(allowed, r.Method) {
		return true
	}
	w.Header().Set("Allow", strings.Join(allowed, ", "))
	refuse(w, http.StatusMethodNotAllowed, fmt.Sprintf("method %.20s: want %s", r.Method, strings.Join(allowed, " or ")))
	return false
}

func refuse(w http.ResponseWriter, code int, why string) { write(w, code, api.Error{Error: why}) }

func write(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	// What is true now is false in a second.
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.Encode(body) // a caller that is gone is no error
}
