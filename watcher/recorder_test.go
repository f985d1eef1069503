package watcher

import (
	"context"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"k8s.io/apimachinery/pkg/runtime"
)

func record(t *testing.T, a *api) (*Recorder, func()) {
	t.Helper()
	r, err := NewRecorder(RecorderConfig{Namespace: "shop", Pod: "web-1", PodUID: "u1", Node: "n1", Client: a.client(runtime.ContentTypeProtobuf)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	return r, func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestEventsAreWrittenOnTheOwnPod(t *testing.T) {
	a := newAPI(t)
	r, stop := record(t, a)
	r.Event("Normal", "Registered", "as 10.0.0.1:8080")
	r.Event("Warning", "DrainTimedOut", strings.Repeat("x", 5000))
	stop() // what waits is written first
	if len(a.created) != 2 || r.Dropped() != 0 {
		t.Fatalf("%d written, %d dropped", len(a.created), r.Dropped())
	}
	e := a.created[0]
	if e.Reason != "Registered" || e.Type != "Normal" || e.Message != "as 10.0.0.1:8080" || e.Count != 1 || e.FirstTimestamp.IsZero() ||
		e.InvolvedObject.UID != "u1" || e.InvolvedObject.Kind != "Pod" || e.InvolvedObject.Name != "web-1" || e.InvolvedObject.Namespace != "shop" ||
		e.ReportingController != "usher.dev/usher-agent" || e.Source.Host != "n1" || e.Namespace != "shop" {
		t.Errorf("event is %+v", e)
	}
	if n := len(a.created[1].Message); n != maxMessage {
		t.Errorf("message of %d bytes", n)
	}
	if a.created[0].Name == a.created[1].Name {
		t.Error("both have one name")
	}
}

func TestEventsNeverBlockAndAreCountedWhenDropped(t *testing.T) {
	a := newAPI(t)
	a.down()
	r, stop := record(t, a)
	const n = 3 * recorderQueue
	for range n {
		r.Event("Normal", "Registered", "")
	}
	poll(t, "all dropped", func() bool { return r.Dropped() == n })
	a.up()
	r.Event("Normal", "Deregistered", "")
	stop()
	if len(a.created) != 1 || r.Dropped() != n {
		t.Errorf("%d written, %d dropped", len(a.created), r.Dropped())
	}
}

func TestEventsThatWaitAreWrittenAtTheEnd(t *testing.T) {
	a := newAPI(t)
	r, err := NewRecorder(RecorderConfig{Namespace: "shop", Pod: "web-1", Client: a.client(runtime.ContentTypeJSON)})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		r.Event("Normal", "Drained", "")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := r.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if len(a.created) != 5 {
		t.Errorf("%d written", len(a.created))
	}
}

func TestRecorderEndsInTimeWhenNobodyAnswers(t *testing.T) {
	a := newAPI(t)
	a.hold = make(chan struct{})
	a.holdCreate = true
	r, stop := record(t, a)
	for range 3 {
		r.Event("Normal", "Registered", "")
	}
	poll(t, "the first is under way", func() bool { return a.count("create events") == 1 })
	start := time.Now()
	stop()
	if d := time.Since(start); d > 4*time.Second {
		t.Errorf("took %v to end", d)
	}
	if r.Dropped() != 3 {
		t.Errorf("%d dropped, want 3", r.Dropped())
	}
}

func TestErrorsOfClientGoAreLowered(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	l := klogLogger(zap.New(core), zapcore.WarnLevel).WithName("reflector").WithValues("k", "v")
	l.Error(nil, "Failed to watch", "type", "Pod")
	l.Info("informed")
	l.V(1).Info("detail")
	l.V(4).Info("too much")
	var got []string
	for _, e := range logs.All() {
		got = append(got, e.Level.String()+" "+e.Message)
	}
	if s := strings.Join(got, ", "); s != "warn Failed to watch, info informed, debug detail" {
		t.Errorf("logged: %s", s)
	}
	if m := logs.All()[0].ContextMap(); m["k"] != "v" || m["type"] != "Pod" || logs.All()[0].LoggerName != "reflector" {
		t.Errorf("fields %v, logger %q", m, logs.All()[0].LoggerName)
	}
}
