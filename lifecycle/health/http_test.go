package health

import (
	"encoding/json"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

func TestShapes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // the bubble's clock begins at midnight UTC 2000-01-01
		r := newRig(t, `{
			"components": {"db": {`+threeProbes+`}, "cache": {"critical": false, `+ready+`}},
			"workers": {"required": 1},
			"groups": {"storage": {"include": ["db", "cache"]}, "all": {"include": ["storage", "readiness"], "showComponents": "when-authorized"}}}`)
		time.Sleep(time.Second)
		r.turn("db", true, true, true)
		r.turn("cache", true, true, false)
		r.beat("w1")
		r.SetLifecycle(Lifecycle{State: "Online", Cause: "endpoint ready in service web"})
		for _, tc := range []struct {
			path, header string
			code         int
			want         string
		}{
			{"/health", "", 200, `{"status": "UP",
				"components": {
					"cache": {"status": "DEGRADED"}, "db": {"status": "UP"}, "lifecycle": {"status": "UP"}, "livenessState": {"status": "UNKNOWN"},
					"readinessState": {"status": "UNKNOWN"}, "workers": {"status": "UP", "components": {"w1": {"status": "UP"}}}},
				"groups": ["all", "liveness", "readiness", "startup", "storage"]}`},
			{"/health/", "", 200, ``},
			{"/health/liveness", "", 200, `{"status": "UP", "components": {
				"db": {"status": "UP"}, "livenessState": {"status": "UNKNOWN"}, "workers": {"status": "UNKNOWN", "components": {"w1": {"status": "UP"}}}}}`},
			{"/health/startup", "", 200, `{"status": "UP", "components": {"db": {"status": "UP"}}}`},
			{"/health/readiness/lifecycle", "", 200, `{"status": "UP"}`},
			{"/health/readiness/lifecycle", "let me in", 200, `{"status": "UP", "details": {"cause": "endpoint ready in service web", "state": "Online"}}`},
			{"/health/storage", "let me in", 200, `{"status": "UP", "components": {
				"cache": {"status": "DEGRADED", "details": {"cause": "readiness probe has not succeeded yet", "critical": false}},
				"db": {"status": "UP", "details": {"critical": true}}}}`},
			{"/health/readiness/workers/w1", "let me in", 200, `{"status": "UP", "details": {
				"expires": "2000-01-01T00:00:11Z", "role": "worker", "since": "2000-01-01T00:00:01Z", "state": "READY"}}`},
			{"/health/all", "", 200, `{"status": "UP"}`},
			{"/health/all/storage", "", 404, `{"error": "no such group, or its components aren't shown to this caller"}`},
			{"/health/all/storage", "wrong", 404, ``},
			{"/health/all/storage/db", "let me in", 200, `{"status": "UP", "details": {"critical": true}}`},
			{"/health/startup/cache", "", 404, `{"error": "no group or component \"startup/cache\"; GET /health names those that there are"}`},
			{"/health/nonesuch", "", 404, ``},
			{"/health/db/x", "", 404, ``},
			{"/health/workers/w1/x", "", 404, ``},
			{"/health/workers/w2", "", 404, ``},
		} {
			w := r.ask(r.hook, "GET", tc.path, "", api.TokenHeader, tc.header)
			if w.Code != tc.code {
				t.Errorf("%s: got %d %s", tc.path, w.Code, w.Body)
			}
			if tc.want != "" {
				equalJSON(t, w.Body.Bytes(), tc.want)
			}
			if got := w.Header().Get("Content-Type"); got != "application/json" {
				t.Errorf("%s: content type %q", tc.path, got)
			}
		}
		// What fails, and with every detail.
		r.setReadiness(lifecycle.RefusingTraffic, "busy")
		r.setLiveness(lifecycle.Correct, "")
		w := r.ask(r.control, "GET", "/health/readiness", "")
		if w.Code != 503 {
			t.Errorf("got %d", w.Code)
		}
		equalJSON(t, w.Body.Bytes(), `{"status": "OUT_OF_SERVICE", "components": {
			"cache": {"status": "DEGRADED", "details": {"cause": "readiness probe has not succeeded yet", "critical": false}},
			"db": {"status": "UP", "details": {"critical": true}},
			"lifecycle": {"status": "UP", "details": {"cause": "endpoint ready in service web", "state": "Online"}},
			"readinessState": {"status": "OUT_OF_SERVICE", "details": {"cause": "busy", "since": "2000-01-01T00:00:01Z", "state": "REFUSING_TRAFFIC"}},
			"workers": {"status": "UP",
				"components": {"w1": {"status": "UP", "details": {"expires": "2000-01-01T00:00:11Z", "role": "worker", "since": "2000-01-01T00:00:01Z", "state": "READY"}}},
				"details": {"quorum": 1, "required": 1}}}}`)
		equalJSON(t, []byte(r.do("GET", "/v1/availability/readiness", "")), `{"state": "REFUSING_TRAFFIC", "cause": "application: busy", "since": "2000-01-01T00:00:01Z"}`)
		equalJSON(t, []byte(r.do("GET", "/v1/workers/", "")), `[{"id": "w1", "state": "READY", "role": "worker", "ttlSeconds": 10, "since": "2000-01-01T00:00:01Z", "expires": "2000-01-01T00:00:11Z"}]`)
		if got := r.ask(r.hook, "GET", "/health?verbose", "").Body.String(); got != `[+]cache degraded: ok
[+]db ok
[+]lifecycle ok
[+]livenessState ok
[-]readinessState failed: reason withheld
[+]workers ok
health check failed
` {
			t.Errorf("verbose: %s", got)
		}
	})
}

