package rollout

import (
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"usher.dev/usher/integration/load"
)

// seen is a site that saw one pod deleted, which ended that long afterwards by its own log.
func seen(t *testing.T, after time.Duration) (*site, *pod) {
	t.Helper()
	s := &site{way: Way{Name: "usher", Ours: true}, pods: map[string]*pod{}, byIP: map[string]*pod{}}
	s.see(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "old", DeletionTimestamp: &metav1.Time{}},
		Status:     corev1.PodStatus{PodIP: "10.0.0.7"},
	}, false)
	p := s.pods["old"]
	end := p.deleted.Add(after).Format(time.RFC3339Nano)
	s.read(p, service, end+` {"time":"`+end+`","level":"INFO","msg":"dying at once","signal":"terminated","inFlight":2}`)
	return s, p
}

func TestAStopIsReadFromTheWatchTheLogAndTheAnswers(t *testing.T) {
	s, p := seen(t, ms(3000))
	s.result(load.Result{Pod: "old", Scheduled: p.deleted.Add(-ms(100)), Latency: ms(2100)})
	s.result(load.Result{Pod: "old", Scheduled: p.deleted, Latency: ms(1)})
	s.result(load.Result{Pod: "new", Scheduled: p.deleted, Latency: ms(2500)})
	got := s.stops([]*pod{p})[0]
	got.After = got.After.Round(time.Millisecond)
	if want := (Stop{Pod: "old", After: ms(3000), Needed: ms(2000), Owed: 2}); got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestAccountTellsEachLossOnceWithAllThatIsKnownOfItsPod(t *testing.T) {
	s, p := seen(t, ms(3000))
	turn := Turn{begun: p.deleted.Add(-ms(4000)), old: []*pod{p}}
	if got := s.account(Turn{begun: turn.begun}); got != "" {
		t.Errorf("nothing was lost, and yet: %s", got)
	}
	lost := load.Result{
		Protocol: load.HTTP, Kind: load.VerySlow, Instance: "10.0.0.7:8080", Scheduled: p.deleted.Add(-ms(250)), Latency: ms(3250),
		Class: load.EOF, Err: "the answer broke off",
	}
	s.result(lost)
	stray := lost
	stray.Instance, stray.Class = "", load.NoInstance
	s.result(stray)
	got := s.account(turn)
	for _, want := range []string{
		"pod old (10.0.0.7), deleted at ", "SIGTERM after 3.00 s, its requests needed 7.75 s, it owed 2 answers",
		"failed: http very-slow to 10.0.0.7:8080, sent at -0.250 s, failed at +3.000 s: eof: the answer broke off",
		`+3.000 s  shop   {"time":`,
		"failed at no pod that is known",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if got := s.account(turn); got != "" {
		t.Errorf("told twice: %s", got)
	}
}

func TestAccountTellsOfAPodThatLingered(t *testing.T) {
	s, p := seen(t, Most+ms(1))
	if got := s.account(Turn{old: []*pod{p}}); !strings.HasPrefix(got, "pod old") {
		t.Errorf("%q, want the pod", got)
	}
}
