package format

import (
	"cmp"
	"fmt"
	"math/big"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// traefikThrottle is how long Traefik lets pass between two configurations that it takes
// (traefik/traefik cmd/configuration.go, providersThrottleDuration).
const traefikThrottle = 2 * time.Second

// newTraefik is a server of Traefik's etcd provider: `<prefix>/http/services/<name>/loadbalancer/servers/<n>/url`, and
// `.../weight` for a weight that is set (Traefik 3; 2 refuses it). n is any string of digits that no other server has
// (pkg/config/kv/kv_node.go), gaps are fine: it is made of address and port. All of Traefik's configuration fails with one
// key or value that it can't decode.
func newTraefik(s Spec) (codec, error) {
	fail := func(field, value, rule string) (codec, error) {
		return codec{}, &Error{Format: s.Type, Field: field, Value: value, Rule: rule}
	}
	if err := checkName(s.Type, s.Name); err != nil {
		return codec{}, err
	}
	if strings.Trim(s.Name, "0123456789") == "" {
		return fail("name", s.Name, "want more than digits: Traefik takes those for a place in a list")
	}
	root := cmp.Or(s.Prefix, "traefik")
	if err := checkPath(s.Type, "prefix", root); err != nil {
		return codec{}, err
	}
	if strings.HasPrefix(root, "/") {
		return fail("prefix", root, "want no slash at the start: Traefik's etcd client trims it")
	}
	refs, err := parsePorts(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	ref := refs[0]
	if len(refs) > 1 {
		return fail("port", s.Port, "want one port")
	}
	if ref.as != "" && ref.as != "http" && ref.as != "https" && ref.as != "h2c" {
		return fail("port", s.Port, "want http, https or h2c before the colon")
	}
	prefix := root + "/http/services/" + s.Name + "/loadbalancer/servers/"
	return codec{prefix: prefix, lag: traefikThrottle, encode: func(i Instance) ([]Record, error) {
		port, err := ref.find(s.Type, i.Ports)
		if err != nil {
			return nil, err
		}
		as := ref.as
		if as == "" {
			switch scheme(port.Name) {
			case "https", "grpcs":
				as = "https"
			case "h2c", "grpc":
				as = "h2c"
			default:
				as = "http"
			}
		}
		at := prefix + serverNumber(i.Addresses[0], port.Number)
		recs := []Record{{Key: at + "/url", Value: as + "://" + hostPort(i.Addresses[0], port.Number)}}
		if i.Weight != 0 {
			if err := checkWeight(s.Type, i.Weight, maxWeight); err != nil {
				return nil, err
			}
			recs = append(recs, Record{Key: at + "/weight", Value: strconv.Itoa(i.Weight)})
		}
		return recs, nil
	}}, nil
}

// serverNumber is the address as a number, with five digits of the port after it.
func serverNumber(addr netip.Addr, port uint16) string {
	return new(big.Int).SetBytes(addr.AsSlice()).String() + fmt.Sprintf("%05d", port)
}