func TestDetailsAreShownToWhomTheyMayBe(t *testing.T) {
	const details, components = `"details"`, `"components"`
	for _, tc := range []struct {
		settings, path            string
		hook, withToken, loopback string // what of the two is in the answer
	}{
		{`{}`, "/health", components, components + details, components + details},
		{`{"showDetails": "always"}`, "/health", components + details, components + details, components + details},
		{`{"showDetails": "never"}`, "/health", components, components, components},
		{`{"showComponents": "never"}`, "/health", "", "", ""},
		{`{"showComponents": "when-authorized"}`, "/health", "", components + details, components + details},
		{`{"showComponents": "never", "groups": {"readiness": {"showComponents": "always", "showDetails": "never"}}}`, "/health/readiness", components, components, components},
	} {
		r := newRig(t, tc.settings)
		r.SetLifecycle(Lifecycle{State: "Online"})
		for who, w := range map[string]*httptest.ResponseRecorder{
			tc.hook + "hook":      r.ask(r.hook, "GET", tc.path, ""),
			tc.withToken + "with": r.ask(r.hook, "GET", tc.path, "", api.TokenHeader, "let me in"),
			tc.loopback + "loop":  r.ask(r.control, "GET", tc.path, ""),
		} {
			for _, part := range []string{details, components} {
				if got := strings.Contains(w.Body.String(), part); got != strings.Contains(who, part) {
					t.Errorf("%s %s: %s: %s", tc.settings, tc.path, who, w.Body)
				}
			}
		}
	}
}

func TestStatusCodesAreMapped(t *testing.T) {
	r := newRig(t, `{"components": {"cache": {"critical": false, `+ready+`}}, "statusCodes": {"OUT_OF_SERVICE": 502},
		"groups": {"readiness": {"statusCodes": {"OUT_OF_SERVICE": 429}}, "deps": {"include": ["cache"], "statusCodes": {"DEGRADED": 503}}}}`)
	r.setReadiness(lifecycle.RefusingTraffic, "")
	for path, want := range map[string]int{"/health": 502, "/health/readiness": 429, "/health/deps": 200, "/health/deps/cache": 503, "/health/cache": 200} {
		if w := r.ask(r.hook, "GET", path, ""); w.Code != want {
			t.Errorf("%s: got %d, want %d", path, w.Code, want)
		}
	}
}

