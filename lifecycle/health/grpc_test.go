package health

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"usher.dev/usher/lifecycle"
)

func dial(t *testing.T, r *rig) (healthpb.HealthClient, context.Context) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, r.GRPC())
	go s.Serve(ln)
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient(ln.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return healthpb.NewHealthClient(conn), ctx
}

func TestGRPCCheckAndList(t *testing.T) {
	r := newRig(t, `{"groups": {"mine": {"include": ["livenessState"]}}}`)
	c, ctx := dial(t, r)
	r.setReadiness(lifecycle.RefusingTraffic, "")
	want := map[string]healthpb.HealthCheckResponse_ServingStatus{
		"": healthpb.HealthCheckResponse_NOT_SERVING, "readiness": healthpb.HealthCheckResponse_NOT_SERVING,
		"liveness": healthpb.HealthCheckResponse_SERVING, "startup": healthpb.HealthCheckResponse_SERVING, "mine": healthpb.HealthCheckResponse_SERVING,
	}
	list, err := c.List(ctx, &healthpb.HealthListRequest{})
	if err != nil || len(list.Statuses) != len(want) {
		t.Fatalf("list: %v %v", list, err)
	}
	for service, w := range want {
		got, err := c.Check(ctx, &healthpb.HealthCheckRequest{Service: service})
		if err != nil || got.Status != w || list.Statuses[service].GetStatus() != w {
			t.Errorf("%q: got %v %v, listed %v", service, got, err, list.Statuses[service])
		}
	}
	if _, err := c.Check(ctx, &healthpb.HealthCheckRequest{Service: "nonesuch"}); status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
}

func TestGRPCWatchSendsEachStatusOnce(t *testing.T) {
	r := newRig(t, `{}`)
	c, ctx := dial(t, r)
	stream, err := c.Watch(ctx, &healthpb.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		got, err := stream.Recv()
		if err != nil || got.Status != want {
			t.Fatalf("got %v %v, want %v", got, err, want)
		}
	}
	next(healthpb.HealthCheckResponse_SERVING)
	r.setReadiness(lifecycle.AcceptingTraffic, "no other status")
	r.setReadiness(lifecycle.RefusingTraffic, "")
	next(healthpb.HealthCheckResponse_NOT_SERVING)
	r.setReadiness(lifecycle.RefusingTraffic, "another cause")
	r.setReadiness(lifecycle.AcceptingTraffic, "")
	next(healthpb.HealthCheckResponse_SERVING)
	r.SetLifecycle(Lifecycle{Draining: true})
	next(healthpb.HealthCheckResponse_NOT_SERVING)

	unknown, err := c.Watch(ctx, &healthpb.HealthCheckRequest{Service: "nonesuch"})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := unknown.Recv(); err != nil || got.Status != healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		t.Errorf("got %v %v", got, err)
	}
}
