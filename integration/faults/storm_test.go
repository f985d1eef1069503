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
		// Without any spreading all requests of all agents would fall into one or two buckets.
		peakMax = agents * 3 / 4
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
	for _, at := range asked {
		i := int(at.Sub(f.begun) / bucket)
		histogram[i]++
		last, peak = max(last, i), max(peak, histogram[i])
	}
	var b strings.Builder
	for i := range last + 1 {
		fmt.Fprintf(&b, "%5d ms %4d %s\n", i*100, histogram[i], strings.Repeat("#", (histogram[i]+3)/4))
	}
	fmt.Printf("requests that etcd answered to %d agents in each 100 ms after it was back, %d in all, at most %d:\n%s", agents, len(asked), peak, b.String())
	if peak > peakMax {
		t.Errorf("%d requests in 100 ms, want at most %d", peak, peakMax)
	}
}
