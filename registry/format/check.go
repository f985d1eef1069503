package format

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// maxKey is far above what any reader's layout needs.
	maxKey = 1 << 10
	// maxValue keeps all records of an instance well inside one etcd request: 1.5 MiB at most by default
	// (etcd, server/embed/config.go, DefaultMaxRequestBytes).
	maxValue = 64 << 10
	// maxWeight is what an SRV record holds (RFC 2782).
	maxWeight = 1<<16 - 1
)

// checkPath holds a key path against what etcd's tools and readers can be relied on to handle.
func checkPath(format, field, path string) error {
	fail := func(rule string) error { return &Error{Format: format, Field: field, Value: path, Rule: rule} }
	switch {
	case path == "":
		return fail("want a path such as shop/api")
	case strings.HasPrefix(path+"/", "/usher/"):
		return fail("/usher/ is the ledger's own")
	case strings.HasSuffix(path, "/"):
		return fail("want no slash at the end")
	case strings.Contains(path, "//"):
		return fail("want no empty segment")
	case !utf8.ValidString(path):
		return fail("want UTF-8")
	}
	for s := range strings.SplitSeq(path, "/") {
		if s == "." || s == ".." {
			return fail("want no . or .. as a segment: some readers resolve it")
		}
	}
	for _, r := range path {
		if unicode.IsSpace(r) || unicode.IsControl(r) || r == utf8.RuneError {
			return fail("want no space and no control character")
		}
	}
	return nil
}

// checkTarget holds a path that clients dial as a part of a URL against what that leaves unchanged.
func checkTarget(format, target string) error {
	if err := checkPath(format, "target", target); err != nil {
		return err
	}
	if strings.ContainsAny(target, "?#%") {
		return &Error{Format: format, Field: "target", Value: target, Rule: "want no ?, # or %: clients dial it as part of a URL"}
	}
	return nil
}

// checkSegment is checkPath for a single segment.
func checkSegment(format, field, s string) error {
	if strings.Contains(s, "/") {
		return &Error{Format: format, Field: field, Value: s, Rule: "want no slash: it is one segment of a key"}
	}
	return checkPath(format, field, s)
}

// checkName holds a service's name against what is the same in a key, in a URL and in every reader's map.
func checkName(format, name string) error {
	fail := func(rule string) error { return &Error{Format: format, Field: "name", Value: name, Rule: rule} }
	switch {
	case name == "":
		return fail("want what clients call the service")
	case len(name) > 253:
		return fail("want at most 253 characters")
	case name[0] == '.' || name[0] == '-':
		return fail("want a letter, a digit or _ first")
	}
	for _, r := range name {
		if !isAlnum(r) && r != '.' && r != '_' && r != '-' {
			return fail("want letters, digits, dots, underscores and hyphens, no slash")
		}
	}
	return nil
}

func isAlnum(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
}

// checkWeight is for a weight that is set.
func checkWeight(format string, w, most int) error {
	if w < 1 || w > most {
		return &Error{Format: format, Field: "weight", Value: strconv.Itoa(w), Rule: fmt.Sprintf("want 1 to %d", most)}
	}
	return nil
}

// checkRecord is what no record may break, whichever format made it.
func checkRecord(format, prefix string, r Record) error {
	if err := checkPath(format, "key", r.Key); err != nil {
		return err
	}
	switch {
	case len(r.Key) > maxKey:
		return &Error{Format: format, Field: "key", Value: r.Key, Rule: fmt.Sprintf("want at most %d bytes", maxKey)}
	case !strings.HasPrefix(r.Key, prefix):
		return &Error{Format: format, Field: "key", Value: r.Key, Rule: "want it under " + prefix}
	case strings.TrimSpace(r.Value) == "":
		return &Error{Format: format, Field: "value", Value: r.Value, Rule: "want one that is not empty"}
	case len(r.Value) > maxValue:
		return &Error{Format: format, Field: "value", Value: r.Value, Rule: fmt.Sprintf("want at most %d bytes", maxValue)}
	}
	return nil
}

// labels are the instance's metadata together with own, which the format's readers act upon, and about, which only
// describes the instance. A key of own is refused in the metadata; one of about is if its value is another. Empty values
// of both are left out.
func labels(format string, i Instance, own, about map[string]string) (map[string]string, error) {
	all := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(i.Metadata)) {
		v := i.Metadata[k]
		fail := func(rule string) (map[string]string, error) {
			return nil, &Error{Format: format, Field: "metadata " + k, Value: v, Rule: rule}
		}
		if k == "" || len(k) > 317 || strings.ContainsFunc(k, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return fail("want a key of 1 to 317 printable ASCII characters without space, as labels and annotations have")
		}
		if _, ok := own[k]; ok {
			return fail("the format itself has this key")
		}
		if a := about[k]; a != "" && a != v {
			return fail(fmt.Sprintf("the instance's %s is %q", k, a))
		}
		if err := checkText(format, "metadata "+k, v); err != nil {
			return nil, err
		}
		all[k] = v
	}
	for _, extra := range []map[string]string{own, about} {
		for k, v := range extra {
			if err := checkText(format, k, v); err != nil {
				return nil, err
			}
			if v != "" {
				all[k] = v
			}
		}
	}
	return all, nil
}

// checkText holds a value that people chose against what comes back unchanged from every encoding.
func checkText(format, field, s string) error {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return &Error{Format: format, Field: field, Value: s, Rule: "want UTF-8 without control characters"}
	}
	return nil
}
