// Command demo shows what Usher is for, on a real Kubernetes: three pods of a sample application that dies at once on
// SIGTERM, consumers that find them through an etcd registry, and a rolling update that loses no request.
//
//	go run ./cmd/demo [--keep]
//
//	EndpointSlices, Pods (API) --+
//	consumer records, ledger ----+-> facts -> timeline -> lines as they happen, and a summary
//	agents' logs (API) ----------+
//	load generator --------------+
//
// It needs root. If no cluster is up it brings one up, and takes it down at the end unless --keep is given; one that is up
// is used, and left without a trace. Exit status: 0 when every request was answered, 1 when any failed or the
// demonstration did not get to its end, 2 for wrong usage.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"

	"usher.dev/usher/integration/cluster"
	"usher.dev/usher/integration/load"
	"usher.dev/usher/integration/stack"
	"usher.dev/usher/registry"
)

const (
	namespace = "usher-demo"
	service   = "shop" // and its Deployment, and its container
	replicas  = 3      // as deploy/example/shop.yaml has it

	// targets is where the demonstration's consumer records are, apart from those of whoever else uses the registry.
	targets    = "demo"
	httpTarget = targets + "/http"
	grpcTarget = targets + "/grpc"
	perPod     = 2 // consumer records

	rate   = 200 // requests a second
	warmUp = 2500 * time.Millisecond
	// coolDown is for requests to the new pods only.
	coolDown = 2500 * time.Millisecond

	onlineWithin  = time.Minute
	rolloutWithin = 2 * time.Minute
	// cleanWithin covers a pod's whole grace period.
	cleanWithin = time.Minute
)

func mix() []load.Share {
	return []load.Share{{Kind: load.Fast, Weight: 96}, {Kind: load.Slow, Weight: 4, For: 2 * time.Second}}
}

const usage = `Usage: demo [--keep]

Brings up a real Kubernetes and a registry, puts three pods of a sample application on it, and replaces them under load.
Needs root. The first time, some minutes go into building Kubernetes; afterwards it takes less than a minute.

  --keep   leave the cluster and the sample application up, and print how to use and remove them

Colours are for terminals only, and not if NO_COLOR is set.
Exit status: 0 no request failed, 1 some failed or the demonstration did not get to its end, 2 wrong usage.
`

