package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"usher.dev/usher/registry/format"
)

func lookup(env map[string]string) func(string) (string, bool) {
	return func(name string) (string, bool) { v, ok := env[name]; return v, ok }
}

func identity(more ...string) map[string]string {
	env := map[string]string{"POD_NAMESPACE": "shop", "POD_NAME": "api-0", "POD_UID": "6f0d"}
	for i := 0; i < len(more); i += 2 {
		env[more[i]] = more[i+1]
	}
	return env
}

func file(t *testing.T, content string) string {
	path := filepath.Join(t.TempDir(), "usher.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestServiceAloneIsEnough(t *testing.T) {
	c, err := parse([]string{"--service=api"}, lookup(identity()))
	if err != nil {
		t.Fatal(err)
	}
	want := format.Spec{Type: "grpc", Target: "shop/api"}
	if len(c.Services) != 1 || c.Services[0].Name != "api" || len(c.Services[0].Formats) != 1 || c.Services[0].Formats[0] != want {
		t.Errorf("services %+v, want api with %+v", c.Services, want)
	}
	if c.Budget.Settle != time.Second || c.LeaseTTL != 15*time.Second || c.HookAddress != ":7400" || c.Etcd.Endpoints[0] != "127.0.0.1:2379" {
		t.Errorf("defaults: %+v", c)
	}
}

func TestFlagWinsOverEnvironmentOverEtcdctlOverFile(t *testing.T) {
	path := file(t, "etcdEndpoints: [http://file:2379, http://file2:2379]\nsettle: 3s\ncluster: from-file\nservices:\n- name: api\n  formats:\n  - {type: grpc, target: t/http, port: http}\n  - {type: grpc, target: t/grpc, port: \"9090\"}\n")
	for _, c := range []struct {
		name      string
		args      []string
		env       map[string]string
		endpoints string
		settle    time.Duration
	}{
		{"file", nil, identity(), "http://file:2379 http://file2:2379", 3 * time.Second},
		{"etcdctl", nil, identity("ETCDCTL_ENDPOINTS", "http://ctl:2379"), "http://ctl:2379", 3 * time.Second},
		{"environment", nil, identity("ETCDCTL_ENDPOINTS", "http://ctl:2379", "USHER_ETCD_ENDPOINTS", "http://env:1,http://env:2", "USHER_SETTLE", "2s"), "http://env:1 http://env:2", 2 * time.Second},
		{"flag", []string{"--etcd-endpoints=http://flag:1", "--settle=1500ms"}, identity("USHER_ETCD_ENDPOINTS", "http://env:1", "USHER_SETTLE", "2s"), "http://flag:1", 1500 * time.Millisecond},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parse(append(c.args, "--config", path), lookup(c.env))
			if err != nil {
				t.Fatal(err)
			}
			if e := strings.Join(got.Etcd.Endpoints, " "); e != c.endpoints || got.Budget.Settle != c.settle || got.Cluster != "from-file" || len(got.Services[0].Formats) != 2 {
				t.Errorf("endpoints %s, settle %s, cluster %s, services %+v", e, got.Budget.Settle, got.Cluster, got.Services)
			}
		})
	}
}

func TestSettleCoversTheSlowestReaderUnlessItIsSet(t *testing.T) {
	for _, c := range []struct {
		args []string
		want time.Duration
	}{
		{[]string{"--service=a"}, time.Second},
		{[]string{"--service=a", "--service=a,format=kitex"}, 6 * time.Second},
		{[]string{"--service=a,format=kitex", "--settle=2s"}, 2 * time.Second},
		{[]string{"--service=a,format=kitex", "--settle=0s"}, 0},
	} {
		got, err := parse(c.args, lookup(identity()))
		if err != nil || got.Budget.Settle != c.want {
			t.Errorf("%v: settle %s, %v; want %s", c.args, got.Budget.Settle, err, c.want)
		}
	}
}

