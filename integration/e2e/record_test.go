package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

// change is one event of the registry, and when a watcher saw it.
type change struct {
	at      time.Time
	deleted bool
	key     string
	value   string
	created int64 // the revision that made the key
}

func (c change) String() string {
	what := "PUT " + c.key + " " + c.value
	if c.deleted {
		what = "DELETE " + c.key
	}
	return c.at.Format("15:04:05.000 ") + what
}

// changes are all that happened under some prefixes.
type changes struct {
	mu   sync.Mutex
	list []change
}

func watchRegistry(ctx context.Context, etcd *clientv3.Client, prefixes ...string) *changes {
	c := &changes{}
	for _, prefix := range prefixes {
		go func() {
			// From the beginning of all: it comes back when etcd does, and nothing is missed until it is there.
			for resp := range etcd.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(1)) {
				now := time.Now()
				c.mu.Lock()
				for _, ev := range resp.Events {
					c.list = append(c.list, change{now, ev.Type == clientv3.EventTypeDelete, string(ev.Kv.Key), string(ev.Kv.Value), ev.Kv.CreateRevision})
				}
				c.mu.Unlock()
			}
		}()
	}
	return c
}

func (c *changes) all() []change {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.list)
}

// last is the newest change of a key.
func (c *changes) last(key string) (change, bool) {
	for _, ch := range slices.Backward(c.all()) {
		if ch.key == key {
			return ch, true
		}
	}
	return change{}, false
}

// first is the oldest change of a key.
func (c *changes) first(key string) (change, bool) {
	for _, ch := range c.all() {
		if ch.key == key {
			return ch, true
		}
	}
	return change{}, false
}

// line is one of a container's log. Its time is the one that it gives itself, if it does, else when containerd got it: on
// a busy machine containerd hears late, and of two containers in any order.
type line struct {
	at        time.Time
	pod, text string
}

// fields are those of a JSON line.
func (l line) fields() map[string]any {
	m := map[string]any{}
	_ = json.Unmarshal([]byte(l.text), &m) // not JSON: no fields
	return m
}

// duration is a field that is one; -1 if it isn't.
func (l line) duration(field string) time.Duration {
	text, _ := l.fields()[field].(string)
	d, err := time.ParseDuration(text)
	if err != nil {
		return -1
	}
	return d
}

// logs holds the containers' log files open, so that they can be read after their pods have gone.
type logs struct {
	mu    sync.Mutex
	files map[string]*os.File
	root  string
}

func followLogs(ctx context.Context, dir, namespace string) *logs {
	// The layout is the kubelet's: NAMESPACE_POD_UID/CONTAINER/RESTARTS.log
	l := &logs{files: map[string]*os.File{}, root: filepath.Join(dir, "pod-logs")}
	look := func() {
		paths, _ := filepath.Glob(filepath.Join(l.root, namespace+"_*", "*", "*.log"))
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, path := range paths {
			if l.files[path] != nil {
				continue
			}
			if f, err := os.Open(path); err == nil {
				l.files[path] = f
			}
		}
	}
	go func() {
		for ctx.Err() == nil {
			look()
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}()
	return l
}

func (l *logs) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, f := range l.files {
		f.Close()
	}
	clear(l.files)
}

// each hands over every log, in the order of its file's name.
func (l *logs) each(fn func(pod, container string, lines []line)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var paths []string
	for path := range l.files {
		paths = append(paths, path)
	}
	slices.Sort(paths)
	for _, path := range paths {
		f := l.files[path]
		info, err := f.Stat()
		if err != nil {
			continue
		}
		b := make([]byte, info.Size())
		n, _ := f.ReadAt(b, 0)
		parts := strings.Split(strings.TrimPrefix(path, l.root+"/"), "/")
		pod := strings.Split(parts[0], "_")[1]
		fn(pod, parts[1], parseCRI(pod, b[:n]))
	}
}

