package format

import (
	"encoding/json"
	"net/netip"
)

// grpc is the record of etcd's naming package, go.etcd.io/etcd/client/v3/naming: `<target>/<id>`, read with the prefix
// `<target>/` by clients that dial `etcd:///<target>`.
type grpc struct{ target, port string }

func newGRPC(s Spec) (Format, error) {
	if err := checkPath("grpc", "target", s.Target); err != nil {
		return nil, err
	}
	return grpc{s.Target, s.Port}, checkPort("grpc", s.Port)
}

// grpcValue is the naming package's internal.Update. Metadata must stay absent: some client versions pass it on as a
// map key, and an object there panics grpc.
type grpcValue struct {
	Op   uint8
	Addr string
}

func (g grpc) Prefix() string { return g.target + "/" }

func (g grpc) Records(i Instance) ([]Record, error) {
	if err := checkPath("grpc", "id", i.ID); err != nil {
		return nil, err
	}
	port, err := choosePort("grpc", g.port, i.Ports)
	if err != nil {
		return nil, err
	}
	if len(i.Addresses) == 0 || !i.Addresses[0].IsValid() {
		return nil, &Error{Format: "grpc", Field: "address", Rule: "the instance has none"}
	}
	v, err := json.Marshal(grpcValue{Addr: netip.AddrPortFrom(i.Addresses[0].WithZone(""), port).String()})
	if err != nil {
		return nil, err
	}
	return []Record{{Key: g.Prefix() + i.ID, Value: string(v)}}, nil
}
