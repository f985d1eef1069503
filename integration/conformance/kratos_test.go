package conformance_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/go-kratos/kratos/v2/log"
	"github.com/go-kratos/kratos/v2/registry"
	kratosgrpc "github.com/go-kratos/kratos/v2/transport/grpc"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/registry/format"
)

// discovery has the semantics of contrib/registry/etcd of go-kratos/kratos, a module that no proxy has under a version of
// its own: a service is all that is below a prefix without a slash at its end, it is listed anew after any change there, a value
// that is no JSON fails the whole, and one of another name is dropped.
type discovery struct{ cli *clientv3.Client }

func (d discovery) GetService(ctx context.Context, name string) ([]*registry.ServiceInstance, error) {
	resp, err := d.cli.Get(ctx, "/microservices/"+name, clientv3.WithPrefix())
	if err != nil {
		return nil, err
	}
	var all []*registry.ServiceInstance
	for _, kv := range resp.Kvs {
		in := &registry.ServiceInstance{}
		if err := json.Unmarshal(kv.Value, in); err != nil {
			return nil, fmt.Errorf("%s: %w", kv.Key, err)
		}
		if in.Name == name {
			all = append(all, in)
		}
	}
	return all, nil
}

func (d discovery) Watch(ctx context.Context, name string) (registry.Watcher, error) {
	ctx, cancel := context.WithCancel(ctx)
	changes := d.cli.Watch(ctx, "/microservices/"+name, clientv3.WithPrefix(), clientv3.WithKeysOnly())
	now := make(chan struct{}, 1)
	now <- struct{}{}
	return &watcher{ctx, cancel, changes, now, func() ([]*registry.ServiceInstance, error) { return d.GetService(ctx, name) }}, nil
}

type watcher struct {
	ctx     context.Context
	cancel  context.CancelFunc
	changes clientv3.WatchChan
	now     chan struct{}
	list    func() ([]*registry.ServiceInstance, error)
}

func (w *watcher) Next() ([]*registry.ServiceInstance, error) {
	select {
	case <-w.ctx.Done():
		return nil, w.ctx.Err()
	case <-w.now:
	case <-w.changes:
	}
	return w.list()
}

func (w *watcher) Stop() error {
	w.cancel()
	return nil
}

// kratos is a gRPC client made by Kratos, with its own resolver and its default balancer.
func kratos(t *testing.T, etcd *etcdtest.Server) conformance.Reader {
	t.Helper()
	log.SetLogger(log.NewStdLogger(io.Discard))
	cc, err := kratosgrpc.DialInsecure(t.Context(), kratosgrpc.WithEndpoint("discovery:///api"),
		kratosgrpc.WithDiscovery(discovery{etcdClient(t, etcd)}), kratosgrpc.WithPrintDiscoveryDebugLog(false))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cc.Close() })
	return conformance.Reader{Name: "Kratos gRPC client", Format: "kratos", Sees: grpcAddress, Look: answering(cc), KeepsLast: true}
}

// TestKratosSendsNothingToADrainingInstance while the record that says so is still there.
func TestKratosSendsNothingToADrainingInstance(t *testing.T) {
	etcd := etcdtest.Start(t)
	cli := etcdClient(t, etcd)
	f, err := format.New(format.Spec{Type: "kratos", Port: "grpc"}.WithDefaults("shop", "api"))
	if err != nil {
		t.Fatal(err)
	}
	a, b := pods(t)
	put := func(in conformance.Instance, draining bool) {
		t.Helper()
		recs, err := f.Records(format.Instance{
			ID: "uid-" + in.Pod, Namespace: "shop", Service: "api", Addresses: in.Addresses, Weight: 20, Draining: draining,
			Ports: []format.Port{{Name: "grpc", Number: in.Ports[0].Number}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range recs {
			if _, err := cli.Put(t.Context(), r.Key, r.Value); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(a, false)
	put(b, false)
	client := kratos(t, etcd)
	see := func(want ...netip.Addr) {
		t.Helper()
		for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			got, err := client.Look(t.Context())
			seen := map[netip.Addr]bool{}
			for _, s := range got {
				seen[netip.MustParseAddrPort(s).Addr()] = true
			}
			if len(seen) == len(want) && !slices.ContainsFunc(want, func(a netip.Addr) bool { return !seen[a] }) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("sends to %q, %v; want %v", got, err, want)
			}
		}
	}
	see(a.Addresses[0], b.Addresses[0])
	put(a, true)
	see(b.Addresses[0])
	put(a, false)
	see(a.Addresses[0], b.Addresses[0])
}
