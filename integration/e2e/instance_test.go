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
	slow := p.request(2 * time.Second)
	deleted := p.delete(0)
	withdrawn := p.withdrawn(deleted)
	answered := p.answered(slow)
	died := p.logged(appName, "dying at once")
	term := p.logged(agentName, `"signal"`, "terminated")
	hook := p.logged(agentName, "hook call")
	released := p.logged(agentName, `"released"`)
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
	if n := died.fields()["inFlight"]; n != 0.0 {
		t.Errorf("the application got SIGTERM with %v in flight", n)
	}
	// The request, the quiet period after it, and time for a busy machine. The idle connection must not add to it.
	if total := released.duration("total"); total > 5*time.Second {
		t.Errorf("released after %v, with a request of 2 s", total)
	}
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
	if c, ok := p.changes.last(p.ledger()); !ok || !c.deleted {
		t.Errorf("the ledger has %s, want nothing left", c)
	}
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
	if total < 900*time.Millisecond || total > 3*time.Second {
		t.Errorf("an idle pod was released after %v, want about 1 s", total)
	}
	p.gone()
}

func TestDeleteWithShortGraceReleasesBeforeItsEnd(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	p.request(8 * time.Second)
	deleted := time.Now()
	sp.kubectl("delete", "pod", p.name, "--grace-period=5", "--wait=false")
	released := p.logged(agentName, `"released"`)
	died := p.logged(appName, "dying at once")
	t.Logf("released after %v, SIGTERM after %v", released.at.Sub(deleted), died.at.Sub(deleted))
	if released.fields()["outcome"] != "timed-out" || released.fields()["inFlight"] != 1.0 {
		t.Errorf("the verdict is %s, want a time-out with 1 in flight", released.text)
	}
	// The application keeps a third of the 5 s. Kubernetes' clock has whole seconds, so it may be one more.
	if total := released.duration("total"); total < 2*time.Second || total > 4*time.Second {
		t.Errorf("released after %v, want 2.3 to 3.3 s", total)
	}
	if took := died.at.Sub(deleted); took > 5*time.Second {
		t.Errorf("SIGTERM after %v of 5 s", took)
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
	p.request(20 * time.Second)
	first := p.delete(0)
	p.withdrawn(first)
	second := p.delete(4 * time.Second)
	released := p.logged(agentName, `"released"`)
	died := p.logged(appName, "dying at once")
	t.Logf("first delete, second %v later, released %v after that, SIGTERM %v", second.Sub(first), released.at.Sub(second), died.at.Sub(second))
	if released.fields()["outcome"] != "timed-out" {
		t.Errorf("the verdict is %s, want a time-out", released.text)
	}
	if took := released.at.Sub(second); took > 4*time.Second {
		t.Errorf("released %v after a delete that gave 4 s", took)
	}
	if took := died.at.Sub(second); took > 4*time.Second {
		t.Errorf("SIGTERM %v after a delete that gave 4 s", took)
	}
	p.gone()
}

func TestContainerRestartedByLivenessDrainsAndComesBack(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop", func(p parts) {
		p.app.LivenessProbe = &corev1.Probe{
			ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/livez", Port: intstr.FromString("http")}},
			PeriodSeconds: 1, FailureThreshold: 1,
		}
		// The kubelet's restart shows no sign that would tell its httpGet hook from a stranger's; the pod's own process is trusted.
		p.app.Lifecycle.PreStop = &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/usher-prestop", "--log-to-pid1"}}}
	})

	slow := p.request(3 * time.Second)
	broken := time.Now()
	p.set("/livez", false)
	withdrawn := p.withdrawn(broken)
	answered := p.answered(slow)
	died := p.logged(appName, "dying at once")
	if died.at.Before(answered) || died.fields()["inFlight"] != 0.0 {
		t.Errorf("the application got SIGTERM with a request in flight: %s", died.text)
	}
	p.logged(appName, "usher-prestop: drained in", "cause: prestop hook") // --log-to-pid1
	p.eventually(soon, "the container is restarted", func() error {
		now, err := p.get()
		if err != nil || len(now.Status.ContainerStatuses) == 0 || now.Status.ContainerStatuses[0].RestartCount != 1 {
			return fmt.Errorf("it isn't: %v", err)
		}
		return nil
	})
	p.waitRegistered()
	t.Logf("liveness lost; withdrawn after %v, SIGTERM after %v, registered again after %v",
		withdrawn.Sub(broken), died.at.Sub(broken), time.Since(broken))

	// It is as good as new.
	slow = p.request(2 * time.Second)
	deleted := p.delete(0)
	p.withdrawn(deleted)
	p.answered(slow)
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
