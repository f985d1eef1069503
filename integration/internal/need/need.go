// Package need says what a test needs of the machine. Without it the test is left out, which is a failure where every test is
// supposed to run: with CI=true in the environment.
package need

import (
	"os"
	"testing"
)

// Root leaves the test out unless it runs as root, which a cluster needs.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	const why = "left out: needs root to bring up a real cluster"
	if os.Getenv("CI") == "true" {
		t.Fatal(why + ", and CI=true wants every test to run")
	}
	t.Skip(why)
}
