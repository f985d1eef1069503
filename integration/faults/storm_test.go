package faults_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/integration/internal/etcdtest"
)

// Not parallel: it is a measurement. All of 200 agents lose etcd until all of their leases are gone, and get it back in one
// moment.
func TestStorm(t *testing.T) {
	const (
		agents = 200
		limit  = 10 * time.Second
		bucket = 100 * time.Millisecond
		// The middle eight tenths of them ask for a lease in no less than this. A machine that stalls only stretches it.
		spreadMin = 450 * time.Millisecond // about 700 ms as it is, 300 ms were reconnects not spread
	)
	w := newWorld(t, 1)
	r := w.register(pod{count: agents})
	f := w.fault(300, fmt.Sprintf("%d agents cut off from etcd past the TTL", agents), limit, time.Minute)
	w.etcd.agents(etcdtest.Refuse)
	eventually(t, patience, "all records are gone", func() bool { return len(w.seen.under()) == 0 })
	r.mu.Lock()
	r.asked = nil
	r.mu.Unlock()
	w.etcd.agents(etcdtest.Pass)
	f.over()
	f.healed(r)
	r.mu.Lock()
	asked := slices.Clone(r.asked)
	r.mu.Unlock()
	histogram := map[int]int{}
	last, peak := 0, 0
	var grants []time.Duration
	for _, l := range asked {
		since := l.At.Sub(f.begun)
		i := int(since / bucket)
		histogram[i]++
		last, peak = max(last, i), max(peak, histogram[i])
		if l.Request == "grant" {
			grants = append(grants, since)
		}
	}
	if len(grants) < agents {
		t.Fatalf("%d agents got %d leases", agents, len(grants))
	}
	slices.Sort(grants)
	spread := grants[len(grants)*9/10] - grants[len(grants)/10]
	var b strings.Builder
	for i := range last + 1 {
		fmt.Fprintf(&b, "%5d ms %4d %s\n", i*100, histogram[i], strings.Repeat("#", (histogram[i]+3)/4))
	}
	fmt.Printf("requests that etcd answered to %d agents in each 100 ms after it was back: %d in all, at most %d; %s between a tenth and nine tenths of the leases\n%s",
		agents, len(asked), peak, spread.Round(time.Millisecond), b.String())
	if spread < spreadMin {
		t.Errorf("eight tenths of %d agents asked for a lease within %s, want them spread over at least %s", agents, spread, spreadMin)
	}
}
