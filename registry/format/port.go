package format

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// portRef is one port of Spec.Port.
type portRef struct {
	as   string // what readers call it; empty when not said
	want string // name or number; empty: the only TCP port
}

// onePort reads the setting of a format that has one port, which readers have no name for.
func onePort(format, setting string) (portRef, error) {
	refs, err := parsePorts(format, setting)
	if err != nil {
		return portRef{}, err
	}
	if len(refs) > 1 || refs[0].as != "" {
		return portRef{}, &Error{Format: format, Field: "port", Value: setting, Rule: "want one port, by its name or number"}
	}
	return refs[0], nil
}

// parsePorts reads a setting such as grpc, 8080 or http:web+grpc:9090. What can be said of ports before any instance
// is known is checked.
func parsePorts(format, setting string) ([]portRef, error) {
	fail := func(rule string) ([]portRef, error) {
		return nil, &Error{Format: format, Field: "port", Value: setting, Rule: rule}
	}
	if setting == "" {
		return []portRef{{}}, nil
	}
	var refs []portRef
	for s := range strings.SplitSeq(setting, "+") {
		ref := portRef{want: s}
		if as, want, ok := strings.Cut(s, ":"); ok {
			if as == "" {
				return fail("want a name before the colon, as in http:web")
			}
			ref = portRef{as, want}
		}
		if !isPort(ref.want) {
			return fail("want a port name or a number from 1 to 65535")
		}
		if slices.ContainsFunc(refs, func(o portRef) bool { return o.want == ref.want && o.as == ref.as }) {
			return fail(s + " is there twice")
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// isPort tells a number or what Kubernetes takes as the name of a Service's port: a DNS label.
func isPort(s string) bool {
	if n, err := strconv.Atoi(s); err == nil {
		return n >= 1 && n <= 65535 && isLabel(s)
	}
	return isLabel(s)
}

// find is the port of an instance that r means: a number as it stands, a name among the TCP ports, or the only TCP port.
// The result's name is empty for a number that the Service doesn't list.
func (r portRef) find(format string, ports []Port) (Port, error) {
	fail := func(rule string) (Port, error) {
		return Port{}, &Error{Format: format, Field: "port", Value: r.want, Rule: rule}
	}
	var tcp []Port
	var names []string
	for _, p := range ports {
		if (p.Protocol == "" || p.Protocol == "TCP") && p.Number != 0 {
			tcp = append(tcp, p)
			names = append(names, fmt.Sprintf("%s (%d)", p.Name, p.Number))
		}
	}
	if n, err := strconv.ParseUint(r.want, 10, 16); err == nil && n > 0 {
		if at := slices.IndexFunc(tcp, func(p Port) bool { return p.Number == uint16(n) }); at >= 0 {
			return tcp[at], nil
		}
		return Port{Number: uint16(n)}, nil
	}
	if r.want == "" {
		switch len(tcp) {
		case 0:
			return fail("the Service has no TCP port: give the number")
		case 1:
			return tcp[0], nil
		}
		return fail("the Service has several ports, choose one of " + strings.Join(names, ", "))
	}
	for _, p := range tcp {
		if p.Name == r.want {
			return p, nil
		}
	}
	return fail("the Service has no such TCP port, only " + strings.Join(names, ", "))
}

// scheme is what the port's name says of its protocol, by Kubernetes' habit of names such as http or grpc-web.
func scheme(portName string) string {
	s, _, _ := strings.Cut(portName, "-")
	return s
}

// isLabel tells a lower-case DNS label (RFC 1123).
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, r := range s {
		if r != '-' && (!isAlnum(r) || 'A' <= r && r <= 'Z') {
			return false
		}
	}
	return true
}
