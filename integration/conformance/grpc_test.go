package conformance_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/integration/internal/etcdtest"
)

// serveGRPC answers health checks for as long as the test runs, whatever the registry says.
func serveGRPC(t *testing.T, addr netip.Addr) uint16 {
	t.Helper()
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	go s.Serve(ln)
	t.Cleanup(s.Stop)
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// etcdClient is a client as applications have it, with the defaults.
func etcdClient(t *testing.T, etcd *etcdtest.Server) *clientv3.Client {
	t.Helper()
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cli.Close() })
	return cli
}

// answering are the addresses that answer a few calls in a row, which the balancer spreads over all it has.
func answering(cc *grpc.ClientConn) func(context.Context) ([]string, error) {
	return func(ctx context.Context) (seen []string, err error) {
		for range 6 {
			call, cancel := context.WithTimeout(ctx, 3*time.Second)
			var p peer.Peer
			_, err := grpc_health_v1.NewHealthClient(cc).Check(call, &grpc_health_v1.HealthCheckRequest{}, grpc.Peer(&p))
			cancel()
			switch status.Code(err) {
			case codes.OK:
				seen = append(seen, p.Addr.String())
			case codes.Unavailable, codes.DeadlineExceeded: // it knows of nobody
				return seen, nil
			default:
				return seen, err
			}
		}
		return seen, nil
	}
}

// namingResolver is a gRPC client that dials etcd:///<target>.
func namingResolver(t *testing.T, etcd *etcdtest.Server) conformance.Reader {
	t.Helper()
	builder, err := resolver.NewBuilder(etcdClient(t, etcd))
	if err != nil {
		t.Fatal(err)
	}
	cc, err := grpc.NewClient("etcd:///shop/api", grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return conformance.Reader{Name: "etcd naming resolver", Format: "grpc", Sees: grpcAddress, Look: answering(cc)}
}

// endpointsManager follows the channel of updates, and holds it against a list.
func endpointsManager(t *testing.T, etcd *etcdtest.Server) conformance.Reader {
	t.Helper()
	m, err := endpoints.NewManager(etcdClient(t, etcd), "shop/api")
	if err != nil {
		t.Fatal(err)
	}
	updates, err := m.NewWatchChannel(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	known := map[string]string{}
	return conformance.Reader{Name: "etcd endpoints manager", Format: "grpc", Sees: grpcAddress, Look: func(ctx context.Context) (seen []string, err error) {
		for more := true; more; {
			select {
			case ups, ok := <-updates:
				if !ok {
					return nil, errors.New("the watch has ended")
				}
				for _, u := range ups {
					if u.Op == endpoints.Delete {
						delete(known, u.Key)
					} else {
						known[u.Key] = u.Endpoint.Addr
					}
				}
			default:
				more = false
			}
		}
		for _, addr := range known {
			seen = append(seen, addr)
		}
		return seen, nil
	}}
}
