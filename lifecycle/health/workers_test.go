package health

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

// beat reports workers as ready.
func (r *rig) beat(ids ...string) {
	r.t.Helper()
	for _, id := range ids {
		r.do("PUT", "/v1/workers/"+id, `{"state": "READY"}`)
	}
}

func TestSilentWorkerTurnsNotReadyAndItsReplacementTurnsItBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 3, "ttlSeconds": 10}}`)
		r.run()
		r.readiness(lifecycle.RefusingTraffic, "0 of 3 workers ready")
		r.beat("w1", "w2", "w3")
		r.readiness(lifecycle.AcceptingTraffic, "")
		time.Sleep(6 * time.Second)
		r.beat("w1", "w3")
		time.Sleep(4*time.Second - time.Nanosecond)
		synctest.Wait()
		r.readiness(lifecycle.AcceptingTraffic, "")
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if got, want := r.heard[len(r.heard)-1], "/ REFUSING_TRAFFIC 2 of 3 workers ready: w2 is SILENT"; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
		r.beat("w4")
		r.readiness(lifecycle.AcceptingTraffic, "")
		if got := r.do("GET", "/v1/workers/w2", ""); !strings.Contains(got, `"SILENT"`) {
			t.Errorf("w2: %s", got)
		}
	})
}

func TestWorkerThatIsTakenOutCountsNoMore(t *testing.T) {
	r := newRig(t, `{"workers": {"required": 2}}`)
	r.beat("a", "b")
	r.do("DELETE", "/v1/workers/a", "")
	r.readiness(lifecycle.RefusingTraffic, "1 of 2 workers ready")
	r.do("PUT", "/v1/workers/c", `{"state": "NOT_READY", "cause": "loading"}`)
	r.readiness(lifecycle.RefusingTraffic, "1 of 2 workers ready: c is NOT_READY: loading")
	r.do("PUT", "/v1/workers/c", `{"state": "READY"}`)
	r.readiness(lifecycle.AcceptingTraffic, "")
	if w := r.ask(r.control, "DELETE", "/v1/workers/a", ""); w.Code != 404 || !strings.Contains(w.Body.String(), "worker a: no such worker") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

func TestQuorumIsEnough(t *testing.T) {
	r := newRig(t, `{"workers": {"ids": ["a", "b", "c"], "quorum": 2}}`)
	r.beat("a", "z") // z isn't one of them
	r.readiness(lifecycle.RefusingTraffic, "1 of 3 workers ready: b hasn't reported, c hasn't reported; the quorum is 2")
	r.beat("b")
	r.readiness(lifecycle.AcceptingTraffic, "")
	if got := r.do("GET", "/health/workers", ""); !strings.Contains(got, `"status": "DEGRADED"`) || !strings.Contains(got, "2 of 3 workers ready: c hasn't reported") {
		t.Errorf("got %s", got)
	}
	r.beat("c")
	if got := r.do("GET", "/health/readiness/workers", ""); strings.Contains(got, "DEGRADED") {
		t.Errorf("got %s", got)
	}
}

func TestLiveAsLongAsTheMasterIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 1}}`)
		r.run()
		r.beat("w1")
		r.livenessIs("", "")
		r.do("PUT", "/v1/workers/m", `{"state": "NOT_READY", "role": "master", "ttlSeconds": 5}`)
		r.livenessIs(lifecycle.Correct, "")
		r.readiness(lifecycle.RefusingTraffic, "the master worker is not ready")
		r.do("PUT", "/v1/workers/m", `{"state": "READY", "role": "master", "ttlSeconds": 5}`)
		r.readiness(lifecycle.AcceptingTraffic, "")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		r.livenessIs(lifecycle.Broken, "the master worker is gone or silent")
		if w := r.ask(r.hook, "GET", "/health/liveness", ""); w.Code != 503 {
			t.Errorf("got %d %s", w.Code, w.Body)
		}
		r.do("PUT", "/v1/workers/m2", `{"state": "READY", "role": "master"}`)
		r.livenessIs(lifecycle.Correct, "")
		r.do("DELETE", "/v1/workers/m2", "")
		r.livenessIs(lifecycle.Broken, "the master worker is gone or silent")
		r.Restarted("container restarted", time.Time{})
		r.livenessIs("", "")
	})
}

