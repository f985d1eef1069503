// Package etcdtest gives a test a real etcd of its own, one member inside the test process, that can be stopped, started
// again, and reached over links that fail on demand.
//
//	client --> Link (Pass, Hold, DropAnswers, Refuse) --> member
//
// Everybody reaches the member through a Link, so its address stays the same whatever port the member has, and stopping
// the member ends its connections at once instead of waiting for open watches.
package etcdtest

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

// startTimeout is generous: a busy machine shares its cores among many of these.
const startTimeout = 30 * time.Second

// Server is one etcd member. Its methods fail the test when they can't do their work.
type Server struct {
	t   testing.TB
	dir string

	mu     sync.Mutex
	etcd   *embed.Etcd // nil when stopped
	target string      // host:port of the member; empty when stopped
	links  []*Link
	own    *Link
}

// Start starts a member with an empty data directory. It ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	s := &Server{t: t, dir: filepath.Join(t.TempDir(), "etcd")}
	s.own = s.Link()
	t.Cleanup(func() {
		s.Stop()
		for _, l := range s.links {
			l.close()
		}
	})
	s.run()
	return s
}

func (s *Server) run() {
	s.t.Helper()
	loopback := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg := embed.NewConfig()
	cfg.Dir = s.dir
	cfg.UnsafeNoFsync = true
	cfg.TickMs, cfg.ElectionMs = 20, 200 // the only member has nobody to lose an election to
	cfg.BcryptCost = 4                   // bcrypt's least: the figure is paid at every login
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = loopback, loopback
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = loopback, loopback
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		s.t.Fatalf("start etcd: %v", err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		s.t.Fatalf("start etcd: %v", err)
	case <-time.After(startTimeout):
		e.Close()
		s.t.Fatalf("etcd is not ready after %s", startTimeout)
	}
	s.mu.Lock()
	s.etcd, s.target = e, e.Clients[0].Addr().String()
	s.mu.Unlock()
}

// Stop stops the member and ends all connections to it. The data stays.
func (s *Server) Stop() {
	s.mu.Lock()
	e, links := s.etcd, s.links
	s.etcd, s.target = nil, ""
	s.mu.Unlock()
	if e == nil {
		return
	}
	for _, l := range links {
		l.cut()
	}
	e.Close()
}

// Restart starts the member on the data it had, stopping it first if it runs.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	s.run()
}

// RestartEmpty starts a member that has lost all data: revisions begin anew.
func (s *Server) RestartEmpty() {
	s.t.Helper()
	s.Stop()
	if err := os.RemoveAll(s.dir); err != nil {
		s.t.Fatal(err)
	}
	s.run()
}

// Endpoint is the address, host:port, of a link that passes everything. It outlives restarts.
func (s *Server) Endpoint() string { return s.own.Endpoint() }

// Link makes another way to the member.
func (s *Server) Link() *Link {
	s.t.Helper()
	l, err := newLink(s.member)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	s.links = append(s.links, l)
	s.mu.Unlock()
	return l
}

func (s *Server) member() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.target
}

// Client is a client of Endpoint. It ends with the test, before the member does.
func (s *Server) Client() *clientv3.Client {
	s.t.Helper()
	return s.ClientAs("", "")
}

// ClientAs is a client that logs in.
func (s *Server) ClientAs(user, password string) *clientv3.Client {
	s.t.Helper()
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{s.Endpoint()}, DialTimeout: 5 * time.Second,
		Username: user, Password: password, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond},
		})},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// History is every change there ever was, oldest first. It needs a client that may read everything, and no compaction.
func History(ctx context.Context, c *clientv3.Client) ([]*clientv3.Event, error) {
	now, err := c.Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithCountOnly())
	if err != nil {
		return nil, fmt.Errorf("read the revision: %w", err)
	}
	if now.Header.Revision == 1 { // the first change is revision 2
		return nil, nil
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var events []*clientv3.Event
	for resp := range c.Watch(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithRev(1)) {
		if err := resp.Err(); err != nil {
			return nil, fmt.Errorf("watch from the first revision: %w", err)
		}
		events = append(events, resp.Events...)
		if n := len(events); n > 0 && events[n-1].Kv.ModRevision >= now.Header.Revision {
			return events, nil
		}
	}
	return nil, ctx.Err()
}