func TestServicesOfFlagReplaceThoseOfFile(t *testing.T) {
	path := file(t, "services: [{name: old}]\n")
	c, err := parse([]string{"--config", path, "--service=a,target=x,port=http", "--service=a,target=y,port=grpc", "--service=b"}, lookup(identity()))
	if err != nil || len(c.Services) != 2 || len(c.Services[0].Formats) != 2 || c.Services[1].Name != "b" {
		t.Fatalf("%+v, %v", c.Services, err)
	}
	c, err = parse(nil, lookup(identity("USHER_SERVICE", "a,target=x;b", "USHER_CONFIG", path)))
	if err != nil || len(c.Services) != 2 || c.Services[0].Formats[0].Target != "x" {
		t.Fatalf("environment: %+v, %v", c.Services, err)
	}
}

// Each message has to name what is wrong, the value, and what would be right.
func TestBadInputIsNamed(t *testing.T) {
	secret := "hunter2"
	for _, c := range []struct {
		name string
		args []string
		env  map[string]string
		file string
		want []string
	}{
		{"unknown flag", []string{"--sevice=a"}, identity(), "", []string{"--sevice", "--help"}},
		{"argument", []string{"--service=a", "serve"}, identity(), "", []string{`"serve"`, "flags only"}},
		{"no service", nil, identity(), "", []string{"--service"}},
		{"no identity", []string{"--service=a"}, nil, "", []string{"POD_NAMESPACE", "POD_NAME", "POD_UID", "metadata.uid"}},
		{"duration", []string{"--service=a", "--settle=1"}, identity(), "", []string{"--settle", `"1"`, "500ms"}},
		{"negative duration", []string{"--service=a", "--quiet-period=-1s"}, identity(), "", []string{"--quiet-period", "-1s"}},
		{"environment", []string{"--service=a"}, identity("USHER_LOG_LEVEL", "loud"), "", []string{"USHER_LOG_LEVEL", "loud", "debug, info"}},
		{"service without name", []string{"--service=port=http"}, identity(), "", []string{"--service", "NAME"}},
		{"service field", []string{"--service=a,prot=http"}, identity(), "", []string{"prot", "want one of", "port"}},
		{"service field without value", []string{"--service=a,port="}, identity(), "", []string{`"port="`, "SETTING=VALUE"}},
		{"weight", []string{"--service=a", "--weight=heavy"}, identity(), "", []string{"--weight", "heavy", "0 to 65535"}},
		{"metadata", []string{"--service=a", "--metadata=team"}, identity(), "", []string{"--metadata", "team", "KEY=VALUE"}},
		{"metadata twice", []string{"--service=a", "--metadata=team=a", "--metadata=team=b"}, identity(), "", []string{"--metadata", "team", "twice"}},
		{"list for a map", []string{"--service=a", "--health=[]"}, identity(), "", []string{"--health", "the whole is a list: want a map"}},
		{"pod IPs", []string{"--service=a", "--pod-ips=10.0.0.1,x"}, identity(), "", []string{"--pod-ips", `"x"`}},
		{"metric without its source", []string{"--service=a", "--in-flight-metric=up"}, identity(), "", []string{"--in-flight-metric", "up", "prometheus"}},
		{"prometheus without its metric", []string{"--service=a", "--in-flight-source=prometheus"}, identity(), "", []string{"--in-flight-metric", "--in-flight-metrics-url"}},
		{"exec without its command", []string{"--service=a", "--in-flight-source=exec"}, identity(), "", []string{"--in-flight-command"}},
		{"command", []string{"--service=a", "--in-flight-source=exec", "--in-flight-command=[sh"}, identity(), "", []string{"--in-flight-command", "[sh", "JSON list"}},
		{"min-available", []string{"--service=a", "--min-available=-1"}, identity(), "", []string{"--min-available", "-1", "whole number from 0"}},
		{"readiness", []string{"--service=a", "--readiness=maybe"}, identity(), "", []string{"--readiness", "maybe", "endpoint, probe"}},
		{"run without a command", []string{"run", "--service=a,port=80"}, nil, "", []string{"usher-agent run [flags] -- COMMAND"}},
		{"run with a stray word", []string{"run", "--service=a,port=80", "x", "--", "y"}, nil, "", []string{"usher-agent run [flags] -- COMMAND"}},
		{"named port without Kubernetes", []string{"--readiness=probe", "--service=a,port=http"}, nil, "", []string{"service a", `"http"`, "1 to 65535"}},
		{"unknown field of health", []string{"--service=a", "--health={components: {db: {udpProbe: {}}}}"}, identity(), "", []string{"--health", `"udpProbe"`, "docs/health.md"}},
		{"type of a health field", []string{"--service=a", "--health={components: {db: {critical: perhaps}}}"}, identity(), "", []string{"--health", "components.critical", "want true or false"}},
		{"YAML of health", []string{"--service=a", "--health={components: "}, identity(), "", []string{"--health", "line 1"}},
		{"component without a probe", []string{"--service=a", "--health={components: {db: {}}}"}, identity(), "", []string{"health.components.db", "want a startupProbe"}},
		{"notify", []string{"--service=a", "--notify={webhooks: [{url: ftp://x}]}"}, identity(), "", []string{"notify.webhooks[0].url", "ftp://x"}},
		{"health in the file", []string{"--service=a"}, identity(), "health: {components: {db: {critical: 1}}}", []string{"health", "components.critical", "want true or false"}},
		{"source", []string{"--service=a", "--in-flight-source=envoy"}, identity(), "", []string{"envoy", "want one of sockdiag, http, prometheus, exec, none"}},
		{"none with others", []string{"--service=a", "--in-flight-source=none,sockdiag"}, identity(), "", []string{"none alone"}},
		{"http without URL", []string{"--service=a", "--in-flight-source=http"}, identity(), "", []string{"--in-flight-url"}},
		{"short token", []string{"--service=a"}, identity("USHER_HOOK_TOKEN", secret), "", []string{"USHER_HOOK_TOKEN", "16"}},
		{"etcd endpoint", []string{"--service=a", "--etcd-endpoints=ftp://x:1"}, identity(), "", []string{"ftp://x:1"}},
		{"etcd password alone", []string{"--service=a"}, identity("USHER_ETCD_PASSWORD", secret), "", []string{"user"}},
		{"file that isn't there", []string{"--config=/nowhere.yaml"}, identity(), "", []string{"/nowhere.yaml"}},
		{"file with unknown key", nil, identity(), "sevices: []\n", []string{"sevices", "no such setting", "usher-agent --help"}},
		{"file with a key in another spelling", nil, identity(), "lease-TTL: 10s\n", []string{"lease-TTL", "no such setting", "want leaseTtl"}},
		{"file with key twice", nil, identity(), "settle: 1s\nsettle: 2s\n", []string{"settle", "already"}},
		{"file with unknown field", nil, identity(), "services: [{name: a, formats: [{kind: grpc}]}]\n", []string{"services", "kind"}},
		{"file with a list for one value", nil, identity(), "services: [{name: a}]\nsettle: [1s, 2s]\n", []string{"settle", "one value"}},
		{"file with a map for a value", nil, identity(), "services: [{name: a}]\nsettle: {a: 1}\n", []string{"settle", "one value"}},
		{"file that is a list", nil, identity(), "- a\n", []string{"map of settings"}},
		{"zero for what can't be", []string{"--service=a", "--quiet-period=0s"}, identity(), "", []string{"--quiet-period", "0s", "above zero"}},
		{"zero floor", []string{"--service=a", "--drain-floor=0"}, identity(), "", []string{"--drain-floor", "above zero"}},
		{"zero interval", []string{"--service=a"}, identity("USHER_DRAIN_INTERVAL", "0s"), "", []string{"USHER_DRAIN_INTERVAL", "above zero"}},
		{"zero lease TTL", []string{"--service=a", "--lease-ttl=0s"}, identity(), "", []string{"--lease-ttl", "above zero"}},
		{"service setting twice", []string{"--service=a,port=80,port=81"}, identity(), "", []string{"--service", "port", "twice"}},
		{"service twice in the file", nil, identity(), "services: [{name: a, formats: [{target: one}]}, {name: a, formats: [{target: two}]}]", []string{"service a", "twice"}},
		{"number for a text in the file", nil, identity(), "services: [{name: a, formats: [{port: 8080}]}]", []string{"services: formats.port is a number", "want a text", "in quotes"}},
		{"two documents in the file", nil, identity(), "# usher\n---\nservices: [{name: a}]\n---\nsettle: 2s\n", []string{"usher.yaml", "one YAML document"}},
		{"two documents of health", []string{"--service=a", "--health={}\n---\n{showDetails: always}"}, identity(), "", []string{"--health", "one YAML document"}},
		{"token with a line feed", []string{"--service=a"}, identity("USHER_HOOK_TOKEN", secret+"0123456789\n"), "", []string{"USHER_HOOK_TOKEN", `'\n'`, "printable ASCII"}},
		{"secret in notify beside a slip", []string{"--service=a", "--notify={webhooks: [{url: http://x, headers: {Authorization: " + secret + "}, tiemout: 1s}]}"}, identity(), "", []string{"--notify", `"tiemout"`}},
		{"secret in notify of the file", nil, identity(), "notify: {webhooks: [{url: http://x, headers: {Authorization: " + secret + "}, tiemout: 1s}]}", []string{"notify", `"tiemout"`}},
		{"secret of the file in a list", nil, identity(), "etcdPassword: [" + secret + ", b]\netcdUser: [a, b]", []string{"etcdPassword", "etcdUser", `["a","b"]`}},
		{"grace that the settings don't fit into", []string{"run", "--service=a,port=80,format=kitex", "--grace-period=5s", "--", "x"}, nil, "", []string{"--grace-period", "5s", "settle needs 6s"}},
		{"file that is no YAML", nil, identity(), "a: [\n", []string{"usher.yaml"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			args := c.args
			if c.file != "" {
				args = append(args, "--config", file(t, c.file))
			}
			_, err := parse(args, lookup(c.env))
			if err == nil {
				t.Fatal("accepted")
			}
			for _, w := range c.want {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("%q doesn't say %q", err, w)
				}
			}
			if strings.Contains(err.Error(), secret) {
				t.Errorf("%q tells a secret", err)
			}
		})
	}
}

