package catalog_test

import (
	"context"
	"fmt"
	"os"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/registry"
)

// endpoint is the etcd of the examples, which have no test of their own to start one.
var endpoint string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	for _, name := range []string{"ETCDCTL_ENDPOINTS", "ETCDCTL_CACERT", "ETCDCTL_USER"} {
		os.Unsetenv(name)
	}
	address, stop, err := etcdtest.Serve()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer stop()
	endpoint = address
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer cli.Close()
	for i, state := range []string{"Online", "Draining"} {
		r := registry.Record{Owner: registry.Owner{Cluster: "default", PodUID: "u", Agent: "a"}, Namespace: "shop", Service: "checkout",
			Pod: fmt.Sprintf("checkout-%d", i+1), State: state, Addresses: []string{fmt.Sprintf("10.0.0.%d", i+1)}}
		value, err := r.Encode()
		if err == nil {
			_, err = cli.Put(context.Background(), registry.InstanceKey("default", "shop", "checkout", r.Pod), string(value))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	released := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	v := registry.Verdict{Owner: registry.Owner{Cluster: "default", PodUID: "u", Agent: "a"}, Namespace: "shop", Pod: "checkout-0", Outcome: "drained",
		Message: "drained in 1.2s, nothing in flight", Started: released.Add(-1200 * time.Millisecond), Released: released, TotalMs: 1200, WithdrawMs: 4,
		Withdrawn: true, Sources: []registry.SourceVerdict{{Name: "sockdiag", Peak: 17}}}
	value, err := v.Encode()
	if err == nil {
		_, err = cli.Put(context.Background(), registry.VerdictKey("default", "shop", v.Pod, "u"), string(value))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}
