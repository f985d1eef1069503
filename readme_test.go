package usher_test

import (
	"flag"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write generated parts of documents anew")

// The manifests in README.md are those that the end-to-end tests apply. go test -run Readme . -update writes them anew.
func TestReadmeManifestsAreTheTestedOnes(t *testing.T) {
	raw, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	readme := string(raw)
	for _, path := range []string{"deploy/example/rbac.yaml", "deploy/example/shop.yaml"} {
		manifest, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		begin, end := "<!-- "+path+" -->\n", "<!-- /"+path+" -->"
		from, to := strings.Index(readme, begin), strings.Index(readme, end)
		if from < 0 || to < from {
			t.Fatalf("README.md lacks the marks %q and %q", begin, end)
		}
		readme = readme[:from] + begin + "```yaml\n" + string(manifest) + "```\n" + readme[to:]
	}
	if readme == string(raw) {
		return
	}
	if !*update {
		t.Fatal("a manifest in README.md is not the one in deploy/example: go test -run Readme . -update")
	}
	if err := os.WriteFile("README.md", []byte(readme), 0o644); err != nil {
		t.Fatal(err)
	}
}

// docs/reliability.md has the agent's metrics, each of them and no other.
func TestReadmeMetricsAreThoseOfTheAgent(t *testing.T) {
	names := func(path, pattern string) []string {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var found []string
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(string(raw), -1) {
			found = append(found, m[1])
		}
		slices.Sort(found)
		return slices.Compact(found)
	}
	has := names("cmd/usher-agent/metrics.go", `"(usher_[a-z_]+)"`)
	documented := names("docs/reliability.md", `\b(usher_[a-z_]+)`)
	if len(has) == 0 || !slices.Equal(has, documented) {
		t.Errorf("the agent has the metrics\n%q, docs/reliability.md has\n%q", has, documented)
	}
}
