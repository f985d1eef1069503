package registry

import (
	"context"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// renewAgain is the pause after a renewal that failed.
const renewAgain = 500 * time.Millisecond

// renew keeps a lease alive until ctx ends, and returns when it is lost: by the server's word, or when the TTL has passed
// since the last renewal was sent.
//
// It is clientv3's KeepAlive for one lease: that one wakes twice a second for its deadlines, which was a quarter of all
// the CPU time that an idle agent took, and takes a lease for lost whose first renewal isn't answered within the dial
// timeout and a second, whatever the TTL. Like that one it stays on one stream, since each new one makes the client log
// in again where etcd has users.
func (r *Registrar) renew(ctx context.Context, cli *clientv3.Client, id clientv3.LeaseID, granted time.Time) {
	expires := granted.Add(r.cfg.TTL)
	// From the sending on, so that an etcd that takes long to answer has two thirds of the TTL for it.
	pause := r.cfg.TTL/3 - time.Since(granted)
	var stream *renewal
	defer func() { stream.close() }()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		sent := time.Now()
		var err error
		if stream == nil {
			stream, err = openRenewal(ctx, cli, min(requestTimeout, max(time.Until(expires), renewAgain)))
		}
		var ttl int64
		if err == nil {
			ttl, err = stream.once(id, min(requestTimeout, max(time.Until(expires), renewAgain)))
		}
		switch {
		case err == nil && ttl <= 0:
			return
		case err == nil:
			r.Counters.Renewals.Add(1)
			expires, pause, failing = sent.Add(r.cfg.TTL), r.cfg.TTL/3-time.Since(sent), false
		default:
			stream.close()
			stream = nil
			if ctx.Err() != nil || !time.Now().Before(expires) {
				return
			}
			if !failing {
				r.log.Warn("lease not renewed, trying again", zap.Stringer("lease", LeaseID(id)), zap.Duration("left", time.Until(expires)), zap.Error(err))
			}
			pause, failing = renewAgain, true
		}
	}
}

// renewal is a stream of renewals.
type renewal struct {
	stream grpc.BidiStreamingClient[etcdserverpb.LeaseKeepAliveRequest, etcdserverpb.LeaseKeepAliveResponse]
	cancel context.CancelFunc
}

func openRenewal(ctx context.Context, cli *clientv3.Client, timeout time.Duration) (*renewal, error) {
	// A member that has lost its leader ends the stream, so that the next one goes to another member.
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	s := &renewal{cancel: cancel}
	defer time.AfterFunc(timeout, cancel).Stop()
	// Waiting for the connection to be ready is what keeps this from spinning while it isn't.
	stream, err := etcdserverpb.NewLeaseClient(cli.ActiveConnection()).LeaseKeepAlive(ctx, grpc.WaitForReady(true))
	if err != nil {
		cancel()
		return nil, err
	}
	s.stream = stream
	return s, nil
}

// once renews the lease, and returns the TTL that the server gives: 0 when the lease is gone.
func (s *renewal) once(id clientv3.LeaseID, timeout time.Duration) (int64, error) {
	defer time.AfterFunc(timeout, s.cancel).Stop()
	if err := s.stream.Send(&etcdserverpb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return 0, err
	}
	resp, err := s.stream.Recv()
	if err != nil {
		return 0, err
	}
	return resp.TTL, nil
}

func (s *renewal) close() {
	if s != nil {
		s.cancel()
	}
}
