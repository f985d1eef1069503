package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"usher.dev/usher/integration/cluster"
)

func TestStrangersHookCallIsRefused(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	code, body, err := p.do(once(), http.MethodGet, 7400, "/prestop", "")
	if err != nil || code != http.StatusForbidden || !strings.Contains(body, "the Pod is not being deleted") {
		t.Errorf("answered %d %s (%v), want 403 and why", code, body, err)
	}
	if n := p.metric(`usher_hook_calls_total{result="refused"}`); n != 1 {
		t.Errorf("%v calls counted as refused, want 1", n)
	}
	st := p.status()
	if st.Refused != 1 || st.State != "Online" {
		t.Errorf("the status says %d refused, %s; want 1, Online", st.Refused, st.State)
	}
	p.logged(agentName, "hook call refused", sp.s.NodeIP())
	p.stayedRegistered()
}

func TestMissingServiceIsWaitedFor(t *testing.T) {
	t.Parallel()
	sp := bareSpace(t, nil)
	p := sp.start("shop")
	says := fmt.Sprintf("service %q does not exist in namespace %q", "shop", sp.name)
	p.notReady(says)
	p.logged(agentName, `service \"shop\" does not exist`)
	svc, _ := sp.example("shop.yaml")
	sp.apply(svc)
	p.waitRegistered()
}

