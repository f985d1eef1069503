package e2e

import (
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/registry"
)

// unattended starts a pod without an agent. Where the agent is one of the pod's containers, Kubernetes says that the pod isn't
// ready while it restarts; here it runs on the node, so that nothing but its probes can say anything against the instance.
func (sp *space) unattended() *pod {
	sp.t.Helper()
	p := sp.start("shop", func(p parts) {
		p.InitContainers = nil
		p.app.Lifecycle = nil
	})
	p.eventually(soon, "the pod is ready", p.ready)
	return p
}

// attend runs an agent for the pod that asks a dependency, for the first time after a delay in seconds. Its records stay for as
// long as the test takes, so that whoever takes them out is an agent. kill ends it as SIGKILL does.
func (p *pod) attend(d *dependency, delay int) (kill func()) {
	p.t.Helper()
	health := strings.Replace(d.component("database", true), "{httpGet", fmt.Sprintf("{initialDelaySeconds: %d, httpGet", delay), 1)
	agent := exec.CommandContext(p.ctx, p.s.Programs.Agent, "--kubeconfig="+p.s.Kubeconfig(), "--etcd-endpoints="+p.s.RegistryEndpoint(),
		"--service=shop,target="+p.space.name+"/http,port=http", "--service=shop,target="+p.space.name+"/grpc,port=grpc",
		"--pod-namespace="+p.space.name, "--pod-name="+p.name, "--pod-uid="+p.uid, "--hook-address=127.0.0.1:0", "--control-address=127.0.0.1:0",
		"--in-flight-source=http", "--in-flight-url=http://"+p.ip+":8080/inflight", "--lease-ttl=300s", "--health="+health)
	var said strings.Builder
	agent.Stderr = &said
	if err := agent.Start(); err != nil {
		p.t.Fatal(err)
	}
	killed := false
	kill = func() {
		if !killed {
			killed = true
			agent.Process.Kill()
			agent.Wait() // ended by us
		}
	}
	p.t.Cleanup(func() {
		kill()
		if p.t.Failed() {
			p.t.Logf("log of agent %d:\n%s", agent.Process.Pid, said.String())
		}
	})
	return kill
}

func (p *pod) record() (registry.Record, error) {
	resp, err := p.etcd.Get(p.ctx, p.ledger())
	if err != nil {
		return registry.Record{}, err
	}
	if len(resp.Kvs) == 0 {
		return registry.Record{}, errors.New("there is no ledger record")
	}
	return registry.DecodeRecord(p.ledger(), resp.Kvs[0].Value)
}

func (p *pod) mustRecord() registry.Record {
	p.t.Helper()
	rec, err := p.record()
	if err != nil {
		p.t.Fatal(err)
	}
	return rec
}

// recorded waits until another agent than before has written the ledger record, with one of the states.
func (p *pod) recorded(before registry.Record, states ...string) {
	p.t.Helper()
	p.eventually(soon, "the new agent's record is there", func() error {
		rec, err := p.record()
		if err == nil && (rec.Owner.Agent == before.Owner.Agent || !slices.Contains(states, rec.State)) {
			err = fmt.Errorf("state %s by agent %s; want %q, and not by %s", rec.State, rec.Owner.Agent, states, before.Owner.Agent)
		}
		return err
	})
}

func TestRestartOfTheAgentLeavesNoGapUntilItsProbesHaveAnswered(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	database := newDependency(t)
	p := sp.unattended()

	kill := p.attend(database, 0)
	p.eventually(soon, "the agent's record is there", func() error {
		_, err := p.record()
		return err
	})
	for _, key := range p.keys() {
		if c, ok := p.changes.last(key); ok {
			t.Errorf("registered before its first probe has succeeded: %s", c)
		}
	}
	database.up.Store(true)
	p.waitRegistered()
	before := p.mustRecord()
	kill()
	killed := time.Now()
	kill = p.attend(database, 3)
	p.recorded(before, "Online")
	t.Logf("taken over %v after the agent was killed", time.Since(killed))
	p.stayedRegistered()

	before = p.mustRecord()
	kill()
	killed = time.Now()
	database.up.Store(false)
	p.attend(database, 0)
	withdrawn := p.withdrawn(killed)
	t.Logf("withdrawn %v after the agent was killed, as the first probe of the next one failed", withdrawn.Sub(killed))
	p.recorded(before, "Offline", "Pending") // Pending where the failure came before the look into etcd
	database.up.Store(true)
	p.waitRegistered()
}

func TestHeldInstanceIsShownAsOfflineByARestartedAgent(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	since := time.Now()
	sp.usherctl("hold", p.name, "--reason", "heap dump", "--actor", "alice")
	p.withdrawn(since)
	before := p.mustRecord()
	if err := p.process("/usher-agent").Kill(); err != nil {
		t.Fatal(err)
	}
	p.recorded(before, "Offline")
	out := sp.usherctl("get", "instances", "-o", "wide")
	t.Logf("usherctl get instances -o wide\n%s", out)
	if !strings.Contains(out, "Offline") || !strings.Contains(out, "held by alice: heap dump") {
		t.Errorf("usherctl get instances says\n%s", out)
	}
}
