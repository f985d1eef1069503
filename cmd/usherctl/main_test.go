package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/registry"
)

func ctl(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(t.Context(), args, func(name string) string { return env[name] }, &out, &err)
	return code, out.String(), err.String()
}

func TestBadInputIsOneLineThatNamesIt(t *testing.T) {
	for _, tc := range []struct {
		args []string
		env  map[string]string
		want string
	}{
		{[]string{"--nope"}, nil, "unknown flag: --nope"},
		{[]string{"drain"}, nil, `unknown command "drain": want one of get, hold, resume, status, watch (usherctl --help)`},
		{[]string{"--bogus", "get", "instances"}, nil, "unknown flag: --bogus"},
		{[]string{"get"}, nil, "get what?"},
		{[]string{"get", "pods"}, nil, `unknown command "pods": want one of instances, verdicts`},
		{[]string{"get", "instances", "a", "b"}, nil, "want usherctl get instances [SERVICE]"},
		{[]string{"get", "instances", "a/b"}, nil, `SERVICE is "a/b": want a name without '/'`},
		{[]string{"get", "instances", "-o", "xml"}, nil, `--output is "xml": want table, wide, json or yaml`},
		{[]string{"get", "instances", "-n", ""}, nil, `--namespace is ""`},
		{[]string{"get", "instances", "-n", "a", "-A"}, nil, "[all-namespaces namespace]"},
		{[]string{"watch", "--cluster", "a/b"}, nil, `--cluster is "a/b"`},
		{[]string{"watch"}, map[string]string{"USHER_CLUSTER": "a/b"}, `USHER_CLUSTER is "a/b"`},
		{[]string{"watch"}, map[string]string{"ETCDCTL_DIAL_TIMEOUT": "x"}, `ETCDCTL_DIAL_TIMEOUT is "x"`},
		{[]string{"watch", "--endpoints", "etcd"}, nil, `endpoints has "etcd": want host:port`},
		{[]string{"watch", "--cert", "c", "--endpoints", "https://a:1"}, nil, `cert is "c", but key is empty`},
		{[]string{"status"}, nil, "an argument is missing: want usherctl status POD"},
		{[]string{"get", "verdicts", "a/b"}, nil, `POD is "a/b": want a name without '/'`},
		{[]string{"hold", "--reason", "x"}, nil, "an argument is missing: want usherctl hold POD"},
		{[]string{"hold", "p", "--for", "soon"}, nil, `invalid argument "soon" for "--for"`},
		{[]string{"resume", "a", "b"}, nil, `"b" is one argument too many: want usherctl resume POD`},
	} {
		code, stdout, stderr := ctl(t, tc.env, append([]string{"usherctl"}, tc.args...)...)
		if code != 1 || stdout != "" || !strings.HasPrefix(stderr, "usherctl: ") || !strings.Contains(stderr, tc.want) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%q: code %d, stdout %q, stderr %q; want one line with %q", tc.args, code, stdout, stderr, tc.want)
		}
	}
}

func TestCalledAsKubectlPlugin(t *testing.T) {
	code, stdout, _ := ctl(t, nil, "/usr/local/bin/kubectl-usher", "get", "instances", "--help")
	if code != 0 || !strings.Contains(stdout, "\n  kubectl usher get instances [SERVICE] [flags]\n") || strings.Contains(stdout, "usherctl") {
		t.Errorf("code %d, help:\n%s", code, stdout)
	}
	if _, _, stderr := ctl(t, nil, "kubectl-usher", "--nope"); !strings.HasPrefix(stderr, "kubectl usher: unknown flag") {
		t.Errorf("stderr %q", stderr)
	}
}

func TestCompletionScript(t *testing.T) {
	if code, stdout, _ := ctl(t, nil, "usherctl", "completion", "bash"); code != 0 || !strings.Contains(stdout, "bash completion") {
		t.Errorf("code %d, %.80q", code, stdout)
	}
	if _, stdout, _ := ctl(t, nil, "usherctl", "__complete", "watch", "-o", ""); !strings.HasPrefix(stdout, "table\nwide\njson\nyaml\n") {
		t.Errorf("completion of -o: %q", stdout)
	}
}

