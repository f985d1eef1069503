// Package conformance_test holds what Usher writes against those who really read it: etcd's naming package, go-zero,
// CoreDNS as a whole server, and Kratos. It is a module of its own because of all that these bring along.
package conformance_test

import (
	"net/netip"
	"testing"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry/format"
)

// TestReadersFollow has one registration in all formats at once, and all readers of them.
func TestReadersFollow(t *testing.T) {
	w := conformance.New(t,
		format.Spec{Type: "grpc", Port: "grpc"},
		format.Spec{Type: "gozero", Target: "api.rpc", Port: "grpc"},
		format.Spec{Type: "kratos", Port: "grpc+http"},
		format.Spec{Type: "skydns", Domain: "shop.example.com", Port: "grpc+http", TTL: 1},
	)
	w.Readers = append(w.Readers, namingResolver(t, w.Etcd), endpointsManager(t, w.Etcd), goZero(t, w.Etcd), kratos(t, w.Etcd))
	w.Readers = append(w.Readers, coreDNS(t, w.Etcd, "")...)
	a, b := pods(t)
	w.Run(a, b, 10)
}

// TestDNSAnswersAreCachedNoLongerThanTheLag: with the cache that Corefiles usually have, and that keeps answers for
// longer than their ttl says.
func TestDNSAnswersAreCachedNoLongerThanTheLag(t *testing.T) {
	w := conformance.New(t, format.Spec{Type: "skydns", Domain: "shop.example.com", Port: "grpc+http", TTL: 1})
	w.Readers = coreDNS(t, w.Etcd, "cache")
	for i := range w.Readers {
		w.Readers[i].KeepsNone = true // an NXDOMAIN, for 30 s
	}
	a, b := pods(t)
	w.Run(a, b, 1)
}

// pods are two dual-stack instances whose gRPC ports really answer.
func pods(t *testing.T) (a, b conformance.Instance) {
	pod := func(name, v4, v6 string) conformance.Instance {
		addr := netip.MustParseAddr(v4)
		return conformance.Instance{
			Pod: name, Addresses: []netip.Addr{addr, netip.MustParseAddr(v6)},
			Ports: []lifecycle.Port{{Name: "grpc", Number: serveGRPC(t, addr), Protocol: "TCP"}, {Name: "http", Number: 8080, Protocol: "TCP"}},
		}
	}
	return pod("api-a", "127.1.0.1", "fd00::1"), pod("api-b", "127.1.0.2", "fd00::2")
}

// grpcAddress is host:port of an instance's gRPC port.
func grpcAddress(in conformance.Instance) string {
	return netip.AddrPortFrom(in.Addresses[0], in.Ports[0].Number).String()
}
