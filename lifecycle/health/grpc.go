package health

import (
	"context"
	"time"

	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// GRPC serves grpc.health.v1. Its services are the groups, and "" is readiness. SERVING is what HTTP answers with a code
// below 400. A server that it is on ends with Stop: GracefulStop waits for whoever watches, and that is for ever. It has an implementation of its own, since google.golang.org/grpc/health keeps a copy of each status that
// somebody has to keep right, and changes what the process' gRPC clients do.
func (h *Health) GRPC() healthpb.HealthServer { return &grpcServer{h: h} }

type grpcServer struct {
	healthpb.UnimplementedHealthServer
	h *Health
}

// status of a service, and what is closed when it may be another.
func (s *grpcServer) status(service string) (healthpb.HealthCheckResponse_ServingStatus, <-chan struct{}) {
	if service == "" {
		service = readiness
	}
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	h.expire(time.Now())
	g, ok := h.groups.named[service]
	if !ok {
		return healthpb.HealthCheckResponse_SERVICE_UNKNOWN, h.changed
	}
	if status, _ := h.groupStatus(g, view{aspect: g.aspect}); g.code(status) < 400 {
		return healthpb.HealthCheckResponse_SERVING, h.changed
	}
	return healthpb.HealthCheckResponse_NOT_SERVING, h.changed
}

func (s *grpcServer) Check(_ context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	serving, _ := s.status(r.GetService())
	if serving == healthpb.HealthCheckResponse_SERVICE_UNKNOWN {
		return nil, status.Error(codes.NotFound, "unknown service")
	}
	return &healthpb.HealthCheckResponse{Status: serving}, nil
}

func (s *grpcServer) List(context.Context, *healthpb.HealthListRequest) (*healthpb.HealthListResponse, error) {
	out := &healthpb.HealthListResponse{Statuses: map[string]*healthpb.HealthCheckResponse{}}
	for _, service := range append(s.h.groups.names(), "") {
		serving, _ := s.status(service)
		out.Statuses[service] = &healthpb.HealthCheckResponse{Status: serving}
	}
	return out, nil
}

// Watch sends the status, and every other one that follows. As the protocol has it, a service that is unknown is no error.
func (s *grpcServer) Watch(r *healthpb.HealthCheckRequest, stream healthpb.Health_WatchServer) error {
	sent := healthpb.HealthCheckResponse_ServingStatus(-1)
	for {
		serving, changed := s.status(r.GetService())
		if serving != sent {
			if err := stream.Send(&healthpb.HealthCheckResponse{Status: serving}); err != nil {
				return err
			}
			sent = serving
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return status.FromContextError(stream.Context().Err()).Err()
		}
	}
}
