package e2e

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestReadyIsRegisteredNotReadyIsNot(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")

	turned := time.Now()
	p.set("/readyz", false)
	at := p.withdrawn(turned)
	t.Logf("withdrawn %v after the application stopped being ready (it is probed once a second)", at.Sub(turned))
	if now, err := p.get(); err != nil || now.DeletionTimestamp != nil || string(now.UID) != p.uid {
		t.Errorf("the pod should live on: %v", err)
	}
	p.eventually(soon, "the ledger says Offline", func() error {
		c, ok := p.changes.last(p.ledger())
		if !ok || c.deleted || !strings.Contains(c.value, `"state":"Offline"`) {
			return fmt.Errorf("it says %s", c)
		}
		return nil
	})
	turned = time.Now()
	p.set("/readyz", true)
	p.waitRegistered()
	t.Logf("registered %v after it was ready again", time.Since(turned))
}

// The order of a pod's end: withdrawn, drained, the application's SIGTERM, the agent's.
func TestDeletedPodIsWithdrawnThenDrainedThenStopped(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")

	// A client that keeps its connection and asks for nothing.
	idle := &http.Client{Transport: &http.Transport{}}
	defer idle.CloseIdleConnections()
	if code, _, err := p.do(idle, http.MethodGet, 8080, "/fast", ""); err != nil || code != http.StatusOK {
		t.Fatal(code, err)
	}
	slow := p.pending()
	deleted := p.delete(0)
	withdrawn := p.withdrawn(deleted)
	p.longerThanIdle()
	answered := p.finish(slow)
	died := p.diedDrained()
	term := p.logged(agentName, `"signal"`, "terminated")
	hook := p.logged(agentName, "hook call")
	// The idle connection must not add to it.
	released := p.releasedSoonAfter(answered)
	p.gone()

	order := []struct {
		what string
		at   time.Time
	}{
		{"deleted", deleted}, {"withdrawn", withdrawn}, {"answered", answered}, {"released", released.at},
		{"application's SIGTERM", died.at}, {"agent's SIGTERM", term.at},
	}
	for i, o := range order {
		t.Logf("%5d ms  %s", o.at.Sub(deleted).Milliseconds(), o.what)
		if i > 0 && o.at.Before(order[i-1].at) {
			t.Errorf("%s came before %s", o.what, order[i-1].what)
		}
	}
	t.Logf("%5d ms  (the hook's call)", hook.at.Sub(deleted).Milliseconds())
	if took := term.at.Sub(deleted); took > 30*time.Second {
		t.Errorf("the agent's SIGTERM came after %v, the grace period is 30 s", took)
	}

	if m := p.event("Registered"); !strings.Contains(m, p.keys()[0]) || !strings.Contains(m, p.keys()[1]) {
		t.Errorf("event Registered doesn't name the keys: %s", m)
	}
	p.event("Deregistered")
	if m := p.event("Drained"); !regexp.MustCompile(`^drained in [1-9][0-9.]*s, nothing in flight$`).MatchString(m) {
		t.Errorf("event Drained: %q, want how long it took", m)
	}
	p.eventually(soon, "nothing is left in the ledger", func() error {
		if c, ok := p.changes.last(p.ledger()); !ok || !c.deleted {
			return fmt.Errorf("it has %s", c)
		}
		return nil
	})
	sp.calm()
}

func TestIdlePodStopsAfterTheSettleTime(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	p.delete(0)
	released := p.logged(agentName, `"released"`)
	total := released.duration("total")
	t.Logf("released after %v", total)
	// Settle is 1 s, and the quiet period passes within it.
	if total < 900*time.Millisecond || total > releaseLag {
		t.Errorf("an idle pod was released after %v, want about 1 s", total)
	}
	p.gone()
}