func TestShortDurationIsKubectls(t *testing.T) {
	const day = 24 * time.Hour
	for d, want := range map[time.Duration]string{
		-3 * time.Second: "<invalid>", -time.Second: "0s", 0: "0s", 119 * time.Second: "119s", 2 * time.Minute: "2m",
		2*time.Minute + 5*time.Second: "2m5s", 10 * time.Minute: "10m", 179 * time.Minute: "179m", 3 * time.Hour: "3h",
		3*time.Hour + 7*time.Minute: "3h7m", 8*time.Hour + 7*time.Minute: "8h", 47 * time.Hour: "47h", 48 * time.Hour: "2d",
		3*day + 5*time.Hour: "3d5h", 8*day + time.Hour: "8d", 729 * day: "729d", 730 * day: "2y", 800 * day: "2y70d", 8 * 365 * day: "8y",
	} {
		if got := shortDuration(d); got != want {
			t.Errorf("%s: %q, want %q", d, got, want)
		}
	}
}

func TestAddressesJoinAndCut(t *testing.T) {
	two := registry.Record{Addresses: []string{"10.0.0.1", "fd00::1"}, Ports: []registry.Port{{Port: 80}, {Port: 90}}}
	for _, tc := range []struct {
		r     registry.Record
		limit int
		want  string
	}{
		{registry.Record{}, 2, "<none>"},
		{registry.Record{Addresses: []string{"10.0.0.1"}}, 2, "10.0.0.1"},
		{two, 0, "10.0.0.1:80,10.0.0.1:90,[fd00::1]:80,[fd00::1]:90"},
		{two, 2, "10.0.0.1:80,10.0.0.1:90 + 2 more..."},
		{two, 4, "10.0.0.1:80,10.0.0.1:90,[fd00::1]:80,[fd00::1]:90"},
	} {
		if got := addresses(tc.r, tc.limit); got != tc.want {
			t.Errorf("limit %d: %q, want %q", tc.limit, got, tc.want)
		}
	}
}

func TestDescribeSaysWhatChanged(t *testing.T) {
	at := func(state string, more func(*registry.Record)) *registry.Entry {
		e := registry.Entry{Record: registry.Record{State: state, Cause: "because", Owner: registry.Owner{PodUID: "1", Agent: "a"}}, Lease: 1}
		if more != nil {
			more(&e.Record)
		}
		return &e
	}
	bad := &registry.Entry{Err: registry.ErrNotARecord}
	for _, tc := range []struct {
		name           string
		kind           registry.EventType
		old, now       *registry.Entry
		synced         bool
		change, detail string
	}{
		{"there at first", registry.Put, nil, at("Online", nil), false, "Online", "because"},
		{"new", registry.Put, nil, at("Pending", nil), true, "new -> Pending", "because"},
		{"state", registry.Put, at("Online", nil), at("Draining", nil), true, "Online -> Draining", "because"},
		{"verdict", registry.Put, at("Draining", nil), at("Released", func(r *registry.Record) { r.Verdict = "drained in 1s" }), true, "Draining -> Released", "drained in 1s"},
		{"successor", registry.Put, at("Released", nil), at("Online", func(r *registry.Record) { r.Owner.PodUID = "2" }), true, "Released -> Online (another pod)", "because"},
		{"address", registry.Put, at("Online", nil), at("Online", func(r *registry.Record) { r.Addresses, r.Keys = []string{"a"}, []string{"k"} }), true, "Online: addresses, keys changed", "because"},
		{"same", registry.Put, at("Online", nil), at("Online", nil), true, "Online: written again", "because"},
		{"gone", registry.Delete, at("Released", nil), at("Released", nil), true, "Released -> gone", ""},
		{"spoilt", registry.Put, at("Online", nil), bad, true, "Online -> Unreadable", "not a ledger record"},
		{"repaired", registry.Put, bad, at("Online", nil), true, "Unreadable -> Online", "because"},
	} {
		change, detail := describe(registry.Event{Type: tc.kind, Entry: *tc.now, Old: tc.old}, tc.synced)
		if change != tc.change || detail != tc.detail {
			t.Errorf("%s: %q, %q; want %q, %q", tc.name, change, detail, tc.change, tc.detail)
		}
	}
}
