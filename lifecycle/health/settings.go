package health

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle/health/probe"
)

const (
	// maxWorkers bounds the memory that reports can take. Kubernetes allows 1,024 processes in a pod on many nodes (podPidsLimit).
	maxWorkers = 1024
	// maxComponents and maxGroups bound the probes that run and the answers' size. gRPC's own health server lists 100 services.
	maxComponents = 100
	maxGroups     = 100

	defaultTTLSeconds = 10
	maxTTLSeconds     = 3600

	// maxName is the length of a DNS label.
	maxName = 63
)

// Who sees a part of an answer, as in Spring Boot.
const (
	Never          = "never"
	WhenAuthorized = "when-authorized"
	Always         = "always"
)

// The groups that are always there.
const (
	liveness  = "liveness"
	readiness = "readiness"
	startup   = "startup"
)

// The members that are always there, workers only when configured.
const (
	livenessState  = "livenessState"
	readinessState = "readinessState"
	lifecycleName  = "lifecycle"
	workersName    = "workers"
)

// Settings are what the agent's configuration has under health.
type Settings struct {
	// Components are the parts of the application, and what it depends upon, by name. At most 100.
	Components map[string]Component `json:"components,omitempty"`
	// Workers is set when several processes are the application; nil: reports of workers are refused.
	Workers *Workers `json:"workers,omitempty"`
	// Groups are the application's own, and what differs for liveness, readiness and startup. At most 100.
	Groups map[string]Group `json:"groups,omitempty"`

	// ShowComponents says who sees the names and statuses of components: never, when-authorized, always. Default always, since
	// the kubelet's probes may ask for one component.
	ShowComponents string `json:"showComponents,omitempty"`
	// ShowDetails says who sees causes and probes' output: never, when-authorized (default), always.
	ShowDetails string `json:"showDetails,omitempty"`
	// StatusCodes are HTTP codes by status. Default 503 for DOWN and OUT_OF_SERVICE, 200 for all others.
	StatusCodes map[string]int `json:"statusCodes,omitempty"`
}

// Component is probed, by at least one probe.
type Component struct {
	// Critical: the application can't be ready without it. Default true.
	Critical       *bool       `json:"critical,omitempty"`
	StartupProbe   *probe.Spec `json:"startupProbe,omitempty"`
	LivenessProbe  *probe.Spec `json:"livenessProbe,omitempty"`
	ReadinessProbe *probe.Spec `json:"readinessProbe,omitempty"`
}

func (c Component) critical() bool { return c.Critical == nil || *c.Critical }

// Workers says which processes it takes. One that reports itself as master is not counted by Required: while a master is
// known, the application is live as long as it is heard, and ready only when it says so too.
type Workers struct {
	// Required is how many workers have to be ready, whatever their ids: 1 to 1024. Or:
	Required int `json:"required,omitempty"`
	// IDs are those that have to be. Default the ids of Probes, when Required isn't set.
	IDs []string `json:"ids,omitempty"`
	// Quorum is how many of Required, or of IDs, are enough. Default all.
	Quorum int `json:"quorum,omitempty"`
	// TTLSeconds is how long a report stands that has no TTL of its own: 1 to 3600, default 10.
	TTLSeconds int `json:"ttlSeconds,omitempty"`
	// Probes ask workers that don't report themselves, by id. They are readiness probes.
	Probes map[string]probe.Spec `json:"probes,omitempty"`
}

// Group is a choice of components.
type Group struct {
	// Include names components, groups, livenessState, readinessState, lifecycle, workers; "*" is all but the groups. For liveness,
	// readiness and startup the default is the package comment's table; others need it.
	Include []string `json:"include,omitempty"`
	// Exclude takes members out again. livenessState, readinessState and lifecycle can't be taken out of liveness and readiness.
	Exclude []string `json:"exclude,omitempty"`
	// ShowComponents, ShowDetails and StatusCodes differ from the settings of the same name.
	ShowComponents string         `json:"showComponents,omitempty"`
	ShowDetails    string         `json:"showDetails,omitempty"`
	StatusCodes    map[string]int `json:"statusCodes,omitempty"`
}

// Validate says what is wrong, field by field, each on a line of its own.
func (s Settings) Validate() error {
	_, err := s.resolve()
	return err
}

// problems collects what is wrong with settings.
type problems []string

func (p *problems) add(format string, args ...any) { *p = append(*p, fmt.Sprintf(format, args...)) }

func (p problems) err() error {
	if len(p) == 0 {
		return nil
	}
	return fmt.Errorf("health.%s", strings.Join(p, "\nhealth."))
}

// addProbe names the field for what a probe calls by its kind.
func (p *problems) addProbe(field string, kind probe.Kind, spec probe.Spec) {
	if err := spec.Validate(kind); err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			*p = append(*p, field+strings.TrimPrefix(line, kind.String()))
		}
	}
}

// token says whether a name can be part of a path, a log line and a metric as it is.
func token(s string) bool {
	if len(s) < 1 || len(s) > maxName || s == "." || s == ".." {
		return false
	}
	for _, c := range []byte(s) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-') {
			return false
		}
	}
	return true
}

const wantToken = "want 1 to 63 of A-Z a-z 0-9 . _ -"

func reserved(name string) bool {
	return name == livenessState || name == readinessState || name == lifecycleName || name == workersName
}

func predefined(name string) bool { return name == liveness || name == readiness || name == startup }

