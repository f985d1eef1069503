package registry

import (
	"context"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"usher.dev/usher/lifecycle"
)

// leases is an etcd that grants leases, notes when, and can do nothing else.
type leases struct {
	etcdserverpb.UnimplementedLeaseServer
	mu      sync.Mutex
	granted []time.Time
}

func (l *leases) LeaseGrant(context.Context, *etcdserverpb.LeaseGrantRequest) (*etcdserverpb.LeaseGrantResponse, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.granted = append(l.granted, time.Now())
	return &etcdserverpb.LeaseGrantResponse{ID: int64(len(l.granted)), TTL: 15}, nil
}

// lostLease is a Registrar whose lease is lost and whose connection has to be made anew. It returns how long it took to get
// another one.
func lostLease(t *testing.T, advertise bool) time.Duration {
	t.Helper()
	ln := bufconn.Listen(1 << 16)
	etcd, s := &leases{}, grpc.NewServer()
	etcdserverpb.RegisterLeaseServer(s, etcd)
	go s.Serve(ln)
	defer s.Stop()
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{"passthrough:///etcd"}, Logger: zap.NewNop(), DialOptions: []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return ln.DialContext(ctx) }),
	}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(Config{Cluster: "c", Namespace: "n", Pod: "p", PodUID: "u", Dial: func() (*clientv3.Client, error) { return cli, nil }})
	if err != nil {
		t.Fatal(err)
	}
	lost := make(chan struct{})
	close(lost)
	r.desired = &lifecycle.Desired{Instances: []lifecycle.Instance{{Service: "s", Advertise: advertise}}}
	r.s.cli, r.s.lease, r.s.leases[7], r.s.lost = cli, 7, true, lost
	began := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	time.Sleep(10 * time.Second)
	cancel()
	<-ended
	etcd.mu.Lock()
	defer etcd.mu.Unlock()
	if len(etcd.granted) == 0 {
		t.Fatal("no lease after 10 s")
	}
	return etcd.granted[0].Sub(began)
}

// One wait is enough for the spread, and each further one is time in which consumers don't find the instance.
func TestReturnAfterALostLeaseIsSpreadOnce(t *testing.T) {
	var shortest, longest time.Duration
	for i := range 40 { // with two waits, half of these would be longer than one may be
		synctest.Test(t, func(t *testing.T) {
			took := lostLease(t, true)
			if i == 0 {
				shortest = took
			}
			shortest, longest = min(shortest, took), max(longest, took)
		})
	}
	if longest > lostLeaseSpread || longest-shortest < lostLeaseSpread/4 {
		t.Errorf("back after %s to %s, want it spread over %s", shortest, longest, lostLeaseSpread)
	}
}

func TestWithdrawalAfterALostLeaseDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if took := lostLease(t, false); took > 0 {
			t.Errorf("it took %s to get a lease", took)
		}
	})
}
