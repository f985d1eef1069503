package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"usher.dev/usher/client"
)

// follower is an application that follows the events.
type follower struct {
	mu     sync.Mutex
	events []client.Event
}

func (p *pod) follow(address string) *follower {
	p.t.Helper()
	c, err := client.New(client.Config{Address: "http://" + address})
	if err != nil {
		p.t.Fatal(err)
	}
	f := &follower{}
	ctx, cancel := context.WithCancel(p.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for e, err := range c.Events(ctx) {
			if err == nil {
				f.mu.Lock()
				f.events = append(f.events, e)
				f.mu.Unlock()
			}
		}
	}()
	p.t.Cleanup(func() {
		cancel()
		<-done
	})
	return f
}

func (f *follower) all() []client.Event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.events)
}

// types are those of all events, those that follow a gap marked.
func (f *follower) types() []string {
	var types []string
	for _, e := range f.all() {
		mark := ""
		if e.Missed {
			mark = " (missed)"
		}
		types = append(types, string(e.Type)+mark)
	}
	return deletion(types)
}

// deletion leaves out that the endpoint was terminating, which is seen a moment before the pod's deletion or with it.
func deletion(types []string) []string {
	if i := slices.Index(types, "draining"); i > 0 && types[i-1] == "offline" {
		return slices.Delete(types, i-1, i)
	}
	return types
}

// heard waits until the follower has had as many events, and no others than these.
func (p *pod) heard(f *follower, want ...string) {
	p.t.Helper()
	p.eventually(soon, fmt.Sprintf("the events %v", want), func() error {
		if got := f.types(); len(got) < len(want) {
			return fmt.Errorf("there are %v", got)
		}
		return nil
	})
	if got := f.types(); !slices.Equal(got, want) {
		p.t.Fatalf("the events %v, want %v", got, want)
	}
}

func TestFollowerHearsEachStateOnceAndInOrderAcrossAReconnect(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	address, cut := p.mustForward(0)
	f := p.follow(address)
	want := []string{"online"}
	p.heard(f, want...)
	turn := func(ready bool) {
		t.Helper()
		at := time.Now()
		p.set("/readyz", ready)
		if ready {
			p.waitRegistered()
		} else {
			p.withdrawn(at)
		}
	}
	turn(false)
	turn(true)
	want = append(want, "offline", "online")
	p.heard(f, want...)

	// It misses nothing of what happens while it is cut off, and hears nothing twice.
	cut()
	turn(false)
	turn(true)
	turn(false)
	if got := f.types(); !slices.Equal(got, want) {
		t.Fatalf("the events %v without a connection, want %v", got, want)
	}
	p.mustForward(portOf(t, address))
	want = append(want, "offline", "online", "offline")
	p.heard(f, want...)
	turn(true)
	p.delete(0)
	want = append(want, "online", "draining", "released")
	p.heard(f, want...)
	events := f.all()
	for i, e := range events {
		if e.Run != events[0].Run || e.ID != events[0].ID+uint64(i) || e.Cause == "" || e.Time.IsZero() {
			t.Errorf("event %d is %+v", i, e)
		}
	}
	if e := events[len(events)-2]; e.Deadline == nil || time.Until(*e.Deadline) > 30*time.Second {
		t.Errorf("draining gives the deadline %v", e.Deadline)
	}
	if e := events[len(events)-1]; e.Verdict == nil || e.Verdict.Outcome != "drained" {
		t.Errorf("released gives the verdict %+v", e.Verdict)
	}
	p.gone()
	if got := f.types(); !slices.Equal(got, want) {
		t.Errorf("the events %v at the end, want %v", got, want)
	}
}

// told are the events that the application got as a webhook, by its log.
func (p *pod) told() []string {
	var types []string
	for _, l := range p.logs.find(p.name, appName, `"told"`) {
		types = append(types, fmt.Sprint(l.fields()["event"]))
	}
	return deletion(types)
}