func TestEverySettingIsInHelpAndInTheCommandsComment(t *testing.T) {
	var out strings.Builder
	help(&out)
	source, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range settings() {
		if !s.envOnly && !strings.Contains(out.String(), "--"+s.flag+" "+s.arg) || s.envOnly && !strings.Contains(out.String(), s.env()) {
			t.Errorf("--help doesn't speak of --%s", s.flag)
		}
		if !strings.Contains(string(source), s.env()) {
			t.Errorf("the comment of main.go doesn't speak of %s", s.env())
		}
	}
	for l := range strings.SplitSeq(out.String(), "\n") {
		if len(l) > 120 {
			t.Errorf("line of %d characters in --help: %s", len(l), l)
		}
	}
	if _, err := parse([]string{"--help"}, lookup(nil)); !errors.Is(err, pflag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

// go test ./cmd/usher-agent -update writes the table anew.
func TestReadmeTableIsTheSettings(t *testing.T) {
	const begin, end = "<!-- settings -->\n", "<!-- /settings -->"
	var b strings.Builder
	b.WriteString(begin + "| flag | default | meaning |\n| --- | --- | --- |\n")
	for _, s := range settings() {
		name, def := "`--"+s.flag+" "+s.arg+"`", ""
		if s.envOnly {
			name = "`" + s.env() + "`"
		}
		if s.def != "" {
			def = "`" + s.def + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | %s |\n", name, def, s.usage)
	}
	b.WriteString(end)
	path := filepath.Join("..", "..", "README.md")
	readme, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	from, to := strings.Index(string(readme), begin), strings.Index(string(readme), end)
	if from < 0 || to < from {
		t.Fatalf("README.md lacks the marks %q and %q", begin, end)
	}
	to += len(end)
	if string(readme[from:to]) == b.String() {
		return
	}
	if !*update {
		t.Fatal("README.md's table of settings is not what the agent has: go test ./cmd/usher-agent -update")
	}
	if err := os.WriteFile(path, []byte(string(readme[:from])+b.String()+string(readme[to:])), 0o644); err != nil {
		t.Fatal(err)
	}
}

var update = flag.Bool("update", false, "write generated parts of documents anew")
