// Package etcdtest runs a real etcd server inside a test, and a link to it that can be cut.
package etcdtest

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"usher.dev/usher/registry"
)

// Server is an etcd of one member on loopback.
type Server struct {
	Endpoint string // host:port

	dir  string
	etcd *embed.Etcd
}

// Start runs an empty etcd until the test ends.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// New runs an empty etcd until Close.
func New() (*Server, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	s := &Server{Endpoint: address}
	if err := errors.Join(s.Wipe(), s.Restart()); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

// Restart runs the etcd again after Stop, with its data and at its address.
func (s *Server) Restart() error {
	cfg := embed.NewConfig()
	cfg.Dir = s.dir
	client, peer := url.URL{Scheme: "http", Host: s.Endpoint}, url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return fmt.Errorf("starting etcd: %w", err)
	}
	s.etcd = e
	select {
	case <-e.Server.ReadyNotify():
		return nil
	case <-time.After(30 * time.Second):
		return errors.New("etcd isn't ready after 30 s")
	}
}

// Stop ends the etcd and keeps its data.
func (s *Server) Stop() {
	if s.etcd != nil {
		s.etcd.Close()
		s.etcd = nil
	}
}

// Wipe makes the next Restart an empty etcd.
func (s *Server) Wipe() (err error) {
	os.RemoveAll(s.dir)
	s.dir, err = os.MkdirTemp("", "etcdtest")
	return err
}

// Close ends the etcd for good.
func (s *Server) Close() {
	s.Stop()
	os.RemoveAll(s.dir)
}

// Client connects to an endpoint until the test ends.
func Client(t testing.TB, endpoint string) *clientv3.Client {
	t.Helper()
	cli, err := registry.Connection{Endpoints: []string{endpoint}}.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cli.Close() })
	return cli
}

// freeAddress is an address that nothing listens on, and that nobody else is given while a server is stopped: outgoing
// connections and other tests take theirs from 127.0.0.1.
func freeAddress() (string, error) {
	host := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(250), rand.IntN(250), 1+rand.IntN(250))
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// Link is a TCP relay on loopback that can be cut and joined again.
type Link struct {
	Address string

	to    string
	t     testing.TB
	mu    sync.Mutex
	l     net.Listener
	conns []net.Conn
}

// NewLink relays to an address.
func NewLink(t testing.TB, to string) *Link {
	t.Helper()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	k := &Link{Address: address, to: to, t: t}
	k.Join()
	t.Cleanup(k.Cut)
	return k
}

// Join accepts connections.
func (k *Link) Join() {
	k.t.Helper()
	l, err := net.Listen("tcp", k.Address)
	if err != nil {
		k.t.Fatal(err)
	}
	k.mu.Lock()
	k.l = l
	k.mu.Unlock()
	go func() {
		for {
			in, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			} else if err != nil {
				continue
			}
			out, err := net.Dial("tcp", k.to)
			if err != nil {
				in.Close()
				continue
			}
			k.mu.Lock()
			if k.l != l {
				in.Close()
				out.Close()
			}
			k.conns = append(k.conns, in, out)
			k.mu.Unlock()
			go relay(in, out)
			go relay(out, in)
		}
	}()
}

func relay(to, from net.Conn) {
	io.Copy(to, from)
	to.Close()
	from.Close()
}

// Cut ends all connections and refuses new ones.
func (k *Link) Cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.l != nil {
		k.l.Close()
		k.l = nil
	}
	for _, c := range k.conns {
		c.Close()
	}
	k.conns = nil
}