func main() {
	keep, err := parse(os.Args[1:])
	switch {
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
		return
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: needs root, since a Kubernetes node makes network interfaces, mounts and cgroups: run it as root, or with sudo")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends it the usual way.
	context.AfterFunc(ctx, stop)
	d := &demo{keep: keep, screen: newScreen(os.Stdout), timeline: newTimeline(), facts: make(chan fact, 1024)}
	code, err := d.run(ctx)
	if ctx.Err() != nil {
		err = errors.New("interrupted")
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		code = 1
	}
	os.Exit(code)
}

func parse(args []string) (keep bool, err error) {
	fs := flag.NewFlagSet("demo", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.BoolVar(&keep, "keep", false, "")
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return false, err
	} else if err != nil {
		return false, fmt.Errorf("%w: the only flag is --keep", err)
	}
	if fs.NArg() > 0 {
		return false, fmt.Errorf("unexpected argument %q: the only flag is --keep", fs.Arg(0))
	}
	return keep, nil
}

// demo is one demonstration. Everything but the screen is run's goroutine's.
type demo struct {
	keep     bool
	screen   *screen
	stack    *stack.Stack
	sources  *sources
	timeline *timeline
	facts    chan fact
}

// run is the whole demonstration, and its clean-up however it ends.
func (d *demo) run(ctx context.Context) (code int, err error) {
	done := make(chan struct{})
	defer close(done)
	go d.screen.run(done)
	defer d.screen.end()

	d.stack, err = stack.Up(ctx, stack.Config{Cluster: cluster.Config{Detach: d.keep}, Progress: d.screen})
	if err != nil {
		return 1, err
	}
	r, err := d.show(ctx)
	d.screen.end()
	if err == nil {
		d.screen.println("")
		var b strings.Builder
		r.summary(&b, d.screen.paint)
		d.screen.println(b.String())
	}
	err = errors.Join(err, d.cleanUp(context.WithoutCancel(ctx), ctx.Err() == nil))
	d.screen.end()
	if err != nil {
		return 1, err
	}
	d.screen.println(d.screen.paint.with(bold, r.lastLine()))
	return r.exit(), nil
}

// show is the part that people came for.
func (d *demo) show(ctx context.Context) (result, error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	if err := d.place(ctx); err != nil {
		return result{}, err
	}
	d.sources = &sources{client: d.stack.Client, etcd: d.stack.Etcd, facts: d.facts, http: map[string]string{}}
	go d.sources.run(ctx)
	if err := d.deploy(ctx); err != nil {
		return result{}, err
	}

	generator, err := load.New(load.Config{
		Endpoints: []string{d.stack.RegistryEndpoint()}, HTTPTarget: httpTarget, GRPCTarget: grpcTarget, Rate: rate, Mix: mix(),
		OnResult: func(r load.Result) {
			if r.Class == "" {
				f := fact{at: r.Scheduled.Add(r.Latency), is: answered{r.Scheduled, r.Pod}}
				select {
				case d.facts <- f:
				case <-ctx.Done():
				}
			}
		},
	})
	if err != nil {
		return result{}, err
	}
	sending, stopSending := context.WithCancel(ctx)
	defer stopSending()
	type end struct {
		report load.Report
		err    error
	}
	ended := make(chan end, 1)
	go func() {
		report, err := generator.Run(sending)
		ended <- end{report, err}
	}()

	fmt.Fprintf(d.screen, "sending %d requests/s, 4 in 100 of them 2 s long, over HTTP keep-alive and gRPC\n", rate)
	warm := time.Now().Add(warmUp)
	if err := d.until(ctx, onlineWithin, "the first requests", func() bool { return time.Now().After(warm) }, nil); err != nil {
		return result{}, err
	}
	for uid, p := range d.timeline.pods {
		go d.sources.follow(ctx, uid, p.name)
	}
	d.screen.end()
	d.screen.println("")
	d.screen.println(header(d.screen.paint))
	begun := time.Now()
	d.timeline.begin(begun, fmt.Sprintf("rollout begins: %d pods to replace, %d requests/s", replicas, rate))
	if err := d.restart(ctx); err != nil {
		return result{}, err
	}
	status := func() {
		s := generator.Snapshot()
		d.screen.show(fmt.Sprintf("%+9.1f s  %s requests, %s failed, %d in flight", time.Since(begun).Seconds(), thousands(s.Sent), thousands(s.Failed), s.InFlight))
	}
	err = d.until(ctx, rolloutWithin, "the rollout", func() bool {
		return d.timeline.replaced() && d.timeline.online(perPod, false) == replicas
	}, status)
	if err != nil {
		return result{}, err
	}
	took := time.Since(begun)
	cool := time.Now().Add(coolDown)
	if err := d.until(ctx, onlineWithin, "the last requests", func() bool { return time.Now().After(cool) }, status); err != nil {
		return result{}, err
	}
	stopSending()
	for {
		select {
		case e := <-ended:
			d.print(time.Time{})
			d.screen.show("")
			return result{report: e.report, begun: begun, rollout: took, pods: d.timeline.old()}, e.err
		case f := <-d.facts:
			d.timeline.add(f)
		}
	}
}

// until takes facts in, and prints them, until done says so.
func (d *demo) until(ctx context.Context, within time.Duration, what string, done func() bool, status func()) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("%s took more than %s", what, within))
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			d.print(time.Time{})
			return context.Cause(ctx)
		case f := <-d.facts:
			d.timeline.add(f)
		case <-tick.C:
			d.print(time.Now())
			if status != nil {
				status()
			}
		}
	}
	return nil
}

func (d *demo) print(now time.Time) {
	for _, l := range d.timeline.due(now) {
		d.screen.println(l.format(d.timeline.begun, d.screen.paint))
	}
}