func TestMissingPermissionIsNamed(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	roles := sp.s.Client.RbacV1().Roles(sp.name)
	role, err := roles.Get(sp.ctx, "usher", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	lacking := role.DeepCopy()
	for i := range lacking.Rules {
		if slices.Contains(lacking.Rules[i].Resources, "endpointslices") {
			lacking.Rules = slices.Delete(lacking.Rules, i, i+1)
			break
		}
	}
	if len(lacking.Rules) != len(role.Rules)-1 {
		t.Fatal("the example's Role has no rule of its own for endpointslices")
	}
	if lacking, err = roles.Update(sp.ctx, lacking, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	p := sp.start("shop")
	const says = `RBAC lacks "list" on endpointslices.discovery.k8s.io`
	p.notReady(says)
	p.logged(agentName, `RBAC lacks \"list\" on endpointslices.discovery.k8s.io`)
	if st := p.status(); !slices.ContainsFunc(st.Problems, func(s string) bool { return strings.Contains(s, says) }) {
		t.Errorf("the status has the problems %q, want %s", st.Problems, says)
	}
	lacking.Rules = role.Rules
	if _, err := roles.Update(sp.ctx, lacking, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	p.waitRegistered()
}

// notReady waits until the agent's readiness says why not, while its liveness is well.
func (p *pod) notReady(why string) {
	p.t.Helper()
	p.eventually(soon, "the agent says why it isn't ready", func() error {
		code, body, err := p.do(once(), http.MethodGet, 7400, "/readyz", "")
		if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(body, why)) {
			err = fmt.Errorf("/readyz says %d %s", code, body)
		}
		return err
	})
	p.alive()
	if err := p.registered(); err == nil {
		p.t.Error("it is registered")
	}
}

func (p *pod) alive() {
	p.t.Helper()
	if code, body, err := p.do(once(), http.MethodGet, 7400, "/livez", ""); err != nil || code != http.StatusOK {
		p.t.Errorf("/livez says %d %s (%v), want 200", code, body, err)
	}
}

func TestBudgetThatDoesNotFitTheGraceIsRefused(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.start("shop", func(p parts) {
		p.TerminationGracePeriodSeconds = new(int64(1))
		p.agent.Args = append(p.agent.Args, "--settle=5s")
	})
	p.logged(agentName, "terminationGracePeriodSeconds", "is 1;", "settle needs 5s", "raise terminationGracePeriodSeconds to at least")
	p.eventually(soon, "the agent ended", func() error {
		now, err := p.get()
		if err != nil || len(now.Status.InitContainerStatuses) == 0 {
			return fmt.Errorf("no status: %v", err)
		}
		s := now.Status.InitContainerStatuses[0]
		for _, state := range []corev1.ContainerState{s.State, s.LastTerminationState} {
			if state.Terminated != nil && state.Terminated.ExitCode != 0 {
				return nil
			}
		}
		return errors.New("it runs")
	})
	if err := p.registered(); err == nil {
		t.Error("it is registered")
	}
}

func TestRegistryUnreachableAtStart(t *testing.T) {
	t.Parallel()
	etcd := newEtcd(t)
	sp := newSpace(t, etcd)
	p := sp.start("shop")
	p.logged(agentName, "registry not as desired, retrying")
	p.alive()
	// Readiness isn't etcd's affair: the pod serves those who find it otherwise.
	p.eventually(soon, "the pod is ready", p.ready)
	p.eventually(soon, "the status says so", func() error {
		st, err := p.askStatus()
		if err == nil && (st.Registry.InSync || st.Registry.Error == "" || st.State != "Online") {
			err = fmt.Errorf("registry %+v in state %s, want what is wrong with it, Online", st.Registry, st.State)
		}
		return err
	})
	etcd.start()
	p.waitRegistered()
	p.logged(agentName, "registry as desired again")
}

func (p *pod) ready() error {
	now, err := p.get()
	if err != nil {
		return err
	}
	for _, c := range now.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return errors.New("it isn't")
}

func TestWrongRegistryPasswordIsSaidAndHeals(t *testing.T) {
	t.Parallel()
	etcd := newEtcd(t)
	etcd.start()
	sp := newSpace(t, etcd)
	// The watches of this test are older than the authentication, which asks for it at each new request only.
	_, err := etcd.client.UserAdd(sp.ctx, "root", "right")
	if err == nil {
		_, err = etcd.client.UserGrantRole(sp.ctx, "root", "root")
	}
	if err == nil {
		_, err = etcd.client.AuthEnable(sp.ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := sp.start("shop", func(p parts) {
		p.agent.Env = append(p.agent.Env, corev1.EnvVar{Name: "ETCDCTL_USER", Value: "root:wrong"})
	})
	p.logged(agentName, "registry not as desired, retrying", "invalid user ID or password")
	p.alive()
	root := etcd.as("root", "right")
	if _, err := root.UserChangePassword(sp.ctx, "root", "wrong"); err != nil {
		t.Fatal(err)
	}
	p.etcd = etcd.as("root", "wrong")
	p.waitRegistered()
}

func TestForeignRecordIsLeftAlone(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	const foreign = "no record of Usher's"
	key := sp.ledgerPrefix() + "shop/shop"
	if _, err := sp.etcd.Put(sp.ctx, key, foreign); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			sp.etcd.Delete(shared.Etcd.Ctx(), key)
		}
	})
	p := sp.start("shop")
	p.logged(agentName, `"error"`, "registry left alone", key, "delete it to have the instance registered")
	if n := p.metric("usher_registry_conflicts_total"); n != 1 {
		t.Errorf("%v conflicts counted, want 1", n)
	}
	resp, err := sp.etcd.Get(sp.ctx, key)
	if err != nil || len(resp.Kvs) != 1 || string(resp.Kvs[0].Value) != foreign || resp.Kvs[0].Version != 1 {
		t.Errorf("the key was touched: %v, %v", resp, err)
	}
	if err := p.registered(); err == nil {
		t.Error("it is registered without a fence")
	}
	if _, err := sp.etcd.Delete(sp.ctx, key); err != nil {
		t.Fatal(err)
	}
	p.waitRegistered()
}

func TestRegistryLostAtDelete(t *testing.T) {
	t.Parallel()
	etcd := newEtcd(t)
	etcd.start()
	sp := newSpace(t, etcd)
	p := sp.online("shop")
	slow := p.pending()
	etcd.kill()
	p.delete(0)
	p.logged(agentName, "hook call")
	p.pass(withdrawShare)
	p.longerThanIdle()
	released := p.releasedSoonAfter(p.finish(slow))
	if v, _ := released.fields()["verdict"].(string); !strings.Contains(v, "the registry could not be told") {
		t.Errorf("the verdict is %q, want that the registry could not be told", v)
	}
	p.diedDrained()
	p.gone()
}

// withdrawShare is what a shutdown has for the registry before it goes on without (--withdraw-timeout).
const withdrawShare = 2 * time.Second

// cuts are the ways in which an etcd is cut off: one answers that nobody is there, the other not at all.
var cuts = map[string]struct{ cut, mend func(*ownEtcd) }{
	"killed": {(*ownEtcd).kill, (*ownEtcd).start},
	"frozen": {(*ownEtcd).freeze, (*ownEtcd).thaw},
}

func TestRegistryLostInMidDrain(t *testing.T) {
	t.Parallel()
	for name, way := range cuts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			etcd := newEtcd(t)
			etcd.start()
			sp := newSpace(t, etcd)
			p := sp.online("shop")
			slow := p.pending()
			deleted := p.delete(0)
			p.withdrawn(deleted)
			p.logged(agentName, "hook call")
			deadline := p.deadline()
			way.cut(etcd)
			p.longerThanIdle()
			if ended := sp.logs.find(p.name, agentName, `"released"`); len(ended) > 0 {
				t.Errorf("released with a request in flight: %s", ended[0].text)
			}
			answered := p.finish(slow)
			p.drainedSoonAfter(answered)
			p.gone()
			if now := time.Now(); now.After(deadline) {
				t.Errorf("gone at %v, when the grace period was over at %v: the agent had to be killed", now, deadline)
			}
		})
	}
}

