package format

import "encoding/json"

// grpcValue is the naming package's internal.Update. Metadata must stay absent: some client versions pass it on as a
// map key, and an object there panics grpc.
type grpcValue struct {
	Op   uint8
	Addr string
}

// newGRPC is the record of etcd's naming package, go.etcd.io/etcd/client/v3/naming: `<target>/<id>`, read and watched
// with the prefix `<target>/` by clients that dial `etcd:///<target>` (resolver/resolver.go takes the URL's path, less
// one slash at its start; endpoints/endpoints_impl.go adds the one at its end).
func newGRPC(s Spec) (codec, error) {
	if err := checkTarget(s.Type, s.Target); err != nil {
		return codec{}, err
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
		v, err := json.Marshal(grpcValue{Addr: hostPort(i.Addresses[0], port.Number)})
		if err != nil {
			return nil, err
		}
		return []Record{{Key: prefix + i.ID, Value: string(v)}}, nil
	}}, nil
}
