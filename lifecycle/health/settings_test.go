package health

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"usher.dev/usher/lifecycle"
)

func TestBadSettingsAreNamed(t *testing.T) {
	many := func(n int, format string) string {
		var parts []string
		for i := range n {
			parts = append(parts, fmt.Sprintf(format, i))
		}
		return strings.Join(parts, ",")
	}
	const db = `"components": {"db": {` + ready + `}}`
	for _, tc := range []struct{ settings, want string }{
		{`{"components": {"db": {}}}`, `health.components.db: no probe; want a startupProbe, livenessProbe or readinessProbe`},
		{`{"components": {"d b": {` + ready + `}}}`, `health.components: name "d b": want 1 to 63 of`},
		{`{"components": {"": {` + ready + `}}}`, `health.components: name "": want 1 to 63 of`},
		{`{"components": {"..": {` + ready + `}}}`, `health.components: name "..": want 1 to 63 of`},
		{`{"components": {"workers": {` + ready + `}}}`, `health.components: name "workers": is taken`},
		{`{"components": {"liveness": {` + ready + `}}}`, `health.components: name "liveness": is taken`},
		{`{"components": {"db": {"readinessProbe": {"tcpSocket": {"port": 0}}}}}`, `health.components.db.readinessProbe.tcpSocket.port: is 0, must be 1 to 65535`},
		{`{"components": {"db": {"livenessProbe": {"exec": {"command": ["x"]}, "periodSeconds": -1}}}}`, `health.components.db.livenessProbe.periodSeconds: is -1, must not be negative`},
		{`{"components": {"db": {"startupProbe": {}}}}`, `health.components.db.startupProbe: says not what to do`},
		{`{"components": {"db": {"readinessProbe": {"tcpSocket": {"port": "pg"}}}}}`, `port is "pg", must be a number: no named ports are known here`},
		{`{"components": {` + many(101, `"c%d": {`+ready+`}`) + `}}`, `health.components: 101 of them; want at most 100`},
		{`{"workers": {}}`, `health.workers: neither required nor ids nor probes; want how many workers, or which`},
		{`{"workers": {"required": -1}}`, `health.workers.required: -1; want 1 to 1024`},
		{`{"workers": {"required": 1025}}`, `health.workers.required: 1025; want 1 to 1024`},
		{`{"workers": {"ids": [` + many(1025, `"%d"`) + `]}}`, `health.workers.ids: 1025 of them; want at most 1024`},
		{`{"workers": {"required": 2, "ids": ["a"]}}`, `health.workers: required 2 and ids; want one of them`},
		{`{"workers": {"ids": ["a", "a"]}}`, `health.workers.ids: "a" is there twice`},
		{`{"workers": {"ids": ["a/b"]}}`, `health.workers.ids: "a/b": want 1 to 63 of`},
		{`{"workers": {"required": 2, "quorum": 3}}`, `health.workers.quorum: 3; want 1 to 2`},
		{`{"workers": {"required": 2, "quorum": -1}}`, `health.workers.quorum: -1; want 1 to 2`},
		{`{"workers": {"required": 2, "ttlSeconds": 3601}}`, `health.workers.ttlSeconds: 3601; want 1 to 3600`},
		{`{"workers": {"probes": {"a": {"grpc": {"port": 0}}}}}`, `health.workers.probes.a.grpc.port: is 0, must be 1 to 65535`},
		{`{"workers": {"probes": {"a b": {"grpc": {"port": 1}}}}}`, `health.workers.probes: id "a b": want 1 to 63 of`},
		{`{"groups": {"g": {}}}`, `health.groups.g.include: is empty; want names of components or groups, or "*"`},
		{`{"groups": {"g": {"include": ["dbb"]}}, ` + db + `}`, `health.groups.g.include: "dbb": no such component or group; there are db, g, lifecycle, liveness, livenessState, readiness, readinessState, startup`},
		{`{"groups": {"g": {"include": ["workers"]}}}`, `health.groups.g.include: "workers": no such component or group`},
		{`{"groups": {"g": {"include": ["g"]}}}`, `health.groups.g.include: a cycle: g -> g`},
		{`{"groups": {"a": {"include": ["b"]}, "b": {"include": ["c"]}, "c": {"include": ["b"]}}}`, `health.groups.b.include: a cycle: b -> c -> b`},
		{`{"groups": {"a": {"include": ["liveness"]}, "liveness": {"include": ["a"]}}}`, `health.groups.liveness.include: a cycle: liveness -> a -> liveness`},
		{`{"groups": {"g": {"include": ["*"], "exclude": ["x"]}}}`, `health.groups.g.exclude: "x" isn't in the group`},
		{`{"groups": {"liveness": {"exclude": ["livenessState"]}}}`, `health.groups.liveness.exclude: "livenessState" decides liveness itself and can't be taken out`},
		{`{"groups": {"readiness": {"exclude": ["lifecycle"]}}}`, `health.groups.readiness.exclude: "lifecycle" decides readiness itself`},
		{`{"groups": {"db": {"include": ["*"]}}, ` + db + `}`, `health.groups: name "db": is a component's; want another`},
		{`{"groups": {"workers": {"include": ["*"]}}}`, `health.groups: name "workers": is a component's; want another`},
		{`{"groups": {"a/b": {"include": ["*"]}}}`, `health.groups: name "a/b": want 1 to 63 of`},
		{`{"groups": {"g": {"include": ["*"], "showDetails": "sometimes"}}}`, `health.groups.g.showDetails: "sometimes"; want never, when-authorized or always`},
		{`{"showComponents": "x"}`, `health.showComponents: "x"; want never, when-authorized or always`},
		{`{"statusCodes": {"FATAL": 500}}`, `health.statusCodes: status "FATAL"; want DOWN, OUT_OF_SERVICE, UP, UNKNOWN or DEGRADED`},
		{`{"statusCodes": {"DOWN": 5}}`, `health.statusCodes.DOWN: 5; want an HTTP status from 200 to 599 that has a body`},
		{`{"groups": {"g": {"include": ["*"], "statusCodes": {"UP": 204}}}}`, `health.groups.g.statusCodes.UP: 204; want`},
		{`{"groups": {` + many(101, `"g%d": {"include": ["*"]}`) + `}}`, `health.groups: 101 of them; want at most 100`},
	} {
		_, err := New(Config{Settings: parse(t, tc.settings)})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%.200s:\ngot  %v\nwant %s", tc.settings, err, tc.want)
			continue
		}
		if n := strings.Count(err.Error(), "\n"); n > 0 {
			t.Errorf("%.200s: %d lines for one mistake: %v", tc.settings, n+1, err)
		}
	}
}

