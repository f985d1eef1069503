package drain_test

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"time"

	"usher.dev/usher/drain"
)

// A server that has been taken out of service waits for its last request, as far as its own count tells, and no longer. On a
// real one the source would be a Sockdiag, which needs nothing of the application.
func Example() {
	var inFlight atomic.Int64
	inFlight.Store(1)
	app := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, inFlight.Load())
	}))
	defer app.Close()

	source, err := drain.NewHTTP(drain.HTTPConfig{URL: app.URL})
	if err != nil {
		log.Fatal(err)
	}
	drainer, err := drain.New(drain.Config{Sources: []drain.Source{source}, Quiet: 50 * time.Millisecond, Interval: 10 * time.Millisecond})
	if err != nil {
		log.Fatal(err)
	}
	time.AfterFunc(100*time.Millisecond, func() { inFlight.Store(0) }) // the last answer

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // SIGTERM must come by then
	defer cancel()
	settled := time.Now().Add(20 * time.Millisecond) // consumers have heard by then
	result := drainer.Wait(ctx, settled)
	fmt.Println(result.Outcome, result.InFlight)
	// Output: quiet 0
}

// A source of one's own: whatever knows how many requests are not answered yet.
func ExampleSource() {
	drainer, err := drain.New(drain.Config{Sources: []drain.Source{&queue{jobs: 3}}, Quiet: 50 * time.Millisecond})
	if err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	result := drainer.Wait(ctx, time.Now())
	fmt.Println(result.Outcome, result.InFlight)
	for _, s := range result.Sources {
		fmt.Println(s.Name, "had", s.Peak)
	}
	// Output:
	// quiet 0
	// queue had 3
}

// queue stands for a broker's queue: a job is done between any two looks at it.
type queue struct{ jobs int }

func (*queue) Name() string { return "queue" }

func (q *queue) Sample(context.Context) (drain.Sample, error) {
	defer func() { q.jobs = max(q.jobs-1, 0) }()
	return drain.Sample{InFlight: q.jobs}, nil
}