func TestDeleteWithShortGraceReleasesBeforeItsEnd(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	p.pending()
	deleted := time.Now()
	sp.kubectl("delete", "pod", p.name, "--grace-period=5", "--wait=false")
	deadline := p.deadline()
	released := p.logged(agentName, `"released"`)
	died := p.logged(appName, "dying at once")
	t.Logf("released after %v, SIGTERM after %v", released.at.Sub(deleted), died.at.Sub(deleted))
	if released.fields()["outcome"] != "timed-out" || released.fields()["inFlight"] != 1.0 {
		t.Errorf("the verdict is %s, want a time-out with 1 in flight", released.text)
	}
	// The application keeps a third of the 5 s. Kubernetes' clock has whole seconds, so it may be one more; an agent that
	// hears of it late has less.
	if total := released.duration("total"); total < 1500*time.Millisecond || total > 5*time.Second {
		t.Errorf("released after %v, want 2.3 to 3.3 s", total)
	}
	if died.at.After(deadline) {
		t.Errorf("SIGTERM at %v, when the grace period was over at %v", died.at, deadline)
	}
	if n := died.fields()["inFlight"]; n != 1.0 {
		t.Errorf("the application had %v in flight at SIGTERM, want the one", n)
	}
	if m := p.event("DrainTimedOut"); !strings.Contains(m, "with 1 in flight") {
		t.Errorf("event DrainTimedOut: %q, want the number in flight", m)
	}
	p.gone()
}

func TestSecondDeleteShortensTheDrain(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	p.pending()
	first := p.delete(0)
	p.withdrawn(first)
	second := p.delete(6 * time.Second)
	deadline := p.deadline()
	released := p.logged(agentName, `"released"`)
	died := p.logged(appName, "dying at once")
	t.Logf("first delete, second %v later, released %v after that, SIGTERM %v", second.Sub(first), released.at.Sub(second), died.at.Sub(second))
	if released.fields()["outcome"] != "timed-out" {
		t.Errorf("the verdict is %s, want a time-out", released.text)
	}
	if released.at.After(deadline) || died.at.After(deadline) {
		t.Errorf("released at %v, SIGTERM at %v, when the grace period was over at %v", released.at, died.at, deadline)
	}
	p.gone()
}

// deadline is when the pod's grace period is over, as Kubernetes says now.
func (p *pod) deadline() time.Time {
	p.t.Helper()
	now, err := p.get()
	if err != nil || now.DeletionTimestamp == nil {
		p.t.Fatalf("the pod is not being deleted: %v", err)
	}
	return now.DeletionTimestamp.Time
}

func TestContainerRestartedByLivenessDrainsAndComesBack(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) {
		p.app.LivenessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/livez", Port: intstr.FromString("http")}},
			PeriodSeconds: 1, TimeoutSeconds: 5, FailureThreshold: 1,
		}
		// The kubelet's restart shows no sign that would tell its httpGet hook from a stranger's; the pod's own process is trusted.
		p.app.Lifecycle.PreStop = &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/usher-prestop", "--log-to-pid1"}}}
	})

	slow := p.pending()
	broken := time.Now()
	p.set("/livez", false)
	p.drainedBeforeSIGTERM(broken, slow)
	p.logged(appName, "usher-prestop: drained in", "cause: prestop hook") // --log-to-pid1
	p.eventually(soon, "the container is restarted", func() error {
		now, err := p.get()
		if err != nil || len(now.Status.ContainerStatuses) == 0 || now.Status.ContainerStatuses[0].RestartCount != 1 {
			return fmt.Errorf("it isn't: %v", err)
		}
		return nil
	})
	p.waitRegistered()
	t.Logf("registered again %v after liveness was lost", time.Since(broken))

	// It is as good as new.
	slow = p.pending()
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.finish(slow)
	p.gone()
	if n := len(p.logs.find(p.name, agentName, `"released"`, `"outcome":"drained"`)); n != 2 {
		t.Errorf("%d drains, want one for each end of the container", n)
	}
	for _, l := range p.logs.find(p.name, appName, "dying at once") {
		if l.fields()["inFlight"] != 0.0 {
			t.Errorf("died with requests in flight: %s", l.text)
		}
	}
}
