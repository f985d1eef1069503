package registry_test

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

// clientGoroutines are those of registrars and of etcd clients, the test's own included.
func clientGoroutines() (n int, stacks string) {
	buf := make([]byte, 4<<20)
	var found []string
	for _, g := range strings.Split(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(g, "usher.dev/usher/registry.") || strings.Contains(g, "go.etcd.io/etcd/client/v3") {
			found = append(found, g)
		}
	}
	return len(found), strings.Join(found, "\n\n")
}

func goroutinesFallTo(t *testing.T, want int, when string) {
	t.Helper()
	var n int
	var stacks string
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if n, stacks = clientGoroutines(); n <= want {
			return
		}
	}
	t.Errorf("%s: %d goroutines, want %d:\n%s", when, n, want, stacks)
}

// Not parallel, since it counts the goroutines of the whole process.
func TestNoLeakedGoroutines(t *testing.T) {
	w := newWorld(t)
	w.history("") // the test's own client has all its goroutines now
	time.Sleep(200 * time.Millisecond)
	none, _ := clientGoroutines()

	a := w.registered(spec{})
	time.Sleep(200 * time.Millisecond)
	steady, _ := clientGoroutines()
	if steady <= none {
		t.Fatalf("%d goroutines with an agent, %d without: this test sees none", steady, none)
	}
	for range 5 {
		w.revoke(a)
		a.advertised()
		w.remove(key)
		a.advertised()
		a.offline("not ready")
		a.sync()
		a.online("ready")
		a.advertised()
	}
	goroutinesFallTo(t, steady, "after five lost leases")
	a.stop()
	goroutinesFallTo(t, none, "after Run")

	// A watch that another one replaces is gone: as many as for an agent that had all its Services from the start.
	services := []string{"api", "web", "admin"}
	a = w.registered(spec{services: services})
	time.Sleep(200 * time.Millisecond)
	steady, _ = clientGoroutines()
	a.stop()
	goroutinesFallTo(t, none, "after Run with three Services")
	a = w.start(spec{services: services})
	for n := range services {
		d := a.desired(lifecycle.Online, "ready")
		d.Instances = d.Instances[:n+1]
		a.Set(d)
		a.sync()
	}
	a.advertised()
	goroutinesFallTo(t, steady, "after three watches")
	a.stop()

	link := w.etcd.Link()
	link.Set(etcdtest.Refuse)
	for name, s := range map[string]spec{
		"etcd was never there": {link: link},
		"no login":             {link: link, conn: registry.Connection{User: "usher", Password: "wrong"}},
	} {
		a := w.start(s)
		a.online("ready")
		eventually(t, name+": it is reported", func() bool { return a.status().Err != "" })
		t.Log(a.status().Err)
		a.stop()
		goroutinesFallTo(t, none, name)
	}
}