func (s Settings) checkComponents(p *problems) {
	if len(s.Components) > maxComponents {
		p.add("components: %d of them; want at most %d", len(s.Components), maxComponents)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Components)) {
		c := s.Components[name]
		switch {
		case !token(name):
			p.add("components: name %.80q: %s", name, wantToken)
		case reserved(name) || predefined(name):
			p.add("components: name %q: is taken; want another than livenessState, readinessState, lifecycle, workers, liveness, readiness, startup", name)
		case c.StartupProbe == nil && c.LivenessProbe == nil && c.ReadinessProbe == nil:
			p.add("components.%s: no probe; want a startupProbe, livenessProbe or readinessProbe", name)
		}
		for _, k := range []struct {
			field string
			kind  probe.Kind
			spec  *probe.Spec
		}{{"startupProbe", probe.Startup, c.StartupProbe}, {"livenessProbe", probe.Liveness, c.LivenessProbe}, {"readinessProbe", probe.Readiness, c.ReadinessProbe}} {
			if k.spec == nil {
				continue
			}
			p.addProbe(fmt.Sprintf("components.%s.%s", name, k.field), k.kind, *k.spec)
		}
	}
}

// checkGroups is for what can be seen without resolving them, and says whether it makes sense to do that.
func (s Settings) checkGroups(p *problems) (ok bool) {
	if ok = len(s.Groups) <= maxGroups; !ok {
		p.add("groups: %d of them; want at most %d", len(s.Groups), maxGroups)
	}
	for _, name := range slices.Sorted(maps.Keys(s.Groups)) {
		if _, taken := s.Components[name]; taken || reserved(name) {
			p.add("groups: name %q: is a component's; want another", name)
			ok = false
		} else if !token(name) {
			p.add("groups: name %.80q: %s", name, wantToken)
			ok = false
		}
		g, field := s.Groups[name], "groups."+name
		checkShow(p, field+".showComponents", g.ShowComponents)
		checkShow(p, field+".showDetails", g.ShowDetails)
		checkCodes(p, field+".statusCodes", g.StatusCodes)
	}
	return ok
}

func (w *Workers) check(p *problems) {
	if w == nil {
		return
	}
	for _, id := range slices.Sorted(maps.Keys(w.Probes)) {
		if !token(id) {
			p.add("workers.probes: id %.80q: %s", id, wantToken)
		}
		p.addProbe("workers.probes."+id, probe.Readiness, w.Probes[id])
	}
	if len(w.Probes) > maxComponents {
		p.add("workers.probes: %d of them; want at most %d", len(w.Probes), maxComponents)
	}
	for i, id := range w.IDs {
		if !token(id) {
			p.add("workers.ids: %.80q: %s", id, wantToken)
		} else if slices.Contains(w.IDs[:i], id) {
			p.add("workers.ids: %q is there twice", id)
		}
	}
	required := len(w.ids())
	switch {
	case w.Required != 0 && len(w.IDs) > 0:
		p.add("workers: required %d and ids; want one of them", w.Required)
	case w.Required < 0 || w.Required > maxWorkers:
		p.add("workers.required: %d; want 1 to %d", w.Required, maxWorkers)
	case w.Required != 0:
		required = w.Required
	case required == 0:
		p.add("workers: neither required nor ids nor probes; want how many workers, or which")
	case required > maxWorkers:
		p.add("workers.ids: %d of them; want at most %d", required, maxWorkers)
	}
	if w.Quorum < 0 || w.Quorum > required {
		p.add("workers.quorum: %d; want 1 to %d, the number of required workers, or nothing for all", w.Quorum, required)
	}
	if w.TTLSeconds < 0 || w.TTLSeconds > maxTTLSeconds {
		p.add("workers.ttlSeconds: %d; want 1 to %d, or nothing for %d", w.TTLSeconds, maxTTLSeconds, defaultTTLSeconds)
	}
}

// ids are the required ones, nil when only their number counts.
func (w *Workers) ids() []string {
	if w.Required == 0 && len(w.IDs) == 0 {
		return slices.Sorted(maps.Keys(w.Probes))
	}
	return w.IDs
}

// ttl of a report that has none of its own.
func (w *Workers) ttl() time.Duration {
	if w.TTLSeconds == 0 {
		return defaultTTLSeconds * time.Second
	}
	return time.Duration(w.TTLSeconds) * time.Second
}

// required is how many, and quorum how many of them are enough.
func (w *Workers) required() (required, quorum int) {
	if required = w.Required; required == 0 {
		required = len(w.ids())
	}
	if quorum = w.Quorum; quorum == 0 {
		quorum = required
	}
	return required, quorum
}

func checkShow(p *problems, field, value string) {
	if value != "" && value != Never && value != WhenAuthorized && value != Always {
		p.add("%s: %.80q; want %s, %s or %s", field, value, Never, WhenAuthorized, Always)
	}
}

func checkCodes(p *problems, field string, codes map[string]int) {
	for _, status := range slices.Sorted(maps.Keys(codes)) {
		if !slices.Contains([]string{api.HealthDown, api.HealthOutOfService, api.HealthUp, api.HealthUnknown, api.HealthDegraded}, status) {
			p.add("%s: status %.80q; want DOWN, OUT_OF_SERVICE, UP, UNKNOWN or DEGRADED", field, status)
		}
		// 1xx are no answers, and 204 and 304 have no body.
		if code := codes[status]; code < 200 || code > 599 || code == 204 || code == 304 {
			p.add("%s.%s: %d; want an HTTP status from 200 to 599 that has a body", field, status, code)
		}
	}
}
