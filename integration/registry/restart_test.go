package registry_test

import (
	"testing"
	"time"

	"usher.dev/usher/lifecycle"
)

// undecided is what an agent desires that has heard nothing of its application yet.
func (a *agent) undecided() {
	d := a.desired(lifecycle.Pending, "readiness probe has not succeeded yet")
	for i := range d.Instances {
		d.Instances[i].Keep = true
	}
	a.Set(d)
}

// inherited restarts the agent of a registered instance with SIGKILL, and waits until the new one has found what is there.
func (w *world) inherited(s spec) (before, now *agent, record *mvcc) {
	w.t.Helper()
	before = w.registered(s)
	record = w.get(key)
	before.kill()
	now = w.start(s)
	now.undecided()
	now.sync()
	return before, now, record
}

func TestUndecidedInstanceStaysAsItsLastAgentLeftIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before, a, record := w.inherited(spec{})
	ledgerWas := *w.get(ledger)
	if st := a.status(); !st.InSync || !st.Advertised || !st.Inherited || st.Lease != before.status().Lease || len(st.Keys) != 2 {
		t.Errorf("status %+v, want the records under lease %s", st, before.status().Lease)
	}
	a.undecided() // and looking again changes nothing
	a.sync()
	if got := w.get(key); got == nil || *got != *record || *w.get(ledger) != ledgerWas {
		t.Errorf("record %+v became %+v, ledger %+v became %+v", record, got, ledgerWas, w.get(ledger))
	}
	a.online("ready")
	a.sync()
	a.advertised()
	if st := a.status(); st.Inherited || st.Lease == before.status().Lease {
		t.Errorf("status %+v, want it taken over", st)
	}
	if n, m := w.count(key, "DELETE"), w.count(ledger, "DELETE"); n+m != 0 {
		t.Errorf("deleted %d times, the ledger record %d times; want a restart without a gap", n, m)
	}
}

func TestUndecidedInstanceIsTakenOutAtTheFirstWordAgainstIt(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, a, _ := w.inherited(spec{})
	a.offline("readiness probe failed")
	a.sync()
	if kv := w.get(key); kv != nil {
		t.Errorf("still there: %+v", kv)
	}
	if rec := w.record(); rec.State != "Offline" || rec.Owner.Lease.String() != a.status().Lease || len(rec.Keys) != 0 {
		t.Errorf("ledger %+v", rec)
	}
	if st := a.status(); st.Advertised || st.Inherited {
		t.Errorf("status %+v", st)
	}
}

// Nobody renews the lease of an agent that is gone: who knows nothing doesn't keep a ghost alive.
func TestUndecidedInstanceGoesWithTheLeaseOfItsLastAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, a, _ := w.inherited(spec{ttl: 3 * time.Second})
	eventually(t, "the record is gone", func() bool { return w.get(key) == nil })
	eventually(t, "the ledger says how it stands", func() bool {
		rec := w.record()
		return rec.State == "Pending" && rec.Owner.Lease.String() == a.status().Lease && !a.status().Advertised
	})
	a.online("ready")
	a.advertised()
}

func TestUndecidedInstanceThatNobodyRegisteredIsNotRegistered(t *testing.T) {
	for name, before := range map[string]func(*world){
		"before":                func(*world) {},
		"by the last agent":     func(w *world) { a := w.start(spec{}); a.offline("not ready"); a.sync(); a.kill() },
		"for the Pod before it": func(w *world) { w.registered(spec{uid: "uid-0", created: created.Add(-time.Hour)}).kill() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			before(w)
			a := w.start(spec{})
			a.undecided()
			a.sync()
			if rec := w.record(); rec.State != "Pending" || rec.Owner.PodUID != uid || len(rec.Keys) != 0 || rec.Owner.Lease.String() != a.status().Lease {
				t.Errorf("ledger %+v, want it to say why", rec)
			}
			a.online("ready")
			a.advertised()
			puts := 0
			for _, ev := range w.history(key) {
				if leaseOf(ev) != a.status().Lease {
					t.Errorf("revision %d: %s under lease %s", ev.Kv.ModRevision, ev.Type, leaseOf(ev))
				}
				puts++
			}
			if puts != 1 {
				t.Errorf("%d changes of the record, want it put once", puts)
			}
		})
	}
}

func TestHoldTakesAnUndecidedInstanceOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	_, a, _ := w.inherited(spec{ttl: time.Minute})
	w.hold(lifecycle.Hold{Reason: "broken disk"})
	a.isTold(1, "broken disk")
	eventually(t, "it is withdrawn", func() bool { return w.get(key) == nil })
}
