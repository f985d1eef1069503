package usher_test

import (
	"flag"
	"os"
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
