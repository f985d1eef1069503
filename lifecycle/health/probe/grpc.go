package probe

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// grpcHandler is probe/grpc/grpc.go: a new connection each time, and whatever goes wrong is a failure.
type grpcHandler struct {
	addr, service string
	timeout       time.Duration
	options       []grpc.DialOption
}

func newGRPCHandler(host string, port int, service, agent string, timeout time.Duration, dial Dial) *grpcHandler {
	return &grpcHandler{
		addr: net.JoinHostPort(host, strconv.Itoa(port)), service: service, timeout: timeout,
		options: []grpc.DialOption{
			grpc.WithUserAgent(agent),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
				return dial(ctx, "tcp", addr)
			}),
			grpc.WithNoProxy(),
			grpc.WithDisableServiceConfig(),
			// The defaults, 32 KiB each, would be allocated for every run; a health check is some 100 bytes.
			grpc.WithReadBufferSize(1 << 10), grpc.WithWriteBufferSize(1 << 10),
		},
	}
}

func (h *grpcHandler) probe(ctx context.Context) (verdict, string, error) {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+h.addr, h.options...)
	if err != nil {
		return failure, fmt.Sprintf("error: failed to connect service at %q: %v", h.addr, err), nil
	}
	defer conn.Close()
	// The kubelet dials with WithBlock: a refused connection is tried again until the timeout.
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if s == connectivity.Idle {
			conn.Connect()
		}
		if !conn.WaitForStateChange(ctx, s) {
			return failure, fmt.Sprintf("timeout: failed to connect service %q within %v: %v", h.addr, h.timeout, ctx.Err()), nil
		}
	}
	answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: h.service})
	if err != nil {
		switch status.Code(err) {
		case codes.Unimplemented:
			return failure, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): " + status.Convert(err).Message(), nil
		case codes.DeadlineExceeded:
			return failure, fmt.Sprintf("timeout: health rpc did not complete within %v", h.timeout), nil
		}
		return failure, fmt.Sprintf("error: health rpc probe failed: %v", err), nil
	}
	if s := answer.GetStatus(); s != healthpb.HealthCheckResponse_SERVING {
		return failure, fmt.Sprintf("service unhealthy (responded with %q)", s.String()), nil
	}
	return success, "service healthy", nil
}