// newReceiver takes webhooks at an address of the node. handle gets each event once its body is read.
func newReceiver(t testing.TB, handle func(client.Event, *http.Request)) (url string) {
	t.Helper()
	ln, err := net.Listen("tcp", net.JoinHostPort(shared.NodeIP(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &httptest.Server{Listener: ln, Config: &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var e client.Event
		body, err := io.ReadAll(r.Body) // to its end, or the server doesn't notice that the agent has gone
		if err == nil {
			err = json.Unmarshal(body, &e)
		}
		if err != nil {
			t.Errorf("a webhook with the body %q: %v", body, err)
		}
		handle(e, r)
	})}}
	srv.Start()
	t.Cleanup(srv.Close)
	return "http://" + ln.Addr().String() + "/"
}

// A file of a volume that outlives the containers, but not the pod, is read while the pod is being deleted: its application
// takes long to answer a request.
func TestApplicationIsToldByWebhookCommandAndStateFile(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	const folder = "/run/usher"
	elsewhere := make(chan string, 100)
	url := newReceiver(t, func(e client.Event, _ *http.Request) { elsewhere <- string(e.Type) })
	p := sp.online("shop", func(p parts) {
		mount := corev1.VolumeMount{Name: "usher", MountPath: folder}
		p.Volumes = append(p.Volumes, corev1.Volume{Name: "usher", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}})
		p.agent.VolumeMounts = append(p.agent.VolumeMounts, mount)
		p.app.VolumeMounts = append(p.app.VolumeMounts, mount)
		// The agent's image has no shell, but a program that installs itself wherever it is told.
		p.agent.Args = append(p.agent.Args, "--notify={webhooks: [{url: 'http://127.0.0.1:8080/told'}, {url: '"+url+"'}], stateFile: "+folder+"/state.json, "+
			"commands: [{events: [draining], command: [/usher-prestop, install, "+folder+"]}]}")
	})
	shared := func(name string) string {
		return fmt.Sprintf("/proc/%d/root%s/%s", p.process("/app").Pid, folder, name)
	}
	state := func(want client.EventType) error {
		var e client.Event
		b, err := os.ReadFile(shared("state.json"))
		if err == nil {
			err = json.Unmarshal(b, &e)
		}
		if err == nil && e.Type != want {
			err = fmt.Errorf("it says %s", e.Type)
		}
		return err
	}
	p.eventually(soon, "the state file says online", func() error { return state(client.EventOnline) })
	if _, err := os.ReadFile(shared("usher-prestop")); err == nil {
		t.Error("the command has run already")
	}
	slow := p.pending()
	deleted := p.delete(0)
	p.eventually(soon, "the state file says draining", func() error { return state(client.EventDraining) })
	p.eventually(soon, "the command has run", func() error {
		_, err := os.ReadFile(shared("usher-prestop"))
		return err
	})
	p.logged(appName, `"told"`, `"draining"`) // before the drain is over
	p.drainedBeforeSIGTERM(deleted, slow)
	p.gone()
	// At the release SIGTERM may be quicker.
	got := p.told()
	if want := []string{"online", "draining", "released"}; !slices.Equal(got, want) && !slices.Equal(got, want[:2]) {
		t.Errorf("the application got webhooks of %v, want %v", got, want)
	}
	var all []string
	for len(elsewhere) > 0 {
		all = append(all, <-elsewhere)
	}
	if want := []string{"online", "draining", "released"}; !slices.Equal(deletion(all), want) {
		t.Errorf("another receiver got webhooks of %v, want %v", all, want)
	}
}

