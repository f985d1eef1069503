package faults_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"usher.dev/usher/integration/internal/etcdtest"
)

// etcd is a cluster of etcd processes. They listen on Unix sockets in folders of their own and are reached over links.
// A peer's URL is a path relative to the member's working directory, so each member has its own link to each other one.
type etcd struct {
	t       testing.TB
	members []*member
	secure  bool // clients come with TLS
}

type member struct {
	name, dir string
	flags     []string
	proc      *process
	own       *etcdtest.Link         // of the observer and of the test
	agents    *etcdtest.Link         // of the registrants
	to        map[int]*etcdtest.Link // to the other members
}

// startEtcd starts n members; flags come after those that make a cluster of them.
func startEtcd(t testing.TB, n int, secure bool, flags ...string) *etcd {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd") // shorter than t.TempDir: a socket's path has at most 107 characters
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	e := &etcd{t: t, secure: secure}
	name := func(i int) string { return fmt.Sprintf("m%d", i+1) }
	var all []string
	for i := range n {
		all = append(all, fmt.Sprintf("%s=unix://%s:1", name(i), name(i)))
		if err := os.Mkdir(filepath.Join(dir, name(i)), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	link := func(network, address, socket string) *etcdtest.Link {
		ln, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		l := etcdtest.NewLink(ln, func() (net.Conn, error) { return net.Dial("unix", socket) })
		t.Cleanup(l.Close)
		return l
	}
	for i := range n {
		m := &member{name: name(i), dir: filepath.Join(dir, name(i)), to: map[int]*etcdtest.Link{}}
		for j := range n {
			if j != i {
				m.to[j] = link("unix", filepath.Join(m.dir, name(j)+":1"), filepath.Join(dir, name(j), name(j)+":1"))
			}
		}
		clients := filepath.Join(m.dir, "c:1")
		m.own, m.agents = link("tcp", "127.0.0.1:0", clients), link("tcp", "127.0.0.1:0", clients)
		scheme := "unix"
		if secure {
			scheme = "unixs"
		}
		m.flags = append([]string{
			"--name", m.name, "--data-dir", "data", "--logger", "zap", "--log-level", "warn", "--unsafe-no-fsync",
			"--listen-client-urls", scheme + "://c:1", "--advertise-client-urls", e.url(m.own),
			"--listen-peer-urls", "unix://" + m.name + ":1", "--initial-advertise-peer-urls", "unix://" + m.name + ":1",
			"--initial-cluster", strings.Join(all, ","),
		}, flags...)
		e.members = append(e.members, m)
		e.start(i)
	}
	return e
}

func (e *etcd) url(l *etcdtest.Link) string {
	if e.secure {
		return "https://" + l.Endpoint()
	}
	return "http://" + l.Endpoint()
}

// start starts a member on the data that it has. It doesn't wait until it answers.
func (e *etcd) start(i int) {
	e.t.Helper()
	m := e.members[i]
	cmd := exec.Command(etcdBinary, m.flags...)
	cmd.Dir = m.dir
	m.proc = startProcess(e.t, "etcd "+m.name, cmd)
}

func (e *etcd) kill(i int) { e.members[i].proc.kill() }

// endpoints are those of the registrants.
func (e *etcd) endpoints() string {
	var all []string
	for _, m := range e.members {
		all = append(all, e.url(m.agents))
	}
	return strings.Join(all, ",")
}

// isolate cuts a member off from the other members, or takes it back; its clients still reach it.
func (e *etcd) isolate(i int, mode etcdtest.Mode) {
	for j, m := range e.members {
		if j == i {
			for _, l := range m.to {
				l.Set(mode)
			}
			continue
		}
		m.to[i].Set(mode)
	}
}

// agents sets all links of the registrants.
func (e *etcd) agents(mode etcdtest.Mode) {
	for _, m := range e.members {
		m.agents.Set(mode)
	}
}

// leader is the member that others than the one left out take for their leader.
func (e *etcd) leader(cli *clientv3.Client, without int) (leader int, ok bool) {
	for i, m := range e.members {
		if i == without {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		st, err := cli.Status(ctx, e.url(m.own))
		cancel()
		if err != nil || st.Leader == 0 {
			continue
		}
		for j, o := range e.members {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			so, err := cli.Status(ctx, e.url(o.own))
			cancel()
			if err == nil && j != without && so.Header.MemberId == st.Leader {
				return j, true
			}
		}
	}
	return 0, false
}

// process is a child that ends with its test, whatever state it is in.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	done chan struct{}
}

func startProcess(t testing.TB, name string, cmd *exec.Cmd) *process {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: cmd, done: make(chan struct{})}
	go func() {
		cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		log.Close()
		if text, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("%s said:\n%s", name, text[max(0, len(text)-6000):])
		}
	})
	return p
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// client is the test's own. config may be changed before it is made.
func (e *etcd) client(change func(*clientv3.Config), members ...int) *clientv3.Client {
	e.t.Helper()
	cfg := clientv3.Config{DialTimeout: 5 * time.Second, Logger: zap.NewNop()}
	for i, m := range e.members {
		if len(members) == 0 || contains(members, i) {
			cfg.Endpoints = append(cfg.Endpoints, e.url(m.own))
		}
	}
	if change != nil {
		change(&cfg)
	}
	c, err := clientv3.New(cfg)
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	return c
}

func contains(all []int, one int) bool {
	for _, i := range all {
		if i == one {
			return true
		}
	}
	return false
}
