package bench

import (
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

func TestPeakIsTheFullestWindowWhereverItBegins(t *testing.T) {
	begun := time.Now()
	at := func(ms ...int) (out []time.Time) {
		for _, m := range ms {
			out = append(out, begun.Add(time.Duration(m)*time.Millisecond))
		}
		return out
	}
	for _, c := range []struct {
		name  string
		times []time.Time
		want  int
	}{
		{"none", nil, 0},
		{"apart", at(0, 100, 200), 1},
		{"over a round hundred", at(0, 90, 95, 105, 110, 300), 4},
		{"unsorted", at(300, 50, 0, 20), 3},
	} {
		if got := peak(c.times, 100*time.Millisecond); got != c.want {
			t.Errorf("%s: got %d, want %d", c.name, got, c.want)
		}
	}
}

func TestWrittenCountsWhatChangesAndNotWhatIsRead(t *testing.T) {
	ops := []clientv3.Op{clientv3.OpPut("key", "value"), clientv3.OpDelete("gone"), clientv3.OpGet("not counted")}
	if got, want := written(ops), len("key")+len("value")+len("gone"); got != want {
		t.Errorf("got %d, want %d", got, want)
	}
}

func TestStepsAreSummedUpInALastRow(t *testing.T) {
	var got []float64
	for _, row := range stepRows([]step{{"start", 1, 400}, {"online", 2, 500}}) {
		got = append(got, row.Ours.Median)
	}
	if want := []float64{1, 400, 2, 500, 3, 900}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestOnlyOnePartIsWanted(t *testing.T) {
	for only, want := range map[string][]string{"": {Latency, Sidecars, Registry}, Registry: {Registry}} {
		var got []string
		for _, part := range []string{Latency, Sidecars, Registry} {
			if (Config{Only: only}).Wants(part) {
				got = append(got, part)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("--only %q: got %v, want %v", only, got, want)
		}
	}
}
