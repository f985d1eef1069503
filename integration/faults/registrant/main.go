// Command registrant runs the agent's registrar with instances that its flags describe, without Kubernetes, so that faults
// can be those of a real process: SIGKILL, SIGSTOP, a restart. etcd is where ETCDCTL_* says.
//
//	stdin:  online | offline, and a cause, one pair a line: what is desired from now on; it begins online
//	        step SECONDS: the wall clock of this process moves
//	stdout: one JSON object a line, see Line
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"usher.dev/usher/integration/faults/registrant/wire"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "registrant:", err)
		os.Exit(1)
	}
}

type settings struct {
	cluster, pod, uid, ip, formats string
	created                        int
	ttl                            time.Duration
	count                          int
	conn                           registry.Connection
}

func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	var s settings
	fs := flag.NewFlagSet("registrant", flag.ContinueOnError)
	fs.StringVar(&s.cluster, "cluster", "test", "name of the Kubernetes cluster")
	fs.StringVar(&s.pod, "pod", "api-0", "name of the Pod")
	fs.StringVar(&s.uid, "uid", "uid-0", "its UID")
	fs.StringVar(&s.ip, "ip", "10.0.0.1", "its IP")
	fs.IntVar(&s.created, "created", 0, "its age: seconds after an arbitrary moment")
	fs.StringVar(&s.formats, "formats", "grpc,kratos,skydns", "formats of its consumer records")
	fs.DurationVar(&s.ttl, "ttl", registry.MinTTL, "the lease's TTL")
	fs.IntVar(&s.count, "count", 1, "so many Pods, told apart by a number after name and UID, with IPs from --ip on")
	fs.StringVar(&s.conn.PasswordFile, "password-file", "", "file with the etcd user's password")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if err := s.conn.FromETCDCTL(os.Getenv); err != nil {
		return err
	}
	logging := zap.NewDevelopmentConfig()
	logging.Level.SetLevel(zap.InfoLevel)
	logging.DisableStacktrace = true
	log, err := logging.Build()
	if err != nil {
		return err
	}
	say := &printer{out: json.NewEncoder(out)}
	all := make([]*instance, s.count)
	var running sync.WaitGroup
	for i := range all {
		if all[i], err = s.instance(i, log, say); err != nil {
			return err
		}
		all[i].set(lifecycle.Online, "started")
		running.Go(func() { all[i].registrar.Run(ctx) }) // it has no error but that of its end
	}
	go func() {
		for lines := bufio.NewScanner(in); lines.Scan(); {
			name, cause, _ := strings.Cut(lines.Text(), " ")
			state := lifecycle.Online
			switch name {
			case "offline":
				state = lifecycle.Offline
			case "step":
				seconds, err := strconv.ParseInt(cause, 10, 64)
				if err == nil {
					err = stepClock(seconds)
				}
				if err != nil {
					log.Fatal("stepping the clock", zap.Error(err))
				}
				continue
			}
			for _, in := range all {
				in.set(state, cause)
			}
		}
	}()
	running.Wait()
	return nil
}

type instance struct {
	registrar *registry.Registrar
	pod       lifecycle.Pod
	ip        netip.Addr
}

const namespace, service = "shop", "api"

func (s settings) instance(i int, log *zap.Logger, say *printer) (*instance, error) {
	suffix := ""
	if s.count > 1 {
		suffix = fmt.Sprintf("-%d", i)
	}
	ip, err := netip.ParseAddr(s.ip)
	if err != nil {
		return nil, err
	}
	for range i {
		ip = ip.Next()
	}
	var formats []registry.NamedFormat
	for name := range strings.SplitSeq(s.formats, ",") {
		spec := format.Spec{Type: name}.WithDefaults(namespace, service)
		if name == "skydns" {
			spec.Domain = "shop.test"
		}
		f, err := format.New(spec)
		if err != nil {
			return nil, err
		}
		formats = append(formats, registry.NamedFormat{Name: name, Format: f})
	}
	in := &instance{ip: ip, pod: lifecycle.Pod{
		Known: true, Namespace: namespace, Name: s.pod + suffix, UID: s.uid + suffix,
		Created: time.Date(2026, 3, 1, 12, 0, s.created, 0, time.UTC),
	}}
	in.registrar, err = registry.New(registry.Config{
		Cluster: s.cluster, Namespace: namespace, Pod: in.pod.Name, PodUID: in.pod.UID, TTL: s.ttl,
		Formats: map[string][]registry.NamedFormat{service: formats},
		Dial: func() (*clientv3.Client, error) {
			c, err := s.conn.Dial(log.Named("etcd"))
			if err == nil {
				c.KV, c.Lease = heardKV{c.KV, say}, heardLease{c.Lease, say}
			}
			return c, err
		},
		OnChange: func(st lifecycle.RegistryStatus) {
			say.line(wire.Line{UID: in.pod.UID, InSync: st.InSync, Advertised: st.Advertised, Lease: st.Lease, Keys: st.Keys, Err: st.Err})
		},
		Logger: log,
	})
	return in, err
}

func (in *instance) set(state lifecycle.State, cause string) {
	in.registrar.Set(lifecycle.Desired{
		State: state, Cause: cause, Since: in.pod.Created, Pod: in.pod,
		Instances: []lifecycle.Instance{{
			Service: service, Advertise: state == lifecycle.Online, Addresses: []netip.Addr{in.ip},
			Ports: []lifecycle.Port{{Name: "http", Number: 8080, Protocol: "TCP"}},
		}},
	})
}

type printer struct {
	mu  sync.Mutex
	out *json.Encoder
}

func (p *printer) line(l wire.Line) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l.At = time.Now()
	p.out.Encode(l) // a reader that has gone away is nobody to tell
}

// heardKV and heardLease tell of every request that etcd has answered, beside renewals and watches.
type heardKV struct {
	clientv3.KV
	say *printer
}

func (k heardKV) Txn(ctx context.Context) clientv3.Txn { return heardTxn{k.KV.Txn(ctx), k.say} }

type heardTxn struct {
	clientv3.Txn
	say *printer
}

func (t heardTxn) If(c ...clientv3.Cmp) clientv3.Txn  { return heardTxn{t.Txn.If(c...), t.say} }
func (t heardTxn) Then(o ...clientv3.Op) clientv3.Txn { return heardTxn{t.Txn.Then(o...), t.say} }
func (t heardTxn) Else(o ...clientv3.Op) clientv3.Txn { return heardTxn{t.Txn.Else(o...), t.say} }

func (t heardTxn) Commit() (*clientv3.TxnResponse, error) {
	resp, err := t.Txn.Commit()
	if err == nil {
		t.say.line(wire.Line{Request: "txn"})
	}
	return resp, err
}

type heardLease struct {
	clientv3.Lease
	say *printer
}

func (l heardLease) Grant(ctx context.Context, ttl int64) (*clientv3.LeaseGrantResponse, error) {
	resp, err := l.Lease.Grant(ctx, ttl)
	if err == nil {
		l.say.line(wire.Line{Request: "grant"})
	}
	return resp, err
}
