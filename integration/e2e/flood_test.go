package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"usher.dev/usher/integration/app/wire"
)

// floodMemory is what a flood may add to the agent's memory: with the 28 MB that it has, less than the 64 MiB that the example
// gives it. It is measured as the kernel's own high-water mark of what is resident (VmHWM).
const floodMemory = 20 << 20

// A stranger in another pod makes 10,000 calls and goes on, with connections that are slow in every way beside them, while
// the pod lives and while it ends.
func TestFloodFromAnotherPodIsRefusedAndHarmsNothing(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	stranger := sp.start("stranger", func(p parts) {
		p.InitContainers = nil
		p.app.Lifecycle = nil
	})
	p := sp.online("shop")
	stranger.eventually(soon, "the stranger runs", stranger.ready)
	before := p.agentMemory("VmRSS")

	cmd := exec.CommandContext(sp.ctx, sp.s.Kubectl(), "--kubeconfig", sp.s.Kubeconfig(), "-n", sp.name, "exec", "-i", stranger.name, "-c", appName, "--",
		"/app", fmt.Sprintf("--flood=%s:7400", p.ip))
	cmd.Stderr = t.Output()
	stop, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	said := json.NewDecoder(out)
	ended := func() (became wire.Flooded) {
		stop.Close()
		if err := said.Decode(&became); err != nil {
			t.Errorf("the end of the flood: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the flood: %v", err)
		}
		return became
	}
	var first wire.Flooded
	if err := said.Decode(&first); err != nil {
		t.Fatalf("the flood: %v", err)
	}
	t.Logf("in life: %+v", first)
	if first.Calls != 10_000 || first.Taken != 0 || first.Refused == 0 || first.Refused+first.Cut != first.Calls {
		t.Errorf("%+v, want 10,000 calls, all refused or cut off", first)
	}
	if n := p.metric(`usher_hook_calls_total{result="refused"}`); int64(n) < first.Refused {
		t.Errorf("%v calls counted as refused, want at least %d", n, first.Refused)
	}
	if n := len(sp.logs.find(p.name, agentName, "hook call refused")); n == 0 || n > 10 {
		t.Errorf("%d lines of refusals, want one in 10 s", n)
	}
	p.alive()
	p.stayedRegistered()

	// The flood is still on, and now whoever calls joins the drain.
	slow := p.pending()
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.longerThanIdle()
	if n := len(sp.logs.find(p.name, agentName, `"released"`)); n != 0 {
		t.Error("released with a request in flight")
	}
	peak := p.agentMemory("VmHWM")
	if now, err := p.get(); err != nil || now.Status.InitContainerStatuses[0].RestartCount != 0 {
		t.Errorf("the agent was restarted: %v", err)
	}
	p.drainedSoonAfter(p.finish(slow))
	p.gone()
	t.Logf("at the end: %+v; resident before %d KiB, at most %d KiB", ended(), before>>10, peak>>10)
	if peak-before > floodMemory {
		t.Errorf("the agent had %d MiB before, %d MiB at most, want at most %d MiB more", before>>20, peak>>20, floodMemory>>20)
	}
	// The kubelet's own call was among them.
	events, err := sp.s.Client.CoreV1().Events(sp.name).List(sp.ctx, metav1.ListOptions{FieldSelector: "involvedObject.uid=" + p.uid})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events.Items {
		if e.Reason == "FailedPreStopHook" {
			t.Errorf("the kubelet's hook call failed: %s", e.Message)
		}
	}
}

// agentMemory is a figure of the agent's process in bytes, as /proc/PID/status names it.
func (p *pod) agentMemory(name string) int64 {
	p.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.process("/usher-agent").Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+) kB$`).FindSubmatch(b)
	if m == nil {
		p.t.Fatalf("no %s in\n%s", name, b)
	}
	n, err := strconv.ParseInt(string(m[1]), 10, 64)
	if err != nil {
		p.t.Fatal(err)
	}
	return n << 10
}
