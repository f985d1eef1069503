package health

import (
	"bytes"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
)

// Check is one line of a verbose answer.
type Check struct {
	Name string
	Err  error // nil: passed

	note string // of one that passed, but not quite
}

// Verbose answers as Kubernetes' components do at /livez and /readyz (k8s.io/apiserver/pkg/server/healthz): "ok", with
// ?verbose a line for each check, and on a failure those lines always, with 500. ?exclude=NAME, as often as wanted, leaves
// checks out. Why one failed is withheld, since anybody may ask. name is the last line's: "livez check passed".
func Verbose(w http.ResponseWriter, r *http.Request, name string, checks ...Check) {
	_, verbose := r.URL.Query()["verbose"]
	verboseText(w, name, http.StatusOK, checks, r.URL.Query()["exclude"], verbose)
}

// verboseText: code is for an answer that no check of its own makes a failure.
func verboseText(w http.ResponseWriter, name string, code int, checks []Check, excluded []string, verbose bool) {
	var text bytes.Buffer
	unknown := map[string]bool{}
	for _, e := range excluded {
		unknown[e] = true
	}
	failed := code >= http.StatusBadRequest
	for _, c := range checks {
		switch {
		case slices.Contains(excluded, c.Name):
			delete(unknown, c.Name)
			fmt.Fprintf(&text, "[+]%s excluded: ok\n", c.Name)
		case c.Err != nil:
			fmt.Fprintf(&text, "[-]%s failed: reason withheld\n", c.Name)
			if code == http.StatusOK {
				code = http.StatusInternalServerError
			}
			failed = true
		case c.note != "":
			fmt.Fprintf(&text, "[+]%s %s: ok\n", c.Name, c.note)
		default:
			fmt.Fprintf(&text, "[+]%s ok\n", c.Name)
		}
	}
	if len(unknown) > 0 {
		var names []string
		for _, n := range slices.Sorted(maps.Keys(unknown)) {
			names = append(names, fmt.Sprintf("%q", n))
		}
		fmt.Fprintf(&text, "warn: some health checks cannot be excluded: no matches for %s\n", strings.Join(names, ","))
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	switch {
	case failed:
		fmt.Fprintf(&text, "%s check failed\n", name)
	case verbose:
		fmt.Fprintf(&text, "%s check passed\n", name)
	default:
		text.Reset()
		text.WriteString("ok")
	}
	w.Write(text.Bytes())
}