// parseCRI reads lines of the container runtime's format: TIME STREAM TAG TEXT.
func parseCRI(pod string, b []byte) []line {
	var out []line
	for raw := range bytes.Lines(b) {
		parts := strings.SplitN(strings.TrimSuffix(string(raw), "\n"), " ", 4)
		if len(parts) < 4 {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, parts[0])
		if err == nil {
			out = append(out, line{at, pod, parts[3]})
		}
	}
	return out
}

// find returns the lines with all the words; pod "" is any.
func (l *logs) find(pod, container string, words ...string) []line {
	var out []line
	l.each(func(p, c string, lines []line) {
		if pod != "" && p != pod || c != container {
			return
		}
		for _, ln := range lines {
			if slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(ln.text, w) }) {
				continue
			}
			text, _ := ln.fields()["time"].(string)
			if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
				ln.at = at
			}
			out = append(out, ln)
		}
	})
	return out
}

// ownEtcd is a registry that a test may take down.
type ownEtcd struct {
	t      testing.TB
	args   []string
	url    string
	client *clientv3.Client
	cmd    *exec.Cmd // nil while it is down
}

// newEtcd prepares one that pods can reach. It isn't started.
func newEtcd(t testing.TB) *ownEtcd {
	t.Helper()
	// Not one of those that the kernel hands out: nobody else may have it while this etcd is down.
	url := func(host string) string {
		for range 100 {
			address := net.JoinHostPort(host, strconv.Itoa(10_000+rand.IntN(10_000)))
			if ln, err := net.Listen("tcp", address); err == nil {
				ln.Close()
				return "http://" + address
			}
		}
		t.Fatal("no port is free")
		return ""
	}
	client, peer := url(shared.NodeIP()), url("127.0.0.1")
	e := &ownEtcd{t: t, url: client, args: []string{
		"--name", "own", "--data-dir", filepath.Join(t.TempDir(), "data"),
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "own=" + peer,
		"--log-level", "error", "--unsafe-no-fsync", "--heartbeat-interval=20", "--election-timeout=200",
	}}
	var err error
	if e.client, err = clientv3.New(clientv3.Config{Endpoints: []string{client}, DialTimeout: 5 * time.Second, Logger: zap.NewNop()}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		e.client.Close()
		if e.cmd != nil {
			e.kill()
		}
	})
	return e
}

func (e *ownEtcd) start() {
	e.t.Helper()
	cmd := exec.Command(shared.Binary("etcd"), e.args...)
	cmd.Stderr = e.t.Output()
	if err := cmd.Start(); err != nil {
		e.t.Fatal(err)
	}
	e.cmd = cmd
	deadline := time.Now().Add(soon)
	for {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_, err := e.client.MemberList(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			e.t.Fatal(fmt.Errorf("starting an etcd: %w", err))
		}
		time.Sleep(pollEvery)
	}
}

// kill ends it as a crash does.
func (e *ownEtcd) kill() {
	e.t.Helper()
	if err := e.cmd.Process.Kill(); err != nil {
		e.t.Error(err)
	}
	e.cmd.Wait() // killed
	e.cmd = nil
}

// freeze makes it hold its connections and answer nothing, until thaw or kill.
func (e *ownEtcd) freeze() { e.signal(syscall.SIGSTOP) }

func (e *ownEtcd) thaw() { e.signal(syscall.SIGCONT) }

func (e *ownEtcd) signal(sig syscall.Signal) {
	e.t.Helper()
	if err := e.cmd.Process.Signal(sig); err != nil {
		e.t.Fatal(err)
	}
}

// as is a client of a user's.
func (e *ownEtcd) as(user, password string) *clientv3.Client {
	e.t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{e.url}, DialTimeout: 5 * time.Second, Username: user, Password: password, Logger: zap.NewNop()})
	if err != nil {
		e.t.Fatal(err)
	}
	e.t.Cleanup(func() { c.Close() })
	return c
}