// What can't be told at once is told as soon as etcd is there again, while the drain goes on.
func TestRegistryLostAtDeleteAndBackInMidDrain(t *testing.T) {
	t.Parallel()
	for name, way := range cuts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			etcd := newEtcd(t)
			etcd.start()
			sp := newSpace(t, etcd)
			// No lease ends in the grace period: whatever goes, the agent has taken out.
			p := sp.online("shop", func(p parts) { p.agent.Args = append(p.agent.Args, "--lease-ttl=2m") })
			slow := p.pending()
			way.cut(etcd)
			deleted := p.delete(0)
			p.logged(agentName, "hook call")
			p.pass(withdrawShare + time.Second) // the drain goes on without
			back := time.Now()
			way.mend(etcd)
			withdrawn := p.withdrawn(deleted)
			t.Logf("withdrawn %v after etcd was to come back", withdrawn.Sub(back))
			// Nothing else can have ended the drain: the request is there.
			if ended := sp.logs.find(p.name, agentName, `"released"`); len(ended) > 0 {
				t.Errorf("released before the withdrawal, with a request in flight: %s", ended[0].text)
			}
			p.longerThanIdle()
			answered := p.finish(slow)
			p.drainedSoonAfter(answered)
			p.gone()
		})
	}
}

// drainedSoonAfter checks the end of a drain in whose midst something was lost that it doesn't need.
func (p *pod) drainedSoonAfter(answered time.Time) {
	p.t.Helper()
	released := p.releasedSoonAfter(answered)
	v, _ := released.fields()["verdict"].(string)
	if released.fields()["outcome"] != "drained" || strings.Contains(v, "could not be told") {
		p.t.Errorf("the verdict is %q, want drained, and the registry told", v)
	}
	if died := p.diedDrained(); died.at.Sub(answered) > releaseLag {
		p.t.Errorf("SIGTERM %v after the last answer, want at most %v", died.at.Sub(answered), releaseLag)
	}
}

func TestRegistryRestartLeavesNoGap(t *testing.T) {
	t.Parallel()
	etcd := newEtcd(t)
	etcd.start()
	sp := newSpace(t, etcd)
	const ttl = 10 * time.Second // of which etcd's restart may take two thirds
	p := sp.online("shop", func(p parts) { p.agent.Args = append(p.agent.Args, "--lease-ttl="+ttl.String()) })
	created := p.revisions()
	etcd.kill()
	p.alive()
	etcd.start()
	p.pass(ttl + time.Second) // in which a lease that nobody renews ends
	p.stayedRegistered()
	if now := p.revisions(); !slices.Equal(now, created) {
		t.Errorf("the records were made at revisions %v, before the restart at %v: there was a gap", now, created)
	}
	turned := time.Now()
	p.set("/readyz", false)
	p.withdrawn(turned)
	p.set("/readyz", true)
	p.waitRegistered()
}

// revisions are those that made the pod's records.
func (p *pod) revisions() []int64 {
	p.t.Helper()
	var out []int64
	for _, key := range p.keys() {
		resp, err := p.etcd.Get(p.ctx, key)
		if err != nil || len(resp.Kvs) != 1 {
			p.t.Fatalf("key %s: %v %v", key, resp, err)
		}
		out = append(out, resp.Kvs[0].CreateRevision)
	}
	return out
}

// Losing the API server changes nothing, and a drain that has begun ends by itself.
func TestAPIServerLost(t *testing.T) {
	sp := newSpace(t, nil)
	ends, stays := sp.start("ends"), sp.start("stays")
	ends.waitRegistered()
	stays.waitRegistered()

	slow := ends.pending()
	deleted := ends.delete(0)
	ends.withdrawn(deleted)
	// The agent may hear of the deletion before the kubelet, which needs the API server to hear of it too.
	ends.logged(agentName, "hook call")
	if err := sp.s.Kill(sp.ctx, cluster.APIServer); err != nil {
		t.Fatal(err)
	}
	back := false
	t.Cleanup(func() {
		if !back {
			sp.s.Start(context.Background(), cluster.APIServer)
		}
	})
	ends.longerThanIdle()
	if ended := sp.logs.find(ends.name, agentName, `"released"`); len(ended) > 0 {
		t.Errorf("released with a request in flight: %s", ended[0].text)
	}
	ends.drainedSoonAfter(ends.finish(slow))
	stays.eventually(soon, "the agent sees that the API server is gone", func() error {
		if stays.metric("usher_kubernetes_problems") == 0 {
			return fmt.Errorf("it sees no problem")
		}
		return nil
	})
	stays.alive()
	if code, body, err := stays.do(once(), "GET", 7400, "/readyz", ""); err != nil || code != 200 {
		t.Errorf("/readyz says %d %s (%v), want 200 as before", code, body, err)
	}
	stays.stayedRegistered()

	if err := sp.s.Start(sp.ctx, cluster.APIServer); err != nil {
		t.Fatal(err)
	}
	back = true
	stays.eventually(soon, "the agent sees the API server again", func() error {
		if n := stays.metric("usher_kubernetes_problems"); n != 0 {
			return fmt.Errorf("it sees %v problems", n)
		}
		return nil
	})
	stays.stayedRegistered()
	turned := time.Now()
	stays.set("/readyz", false)
	stays.withdrawn(turned)
	stays.set("/readyz", true)
	stays.waitRegistered()
	ends.gone()
}
