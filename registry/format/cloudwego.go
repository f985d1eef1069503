package format

import (
	"cmp"
	"encoding/json"
	"strings"
	"time"
)

// cloudWeGoPoll is how often Kitex and Hertz list a service: they don't watch (cloudwego/kitex
// pkg/loadbalance/lbcache/cache.go, defaultRefreshInterval; cloudwego/hertz pkg/app/client/loadbalance/loadbalance.go,
// DefaultRefreshInterval).
const cloudWeGoPoll = 5 * time.Second

// cloudWeGoWeight is what readers take a weight below 1 for (kitex-contrib/registry-etcd etcd_resolver.go).
const cloudWeGoWeight = 10

// cloudWeGoValue is instanceInfo of kitex-contrib/registry-etcd and hertz-contrib/registry etcd/common.go.
type cloudWeGoValue struct {
	Network string            `json:"network"`
	Address string            `json:"address"`
	Weight  int               `json:"weight"`
	Tags    map[string]string `json:"tags"`
}

// newKitex is the record of kitex-contrib/registry-etcd: `<prefix>/<name>/<ip:port>`. Its reader lists with the prefix
// `<prefix>/<name>` without a slash and doesn't look at the name: a service must not be called as another one begins.
func newKitex(s Spec) (codec, error) {
	return newCloudWeGo(s, cmp.Or(s.Prefix, "kitex/registry-etcd"))
}

// newHertz is the record of hertz-contrib/registry etcd: as Kitex's under a prefix that is fixed, listed with a slash at
// its end. The name is the host of the clients' URLs, which Hertz turns to lower case (pkg/protocol/uri.go).
func newHertz(s Spec) (codec, error) {
	if s.Name != strings.ToLower(s.Name) {
		return codec{}, &Error{Format: s.Type, Field: "name", Value: s.Name, Rule: "want lower case: it is the host of the clients' URLs"}
	}
	return newCloudWeGo(s, "hertz/registry-etcd")
}

func newCloudWeGo(s Spec, root string) (codec, error) {
	if err := checkName(s.Type, s.Name); err != nil {
		return codec{}, err
	}
	if err := checkPath(s.Type, "prefix", root); err != nil {
		return codec{}, err
	}
	ref, err := onePort(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	prefix := root + "/" + s.Name + "/"
	return codec{prefix: prefix, lag: cloudWeGoPoll, encode: func(i Instance) ([]Record, error) {
		port, err := ref.find(s.Type, i.Ports)
		if err != nil {
			return nil, err
		}
		weight := cmp.Or(i.Weight, cloudWeGoWeight)
		if err := checkWeight(s.Type, weight, maxWeight); err != nil {
			return nil, err
		}
		tags, err := labels(s.Type, i, nil, map[string]string{"version": i.Version, "zone": i.Zone})
		if err != nil {
			return nil, err
		}
		addr := hostPort(i.Addresses[0], port.Number)
		v, err := json.Marshal(cloudWeGoValue{"tcp", addr, weight, tags})
		if err != nil {
			return nil, err
		}
		return []Record{{Key: prefix + addr, Value: string(v)}}, nil
	}}, nil
}
