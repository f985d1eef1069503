package watcher

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"usher.dev/usher/lifecycle"
)

// serviceInfo is what is kept of a Service.
type serviceInfo struct{ families []family }

func reduceService(obj runtime.Object) serviceInfo {
	var info serviceInfo
	for _, f := range obj.(*corev1.Service).Spec.IPFamilies {
		switch f {
		case corev1.IPv4Protocol:
			info.families = append(info.families, 4)
		case corev1.IPv6Protocol:
			info.families = append(info.families, 6)
		}
	}
	return info
}

// service follows the own endpoint of one Service. Only the worker touches it; the feeds wake the worker.
type service struct {
	w    *Watcher
	name string

	object *feed[serviceInfo]
	wide   *feed[sliceInfo]            // nil while the narrow ones do
	narrow map[string]*feed[sliceInfo] // by slice
	last   lifecycle.Endpoint
}

func (s *service) start(ctx context.Context) {
	s.last = lifecycle.Endpoint{Service: s.name}
	s.narrow = map[string]*feed[sliceInfo]{}
	s.object = startFeed(ctx, query{
		client: s.w.cfg.Client.core, resource: "services", namespace: s.w.cfg.Namespace, name: s.name,
		example: &corev1.Service{},
	}, s.w.notify, reduceService)
	s.wide = s.watchSlices(ctx, "")
}

// watchSlices watches all slices of the Service, or the one of that name. The label is asked for in both, so that a slice
// given to another Service is seen as gone.
func (s *service) watchSlices(ctx context.Context, name string) *feed[sliceInfo] {
	return startFeed(ctx, query{
		client: s.w.cfg.Client.discovery, resource: "endpointslices", group: discoveryv1.GroupName,
		namespace: s.w.cfg.Namespace, name: name, labels: discoveryv1.LabelServiceName + "=" + s.name,
		example: &discoveryv1.EndpointSlice{},
	}, s.w.notify, reducer(s.w.cfg.Namespace, s.w.cfg.Pod, s.w.cfg.PodUID))
}

// observe returns the own endpoint, and switches between wide and narrow. While neither can tell, the last known stands.
//
// The endpoint of a Pod that is ending is not searched for once it is gone: it won't be back, and at the end of each pod
// of a rollout a look at all slices would be the very load that the narrow watch saves.
func (s *service) observe(ctx context.Context, id identity, ending bool) lifecycle.Endpoint {
	families := s.families(id)
	primary := family(4)
	if len(id.ips) > 0 {
		primary = familyOf(id.ips[0])
	} else if len(families) > 0 {
		primary = families[0]
	}

	// The wide feed is the truth for as long as there is one. A narrow one may take over once it is not behind.
	var wide, narrow = map[string]sliceInfo{}, map[string]sliceInfo{}
	if s.wide != nil {
		items, synced := s.wide.snapshot()
		if !synced {
			return s.last
		}
		wide = items
	}
	for name, f := range s.narrow {
		items, _ := f.snapshot()
		if slice, ok := items[name]; ok && slice.holds(id) && slice.version >= wide[name].version {
			narrow[name] = slice
		}
	}

	if s.wide == nil {
		found := find(narrow, id)
		if len(narrow) < len(s.narrow) || !covers(found, families) {
			if !ending {
				s.narrowTo(ctx, nil)
				s.wide = s.watchSlices(ctx, "")
				return s.last
			}
		}
		s.last = merge(s.name, found, primary)
		return s.last
	}

	found := find(wide, id)
	want := map[string]sliceInfo{}
	if covers(found, families) {
		for _, m := range found {
			want[m.slice.name] = m.slice
		}
	}
	s.narrowTo(ctx, want)
	ready := len(want) > 0
	for name := range want {
		slice, ok := narrow[name]
		want[name], ready = slice, ready && ok
	}
	if ready {
		s.wide.stop()
		s.wide = nil
		found = find(want, id) // which may be newer than the wide feed's
	}
	s.last = merge(s.name, found, primary)
	return s.last
}

// covers says that there is an endpoint, and one in each of the families.
func covers(found map[family]match, families []family) bool {
	for _, f := range families {
		if _, ok := found[f]; !ok {
			return false
		}
	}
	return len(found) > 0
}

// narrowTo makes the narrow feeds those of the wanted slices.
func (s *service) narrowTo(ctx context.Context, want map[string]sliceInfo) {
	for name, f := range s.narrow {
		if _, ok := want[name]; !ok {
			f.stop()
			delete(s.narrow, name)
		}
	}
	for name := range want {
		if s.narrow[name] == nil {
			s.narrow[name] = s.watchSlices(ctx, name)
		}
	}
}

// families are those in which both the Service and the Pod have addresses: in each, a slice will hold the own endpoint.
// There are none as long as Service or Pod haven't told theirs.
func (s *service) families(id identity) []family {
	items, _ := s.object.snapshot()
	var shared []family
	for _, f := range items[s.name].families {
		if slices.ContainsFunc(id.ips, func(a netip.Addr) bool { return familyOf(a) == f }) {
			shared = append(shared, f)
		}
	}
	return shared
}

// answered says that the first Observation needn't wait for this Service any more.
func (s *service) answered() bool {
	return s.object.answered() && (s.wide == nil || s.wide.answered())
}

func (s *service) problems(p *problems) {
	if items, synced := s.object.snapshot(); synced && len(items) == 0 {
		p.add(fmt.Sprintf("service %q does not exist in namespace %q; waiting for it", s.name, s.w.cfg.Namespace))
	}
	s.object.problems(p)
	if s.wide != nil {
		s.wide.problems(p)
	}
	for _, f := range s.narrow {
		f.problems(p)
	}
}
