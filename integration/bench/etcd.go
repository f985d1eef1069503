package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/registry"
)

// etcdStart is how long etcd has to answer.
const etcdStart = 30 * time.Second

// etcd is a process of one member with fsync, on loopback, with nothing of anybody else in it.
type etcd struct {
	binary, dir, client, peer string // client and peer are host:port

	cmd *exec.Cmd // nil: not running
	log *bytes.Buffer
}

// startEtcd starts one with empty data.
func startEtcd(ctx context.Context, binary string) (*etcd, error) {
	ports, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "usher-bench-etcd")
	if err != nil {
		return nil, fmt.Errorf("making etcd's folder: %w", err)
	}
	e := &etcd{binary: binary, dir: dir, client: ports[0], peer: ports[1]}
	if _, err := e.start(ctx); err != nil {
		return nil, errors.Join(err, e.remove())
	}
	return e, nil
}

// start starts the process on the data that there is, and returns when it answered.
func (e *etcd) start(ctx context.Context) (time.Time, error) {
	client, peer := "http://"+e.client, "http://"+e.peer
	e.log = new(bytes.Buffer)
	e.cmd = exec.Command(e.binary, "--name", "bench", "--data-dir", e.dir, "--log-level", "warn",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "bench="+peer)
	e.cmd.Stderr = e.log
	if err := e.cmd.Start(); err != nil {
		e.cmd = nil
		return time.Time{}, fmt.Errorf("starting etcd: %w", err)
	}
	at, err := e.answering(ctx)
	if err != nil {
		e.kill() // so that nothing writes to the log any more
		return at, fmt.Errorf("waiting for etcd to answer: %w\n%s", err, e.log)
	}
	return at, nil
}

// answering waits for the first answer. etcd listens before it serves, so a connection that is made as soon as it listens
// hears at once.
func (e *etcd) answering(ctx context.Context) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, etcdStart)
	defer cancel()
	for {
		conn, err := net.Dial("tcp", e.client)
		if err == nil {
			conn.Close()
			break
		}
		select {
		case <-time.After(2 * time.Millisecond):
		case <-ctx.Done():
			return time.Time{}, err
		}
	}
	cli, err := e.dial()
	if err != nil {
		return time.Time{}, err
	}
	defer cli.Close()
	_, err = cli.Get(ctx, "a")
	return time.Now(), err
}

func (e *etcd) dial() (*clientv3.Client, error) {
	return registry.Connection{Endpoints: []string{"http://" + e.client}}.Dial(nil)
}

func (e *etcd) revision(ctx context.Context) (int64, error) {
	cli, err := e.dial()
	if err != nil {
		return 0, err
	}
	defer cli.Close()
	resp, err := cli.Get(ctx, "a")
	if err != nil {
		return 0, fmt.Errorf("reading etcd's revision: %w", err)
	}
	return resp.Header.Revision, nil
}

// kill is SIGKILL. The data stays.
func (e *etcd) kill() {
	if e.cmd == nil {
		return
	}
	e.cmd.Process.Kill()
	e.cmd.Wait() // "signal: killed", as asked for
	e.cmd = nil
}

func (e *etcd) remove() error {
	e.kill()
	return os.RemoveAll(e.dir)
}
