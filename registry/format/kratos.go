package format

import (
	"cmp"
	"encoding/json"
	"slices"
	"strconv"
	"strings"
)

// kratosValue is registry.ServiceInstance of go-kratos/kratos, registry/registry.go.
type kratosValue struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Version   string            `json:"version"`
	Metadata  map[string]string `json:"metadata"`
	Endpoints []string          `json:"endpoints"`
}

// newKratos is the record of Kratos, go-kratos/kratos contrib/registry/etcd: `<prefix>/<name>/<id>`. Readers take one
// endpoint of each scheme, http or grpc or with TLS https or grpcs (internal/endpoint/endpoint.go). They list with
// the prefix `<prefix>/<name>` without a slash, fail as a whole on a value that they can't decode, and drop those whose
// name isn't the one they asked for (watcher.go): hence the name in the value is the one in the key.
//
// Draining is weight 0: Kratos' default balancer then picks the instance only if all have it (selector/wrr; the p2c and
// random ones know no weight). gRPC clients connect anew for it, since the metadata is a part of the address.
func newKratos(s Spec) (codec, error) {
	if err := checkName(s.Type, s.Name); err != nil {
		return codec{}, err
	}
	root := cmp.Or(s.Prefix, "/microservices")
	if err := checkPath(s.Type, "prefix", root); err != nil {
		return codec{}, err
	}
	refs, err := parsePorts(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	schemes := []string{"http", "https", "grpc", "grpcs"}
	badScheme := func(r portRef, scheme string) error {
		return &Error{Format: s.Type, Field: "port", Value: cmp.Or(r.want, scheme), Rule: "want what it speaks before it, one of " + strings.Join(schemes, ", ") + ", as in http:web"}
	}
	for _, r := range refs {
		if r.as != "" && !slices.Contains(schemes, r.as) {
			return codec{}, badScheme(r, r.as)
		}
	}
	prefix := root + "/" + s.Name + "/"
	return codec{prefix: prefix, drains: true, encode: func(i Instance) ([]Record, error) {
		v := kratosValue{ID: i.ID, Name: s.Name, Version: i.Version}
		seen := map[string]bool{}
		for _, r := range refs {
			port, err := r.find(s.Type, i.Ports)
			if err != nil {
				return nil, err
			}
			as := cmp.Or(r.as, scheme(port.Name))
			if !slices.Contains(schemes, as) {
				return nil, badScheme(r, port.Name)
			}
			if seen[as] {
				return nil, &Error{Format: s.Type, Field: "port", Value: s.Port, Rule: "want one port that speaks " + as + ": readers take the first"}
			}
			seen[as] = true
			v.Endpoints = append(v.Endpoints, as+"://"+hostPort(i.Addresses[0], port.Number))
		}
		weight := ""
		if i.Weight != 0 {
			if err := checkWeight(s.Type, i.Weight, maxWeight); err != nil {
				return nil, err
			}
			weight = strconv.Itoa(i.Weight)
		}
		if i.Draining {
			weight = "0"
		}
		var err error
		if v.Metadata, err = labels(s.Type, i, map[string]string{"weight": weight}, map[string]string{"zone": i.Zone}); err != nil {
			return nil, err
		}
		if err := checkText(s.Type, "version", i.Version); err != nil {
			return nil, err
		}
		b, err := json.Marshal(v)
		if err != nil {
			return nil, err
		}
		return []Record{{Key: prefix + i.ID, Value: string(b)}}, nil
	}}, nil
}
