package e2e

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
)

// usherctl asks the registry about this namespace.
func (sp *space) usherctl(args ...string) string {
	sp.t.Helper()
	cmd := exec.CommandContext(sp.ctx, sp.s.Programs.Ctl, append(args, "-n", sp.name, "--endpoints", sp.s.RegistryEndpoint())...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		sp.t.Fatalf("usherctl %v: %v %s", args, err, stderr.String())
	}
	return string(out)
}

func TestUsherctlShowsInstances(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	for _, args := range [][]string{{"get", "instances"}, {"get", "instances", "shop"}, {"status", p.name}} {
		out := sp.usherctl(args...)
		for _, want := range []string{p.name, "Online", p.ip} {
			if !strings.Contains(out, want) {
				t.Errorf("usherctl %v doesn't say %s:\n%s", args, want, out)
			}
		}
		t.Logf("usherctl %v\n%s", args, out)
	}
	if out := sp.usherctl("status", p.name, "-o", "json"); !json.Valid([]byte(out)) || !strings.Contains(out, p.uid) {
		t.Errorf("usherctl status -o json:\n%s", out)
	}
}
