package registry_test

import (
	"context"
	"log"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

// A process that registers itself until SIGTERM, for gRPC clients that dial etcd:///shop/grpc. Lease loss, a key deleted by
// hand and an etcd that is away are made good behind it.
func ExampleRegistrar() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	conn := registry.Connection{Endpoints: []string{registry.DefaultEndpoint}}
	if err := conn.FromETCDCTL(os.Getenv); err != nil {
		log.Fatal(err)
	}
	grpc, err := format.New(format.Spec{Type: "grpc", Target: "shop/grpc", Port: "grpc"})
	if err != nil {
		log.Fatal(err)
	}
	registrar, err := registry.New(registry.Config{
		Cluster: "default", Namespace: "prod", Pod: "shop-0", PodUID: "0b7c",
		Dial:    func() (*clientv3.Client, error) { return conn.Dial(nil) },
		Formats: map[string][]registry.NamedFormat{"shop": {{Name: "grpc", Format: grpc}}},
		Logger:  zap.NewNop(),
	})
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- registrar.Run(ctx) }()

	address := netip.MustParseAddr("10.0.0.1")
	registrar.Set(lifecycle.Desired{
		State: lifecycle.Online, Cause: "ready", Since: time.Now(),
		Pod: lifecycle.Pod{Known: true, Namespace: "prod", Name: "shop-0", UID: "0b7c", Created: time.Now(), IPs: []netip.Addr{address}},
		Instances: []lifecycle.Instance{{
			Service: "shop", Advertise: true, Addresses: []netip.Addr{address},
			Ports: []lifecycle.Port{{Name: "grpc", Number: 9090, Protocol: "TCP"}},
		}},
	})
	if err := registrar.Sync(ctx); err != nil {
		log.Print(err) // it is being retried
	}
	if err := <-ended; err != nil { // Run has revoked the lease, and with it the record
		log.Fatal(err)
	}
}