func TestEveryMistakeIsNamedAtOnce(t *testing.T) {
	err := parse(t, `{"components": {"db": {}}, "workers": {}, "showDetails": "x"}`).Validate()
	if err == nil || strings.Count(err.Error(), "\nhealth.") != 2 {
		t.Errorf("got %v", err)
	}
}

func TestGroupsMembersAndDefaults(t *testing.T) {
	gs, err := parse(t, `{
		"components": {
			"all": {`+threeProbes+`}, "live": {"livenessProbe": {"exec": {"command": ["x"]}}}, "start": {"startupProbe": {"exec": {"command": ["x"]}}}, "rdy": {`+ready+`}},
		"workers": {"required": 1},
		"groups": {"mine": {"include": ["rdy", "other", "startup", "rdy"]}, "other": {"include": ["*"], "exclude": ["live", "lifecycle"]}, "startup": {"exclude": ["start"]},
			"less": {"include": ["readiness"]}}}`).resolve()
	if err != nil {
		t.Fatal(err)
	}
	for group, want := range map[string]string{
		"liveness":  "livenessState all live start workers",
		"readiness": "readinessState lifecycle all rdy start workers",
		"startup":   "all",
		"mine":      "rdy other startup",
		"other":     "livenessState readinessState all rdy start workers",
		"less":      "readiness",
	} {
		var names []string
		for _, m := range gs.named[group].members {
			names = append(names, m.name)
		}
		if got := strings.Join(names, " "); got != want {
			t.Errorf("%s: got %s, want %s", group, got, want)
		}
	}
}

func TestReadinessIsWhatItsGroupIs(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+ready+`}, "s3": {`+ready+`}, "report": {`+ready+`}},
		"groups": {"storage": {"include": ["db", "s3"]}, "readiness": {"include": ["storage"]}}}`)
	r.turn("db", true, true, true)
	r.readiness(lifecycle.RefusingTraffic, "component s3: readiness probe has not succeeded yet")
	r.turn("s3", true, true, true)
	r.readiness(lifecycle.AcceptingTraffic, "") // report isn't in the group
	r.setReadiness(lifecycle.RefusingTraffic, "")
	r.readiness(lifecycle.RefusingTraffic, "application") // the application's word is, always
}

func FuzzSettings(f *testing.F) {
	for _, s := range []string{
		`{}`, `{"components": {"db": {"critical": false, "readinessProbe": {"tcpSocket": {"port": 5432}}}}}`,
		`{"workers": {"required": 3, "quorum": 2, "probes": {"a": {"grpc": {"port": 1}}}}}`,
		`{"groups": {"a": {"include": ["b", "*"]}, "b": {"include": ["a"]}, "liveness": {"exclude": ["x"]}}}`,
		`{"groups": {"readiness": {"include": ["startup"], "statusCodes": {"DOWN": 500}}}, "showDetails": "always"}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s, err := strict(text)
		if err != nil {
			return
		}
		invalid := s.Validate()
		h, err := New(Config{Settings: s})
		if invalid != nil && err == nil {
			t.Fatalf("%s: New takes what Validate refuses: %v", text, invalid)
		}
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "health.") && !strings.HasPrefix(line, "probes of ") {
					t.Errorf("%s: a line that names no field: %s", text, line)
				}
			}
			return
		}
		for name, g := range h.groups.named {
			if _, err := json.Marshal(h.describeGroup(g, view{aspect: g.aspect}, description{true, true})); err != nil {
				t.Errorf("%s: group %s: %v", text, name, err)
			}
		}
	})
}