// Each kubelet probe of a container may ask for its own component.
func TestComponentIsSeenInItsGroupsAspect(t *testing.T) {
	r := newRig(t, `{"components": {"web": {`+threeProbes+`}, "api": {`+threeProbes+`}}, "groups": {"both": {"include": ["web", "api"]}, "liveness": {"include": ["both"]}}}`)
	r.turn("web", true, true, false)
	r.turn("api", true, false, true)
	for path, want := range map[string]int{
		"/health/liveness": 503, "/health/liveness/both/web": 200, "/health/liveness/both/api": 503, "/health/readiness/web": 503, "/health/readiness/api": 200,
		"/health/startup/web": 200, "/health/web": 503, "/health/api": 503,
	} {
		if w := r.ask(r.hook, "GET", path, ""); w.Code != want {
			t.Errorf("%s: got %d %s", path, w.Code, w.Body)
		}
	}
	r.livenessIs(lifecycle.Broken, "component api: liveness probe failed")
}

func TestPredefinedGroupKeepsItsAspectInAnother(t *testing.T) {
	r := newRig(t, `{"components": {"web": {`+threeProbes+`}}, "groups": {"mine": {"include": ["liveness"]}, "ours": {"include": ["readiness"]}}}`)
	r.turn("web", true, true, false)
	for path, want := range map[string]int{"/health/mine": 200, "/health/mine/liveness/web": 200, "/health/ours": 503, "/health/ours/readiness/web": 503} {
		if w := r.ask(r.hook, "GET", path, ""); w.Code != want {
			t.Errorf("%s: got %d %s", path, w.Code, w.Body)
		}
	}
}

func TestLongOutputIsCut(t *testing.T) {
	r := newRig(t, `{"components": {"db": {`+ready+`}}}`)
	r.turn("db", true, true, true)
	r.turn("db", true, true, false, strings.Repeat("ä", 10_000))
	if got := r.Availability().Readiness.Cause; len(got) > maxCause+100 || !strings.HasSuffix(got, "ä…") {
		t.Errorf("a cause of %d bytes: %.80s", len(got), got)
	}
}

