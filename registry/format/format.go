// Package format turns an instance into the etcd records that existing discovery clients read. Codecs are pure: they
// validate strictly and never touch etcd, since one malformed record can break a whole service for its readers.
package format

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Instance is what a format may say of an instance.
type Instance struct {
	ID        string // unique among all instances that ever were: the pod's UID
	Namespace string
	Service   string
	Addresses []netip.Addr // the primary one first; formats of one address use it
	Ports     []Port
}

// Port is one port of an instance.
type Port struct {
	Name     string
	Number   uint16
	Protocol string // "TCP" when empty
}

// Record is one etcd key with its value.
type Record struct{ Key, Value string }

// Format is one kind of record.
type Format interface {
	// Records are the keys and values of an instance. A rule that the instance breaks is an *Error.
	Records(Instance) ([]Record, error)
	// Prefix is what readers of these records list and watch.
	Prefix() string
}

// Spec is a format as it is configured.
type Spec struct {
	Type   string `json:"type"`
	Target string `json:"target,omitempty"` // grpc: what clients dial as etcd:///<target>
	Port   string `json:"port,omitempty"`   // name or number; empty: the only TCP port
}

// Error names the format, the field and the rule that was broken.
type Error struct{ Format, Field, Value, Rule string }

func (e *Error) Error() string {
	return fmt.Sprintf("format %s: %s %q: %s", e.Format, e.Field, e.Value, e.Rule)
}

var builders = map[string]func(Spec) (Format, error){
	"grpc": newGRPC,
}

// Types are the names that Spec.Type may have.
func Types() []string { return slices.Sorted(maps.Keys(builders)) }

// New builds the format that s describes. Errors are *Error.
func New(s Spec) (Format, error) {
	b, ok := builders[s.Type]
	if !ok {
		return nil, &Error{Format: strconv.Quote(s.Type), Field: "type", Value: s.Type, Rule: "want one of " + strings.Join(Types(), ", ")}
	}
	return b(s)
}

// choosePort finds the port that want names: a number as it stands, a name among the instance's TCP ports, or the only
// TCP port when want is empty.
func choosePort(format, want string, ports []Port) (uint16, error) {
	fail := func(rule string) (uint16, error) {
		return 0, &Error{Format: format, Field: "port", Value: want, Rule: rule}
	}
	if n, err := strconv.ParseUint(want, 10, 16); err == nil && n > 0 {
		return uint16(n), nil
	}
	var tcp []Port
	var names []string
	for _, p := range ports {
		if (p.Protocol == "" || p.Protocol == "TCP") && p.Number != 0 {
			tcp = append(tcp, p)
			names = append(names, fmt.Sprintf("%s (%d)", p.Name, p.Number))
		}
	}
	if want == "" {
		switch len(tcp) {
		case 0:
			return fail("the Service has no TCP port: give the number")
		case 1:
			return tcp[0].Number, nil
		}
		return fail("the Service has several ports, choose one of " + strings.Join(names, ", "))
	}
	for _, p := range tcp {
		if p.Name == want {
			return p.Number, nil
		}
	}
	return fail("the Service has no such TCP port, only " + strings.Join(names, ", "))
}

// checkPort is what can be said of a port before any instance is known.
func checkPort(format, want string) error {
	if n, err := strconv.Atoi(want); err == nil && (n < 1 || n > 65535) {
		return &Error{Format: format, Field: "port", Value: want, Rule: "want a port name or a number from 1 to 65535"}
	}
	return nil
}

// checkPath holds a key path against what etcd's tools and readers can be relied on to handle.
func checkPath(format, field, path string) error {
	fail := func(rule string) error { return &Error{Format: format, Field: field, Value: path, Rule: rule} }
	switch {
	case path == "":
		return fail("want a path such as shop/api")
	case strings.HasPrefix(path, "/usher/"):
		return fail("/usher/ is the ledger's own")
	case strings.HasSuffix(path, "/"):
		return fail("want no slash at the end")
	case strings.Contains(path, "//"):
		return fail("want no empty segment")
	}
	for _, r := range path {
		if r <= ' ' || r == 0x7f || r == '\ufffd' {
			return fail("want no space and no control character")
		}
	}
	return nil
}
