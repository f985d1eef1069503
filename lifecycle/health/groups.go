package health

import (
	"maps"
	"slices"
	"strings"

	"usher.dev/usher/internal/api"
)

// kind of a member.
type kind int

const (
	ofLiveness kind = iota // livenessState
	ofReadiness
	ofLifecycle
	ofComponent
	ofWorkers
	ofGroup
)

// member of a group.
type member struct {
	name  string
	kind  kind
	group *group // of ofGroup
}

// aspect in which a member is seen.
type aspect int

const (
	overall aspect = iota
	asStartup
	asLiveness
	asReadiness
)

// group is a Group with its defaults, its members found.
type group struct {
	name           string
	aspect         aspect
	members        []member // in the order of precedence of causes
	showComponents string
	showDetails    string
	codes          map[string]int
}

// code is the HTTP status for a status.
func (g *group) code(status string) int {
	if code, ok := g.codes[status]; ok {
		return code
	}
	if status == api.HealthDown || status == api.HealthOutOfService {
		return 503
	}
	return 200
}

func (g *group) find(name string) (member, bool) {
	i := slices.IndexFunc(g.members, func(m member) bool { return m.name == name })
	if i < 0 {
		return member{}, false
	}
	return g.members[i], true
}

// groups are all of them; primary, which has no name and every member, is what /health itself shows.
type groups struct {
	primary *group
	named   map[string]*group
}

func (gs *groups) names() []string { return slices.Sorted(maps.Keys(gs.named)) }

// resolve checks the settings, and finds the members of every group.
func (s Settings) resolve() (*groups, error) {
	var p problems
	s.checkComponents(&p)
	s.Workers.check(&p)
	checkShow(&p, "showComponents", s.ShowComponents)
	checkShow(&p, "showDetails", s.ShowDetails)
	checkCodes(&p, "statusCodes", s.StatusCodes)

	r := resolver{s: s, p: &p, all: s.all(), done: map[string]*group{}}
	if !s.checkGroups(&p) {
		return nil, p.err()
	}
	for _, name := range append([]string{liveness, readiness, startup}, slices.Sorted(maps.Keys(s.Groups))...) {
		r.group(name, nil)
	}
	primary := r.settle("", Group{})
	primary.members = r.all
	return &groups{primary, r.done}, p.err()
}

// all are the members that are not groups.
func (s Settings) all() []member {
	all := []member{{name: livenessState, kind: ofLiveness}, {name: readinessState, kind: ofReadiness}, {name: lifecycleName, kind: ofLifecycle}}
	for _, name := range slices.Sorted(maps.Keys(s.Components)) {
		all = append(all, member{name: name, kind: ofComponent})
	}
	if s.Workers != nil {
		all = append(all, member{name: workersName, kind: ofWorkers})
	}
	return all
}

type resolver struct {
	s    Settings
	p    *problems
	all  []member
	done map[string]*group
}

// settle gives a group its settings.
func (r *resolver) settle(name string, g Group) *group {
	first := func(values ...string) string {
		return values[slices.IndexFunc(values, func(v string) bool { return v != "" })]
	}
	out := &group{
		name:           name,
		showComponents: first(g.ShowComponents, r.s.ShowComponents, Always),
		showDetails:    first(g.ShowDetails, r.s.ShowDetails, WhenAuthorized),
		codes:          map[string]int{},
	}
	maps.Copy(out.codes, r.s.StatusCodes)
	maps.Copy(out.codes, g.StatusCodes)
	switch name {
	case liveness:
		out.aspect = asLiveness
	case readiness:
		out.aspect = asReadiness
	case startup:
		out.aspect = asStartup
	}
	return out
}

// group resolves one group and those that it includes; via are the groups that led here.
func (r *resolver) group(name string, via []string) *group {
	if i := slices.Index(via, name); i >= 0 {
		r.p.add("groups.%s.include: a cycle: %s", name, strings.Join(append(slices.Clone(via[i:]), name), " -> "))
		return nil
	}
	if g, ok := r.done[name]; ok {
		return g
	}
	via = append(slices.Clone(via), name)
	set, field := r.s.Groups[name], "groups."+name
	g := r.settle(name, set)
	fixed := map[string][]string{liveness: {livenessState}, readiness: {readinessState, lifecycleName}}[name]
	var chosen []string
	if len(set.Include) == 0 {
		if !predefined(name) {
			r.p.add("%s.include: is empty; want names of components or groups, or \"*\"", field)
		}
		chosen = r.byDefault(g.aspect)
	}
	for _, include := range set.Include {
		if include == "*" {
			for _, m := range r.all {
				chosen = append(chosen, m.name)
			}
			continue
		}
		if !r.known(include) {
			r.p.add("%s.include: %.80q: no such component or group; there are %s", field, include, r.names())
			continue
		}
		chosen = append(chosen, include)
	}
	chosen = append(chosen, fixed...)
	for _, exclude := range set.Exclude {
		switch {
		case slices.Contains(fixed, exclude):
			r.p.add("%s.exclude: %q decides %s itself and can't be taken out", field, exclude, name)
		case !slices.Contains(chosen, exclude):
			r.p.add("%s.exclude: %.80q isn't in the group", field, exclude)
		}
		chosen = slices.DeleteFunc(chosen, func(c string) bool { return c == exclude })
	}
	for _, m := range r.all {
		if slices.Contains(chosen, m.name) {
			g.members = append(g.members, m)
		}
	}
	for _, other := range slices.Sorted(maps.Keys(r.s.Groups)) {
		if slices.Contains(chosen, other) {
			if inner := r.group(other, via); inner != nil {
				g.members = append(g.members, member{name: other, kind: ofGroup, group: inner})
			}
		}
	}
	for _, other := range []string{liveness, readiness, startup} {
		if _, own := r.s.Groups[other]; !own && slices.Contains(chosen, other) {
			if inner := r.group(other, via); inner != nil {
				g.members = append(g.members, member{name: other, kind: ofGroup, group: inner})
			}
		}
	}
	r.done[name] = g
	return g
}

// byDefault are the members of a predefined group.
func (r *resolver) byDefault(a aspect) []string {
	var names []string
	for name, c := range r.s.Components {
		if a == asStartup && c.StartupProbe != nil ||
			a == asLiveness && (c.StartupProbe != nil || c.LivenessProbe != nil) ||
			a == asReadiness && (c.StartupProbe != nil || c.ReadinessProbe != nil) {
			names = append(names, name)
		}
	}
	if r.s.Workers != nil && (a == asLiveness || a == asReadiness) {
		names = append(names, workersName)
	}
	return names
}

func (r *resolver) known(name string) bool {
	_, own := r.s.Groups[name]
	return own || predefined(name) || slices.ContainsFunc(r.all, func(m member) bool { return m.name == name })
}

func (r *resolver) names() string {
	names := []string{liveness, readiness, startup}
	for _, m := range r.all {
		names = append(names, m.name)
	}
	for name := range r.s.Groups {
		if !predefined(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	if len(names) > 20 {
		names = append(names[:20], "...")
	}
	return strings.Join(names, ", ")
}