func TestBadRequestsAreRefusedAndChangeNothing(t *testing.T) {
	r := newRig(t, `{"workers": {"required": 1}}`)
	r.setReadiness(lifecycle.AcceptingTraffic, "before")
	r.setLiveness(lifecycle.Correct, "before")
	r.beat("w")
	before := [2]string{r.do("GET", "/health", ""), r.do("GET", "/v1/workers/", "")}
	for _, tc := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"PUT", "/v1/availability/readiness", ``, 400, "body: is no JSON object; want one with cause, state"},
		{"PUT", "/v1/availability/readiness", `REFUSING_TRAFFIC`, 400, "body: is no JSON object; want one with cause, state"},
		{"PUT", "/v1/availability/readiness", `["REFUSING_TRAFFIC"]`, 400, "body: is no JSON object"},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC"`, 400, "body: is no JSON: "},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC",}`, 400, "body: is no JSON: "},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC"} x`, 400, "body: goes on after its JSON object"},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC"}{}`, 400, "body: goes on after its JSON object"},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "why": "x"}`, 400, `body: field \"why\": there is none; want cause, state`},
		{"PUT", "/v1/availability/readiness", `{"State": "REFUSING_TRAFFIC"}`, 400, `body: field \"State\": there is none`},
		{"PUT", "/v1/availability/readiness", `{"state": "ACCEPTING_TRAFFIC", "state": "REFUSING_TRAFFIC"}`, 400, `body: field \"state\": is there twice`},
		{"PUT", "/v1/availability/readiness", `{"state": 1}`, 400, `body: field \"state\": 1; want a string`},
		{"PUT", "/v1/availability/readiness", `{"state": null}`, 400, `body: field \"state\": null; want a string`},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "cause": {}}`, 400, `body: field \"cause\": {}; want a string`},
		{"PUT", "/v1/availability/readiness", `{}`, 400, `state: \"\"; want ACCEPTING_TRAFFIC or REFUSING_TRAFFIC`},
		{"PUT", "/v1/availability/readiness", `{"state": "BROKEN"}`, 400, `state: \"BROKEN\"; want ACCEPTING_TRAFFIC or REFUSING_TRAFFIC`},
		{"PUT", "/v1/availability/liveness", `{"state": "REFUSING_TRAFFIC"}`, 400, `state: \"REFUSING_TRAFFIC\"; want CORRECT or BROKEN`},
		{"PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "cause": "` + strings.Repeat("x", 1<<20) + `"}`, 413, "body: is larger than 65536 bytes"},
		{"PUT", "/v1/availability/readiness", strings.Repeat("[", 60_000), 400, "body: is no JSON object"},
		{"PUT", "/v1/availability/readiness", `{"state": ` + strings.Repeat("[", 60_000), 400, `body: field \"state\": is no JSON`},
		{"PUT", "/v1/availability/startup", `{"state": "UP"}`, 404, `\"startup\" is no state; want /v1/availability/liveness or /v1/availability/readiness`},
		{"PUT", "/v1/availability/", `{"state": "UP"}`, 404, `\"\" is no state`},
		{"POST", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC"}`, 405, "method POST: want GET or PUT"},
		{"PUT", "/v1/workers/a%20b", `{"state": "NOT_READY"}`, 400, `worker id \"a b\": want 1 to 63 of A-Z a-z 0-9 . _ -`},
		{"PUT", "/v1/workers/a%2fb", `{"state": "NOT_READY"}`, 400, `worker id \"a/b\": want`},
		{"PUT", "/v1/workers/a%0ab", `{"state": "NOT_READY"}`, 400, `worker id \"a\\nb\": want`},
		{"PUT", "/v1/workers/%c3%a4", `{"state": "NOT_READY"}`, 400, `worker id \"ä\": want`},
		{"PUT", "/v1/workers/" + strings.Repeat("a", 64), `{"state": "NOT_READY"}`, 400, `: want 1 to 63 of`},
		{"PUT", "/v1/workers/", `{"state": "NOT_READY"}`, 405, "method PUT: want GET"},
		{"PUT", "/v1/workers/w", `{"state": "SILENT"}`, 400, `state: \"SILENT\"; want READY or NOT_READY`},
		{"PUT", "/v1/workers/w", `{"state": "ready"}`, 400, `state: \"ready\"; want READY or NOT_READY`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "role": "boss"}`, 400, `role: \"boss\"; want master or worker`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "ttlSeconds": -1}`, 400, `ttlSeconds: -1; want 1 to 3600`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "ttlSeconds": 3601}`, 400, `ttlSeconds: 3601; want 1 to 3600`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "ttlSeconds": 1.5}`, 400, `body: field \"ttlSeconds\": 1.5; want a whole number`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "ttlSeconds": 99999999999999999999}`, 400, `want a whole number`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "ttlSeconds": "10s"}`, 400, `want a whole number`},
		{"PUT", "/v1/workers/w", `{"state": "NOT_READY", "id": "w"}`, 400, `field \"id\": there is none; want cause, role, state, ttlSeconds`},
		{"PUT", "/v1/workers/w", strings.Repeat(" ", api.MaxBody) + `{"state": "NOT_READY"}`, 413, "body: is larger than 65536 bytes"},
		{"PATCH", "/v1/workers/w", `{}`, 405, "method PATCH: want GET or PUT or DELETE"},
		{"GET", "/v1/workers/x", ``, 404, "worker x: no such worker"},
		{"POST", "/health", ``, 405, "method POST: want GET or HEAD"},
		{"PUT", "/health/readiness", `{"status": "DOWN"}`, 405, "method PUT: want GET or HEAD"},
	} {
		w := r.ask(r.control, tc.method, tc.path, tc.body)
		got := w.Body.String()
		if w.Code != tc.code || !strings.Contains(got, tc.want) || strings.Count(got, "\n") != 3 || len(got) > 500 {
			t.Errorf("%s %s %.80s: got %d %.500s, want %d %s", tc.method, tc.path, tc.body, w.Code, got, tc.code, tc.want)
		}
	}
	if after := [2]string{r.do("GET", "/health", ""), r.do("GET", "/v1/workers/", "")}; after != before {
		t.Errorf("before %s\nafter %s", before, after)
	}
	for _, path := range []string{"/v1/availability/readiness", "/v1/workers/w", "/v1/workers/"} {
		if w := r.ask(r.hook, "PUT", path, `{"state": "NOT_READY"}`); w.Code != 404 {
			t.Errorf("hook listener, %s: %d %s", path, w.Code, w.Body)
		}
	}
}

