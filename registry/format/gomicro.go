package format

import (
	"cmp"
	"encoding/json"
)

// goMicroValue is registry.Service of micro/go-micro, registry/registry.go.
type goMicroValue struct {
	Name      string            `json:"name"`
	Version   string            `json:"version"`
	Metadata  map[string]string `json:"metadata"`
	Endpoints []struct{}        `json:"endpoints"` // of an API gateway; none is null
	Nodes     []goMicroNode     `json:"nodes"`
}

type goMicroNode struct {
	ID       string            `json:"id"`
	Address  string            `json:"address"`
	Metadata map[string]string `json:"metadata"`
}

// newGoMicro is the record of micro/go-micro, registry/etcd: `<prefix>/<name>/<id>` with a service of one node. Readers
// group nodes by version, and go-micro's servers call theirs "latest" if they have none. The metadata is the node's:
// of the services' they take any.
func newGoMicro(s Spec) (codec, error) {
	if err := checkName(s.Type, s.Name); err != nil {
		return codec{}, err
	}
	root := cmp.Or(s.Prefix, "/micro/registry")
	if err := checkPath(s.Type, "prefix", root); err != nil {
		return codec{}, err
	}
	ref, err := onePort(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	prefix := root + "/" + s.Name + "/"
	return codec{prefix: prefix, encode: func(i Instance) ([]Record, error) {
		port, err := ref.find(s.Type, i.Ports)
		if err != nil {
			return nil, err
		}
		md, err := labels(s.Type, i, nil, map[string]string{"zone": i.Zone})
		if err != nil {
			return nil, err
		}
		if err := checkText(s.Type, "version", i.Version); err != nil {
			return nil, err
		}
		v, err := json.Marshal(goMicroValue{
			Name: s.Name, Version: cmp.Or(i.Version, "latest"), Metadata: map[string]string{},
			Nodes: []goMicroNode{{i.ID, hostPort(i.Addresses[0], port.Number), md}},
		})
		if err != nil {
			return nil, err
		}
		return []Record{{Key: prefix + i.ID, Value: string(v)}}, nil
	}}, nil
}