// place makes the namespace, anew if an earlier demonstration was kept.
func (d *demo) place(ctx context.Context) error {
	gone, err := namespaceGone(ctx, d.stack.Client)
	if err != nil {
		return err
	}
	if !gone {
		fmt.Fprintln(d.screen, "removing what an earlier demonstration left")
		if err := d.remove(ctx); err != nil {
			return err
		}
	}
	return d.stack.Namespace(ctx, namespace)
}

// deploy applies the example, and waits until all its pods are found through the registry.
func (d *demo) deploy(ctx context.Context) error {
	fmt.Fprintf(d.screen, "deploying deploy/example/shop.yaml: %d pods, each with usher-agent beside an application that dies at once on SIGTERM\n", replicas)
	manifest, err := stack.Example(ctx, "shop.yaml")
	if err != nil {
		return err
	}
	manifest = strings.ReplaceAll(manifest, "target="+service+"/", "target="+targets+"/")
	if err := d.stack.Apply(ctx, namespace, manifest); err != nil {
		return err
	}
	return d.until(ctx, onlineWithin, "bringing the pods online", func() bool { return d.timeline.online(perPod, false) == replicas }, nil)
}

// restart is `kubectl rollout restart`.
func (d *demo) restart(ctx context.Context) error {
	patch, err := json.Marshal(map[string]any{"spec": map[string]any{"template": map[string]any{"metadata": map[string]any{
		"annotations": map[string]string{"kubectl.kubernetes.io/restartedAt": time.Now().Format(time.RFC3339)},
	}}}})
	if err != nil {
		return err
	}
	if _, err := d.stack.Client.AppsV1().Deployments(namespace).Patch(ctx, service, types.StrategicMergePatchType, patch, metav1.PatchOptions{}); err != nil {
		return fmt.Errorf("restarting Deployment %s: %w", service, err)
	}
	return nil
}

// cleanUp leaves the machine as it was, or says how to do that later.
func (d *demo) cleanUp(ctx context.Context, finished bool) error {
	if d.keep && finished {
		d.screen.println(fmt.Sprintf(`The cluster is up, with the sample application in namespace %s:
  export KUBECONFIG=%s
  export ETCDCTL_ENDPOINTS=%s
  export PATH=%s:$PATH   # kubectl, etcdctl
Remove the application: kubectl delete namespace %s
Take the cluster down:  make cluster-down
`, namespace, d.stack.Kubeconfig(), d.stack.RegistryEndpoint(), filepath.Dir(d.stack.Kubectl()), namespace))
		return d.stack.Etcd.Close()
	}
	var err error
	if d.stack.Attached() {
		fmt.Fprintf(d.screen, "removing namespace %s; the cluster was up before and stays\n", namespace)
		err = d.remove(ctx)
	} else {
		fmt.Fprintln(d.screen, "taking the cluster down")
	}
	return errors.Join(err, d.stack.Down(ctx))
}

// remove deletes the namespace, and then what is left of its keys. The agents have taken theirs along by then.
func (d *demo) remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cleanWithin)
	defer cancel()
	if err := d.stack.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting namespace %s: %w", namespace, err)
	}
	err := wait.PollUntilContextCancel(ctx, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		return namespaceGone(ctx, d.stack.Client)
	})
	if err != nil {
		return fmt.Errorf("waiting until namespace %s is gone: %w", namespace, err)
	}
	entries, err := registry.NewCatalog(d.stack.Etcd, "").List(ctx, namespace, "")
	if err != nil {
		return err
	}
	ops := []clientv3.Op{clientv3.OpDelete(targets+"/", clientv3.WithPrefix())}
	for _, e := range entries {
		ops = append(ops, clientv3.OpDelete(e.Key))
	}
	if _, err := d.stack.Etcd.Txn(ctx).Then(ops...).Commit(); err != nil {
		return fmt.Errorf("deleting the demonstration's keys: %w", err)
	}
	return nil
}
