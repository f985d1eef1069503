// Package grpcinflight counts the RPCs that a gRPC server has in flight, into the same inflight.Counter as its HTTP requests.
// It is a package of its own so that applications without gRPC don't link it in.
package grpcinflight

import (
	"context"
	"errors"

	"google.golang.org/grpc/stats"

	"usher.dev/usher/drain/inflight"
)

// Config of a Handler.
type Config struct {
	// Counter counts the RPCs.
	Counter *inflight.Counter
	// Skip, when set, says by their full name (/package.Service/Method) which methods don't count: probes, and streams that
	// go on until the server ends them, since those would hold every drain to its deadline. It is called concurrently.
	Skip func(fullMethod string) bool
}

// Handler counts each RPC that a server answers, unary or stream, from its begin to its end. It is given to the server:
//
//	grpc.NewServer(grpc.StatsHandler(handler))
//
// On a client, where the same handler may be in use, it counts nothing: what a server asks of others is within what it was
// asked itself. An RPC of a method that the server doesn't know is refused at once, and never counts.
type Handler struct {
	counter *inflight.Counter
	skip    func(string) bool
}

// New returns an error when there is no counter.
func New(cfg Config) (*Handler, error) {
	if cfg.Counter == nil {
		return nil, errors.New("grpcinflight: Counter is nil, must be the counter that serves the agent")
	}
	h := &Handler{counter: cfg.Counter, skip: cfg.Skip}
	if h.skip == nil {
		h.skip = func(string) bool { return false }
	}
	return h, nil
}

// rpcKey is the key of the *rpc in its context. A server may have several handlers.
type rpcKey struct{ *Handler }

// rpc is set its end when it begins. gRPC calls a Handler for the events of one RPC in their order.
type rpc struct{ end func() }

// TagRPC is part of stats.Handler.
func (h *Handler) TagRPC(ctx context.Context, info *stats.RPCTagInfo) context.Context {
	if h.skip(info.FullMethodName) {
		return ctx
	}
	return context.WithValue(ctx, rpcKey{h}, &rpc{})
}

// HandleRPC is part of stats.Handler.
func (h *Handler) HandleRPC(ctx context.Context, event stats.RPCStats) {
	if event.IsClient() {
		return
	}
	r, ok := ctx.Value(rpcKey{h}).(*rpc)
	if !ok {
		return
	}
	switch event.(type) {
	case *stats.Begin:
		r.end = h.counter.Begin()
	case *stats.End:
		if r.end != nil {
			r.end()
		}
	}
}

// TagConn is part of stats.Handler.
func (h *Handler) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }

// HandleConn is part of stats.Handler.
func (h *Handler) HandleConn(context.Context, stats.ConnStats) {}