func TestLongCauseIsCut(t *testing.T) {
	r := newRig(t, `{}`)
	r.do("PUT", "/v1/availability/readiness", `{"state": "REFUSING_TRAFFIC", "cause": "`+strings.Repeat("x", 50_000)+`"}`)
	if got := r.Availability().Readiness; got.State != lifecycle.RefusingTraffic || len(got.Cause) > maxCause+len("application: ") {
		t.Errorf("a cause of %d bytes", len(got.Cause))
	}
}

func TestVerbose(t *testing.T) {
	passed, failed := Check{Name: "ping"}, Check{Name: "etcd", Err: errUnknown}
	for _, tc := range []struct {
		query  string
		checks []Check
		code   int
		want   string
	}{
		{"", []Check{passed}, 200, "ok"},
		{"?verbose", []Check{passed}, 200, "[+]ping ok\nreadyz check passed\n"},
		{"", []Check{passed, failed}, 500, "[+]ping ok\n[-]etcd failed: reason withheld\nreadyz check failed\n"},
		{"?exclude=etcd", []Check{passed, failed}, 200, "ok"},
		{"?verbose&exclude=etcd&exclude=x&exclude=a", []Check{passed, failed}, 200, "[+]ping ok\n[+]etcd excluded: ok\nwarn: some health checks cannot be excluded: no matches for \"a\",\"x\"\nreadyz check passed\n"},
		{"?verbose", nil, 200, "readyz check passed\n"},
	} {
		w := httptest.NewRecorder()
		Verbose(w, httptest.NewRequest("GET", "/readyz"+tc.query, nil), "readyz", tc.checks...)
		if w.Code != tc.code || w.Body.String() != tc.want {
			t.Errorf("%s: got %d %q, want %d %q", tc.query, w.Code, w.Body, tc.code, tc.want)
		}
	}
}

func TestToken(t *testing.T) {
	is := regexp.MustCompile(`^[A-Za-z0-9._-]{1,63}$`)
	for c := range rune(300) {
		for _, s := range []string{string(c), "a" + string(c), string(c) + "a" + string(c)} {
			if got, want := token(s), is.MatchString(s) && s != "."; got != want {
				t.Errorf("%q: got %v", s, got)
			}
		}
	}
	for s, want := range map[string]bool{"": false, "..": false, "...": true, strings.Repeat("a", 63): true, strings.Repeat("a", 64): false, "a\n": false} {
		if token(s) != want {
			t.Errorf("%q: got %v", s, !want)
		}
	}
}

func FuzzBodies(f *testing.F) {
	for _, s := range []string{``, `{}`, `{"state": "READY"}`, `{"state": "READY", "ttlSeconds": 1e2}`, `{"state": "\ud800", "cause": "\u0000"}`, `{"state"`, `[[`, `{"a":{"b":[]}} `} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, body string) {
		r := newRig(t, `{"workers": {"required": 1}}`)
		before := r.Availability()
		for path, valid := range map[string]func() bool{
			"/v1/availability/readiness": func() bool { return r.Availability().Readiness != before.Readiness },
			"/v1/workers/w":              func() bool { return len(r.workers.known) == 1 },
		} {
			req := httptest.NewRequest("PUT", path, strings.NewReader(body))
			w := httptest.NewRecorder()
			r.control.ServeHTTP(w, req)
			switch w.Code {
			case 200:
				if !json.Valid([]byte(body)) || !valid() {
					t.Errorf("%s %q: accepted: %s", path, body, w.Body)
				}
			case 400, 413:
				var e api.Error
				if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error == "" || strings.ContainsAny(e.Error, "\n") {
					t.Errorf("%s %q: %d %s", path, body, w.Code, w.Body)
				}
				if path != "/v1/workers/w" && r.readinessWord() != "" || path == "/v1/workers/w" && len(r.workers.known) != 0 {
					t.Errorf("%s %q: refused, and half applied", path, body)
				}
			default:
				t.Errorf("%s %q: %d %s", path, body, w.Code, w.Body)
			}
		}
	})
}

func (r *rig) readinessWord() lifecycle.ReadinessState { return r.Health.readiness.state }
