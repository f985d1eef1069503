package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"usher.dev/usher/integration/load"
	"usher.dev/usher/integration/stack"
)

// traffic is a load that goes on until it is stopped.
type traffic struct {
	*space
	g      *load.Generator
	cancel context.CancelFunc
	wg     sync.WaitGroup
	report load.Report
	err    error
}

// send sends fast and slow requests (2 s), HTTP and gRPC, in an open and a closed loop, to the instances under target/http
// and target/grpc.
func (sp *space) send(target string) *traffic {
	sp.t.Helper()
	g, err := load.New(load.Config{
		Endpoints: sp.etcd.Endpoints(), HTTPTarget: target + "/http", GRPCTarget: target + "/grpc",
		Rate: 320, Workers: 24,
		Mix: []load.Share{{Kind: load.Fast, Weight: 96}, {Kind: load.Slow, Weight: 4, For: 2 * time.Second}},
	})
	if err != nil {
		sp.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(sp.ctx)
	tr := &traffic{space: sp, g: g, cancel: cancel}
	tr.wg.Go(func() { tr.report, tr.err = g.Run(ctx) })
	sp.eventually(soon, "requests are answered", func() error {
		if r := g.Snapshot(); r.Answered < 500 {
			return fmt.Errorf("%d of %d are", r.Answered, r.Sent)
		}
		return nil
	})
	return tr
}

// stop ends the load and reports when all answers are in.
func (tr *traffic) stop() load.Report {
	tr.t.Helper()
	tr.cancel()
	tr.wg.Wait()
	if tr.err != nil {
		tr.t.Fatal(tr.err)
	}
	tr.t.Logf("%s", tr.report)
	return tr.report
}

// deployed waits until n instances are registered, and returns the pods.
func (sp *space) deployed(n int) []corev1.Pod {
	sp.t.Helper()
	var pods []corev1.Pod
	sp.eventually(2*soon, fmt.Sprintf("%d instances are online", n), func() error {
		list, err := sp.s.Client.CoreV1().Pods(sp.name).List(sp.ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		if len(list.Items) != n {
			return fmt.Errorf("%d pods are there", len(list.Items))
		}
		for _, p := range list.Items {
			c, ok := sp.changes.last(sp.ledgerPrefix() + "shop/" + p.Name)
			if !ok || c.deleted || !strings.Contains(c.value, `"state":"Online"`) {
				return fmt.Errorf("pod %s isn't online", p.Name)
			}
		}
		pods = list.Items
		return nil
	})
	return pods
}

// rollOut replaces all pods, and returns when the last old one is gone.
func (sp *space) rollOut() {
	sp.t.Helper()
	begun := time.Now()
	old := map[string]bool{}
	for _, p := range sp.deployed(3) {
		old[p.Name] = true
	}
	sp.kubectl("rollout", "restart", "deployment/shop")
	sp.kubectl("rollout", "status", "deployment/shop", "--timeout=4m")
	for _, p := range sp.deployed(3) {
		if old[p.Name] {
			sp.t.Fatalf("pod %s was not replaced", p.Name)
		}
	}
	sp.t.Logf("a rollout took %v", time.Since(begun).Round(100*time.Millisecond))
}

// stoppedWell checks every pod that ended: drained, with nothing in flight at SIGTERM, and no longer than the longest
// request wanted.
func (sp *space) stoppedWell(pods int, longest time.Duration) {
	sp.t.Helper()
	most := longest + releaseLag
	var totals []time.Duration
	sp.eventually(soon, "all stops are in the logs", func() error {
		if n := len(sp.logs.find("", appName, "dying at once")); n < pods {
			return fmt.Errorf("%d applications have stopped, want %d", n, pods)
		}
		if n := len(sp.logs.find("", agentName, `"released"`)); n < pods {
			return fmt.Errorf("%d agents have released, want %d", n, pods)
		}
		return nil
	})
	for _, l := range sp.logs.find("", agentName, `"released"`) {
		total := l.duration("total")
		totals = append(totals, total.Round(10*time.Millisecond))
		if total > most || l.fields()["outcome"] != "drained" {
			sp.t.Errorf("a pod stopped badly (want drained, within %v): %s", most, l.text)
		}
	}
	sp.t.Logf("the longest request took %v; from a pod's end to SIGTERM: %v", longest.Round(10*time.Millisecond), totals)
	for _, l := range sp.logs.find("", appName, "dying at once") {
		if l.fields()["inFlight"] != 0.0 {
			sp.t.Errorf("an application got SIGTERM with requests in flight: %s", l.text)
		}
	}
	sp.calm()
}

func (sp *space) lostNone(r load.Report, least int64) {
	sp.t.Helper()
	if r.Failed != 0 || r.Answered != r.Sent {
		sp.t.Errorf("%d of %d requests were lost: %v", r.Failed, r.Sent, r.Failures)
	}
	if r.Sent < least {
		sp.t.Errorf("%d requests, want at least %d", r.Sent, least)
	}
	for _, p := range []load.Protocol{load.HTTP, load.GRPC} {
		for _, k := range []load.Kind{load.Fast, load.Slow} {
			n := int64(0)
			for _, kr := range r.Kinds {
				if kr.Protocol == p && kr.Kind == k {
					n = kr.Answered
				}
			}
			if n == 0 {
				sp.t.Errorf("no %s %s request was answered: the test shows nothing of them", p, k)
			}
		}
	}
}

// The example as it stands, with an application that dies at once on SIGTERM, through three rollouts under load.
func TestRollingUpdateLosesNoRequest(t *testing.T) {
	sp := bareSpace(t, nil)
	manifest, err := stack.Example(sp.ctx, "shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if err := sp.s.Apply(sp.ctx, sp.name, manifest); err != nil {
		t.Fatal(err)
	}
	sp.deployed(3)
	tr := sp.send("shop")
	for range 3 {
		sp.rollOut()
	}
	const least = 20_000
	sp.eventually(2*soon, "enough requests are sent", func() error {
		if r := tr.g.Snapshot(); r.Sent < least {
			return fmt.Errorf("%d are", r.Sent)
		}
		return nil
	})
	r := tr.stop()
	sp.lostNone(r, least)
	sp.stoppedWell(9, r.Longest.Latency)
}

// The same without the hook: proof that the test above can see a loss.
func TestRollingUpdateWithoutHookLosesRequests(t *testing.T) {
	sp := bareSpace(t, nil)
	svc, dep := sp.example("shop.yaml")
	app := &dep.Spec.Template.Spec.Containers[0]
	if app.Lifecycle == nil {
		t.Fatal("the example has no hook")
	}
	app.Lifecycle = nil
	sp.apply(svc)
	sp.apply(dep)
	sp.deployed(3)
	tr := sp.send(sp.name)
	sp.rollOut()
	if r := tr.stop(); r.Failed == 0 {
		t.Errorf("none of %d requests was lost without the hook, so the test with it proves nothing", r.Sent)
	}
}

// The kubelet sends SIGTERM to an ordinary container at once, while the application's hook still waits for it.
func TestRollingUpdateWithClassicSidecarLosesNoRequest(t *testing.T) {
	sp := bareSpace(t, nil)
	svc, dep := sp.example("classic.yaml")
	if n := len(dep.Spec.Template.Spec.InitContainers); n != 0 {
		t.Fatalf("the example has %d init containers, want the agent beside the application", n)
	}
	sp.apply(svc)
	sp.apply(dep)
	sp.deployed(3)
	tr := sp.send(sp.name)
	sp.rollOut()
	r := tr.stop()
	sp.lostNone(r, 1000)
	sp.stoppedWell(3, r.Longest.Latency)
	// Otherwise this was no other test than the one above.
	for _, l := range sp.logs.find("", agentName, `"released"`) {
		if term := sp.logs.find(l.pod, agentName, `"signal"`, "terminated"); len(term) != 1 || term[0].at.After(l.at) {
			t.Errorf("agent of pod %s: want SIGTERM before the release, there is %v", l.pod, term)
		}
	}
}
