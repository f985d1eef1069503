package registry_test

import (
	"slices"
	"strings"
	"testing"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

const rpcxKey = "/rpcx/api/tcp@10.0.0.1:8080"

// values are all values that a key ever had, "" for a deletion.
func (w *world) values(key string) []string {
	var out []string
	for _, ev := range w.history(key) {
		if string(ev.Kv.Key) == key {
			out = append(out, string(ev.Kv.Value))
		}
	}
	return out
}

func TestDrainingIsSaidBeforeTheRecordGoesWhereAFormatCan(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{formats: []format.Spec{{Type: "rpcx", Prefix: "/rpcx"}}})
	a.Set(a.desired(lifecycle.Draining, "pod terminating"))
	a.sync()
	if got := w.values(rpcxKey); len(got) != 3 || !strings.Contains(got[0], "state=active") || !strings.Contains(got[1], "state=inactive") || got[2] != "" {
		t.Errorf("rpcx record was %q in turn; want active, inactive, gone", got)
	}
	if got := w.values(key); !slices.Equal(got, []string{value, ""}) {
		t.Errorf("grpc record was %q in turn; want it there, then gone", got)
	}
	if rec := w.record(); rec.State != "Draining" || len(rec.Keys) != 0 {
		t.Errorf("ledger: %+v", rec)
	}
}

func TestInstanceThatNobodyKnowsIsNotBroughtInToSayThatItGoes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.start(spec{formats: []format.Spec{{Type: "rpcx", Prefix: "/rpcx"}}})
	a.Set(a.desired(lifecycle.Pending, "not ready"))
	a.sync()
	a.Set(a.desired(lifecycle.Draining, "pod terminating"))
	a.sync()
	if got := w.values(rpcxKey); len(got) != 0 {
		t.Errorf("rpcx record was %q in turn; want none ever", got)
	}
}

func TestAnnotationChangedOnTheRunningPodIsRepublished(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.registered(spec{formats: []format.Spec{{Type: "rpcx", Prefix: "/rpcx"}}})
	lease := w.get(rpcxKey).lease
	annotate := func(weight string) {
		d := a.desired(lifecycle.Online, "ready")
		d.Pod.Annotations = map[string]string{registry.AnnotationWeight: weight, registry.AnnotationVersion: "v2"}
		a.Set(d)
		a.sync()
	}
	annotate("30")
	if kv := w.get(rpcxKey); kv.lease != lease || kv.value != "state=active&version=v2&weight=30&zone=zone-1" {
		t.Errorf("after the annotation: %+v", kv)
	}
	if rec := w.record(); rec.Version != "v2" {
		t.Errorf("ledger: version %q, want v2", rec.Version)
	}
	annotate("heavy")
	if kv := w.get(rpcxKey); kv == nil || kv.value != "state=active&version=v2&zone=zone-1" {
		t.Errorf("with a bad weight: %+v; want the record without one", kv)
	}
	if st := a.status(); !strings.Contains(st.Err, registry.AnnotationWeight) || !strings.Contains(st.Err, "heavy") {
		t.Errorf("status says %q; want the annotation and its value", st.Err)
	}
	annotate("2000") // more than rpcx clients can take
	if kv := w.get(rpcxKey); kv == nil || kv.value != "state=active&version=v2&zone=zone-1" {
		t.Errorf("with a weight that the format refuses: %+v; want what was there before", kv)
	}
	if w.get(key) == nil {
		t.Error("the other format's record is gone")
	}
}