func TestCauseNamesOnlySomeWorkers(t *testing.T) {
	r := newRig(t, `{"workers": {"ids": ["a", "b", "c", "d", "e"]}}`)
	r.beat("c")
	r.readiness(lifecycle.RefusingTraffic, "1 of 5 workers ready: a hasn't reported, b hasn't reported, d hasn't reported, and 1 more")
}

func TestHeartbeatIsNoChange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 1}}`)
		r.run()
		r.beat("a")
		synctest.Wait()
		heard, changed := len(r.heard), r.changed
		var since time.Time
		for range 100 {
			time.Sleep(3 * time.Second)
			r.beat("a")
			synctest.Wait()
			since = r.workers.known["a"].since
		}
		if changed != r.changed || time.Since(since) != 300*time.Second || len(r.heard) != heard {
			t.Errorf("heard %q, since %v", r.heard, time.Since(since))
		}
	})
}

// A worker's shorter TTL holds although another's longer one was waited for.
func TestShorterTTLIsNoticedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 2}}`)
		r.run()
		r.do("PUT", "/v1/workers/a", `{"state": "READY", "ttlSeconds": 3600}`)
		r.do("PUT", "/v1/workers/b", `{"state": "READY", "ttlSeconds": 3600}`)
		synctest.Wait()
		r.do("PUT", "/v1/workers/b", `{"state": "READY", "ttlSeconds": 2}`)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got, want := r.heard[len(r.heard)-1], "/ REFUSING_TRAFFIC 1 of 2 workers ready: b is SILENT"; got != want {
			t.Errorf("heard %q, want %q", got, want)
		}
	})
}

func TestSilentWorkersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 1}}`)
		r.run()
		r.beat("a")
		time.Sleep(10*time.Second + forgetAfter)
		synctest.Wait()
		if len(r.workers.known) != 0 || !r.workers.next.IsZero() {
			t.Errorf("known %d, next %v", len(r.workers.known), r.workers.next)
		}
		r.readiness(lifecycle.RefusingTraffic, "0 of 1 workers ready")
	})
}

func TestTenThousandWorkers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, `{"workers": {"required": 1024}}`)
		r.run()
		const want = "{\n  \"error\": \"worker w1024: 1024 workers are known already, which is the most there may be: DELETE those that are gone\"\n}\n"
		for i := range 10_000 {
			w := r.ask(r.control, "PUT", fmt.Sprintf("/v1/workers/w%d", i), `{"state": "READY"}`)
			if accepted := w.Code == 200; accepted != (i < maxWorkers) {
				t.Fatalf("worker %d: %d %s", i, w.Code, w.Body)
			}
			if i == maxWorkers && (w.Code != 409 || w.Body.String() != want) {
				t.Errorf("got %d %q, want 409 %q", w.Code, w.Body, want)
			}
		}
		r.readiness(lifecycle.AcceptingTraffic, "")
		r.beat("w1000") // who is in may go on
		time.Sleep(9 * time.Second)
		r.beat("w1023")
		time.Sleep(time.Second)
		synctest.Wait()
		r.beat("late") // the silent make room
		if _, kept := r.workers.known["w1023"]; len(r.workers.known) != maxWorkers || !kept {
			t.Errorf("%d known, w1023 among them: %v", len(r.workers.known), kept)
		}
	})
}

func TestWorkersThatNobodyExpectsAreRefused(t *testing.T) {
	r := newRig(t, `{}`)
	w := r.ask(r.control, "PUT", "/v1/workers/a", `{"state": "READY"}`)
	if w.Code != 409 || !strings.Contains(w.Body.String(), "set health.workers") {
		t.Errorf("got %d %s", w.Code, w.Body)
	}
}

// One core at most a hundredth busy with the most workers, each heard every 3 s: 341 reports a second in 10 ms.
func BenchmarkHeartbeatsOfAllWorkers(b *testing.B) {
	r := newRig(b, `{"workers": {"required": 1024}}`)
	now := time.Now()
	for i := range maxWorkers {
		r.workers.report(fmt.Sprint(i), api.Worker{State: api.WorkerReady, Role: api.RoleWorker}, now)
	}
	for i := 0; b.Loop(); i++ {
		r.ask(r.control, "PUT", fmt.Sprintf("/v1/workers/%d", i%maxWorkers), `{"state": "READY"}`)
	}
}
