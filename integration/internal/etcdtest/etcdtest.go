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
	"errors"
	"fmt"
	"net"
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

// Server is one etcd member of a test. Its methods fail the test when they can't do their work.
type Server struct {
	*member
	t testing.TB
}

// Start starts a member with an empty data directory. It ends with the test.
func Start(t testing.TB) *Server {
	t.Helper()
	m, err := start(filepath.Join(t.TempDir(), "etcd"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.close)
	return &Server{m, t}
}

// Serve starts an empty member for what has no test of its own: TestMain, and the examples it makes ready. The endpoint is
// host:port; stop ends the member and removes its data.
func Serve() (endpoint string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "etcdtest")
	if err != nil {
		return "", nil, fmt.Errorf("start etcd: %w", err)
	}
	m, err := start(dir)
	if err != nil {
		os.RemoveAll(dir)
		return "", nil, err
	}
	return m.Endpoint(), func() {
		m.close()
		os.RemoveAll(dir)
	}, nil
}

// Restart starts the member on the data it had, stopping it first if it runs.
func (s *Server) Restart() {
	s.t.Helper()
	s.Stop()
	if err := s.run(); err != nil {
		s.t.Fatal(err)
	}
}

// RestartEmpty starts a member that has lost all data: revisions begin anew.
func (s *Server) RestartEmpty() {
	s.t.Helper()
	s.Stop()
	if err := os.RemoveAll(s.dir); err != nil {
		s.t.Fatal(err)
	}
	s.Restart()
}

// Link makes another way to the member.
func (s *Server) Link() *Link {
	s.t.Helper()
	l, err := s.link()
	if err != nil {
		s.t.Fatal(err)
	}
	return l
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
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond},
			MinConnectTimeout: 5 * time.Second, // without it a connection has the 50 ms to come about
		})},
	})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { c.Close() })
	return c
}

// member is what a Server is without its test.
type member struct {
	dir string
	own *Link

	mu     sync.Mutex
	etcd   *embed.Etcd // nil when stopped
	target string      // host:port of the member; empty when stopped
	links  []*Link
}

func start(dir string) (*member, error) {
	m := &member{dir: dir}
	var err error
	if m.own, err = m.link(); err != nil {
		return nil, err
	}
	if err := m.run(); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *member) run() error {
	loopback := []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg := embed.NewConfig()
	cfg.Dir = m.dir
	cfg.UnsafeNoFsync = true
	cfg.TickMs, cfg.ElectionMs = 20, 200 // the only member has nobody to lose an election to
	cfg.BcryptCost = 4                   // bcrypt's least: the figure is paid at every login
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = loopback, loopback
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = loopback, loopback
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("start etcd: %w", err)
	}
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		e.Close()
		return fmt.Errorf("start etcd: %w", err)
	case <-time.After(startTimeout):
		e.Close()
		return fmt.Errorf("etcd is not ready after %s", startTimeout)
	}
	m.mu.Lock()
	m.etcd, m.target = e, e.Clients[0].Addr().String()
	m.mu.Unlock()
	return nil
}

// Stop stops the member and ends all connections to it. The data stays.
func (m *member) Stop() {
	m.mu.Lock()
	e, links := m.etcd, m.links
	m.etcd, m.target = nil, ""
	m.mu.Unlock()
	if e == nil {
		return
	}
	for _, l := range links {
		l.cut()
	}
	e.Close()
}

func (m *member) close() {
	m.Stop()
	for _, l := range m.links {
		l.Close()
	}
}

// Endpoint is the address, host:port, of a link that passes everything. It outlives restarts.
func (m *member) Endpoint() string { return m.own.Endpoint() }

func (m *member) link() (*Link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("make a link to etcd: %w", err)
	}
	l := NewLink(ln, m.dial)
	m.mu.Lock()
	m.links = append(m.links, l)
	m.mu.Unlock()
	return l, nil
}

func (m *member) dial() (net.Conn, error) {
	m.mu.Lock()
	target := m.target
	m.mu.Unlock()
	if target == "" {
		return nil, errors.New("the member is stopped")
	}
	return net.Dial("tcp", target)
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
