package watcher

import (
	"net/netip"
	"slices"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"usher.dev/usher/lifecycle"
)

// identity is by what the own endpoint is recognised.
type identity struct {
	uid string       // "" while unknown
	ips []netip.Addr // the primary one first; empty while unknown
}

// family is an IP family: 4 or 6.
type family int

func familyOf(a netip.Addr) family {
	if a.Unmap().Is4() {
		return 4
	}
	return 6
}

// sliceInfo is what is kept of an EndpointSlice.
type sliceInfo struct {
	name      string
	version   uint64 // its resourceVersion, which counts up (KEP-5504); 0 if it isn't a number
	family    family // 0 for a slice of domain names
	ports     []lifecycle.Port
	endpoints []endpointInfo // those that may be the own one
}

type endpointInfo struct {
	uid string // of the targetRef; "" without a targetRef, or when it names the own Pod but has no UID
	ep  lifecycle.Endpoint
}

// reducer keeps the endpoints of a slice that may be the own one: those whose targetRef names the Pod or has its UID,
// and, since the Pod's IPs may be learned later, those without a targetRef.
func reducer(namespace, pod, uid string) func(runtime.Object) sliceInfo {
	return func(obj runtime.Object) sliceInfo {
		s := obj.(*discoveryv1.EndpointSlice)
		info := sliceInfo{name: s.Name}
		info.version, _ = strconv.ParseUint(s.ResourceVersion, 10, 64)
		switch s.AddressType {
		case discoveryv1.AddressTypeIPv4:
			info.family = 4
		case discoveryv1.AddressTypeIPv6:
			info.family = 6
		default:
			return info // no addresses in it
		}
		for _, e := range s.Endpoints {
			var kept endpointInfo
			if ref := e.TargetRef; ref != nil {
				own := ref.Name == pod && (ref.Namespace == "" || ref.Namespace == namespace)
				if ref.Kind != "Pod" || !own && (uid == "" || string(ref.UID) != uid) {
					continue
				}
				kept.uid = string(ref.UID)
			}
			kept.ep = endpoint(e)
			info.endpoints = append(info.endpoints, kept)
		}
		if len(info.endpoints) > 0 {
			info.ports = ports(s.Ports)
		}
		return info
	}
}

// endpoint resolves the conditions as discovery/v1 defines an absent one.
func endpoint(e discoveryv1.Endpoint) lifecycle.Endpoint {
	ep := lifecycle.Endpoint{Found: true, Ready: e.Conditions.Ready == nil || *e.Conditions.Ready}
	ep.Serving = ep.Ready
	if e.Conditions.Serving != nil {
		ep.Serving = *e.Conditions.Serving
	}
	ep.Terminating = e.Conditions.Terminating != nil && *e.Conditions.Terminating
	for _, s := range e.Addresses {
		if a, err := netip.ParseAddr(s); err == nil {
			ep.Addresses = append(ep.Addresses, a.Unmap())
		}
	}
	if e.Zone != nil {
		ep.Zone = *e.Zone
	}
	return ep
}

func ports(in []discoveryv1.EndpointPort) []lifecycle.Port {
	var out []lifecycle.Port
	for _, p := range in {
		// An absent number means all ports, which no consumer can dial.
		if p.Port == nil || *p.Port <= 0 || *p.Port > 65535 {
			continue
		}
		port := lifecycle.Port{Number: uint16(*p.Port), Protocol: string(corev1.ProtocolTCP)}
		if p.Name != nil {
			port.Name = *p.Name
		}
		if p.Protocol != nil {
			port.Protocol = string(*p.Protocol)
		}
		if p.AppProtocol != nil {
			port.AppProtocol = *p.AppProtocol
		}
		out = append(out, port)
	}
	return out
}

// own finds the own endpoint in a slice.
func (s sliceInfo) own(id identity) (lifecycle.Endpoint, bool) {
	for _, e := range s.endpoints {
		if e.uid != "" && e.uid == id.uid {
			return e.ep, true
		}
	}
	for _, e := range s.endpoints {
		if e.uid != "" {
			continue
		}
		for _, a := range e.ep.Addresses {
			if slices.Contains(id.ips, a) {
				return e.ep, true
			}
		}
	}
	return lifecycle.Endpoint{}, false
}

func (s sliceInfo) holds(id identity) bool {
	_, ok := s.own(id)
	return ok
}

// match is the own endpoint in one slice.
type match struct {
	slice sliceInfo
	ep    lifecycle.Endpoint
}

// find returns the own endpoint of each family, from the slice written last where several have it.
func find(items map[string]sliceInfo, id identity) map[family]match {
	found := map[family]match{}
	for _, s := range items {
		ep, ok := s.own(id)
		if !ok {
			continue
		}
		old, dup := found[s.family]
		if !dup || s.version > old.slice.version || s.version == old.slice.version && s.name > old.slice.name {
			found[s.family] = match{slice: s, ep: ep}
		}
	}
	return found
}

// merge makes one endpoint of both families'. The primary family decides conditions, ports and zone.
func merge(service string, found map[family]match, primary family) lifecycle.Endpoint {
	other := 10 - primary
	m, ok := found[primary]
	if !ok {
		if m, ok = found[other]; !ok {
			return lifecycle.Endpoint{Service: service}
		}
		delete(found, other)
	}
	ep := m.ep
	ep.Service = service
	ep.Ports = m.slice.ports
	ep.Addresses = slices.Concat(ep.Addresses, found[other].ep.Addresses)
	return ep
}
