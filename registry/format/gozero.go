package format

import "strings"

// newGoZero is the record of go-zero, zeromicro/go-zero core/discov: `<target>/<id>` with the bare address as its value,
// read and watched with the prefix `<target>/` (core/discov/internal/registry.go, makeKeyPrefix). Any id will do.
// Before 1.10.2 a changed value left the old address with readers for ever, so the address is a part of the key: it
// may change during a pod's life, when its sandbox is made anew.
//
// Clients trim slashes from the key and, before 1.10.3, took it from the path of a URL
// (zrpc/resolver/internal/targets/endpoints.go).
func newGoZero(s Spec) (codec, error) {
	if err := checkTarget(s.Type, s.Target); err != nil {
		return codec{}, err
	}
	if strings.HasPrefix(s.Target, "/") {
		return codec{}, &Error{Format: s.Type, Field: "target", Value: s.Target, Rule: "want no slash at the start: clients trim it"}
	}
	ref, err := onePort(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	prefix := s.Target + "/"
	return codec{prefix: prefix, encode: func(i Instance) ([]Record, error) {
		port, err := ref.find(s.Type, i.Ports)
		if err != nil {
			return nil, err
		}
		addr := hostPort(i.Addresses[0], port.Number)
		return []Record{{Key: prefix + i.ID + "@" + addr, Value: addr}}, nil
	}}, nil
}