// A receiver that hangs gets 2 s of the shutdown, and nothing of the withdrawal.
func TestWebhookThatHangsDelaysTheReleaseByItsShareAtMost(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	asked := make(chan struct{}, 10)
	url := newReceiver(t, func(_ client.Event, r *http.Request) {
		asked <- struct{}{}
		<-r.Context().Done()
	})
	p := sp.online("shop", func(p parts) {
		p.agent.Args = append(p.agent.Args, fmt.Sprintf("--notify={webhooks: [{url: '%s', events: [draining], timeout: 20s, deadline: 20s}]}", url))
	})
	deleted := p.delete(0)
	withdrawn := p.withdrawn(deleted)
	released := p.logged(agentName, `"released"`)
	t.Logf("withdrawn after %v: %s", withdrawn.Sub(deleted), released.text)
	if len(asked) == 0 {
		t.Error("the receiver was never asked")
	}
	if took := released.duration("withdraw"); took < 0 || took >= 1900*time.Millisecond {
		t.Errorf("the withdrawal took %v", took)
	}
	// 2 s is the share; a shutdown with nothing in flight takes 1.5 s.
	if total := released.duration("total"); total < 1900*time.Millisecond || total > releaseLag || !strings.Contains(released.text, "not all could be told") {
		t.Errorf("%s", released.text)
	}
	p.gone()
}

func TestHeldInstanceIsOutOfTheRegistryAcrossARestartOfTheAgent(t *testing.T) {
	t.Parallel()
	sp := newSpace(t, nil)
	p := sp.online("shop")
	address, _ := p.mustForward(0)
	f := p.follow(address)
	p.heard(f, "online")
	c, err := client.New(client.Config{Address: "http://" + address})
	if err != nil {
		t.Fatal(err)
	}
	var refused *client.Error
	if err := c.Hold(sp.ctx, client.Hold{Actor: "alice"}); !errors.As(err, &refused) || refused.Code != http.StatusBadRequest || !strings.Contains(refused.Message, "reason") {
		t.Errorf("a hold without a reason: %v, want 400 and what is missing", err)
	}
	held := time.Now()
	if err := c.Hold(sp.ctx, client.Hold{Reason: "heap dump", Actor: "alice"}); err != nil {
		t.Fatal(err)
	}
	withdrawn := p.withdrawn(held)
	t.Logf("out of the registry after %v", withdrawn.Sub(held))
	p.eventually(soon, "the follower is told", func() error {
		if got := f.types(); !slices.Contains(got, "held") || !slices.Contains(got, "offline") {
			return fmt.Errorf("it has %v", got)
		}
		return nil
	})
	t.Logf("the follower heard %v", f.types())

	before := p.process("/usher-agent")
	if err := before.Kill(); err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	p.eventually(soon, "another agent runs", func() error {
		now, err := p.get()
		if err == nil && now.Status.InitContainerStatuses[0].RestartCount != 1 {
			err = errors.New("the container was not restarted")
		}
		return err
	})
	var st string
	p.eventually(soon, "the new agent knows of the hold", func() error {
		now, err := p.askStatus()
		if st = now.Cause; err == nil && !strings.Contains(st, "heap dump") {
			err = fmt.Errorf("it says %q", st)
		}
		return err
	})
	for _, ch := range p.changes.all() {
		if !ch.deleted && slices.Contains(p.keys(), ch.key) && ch.at.After(withdrawn) {
			t.Errorf("registered though it is held: %s", ch)
		}
	}
	t.Logf("held %v after the agent was killed: %s", time.Since(killed), st)

	if out := sp.usherctl("status", p.name); !strings.Contains(out, "heap dump") {
		t.Errorf("usherctl status says nothing of the hold:\n%s", out)
	}
	after := p.follow(first(p.mustForward(0)))
	p.eventually(soon, "the new agent's first event", func() error {
		if len(after.all()) == 0 {
			return errors.New("there is none")
		}
		return nil
	})
	sp.usherctl("resume", p.name)
	resumed := time.Now()
	p.waitRegistered()
	t.Logf("back %v after usherctl resume", time.Since(resumed))
	p.eventually(soon, "the follower is told", func() error {
		if got := after.types(); !slices.Contains(got, "resumed") || !slices.Contains(got, "online") {
			return fmt.Errorf("it has %v", got)
		}
		return nil
	})
	t.Logf("the follower of the new agent heard %v", after.types())

	held = time.Now()
	sp.usherctl("hold", p.name, "--reason", "upgrade of the node")
	p.withdrawn(held)
	if err := p.control().Resume(sp.ctx); err != nil {
		t.Fatal(err)
	}
	p.waitRegistered()
}

func first(address string, _ func()) string { return address }
