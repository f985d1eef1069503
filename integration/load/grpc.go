package load

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"usher.dev/usher/integration/app/wire"
)

// grpcClient is several client connections, each with a resolver and a balancer of its own, used in turn.
type grpcClient struct {
	conns []*grpc.ClientConn
	next  atomic.Uint64
}

func dialGRPC(cli *clientv3.Client, target string, conns int) (*grpcClient, error) {
	b, err := resolver.NewBuilder(cli)
	if err != nil {
		return nil, fmt.Errorf("make the gRPC resolver: %w", err)
	}
	c := &grpcClient{}
	for range conns {
		cc, err := grpc.NewClient("etcd:///"+target,
			grpc.WithResolvers(b),
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
			grpc.WithDisableServiceConfig(),
			grpc.WithDisableRetry(),
			grpc.WithNoProxy(),
			// Never idle: an idle client forgets its instances and asks the registry anew.
			grpc.WithIdleTimeout(0),
		)
		if err != nil {
			c.close()
			return nil, fmt.Errorf("make a gRPC client of etcd:///%s: %w", target, err)
		}
		c.conns = append(c.conns, cc)
	}
	return c, nil
}

// connected waits until every connection has tried an instance; whether that one answers is for the requests to find out.
func (c *grpcClient) connected(ctx context.Context) error {
	for _, cc := range c.conns {
		cc.Connect()
	}
	for _, cc := range c.conns {
		for s := cc.GetState(); s != connectivity.Ready && s != connectivity.TransientFailure; s = cc.GetState() {
			if !cc.WaitForStateChange(ctx, s) {
				return ctx.Err()
			}
		}
	}
	return nil
}

func (c *grpcClient) close() {
	for _, cc := range c.conns {
		cc.Close()
	}
}

func grpcRoute(c *grpcClient) route {
	return route{protocol: GRPC, shared: c, worker: func() (sender, func()) { return c, func() {} }}
}

func (c *grpcClient) send(ctx context.Context, s Share) outcome {
	cc := c.conns[c.next.Add(1)%uint64(len(c.conns))]
	var at peer.Peer
	var o outcome
	if s.Kind == Stream {
		o.pod, o.err = stream(ctx, cc, s, grpc.Peer(&at))
	} else {
		answer := new(wrapperspb.StringValue)
		o.err = cc.Invoke(ctx, wire.WaitMethod, durationpb.New(s.For), answer, grpc.Peer(&at))
		o.pod = answer.GetValue()
	}
	if at.Addr != nil {
		o.instance = at.Addr.String()
	}
	return o
}

func stream(ctx context.Context, cc *grpc.ClientConn, s Share, opts ...grpc.CallOption) (pod string, err error) {
	st, err := cc.NewStream(ctx, wire.StreamDesc(), wire.StreamMethod, opts...)
	if err != nil {
		return "", err
	}
	// An error of sending is io.EOF; the real one comes from receiving.
	if err := st.SendMsg(durationpb.New(s.For)); err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	if err := st.CloseSend(); err != nil {
		return "", err
	}
	for {
		m := new(wrapperspb.StringValue)
		err := st.RecvMsg(m)
		if errors.Is(err, io.EOF) {
			return pod, nil
		}
		if err != nil {
			return pod, err
		}
		pod = m.GetValue()
	}
}
