package format

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	defaultDNSTTL = 5
	maxDNSTTL     = 3600
	// coreDNSCache is the least time that CoreDNS' cache plugin keeps an answer, however low its ttl
	// (coredns/coredns plugin/cache/README.md, MINTTL).
	coreDNSCache = 5 * time.Second
)

// skyDNSValue is msg.Service of coredns/coredns, plugin/etcd/msg/service.go. Weight and ttl are always there: CoreDNS
// takes a missing weight for 100, and a missing ttl for that of the lease (older versions: for the lease's number) or
// 300 s (plugin/etcd/etcd.go).
type skyDNSValue struct {
	Host        string `json:"host"`
	Port        uint16 `json:"port"`
	Priority    int    `json:"priority"`
	Weight      int    `json:"weight"`
	TTL         int    `json:"ttl"`
	TargetStrip int    `json:"targetstrip,omitempty"`
}

// newSkyDNS is the record that CoreDNS' etcd plugin and SkyDNS answer from: `/<prefix>/<labels of the name, reversed>/<id>`
// (coredns/coredns plugin/etcd/msg/path.go, where the name of an SRV record's target is also made of the key: with a
// prefix of one segment). One value that can't be decoded fails the lookup for all. A query reads all keys below its
// name, so `api` is answered from those of `_grpc._tcp.api` too.
//
//	port grpc          api.shop.example.com             /skydns/com/example/shop/api/<id>
//	port grpc+http     _grpc._tcp.api.shop.example.com  /skydns/com/example/shop/api/_tcp/_grpc/<id>, and so for http
//	two addresses      <id>.api.shop.example.com        .../api/<id>/a and .../api/<id>/aaaa
//
// A key holds one address. Those of a dual-stack instance have targetstrip 1, so that both belong to one SRV target.
func newSkyDNS(s Spec) (codec, error) {
	root := cmp.Or(s.Prefix, "skydns")
	fail := func(field, value, rule string) (codec, error) {
		return codec{}, &Error{Format: s.Type, Field: field, Value: value, Rule: rule}
	}
	if err := checkSegment(s.Type, "prefix", root); err != nil {
		return codec{}, err
	}
	if root == "usher" {
		return fail("prefix", root, "/usher/ is the ledger's own")
	}
	for _, f := range []struct{ field, value string }{{"name", s.Name}, {"domain", s.Domain}} {
		if f.value == "" {
			return fail(f.field, f.value, "want DNS labels, as in name api, domain shop.example.com")
		}
		for l := range strings.SplitSeq(f.value, ".") {
			if !isDNSLabel(l) {
				return fail(f.field, f.value, "want DNS labels between dots: lower-case letters, digits and hyphens, and not any, which is a wildcard")
			}
		}
	}
	if s.TTL < 0 || s.TTL > maxDNSTTL {
		return fail("ttl", strconv.Itoa(s.TTL), fmt.Sprintf("want 1 to %d seconds", maxDNSTTL))
	}
	ttl := cmp.Or(s.TTL, defaultDNSTTL)
	refs, err := parsePorts(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	for _, r := range refs {
		if r.as != "" && !isService(r.as) {
			return fail("port", s.Port, "want an SRV service of at most 62 lower-case letters, digits and hyphens before the colon")
		}
	}

	domain := s.Name + "." + s.Domain
	labels := strings.Split(domain, ".")
	slices.Reverse(labels)
	prefix := "/" + root + "/" + strings.Join(labels, "/") + "/"
	return codec{prefix: prefix, lag: max(time.Duration(ttl)*time.Second, coreDNSCache), encode: func(i Instance) ([]Record, error) {
		bad := func(field, value, rule string) ([]Record, error) {
			return nil, &Error{Format: s.Type, Field: field, Value: value, Rule: rule}
		}
		if !isDNSLabel(i.ID) {
			return bad("id", i.ID, "want one DNS label: at most 63 lower-case letters, digits and hyphens")
		}
		weight := cmp.Or(i.Weight, 10)
		if err := checkWeight(s.Type, weight, maxWeight); err != nil {
			return nil, err
		}
		if len(i.Addresses) > 2 || len(i.Addresses) == 2 && i.Addresses[0].Is4() == i.Addresses[1].Is4() {
			return bad("address", fmt.Sprint(i.Addresses), "want one address of a family")
		}
		var recs []Record
		for _, r := range refs {
			port, err := r.find(s.Type, i.Ports)
			if err != nil {
				return nil, err
			}
			key, name := prefix, i.ID+"."+domain
			if r.as != "" || len(refs) > 1 {
				service := cmp.Or(r.as, port.Name)
				if !isService(service) {
					return bad("port", r.want, "want the SRV service before it, as in grpc:9090")
				}
				key += "_tcp/_" + service + "/"
				name = i.ID + "._" + service + "._tcp." + domain
			}
			key += i.ID
			if len(name)+len("aaaa.") > 253 {
				return bad("name", name, "want a DNS name of at most 253 characters")
			}
			for _, a := range i.Addresses {
				v := skyDNSValue{Host: a.String(), Port: port.Number, Priority: 10, Weight: weight, TTL: ttl}
				at := key
				if len(i.Addresses) > 1 {
					v.TargetStrip = 1
					at += map[bool]string{true: "/a", false: "/aaaa"}[a.Is4()]
				}
				b, err := json.Marshal(v)
				if err != nil {
					return nil, err
				}
				recs = append(recs, Record{Key: at, Value: string(b)})
			}
		}
		return recs, nil
	}}, nil
}

// isDNSLabel tells a label that CoreDNS looks up as it stands.
func isDNSLabel(s string) bool { return isLabel(s) && s != "any" }

// isService tells what is a label with an underscore before it.
func isService(s string) bool { return isLabel(s) && len(s) < 63 }
