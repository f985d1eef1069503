package grpcinflight_test

import (
	"context"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"usher.dev/usher/drain/inflight"
	"usher.dev/usher/drain/inflight/grpcinflight"
)

// service is a real service whose methods do what the test says.
type service struct {
	grpc_health_v1.UnimplementedHealthServer
	check func(context.Context) error
	watch func(grpc_health_v1.Health_WatchServer) error
}

func (s *service) Check(ctx context.Context, _ *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	return &grpc_health_v1.HealthCheckResponse{}, s.check(ctx)
}

func (s *service) Watch(_ *grpc_health_v1.HealthCheckRequest, stream grpc_health_v1.Health_WatchServer) error {
	return s.watch(stream)
}

func newHandler(t *testing.T, skip func(string) bool) (*inflight.Counter, *grpcinflight.Handler) {
	t.Helper()
	c, err := inflight.New(inflight.Config{})
	if err != nil {
		t.Fatal(err)
	}
	h, err := grpcinflight.New(grpcinflight.Config{Counter: c, Skip: skip})
	if err != nil {
		t.Fatal(err)
	}
	return c, h
}

// serve runs a server with the handlers. The client has the first one too: it must count nothing there.
func serve(t *testing.T, s *service, handlers ...*grpcinflight.Handler) (*grpc.Server, *grpc.ClientConn) {
	t.Helper()
	var opts []grpc.ServerOption
	for _, h := range handlers {
		opts = append(opts, grpc.StatsHandler(h))
	}
	srv := grpc.NewServer(opts...)
	grpc_health_v1.RegisterHealthServer(srv, s)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	client, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithStatsHandler(handlers[0]), grpc.WithInitialWindowSize(1<<16)) // set, the window does not grow
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return srv, client
}

func unary(ctx context.Context, client *grpc.ClientConn) error {
	_, err := grpc_health_v1.NewHealthClient(client).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	return err
}

func become(t *testing.T, c *inflight.Counter, want int) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); c.InFlight() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d in flight, want %d", c.InFlight(), want)
		}
	}
}

func check(t *testing.T, c *inflight.Counter, want int) {
	t.Helper()
	if got := c.InFlight(); got != want {
		t.Errorf("%d in flight, want %d", got, want)
	}
}

func TestUnaryRPCsCountUntilTheirEnd(t *testing.T) {
	for _, want := range []error{nil, status.Error(codes.NotFound, "none")} {
		c, h := newHandler(t, nil)
		arrived, release := make(chan struct{}), make(chan struct{})
		_, client := serve(t, &service{check: func(context.Context) error {
			arrived <- struct{}{}
			<-release
			return want
		}}, h)
		const calls = 10
		answers := make(chan error, calls)
		for i := range calls {
			go func() { answers <- unary(t.Context(), client) }()
			<-arrived
			check(t, c, i+1)
		}
		for left := calls - 1; left >= 0; left-- {
			release <- struct{}{}
			if err := <-answers; status.Code(err) != status.Code(want) {
				t.Errorf("got %v, want %v", err, want)
			}
			become(t, c, left)
		}
	}
}

func TestCancelledRPCCountsUntilItsHandlerReturns(t *testing.T) {
	c, h := newHandler(t, nil)
	arrived, release := make(chan struct{}), make(chan struct{})
	_, client := serve(t, &service{check: func(ctx context.Context) error {
		close(arrived)
		<-ctx.Done()
		<-release
		return ctx.Err()
	}}, h)
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error, 1)
	go func() { answer <- unary(ctx, client) }()
	<-arrived
	cancel()
	if err := <-answer; status.Code(err) != codes.Canceled {
		t.Errorf("got %v, want Canceled", err)
	}
	check(t, c, 1)
	close(release)
	become(t, c, 0)
}

// TestStreamCountsWhileItsMessagesAreNotRead: 210 kB of messages are more than a stream's window and grpc-go's buffer.
func TestStreamCountsWhileItsMessagesAreNotRead(t *testing.T) {
	c, h := newHandler(t, nil)
	const messages = 30_000
	_, client := serve(t, &service{watch: func(stream grpc_health_v1.Health_WatchServer) error {
		for range messages {
			if err := stream.Send(&grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}); err != nil {
				return err
			}
		}
		return nil
	}}, h)
	stream, err := grpc_health_v1.NewHealthClient(client).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	received := 0
	for ; ; received++ {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		if received <= messages/6 {
			check(t, c, 1)
		}
	}
	if received != messages {
		t.Errorf("%d messages, want %d", received, messages)
	}
	become(t, c, 0)
}

func TestServerThatStopsEndsItsRPCs(t *testing.T) {
	c, h := newHandler(t, nil)
	arrived := make(chan struct{})
	srv, client := serve(t, &service{watch: func(stream grpc_health_v1.Health_WatchServer) error {
		close(arrived)
		<-stream.Context().Done()
		return stream.Context().Err()
	}}, h)
	if _, err := grpc_health_v1.NewHealthClient(client).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatal(err)
	}
	<-arrived
	check(t, c, 1)
	srv.Stop()
	become(t, c, 0)
}

// The context of the front's RPC, in which its count is kept, is the one that its call of the back is made with.
func TestRPCOnBehalfOfAnotherCountsAtEachServerOnce(t *testing.T) {
	front, frontHandler := newHandler(t, nil)
	back, backHandler := newHandler(t, nil)
	_, toBack := serve(t, &service{check: func(context.Context) error {
		check(t, front, 1)
		check(t, back, 1)
		return nil
	}}, backHandler)
	_, toFront := serve(t, &service{check: func(ctx context.Context) error {
		err := unary(ctx, toBack)
		become(t, back, 0)
		check(t, front, 1)
		return err
	}}, frontHandler)
	if err := unary(t.Context(), toFront); err != nil {
		t.Fatal(err)
	}
	become(t, front, 0)
}

func TestHandlersOfOneServerCountEachForItself(t *testing.T) {
	one, oneHandler := newHandler(t, nil)
	two, twoHandler := newHandler(t, nil)
	_, client := serve(t, &service{check: func(context.Context) error {
		check(t, one, 1)
		check(t, two, 1)
		return nil
	}}, oneHandler, twoHandler)
	if err := unary(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	become(t, one, 0)
	become(t, two, 0)
}

func TestSkippedMethodsDontCount(t *testing.T) {
	c, h := newHandler(t, func(method string) bool { return method == grpc_health_v1.Health_Check_FullMethodName })
	_, client := serve(t, &service{
		check: func(context.Context) error { check(t, c, 0); return nil },
		watch: func(grpc_health_v1.Health_WatchServer) error { check(t, c, 1); return nil },
	}, h)
	if err := unary(t.Context(), client); err != nil {
		t.Fatal(err)
	}
	check(t, c, 0)
	stream, err := grpc_health_v1.NewHealthClient(client).Watch(t.Context(), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the stream's end", err)
	}
	become(t, c, 0)
}

func TestUnknownMethodsDontCount(t *testing.T) {
	c, h := newHandler(t, nil)
	_, client := serve(t, &service{}, h)
	for range 3 {
		err := client.Invoke(t.Context(), "/no.such.Service/Method", &grpc_health_v1.HealthCheckRequest{}, &grpc_health_v1.HealthCheckResponse{}, grpc.WaitForReady(true))
		if status.Code(err) != codes.Unimplemented {
			t.Errorf("got %v, want Unimplemented", err)
		}
	}
	check(t, c, 0)
}

func TestNewNamesWhatIsWrong(t *testing.T) {
	if _, err := grpcinflight.New(grpcinflight.Config{}); err == nil {
		t.Error("no error without a counter")
	}
}
