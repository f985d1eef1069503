package format

import (
	"net/url"
	"strconv"
)

// rpcxMaxWeight bounds what clients allocate: their weighted balancer makes a ring as long as the sum of all weights, and
// panics on one of length 0 (smallnest/rpcx client/selector.go).
const rpcxMaxWeight = 1000

// newRPCX is the record of smallnest/rpcx, rpcxio/rpcx-etcd: `<prefix>/<name>/tcp@<ip:port>` with the metadata as a URL query.
// The prefix is the base path that servers and clients agree on, slash for slash; it has no default there.
//
// Draining is state=inactive, which clients leave out whatever they balance with (client/xclient.go,
// filterByStateAndGroup).
func newRPCX(s Spec) (codec, error) {
	if err := checkName(s.Type, s.Name); err != nil {
		return codec{}, err
	}
	if s.Prefix == "" {
		return codec{}, &Error{Format: s.Type, Field: "prefix", Rule: "want the base path of the clients, as in /rpcx"}
	}
	if err := checkPath(s.Type, "prefix", s.Prefix); err != nil {
		return codec{}, err
	}
	ref, err := onePort(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	prefix := s.Prefix + "/" + s.Name + "/"
	return codec{prefix: prefix, drains: true, encode: func(i Instance) ([]Record, error) {
		port, err := ref.find(s.Type, i.Ports)
		if err != nil {
			return nil, err
		}
		weight, state := "", "active"
		if i.Weight != 0 {
			if err := checkWeight(s.Type, i.Weight, rpcxMaxWeight); err != nil {
				return nil, err
			}
			weight = strconv.Itoa(i.Weight)
		}
		if i.Draining {
			state = "inactive"
		}
		md, err := labels(s.Type, i, map[string]string{"weight": weight, "state": state}, map[string]string{"version": i.Version, "zone": i.Zone})
		if err != nil {
			return nil, err
		}
		query := url.Values{}
		for k, v := range md {
			query.Set(k, v)
		}
		return []Record{{Key: prefix + "tcp@" + hostPort(i.Addresses[0], port.Number), Value: query.Encode()}}, nil
	}}, nil
}
