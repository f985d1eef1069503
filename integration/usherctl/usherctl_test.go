// Package usherctl_test runs the real usherctl against a real etcd.
package usherctl_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/registry"
)

var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "usherctl")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "usherctl")
	build := exec.Command("go", "build", "-o", binary, "./cmd/usherctl")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building usherctl: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

type result struct {
	code           int
	stdout, stderr string
}

func ctl(t *testing.T, endpoint string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, args...)
	cmd.Env = []string{"ETCDCTL_ENDPOINTS=" + endpoint, "TZ=UTC"}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// ledger is an etcd with the same few records every time.
type ledger struct {
	t        *testing.T
	endpoint string
	cli      *clientv3.Client
}

const leaseA, leaseB = 0x1a2b, 0x1a2c

func newLedger(t *testing.T) ledger {
	t.Helper()
	s := etcdtest.Start(t)
	l := ledger{t, s.Endpoint(), s.Client()}
	for _, id := range []int64{leaseA, leaseB} {
		if _, err := pb.NewLeaseClient(l.cli.ActiveConnection()).LeaseGrant(t.Context(), &pb.LeaseGrantRequest{ID: id, TTL: 3600}); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func (l ledger) put(key, value string, lease clientv3.LeaseID) {
	l.t.Helper()
	if _, err := l.cli.Put(l.t.Context(), key, value, clientv3.WithLease(lease)); err != nil {
		l.t.Fatal(err)
	}
}

func (l ledger) record(cluster, namespace, service, pod, state string, more func(*registry.Record)) {
	l.t.Helper()
	r := registry.Record{
		Owner:     registry.Owner{Cluster: cluster, PodUID: "uid-" + pod, Lease: leaseA, Agent: "agent-1"},
		Namespace: namespace, Service: service, Pod: pod, Node: "node-1", Zone: "zone-a", State: state,
		Since: time.Now().Add(-200 * 24 * time.Hour), Cause: "endpoint ready", Addresses: []string{"10.0.0.1"},
		Ports: []registry.Port{{Name: "http", Port: 8080, Protocol: "TCP"}}, Formats: []string{"grpc"},
	}
	if more != nil {
		more(&r)
	}
	value, err := r.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	l.put(registry.InstanceKey(cluster, namespace, service, pod), string(value), leaseA)
}

func (l ledger) fill() {
	l.record("default", "shop", "checkout", "checkout-1", "Online", nil)
	l.record("default", "shop", "checkout", "checkout-2", "Draining", func(r *registry.Record) {
		r.Addresses, r.Cause, r.Zone = []string{"10.0.0.2", "fd00::2"}, "prestop hook", ""
		r.Ports = append(r.Ports, registry.Port{Name: "grpc", Port: 9090})
	})
	l.put(registry.InstanceKey("default", "shop", "checkout", "checkout-3"), "by hand", 0)
	l.record("default", "shop", "search", "search-0", "Pending", func(r *registry.Record) { r.Addresses, r.Formats = nil, nil })
	l.record("default", "default", "web", "web-0", "Online", nil)
	l.record("other", "shop", "checkout", "checkout-9", "Online", nil)
}

func TestGetInstancesTables(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fill()
	const warning = "Warning: not a ledger record: key /usher/v1/default/instances/shop/checkout/checkout-3: invalid character 'b' looking for beginning of value\n"
	for _, tc := range []struct {
		args           string
		stdout, stderr string
	}{
		{"get instances -n shop", `
NAME         SERVICE    STATE        ADDRESS                                   AGE
checkout-1   checkout   Online       10.0.0.1:8080                             200d
checkout-2   checkout   Draining     10.0.0.2:8080,10.0.0.2:9090 + 2 more...   200d
checkout-3   checkout   Unreadable   <unknown>                                 <unknown>
search-0     search     Pending      <none>                                    200d
`, warning},
		{"get instances", `
NAME    SERVICE   STATE    ADDRESS         AGE
web-0   web       Online   10.0.0.1:8080   200d
`, ""},
		{"get instances search -n shop -o wide", `
NAME       SERVICE   STATE     ADDRESS   AGE    NODE     ZONE     LEASE   FORMATS   CAUSE            UID
search-0   search    Pending   <none>    200d   node-1   zone-a   1a2b    <none>    endpoint ready   uid-search-0
`, ""},
		{"get instances checkout -n shop -o wide --no-headers", `
checkout-1   checkout   Online       10.0.0.1:8080                                               200d        node-1      zone-a      1a2b     grpc        endpoint ready   uid-checkout-1
checkout-2   checkout   Draining     10.0.0.2:8080,10.0.0.2:9090,[fd00::2]:8080,[fd00::2]:9090   200d        node-1      <none>      1a2b     grpc        prestop hook     uid-checkout-2
checkout-3   checkout   Unreadable   <unknown>                                                   <unknown>   <unknown>   <unknown>   <none>   <unknown>   <unknown>        <unknown>
`, warning},
		{"get instances -A", `
NAMESPACE   NAME         SERVICE    STATE        ADDRESS                                   AGE
default     web-0        web        Online       10.0.0.1:8080                             200d
shop        checkout-1   checkout   Online       10.0.0.1:8080                             200d
shop        checkout-2   checkout   Draining     10.0.0.2:8080,10.0.0.2:9090 + 2 more...   200d
shop        checkout-3   checkout   Unreadable   <unknown>                                 <unknown>
shop        search-0     search     Pending      <none>                                    200d
`, warning},
		{"get instances -n shop --cluster other", `
NAME         SERVICE    STATE    ADDRESS         AGE
checkout-9   checkout   Online   10.0.0.1:8080   200d
`, ""},
		{"get instances -n empty", "\n", "No instances found in namespace \"empty\".\n"},
		{"get instances nobody -A", "\n", "No instances found.\n"},
	} {
		got := ctl(t, l.endpoint, strings.Fields(tc.args)...)
		if got.code != 0 || "\n"+got.stdout != tc.stdout || got.stderr != tc.stderr {
			t.Errorf("%s: code %d\n%s%s\nwant%s%s", tc.args, got.code, got.stdout, got.stderr, tc.stdout, tc.stderr)
		}
	}
}

func TestGetInstancesJSONAndYAML(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fill()
	got := ctl(t, l.endpoint, "get", "instances", "-n", "shop", "-o", "json")
	var list struct {
		Items []struct {
			Key, Lease, Error string
			Record            *registry.Record
		}
	}
	if err := json.Unmarshal([]byte(got.stdout), &list); err != nil || got.code != 0 || len(list.Items) != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	if i := list.Items[0]; i.Lease != "1a2b" || i.Record == nil || i.Record.Addresses[0] != "10.0.0.1" || i.Record.Owner.Lease != leaseA {
		t.Errorf("first item %+v", i)
	}
	if i := list.Items[2]; i.Record != nil || !strings.Contains(i.Error, "not a ledger record") {
		t.Errorf("unreadable item %+v", i)
	}
	if got := ctl(t, l.endpoint, "get", "instances", "-n", "empty", "-o", "json"); got.code != 0 || strings.Join(strings.Fields(got.stdout), "") != `{"items":[]}` {
		t.Errorf("nothing as JSON: %+v", got)
	}
	if got := ctl(t, l.endpoint, "get", "instances", "-o", "yaml"); got.code != 0 ||
		!strings.HasPrefix(got.stdout, "items:\n- key: /usher/v1/default/instances/default/web/web-0\n  lease: 1a2b\n  record:\n") {
		t.Errorf("YAML: %+v", got)
	}
}

func TestStatusHoldsTheRecordAgainstEtcd(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.put("services/checkout/uid-1", "x", leaseA)
	l.put("services/checkout/uid-1-old", "x", 0)
	l.put("services/checkout/uid-1-foreign", "x", leaseB)
	l.record("default", "shop", "checkout", "checkout-1", "Released", func(r *registry.Record) {
		r.Since = time.Date(2024, 2, 3, 4, 5, 6, 0, time.UTC)
		r.Cause, r.Verdict = "prestop hook", "drained in 1.2s, nothing in flight"
		r.Keys = []string{"services/checkout/uid-1", "services/checkout/uid-1-old", "services/checkout/uid-1-foreign", "services/checkout/gone"}
	})
	l.put(registry.InstanceKey("default", "shop", "metrics", "checkout-1"), "{}", 0)
	l.record("default", "shop", "checkout", "checkout-10", "Online", nil)

	got := ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop")
	stdout := regexp.MustCompile(`\(\S+ ago\)`).ReplaceAllString(got.stdout, "(AGE ago)")
	stdout = regexp.MustCompile(`\(3[56]\d\ds left`).ReplaceAllString(stdout, "(TTL left")
	want := `Name:     checkout-1
Cluster:  default

Service:      checkout
  Namespace:  shop
  State:      Released
  Since:      2024-02-03T04:05:06Z (AGE ago)
  Cause:      prestop hook
  Verdict:    drained in 1.2s, nothing in flight
  Addresses:  10.0.0.1
  Ports:      http 8080/TCP
  Node:       node-1
  Zone:       zone-a
  Pod UID:    uid-checkout-1
  Agent:      agent-1
  Lease:      1a2b (TTL left of 3600s)
  Formats:    grpc
  Keys:
    services/checkout/uid-1          present
    services/checkout/uid-1-old      WITHOUT A LEASE: it stays when the agent dies
    services/checkout/uid-1-foreign  UNDER ANOTHER LEASE: 1a2c
    services/checkout/gone           MISSING

Service:      metrics
  Namespace:  shop
  State:      Unreadable
  Error:      not a ledger record: key /usher/v1/default/instances/shop/metrics/checkout-1: field owner.cluster is missing or empty
  Lease:      none: the record stays when the agent dies
`
	if got.code != 0 || stdout != want || got.stderr != "" {
		t.Errorf("code %d, stderr %q\n%s\nwant\n%s", got.code, got.stderr, stdout, want)
	}

	var status struct {
		Pod       string
		Instances []struct {
			Service    string
			TTLSeconds int64 `json:"ttlSeconds"`
			Keys       []struct {
				Key        string
				Exists, OK bool
			}
		}
	}
	got = ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop", "-o", "json")
	if err := json.Unmarshal([]byte(got.stdout), &status); err != nil || len(status.Instances) != 2 || len(status.Instances[0].Keys) != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	if i := status.Instances[0]; i.TTLSeconds < 3000 || !i.Keys[0].OK || i.Keys[1].OK || !i.Keys[1].Exists || i.Keys[3].Exists {
		t.Errorf("%+v", i)
	}
	if got := ctl(t, l.endpoint, "status", "nobody", "-n", "shop"); got.code != 1 || got.stdout != "" ||
		got.stderr != "usherctl: pod \"nobody\" has no record in namespace \"shop\" of cluster \"default\"\n" {
		t.Errorf("%+v", got)
	}
}

// watching is a running `usherctl watch`.
type watching struct {
	t      *testing.T
	cmd    *exec.Cmd
	stderr *bytes.Buffer
	lines  chan string
}

func watch(t *testing.T, endpoint string, args ...string) *watching {
	t.Helper()
	w := &watching{t: t, cmd: exec.CommandContext(t.Context(), binary, append([]string{"watch"}, args...)...), stderr: &bytes.Buffer{}, lines: make(chan string, 100)}
	w.cmd.Env = []string{"ETCDCTL_ENDPOINTS=" + endpoint, "TZ=UTC"}
	w.cmd.Stderr = w.stderr
	stdout, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(w.lines)
		for s := bufio.NewScanner(stdout); s.Scan(); {
			w.lines <- s.Text()
		}
	}()
	return w
}

func (w *watching) line() string {
	w.t.Helper()
	select {
	case s, ok := <-w.lines:
		if !ok {
			w.t.Fatalf("usherctl ended: %s", w.stderr)
		}
		return s
	case <-time.After(30 * time.Second):
		w.t.Fatal("no line")
	}
	return ""
}

// interrupt is Ctrl-C, and must end well.
func (w *watching) interrupt() {
	w.t.Helper()
	if err := w.cmd.Process.Signal(syscall.SIGINT); err != nil {
		w.t.Fatal(err)
	}
	for range w.lines {
	}
	if err := w.cmd.Wait(); err != nil {
		w.t.Errorf("after SIGINT: %v (%s)", err, w.stderr)
	}
}

func TestWatchPrintsALineForEachChange(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.record("default", "shop", "checkout", "checkout-1", "Online", nil)
	l.record("default", "shop", "search", "search-0", "Online", nil)
	w := watch(t, l.endpoint, "checkout", "-n", "shop")
	clock := regexp.MustCompile(`^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}`)
	for i, step := range []struct {
		do   func()
		want string
	}{
		{nil, "TIME                      NAME         SERVICE    CHANGE                 DETAIL"},
		{nil, "CLOCK   checkout-1   checkout   Online                 endpoint ready"},
		{func() {
			l.record("default", "shop", "search", "search-0", "Draining", nil)
			l.record("default", "shop", "checkout", "checkout-1", "Draining", func(r *registry.Record) { r.Cause = "prestop hook" })
		}, "CLOCK   checkout-1   checkout   Online -> Draining     prestop hook"},
		{func() {
			l.record("default", "shop", "checkout", "checkout-1", "Released", func(r *registry.Record) { r.Verdict = "drained in 1.2s" })
		}, "CLOCK   checkout-1   checkout   Draining -> Released   drained in 1.2s"},
		{func() { l.record("default", "shop", "checkout", "checkout-2", "Pending", nil) },
			"CLOCK   checkout-2   checkout   new -> Pending         endpoint ready"},
		{func() {
			if _, err := l.cli.Delete(t.Context(), registry.InstanceKey("default", "shop", "checkout", "checkout-1")); err != nil {
				t.Fatal(err)
			}
		}, "CLOCK   checkout-1   checkout   Released -> gone       <none>"},
	} {
		if step.do != nil {
			step.do()
		}
		if got := clock.ReplaceAllString(w.line(), "CLOCK"); got != step.want {
			t.Errorf("line %d is %q, want %q", i, got, step.want)
		}
	}
	w.interrupt()
}

func TestWatchJSONIsOneObjectALine(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.record("default", "shop", "checkout", "checkout-1", "Online", nil)
	w := watch(t, l.endpoint, "-A", "-o", "json")
	next := func(kind, change string, initial bool) {
		t.Helper()
		var c struct {
			Time               time.Time
			Type, Change, From string
			Initial            bool
			Instance           struct{ Record registry.Record }
		}
		line := w.line()
		if err := json.Unmarshal([]byte(line), &c); err != nil || c.Type != kind || c.Change != change || c.Initial != initial ||
			c.Instance.Record.Pod != "checkout-1" || time.Since(c.Time) > time.Minute {
			t.Errorf("%s: %v; want %s, %s", line, err, kind, change)
		}
	}
	next("ADDED", "Online", true)
	l.record("default", "shop", "checkout", "checkout-1", "Draining", nil)
	next("MODIFIED", "Online -> Draining", false)
	if _, err := l.cli.Revoke(t.Context(), leaseA); err != nil {
		t.Fatal(err)
	}
	next("DELETED", "Draining -> gone", false)
	w.interrupt()
}

func TestWatchOfNothingSaysSoAndWaits(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	w := watch(t, l.endpoint, "-n", "shop", "--no-headers")
	// The record is written again and again until the watch, whose start can't be seen from outside, shows a change.
	for i := range 100 {
		l.record("default", "shop", "checkout", "checkout-1", fmt.Sprint("Online", i), nil)
		select {
		case <-w.lines:
			w.interrupt()
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
	t.Fatal("no change in 20 s")
}

func TestUnreachableEtcdIsOneLineInTime(t *testing.T) {
	t.Parallel()
	for _, args := range []string{"get instances", "watch", "status x", "get instances --user me:secret"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			got := ctl(t, "127.0.0.1:1", strings.Fields(args)...)
			want := "usherctl: etcd at 127.0.0.1:1 doesn't answer: dial tcp 127.0.0.1:1: connect: connection refused\n"
			if got.code != 1 || got.stdout != "" || got.stderr != want {
				t.Errorf("%+v, want %q", got, want)
			}
			if took := time.Since(start); took > 15*time.Second {
				t.Errorf("took %s", took)
			}
		})
	}
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fill()
	ctx := t.Context()
	for _, step := range []func() error{
		func() error { _, err := l.cli.UserAdd(ctx, "root", "secret"); return err },
		func() error { _, err := l.cli.UserGrantRole(ctx, "root", "root"); return err },
		func() error { _, err := l.cli.UserAdd(ctx, "guest", "guest"); return err },
		func() error { _, err := l.cli.AuthEnable(ctx); return err },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"--user root:secret", 0, ""},
		{"--user root --password secret", 0, ""},
		{"--user root:wrong", 1, "authentication failed"},
		{"--user guest:guest", 1, "permission denied"},
		{"", 1, "user name is empty"},
	} {
		got := ctl(t, l.endpoint, append([]string{"get", "instances"}, strings.Fields(tc.args)...)...)
		if got.code != tc.code || !strings.Contains(got.stderr, tc.want) || strings.Count(got.stderr, "\n") > 1 || strings.Contains(got.stderr, "secret") {
			t.Errorf("%q: %+v, want code %d and %q", tc.args, got, tc.code, tc.want)
		}
	}
}

func TestFlagWinsOverEnvironment(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fill()
	if got := ctl(t, "127.0.0.1:1", "get", "instances", "--endpoints", l.endpoint); got.code != 0 || !strings.Contains(got.stdout, "web-0") {
		t.Errorf("%+v", got)
	}
}
