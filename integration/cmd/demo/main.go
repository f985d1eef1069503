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
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"

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

var errInterrupted = errors.New("interrupted")

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
	if err != nil && ctx.Err() != nil {
		return 1, fmt.Errorf("%w: %w", errInterrupted, err)
	}
	if err != nil {
		return 1, err
	}
	unlock, err := d.lock()
	if err != nil {
		return 1, errors.Join(err, d.stack.Down(context.WithoutCancel(ctx)))
	}
	defer unlock()
	r, err := d.show(ctx)
	d.screen.end()
	if err == nil {
		d.screen.println("")
		var b strings.Builder
		r.summary(&b, d.screen.paint)
		d.screen.println(b.String())
	} else if ctx.Err() != nil {
		err = errInterrupted
	}
	err = errors.Join(err, d.cleanUp(context.WithoutCancel(ctx), ctx.Err() == nil))
	d.screen.end()
	if err != nil {
		return 1, err
	}
	code, colour := r.exit(), bold
	if code != 0 {
		colour = red
	}
	d.screen.println(d.screen.paint.with(colour, r.lastLine()))
	return code, nil
}

// show is the part that people came for.
func (d *demo) show(ctx context.Context) (result, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	if err := d.place(ctx); err != nil {
		return result{}, err
	}
	cfg := d.stack.RESTConfig()
	cfg.ContentType = runtime.ContentTypeProtobuf // decoded sooner than JSON, so that a fact's time is closer to the truth
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return result{}, fmt.Errorf("making the Kubernetes client: %w", err)
	}
	d.sources = &sources{client: client, etcd: d.stack.Etcd, facts: d.facts, http: map[string]string{}}
	go d.sources.run(ctx)
	if err := d.deploy(ctx); err != nil {
		return result{}, err
	}

	generator, err := load.New(load.Config{
		Endpoints: []string{d.stack.RegistryEndpoint()}, HTTPTarget: httpTarget, GRPCTarget: grpcTarget, Rate: rate, Mix: mix(),
		OnResult: func(r load.Result) {
			if r.Class == "" {
				f := fact{at: r.Scheduled.Add(r.Latency), is: answered{r.Pod}}
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
	ended := make(chan load.Report, 1)
	go func() {
		report, err := generator.Run(sending)
		if err != nil {
			stop(err)
		}
		ended <- report
	}()

	fmt.Fprintf(d.screen, "sending %d requests/s, 4 in 100 of them 2 s long, over HTTP keep-alive and gRPC\n", rate)
	if err := d.until(ctx, onlineWithin, "the first requests", func() bool {
		s := generator.Snapshot()
		return !s.Started.IsZero() && s.Elapsed > warmUp
	}, nil); err != nil {
		return result{}, err
	}
	for uid, p := range d.timeline.pods {
		go d.sources.follow(ctx, uid, p.name)
	}
	d.screen.end()
	d.screen.println("")
	d.screen.println(legend(d.screen.paint))
	d.screen.println(header(d.screen.paint))
	begun := time.Now()
	d.timeline.begin(begun, fmt.Sprintf("rollout begins: %d pods to replace, %d requests/s", replicas, rate))
	if err := d.restart(ctx); err != nil {
		return result{}, err
	}
	status := func() {
		s := generator.Snapshot()
		d.screen.show(fmt.Sprintf("%+7.1f s  %s requests, %s failed, %d in flight", time.Since(begun).Seconds(), thousands(s.Sent), thousands(s.Failed), s.InFlight))
	}
	var replaced time.Time
	err = d.until(ctx, rolloutWithin, "the rollout", func() (ok bool) {
		replaced, ok = d.timeline.replaced(perPod, replicas)
		return ok
	}, status)
	if err != nil {
		return result{}, err
	}
	cool := time.Now().Add(coolDown)
	if err := d.until(ctx, onlineWithin, "the requests after it", func() bool { return time.Now().After(cool) }, status); err != nil {
		return result{}, err
	}
	stopSending()
	r := result{begun: begun, rollout: replaced.Sub(begun), names: d.timeline.names()}
	err = d.until(ctx, onlineWithin, "the last answers", func() bool {
		select {
		case r.report = <-ended:
			return true
		default:
			return false
		}
	}, status)
	if err != nil {
		return result{}, err
	}
	d.print(time.Time{})
	r.pods = d.timeline.old()
	return r, nil
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

// lock keeps two demonstrations from sharing a namespace. The file goes with the cluster.
func (d *demo) lock() (unlock func() error, err error) {
	f, err := os.OpenFile(filepath.Join(d.stack.Dir(), "demo.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("keeping other demonstrations out: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, errors.New("another demonstration is running on this machine: wait for its end")
	}
	return f.Close, nil
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
	fmt.Fprintf(d.screen, "deploying %d pods of the sample application, which dies at once on SIGTERM\n", replicas)
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
  export PATH=%s:%s:$PATH   # usherctl; kubectl, etcdctl
Watch the registry:     usherctl -n %[1]s watch
Roll out once more:     kubectl -n %[1]s rollout restart deployment %[6]s
Remove the application: kubectl delete namespace %[1]s
Take the cluster down:  make cluster-down
`, namespace, d.stack.Kubeconfig(), d.stack.RegistryEndpoint(), filepath.Dir(d.stack.Programs.Ctl), filepath.Dir(d.stack.Kubectl()), service))
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
	// Kubernetes leaves a namespace's pods alone for its first 5 s, and looks again much later if any are left then
	// (namespaceDeletionGracePeriod in pkg/controller/namespace/namespace_controller.go).
	background := metav1.DeletePropagationBackground
	err := d.stack.Client.AppsV1().Deployments(namespace).Delete(ctx, service, metav1.DeleteOptions{PropagationPolicy: &background})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting Deployment %s: %w", service, err)
	}
	if err := d.stack.Client.CoreV1().Namespaces().Delete(ctx, namespace, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("deleting namespace %s: %w", namespace, err)
	}
	err = wait.PollUntilContextCancel(ctx, 100*time.Millisecond, true, func(ctx context.Context) (bool, error) {
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
