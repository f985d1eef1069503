package inflight_test

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"

	"usher.dev/usher/drain/inflight"
)

// An application that counts all requests but its probes, and serves the count at /inflight.
func Example() {
	counter, err := inflight.New(inflight.Config{
		Skip: func(r *http.Request) bool { return r.URL.Path == "/healthz" },
	})
	if err != nil {
		log.Fatal(err)
	}
	arrived, release := make(chan struct{}), make(chan struct{})
	mux := http.NewServeMux()
	mux.Handle("/inflight", counter)
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {})
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-release
	})
	app := httptest.NewServer(counter.Middleware(mux))
	defer app.Close()

	count := func() {
		resp, err := http.Get(app.URL + "/inflight")
		if err != nil {
			log.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("in flight: %s", body)
	}
	count()
	go http.Get(app.URL + "/slow")
	<-arrived
	count()
	close(release)
	// Output:
	// in flight: 0
	// in flight: 1
}

// Work that is no request, a queue's job for instance, counts from Begin to its end.
func ExampleCounter_Begin() {
	counter, err := inflight.New(inflight.Config{})
	if err != nil {
		log.Fatal(err)
	}
	work := func() {
		defer counter.Begin()()
		fmt.Println("working:", counter.InFlight())
	}
	work()
	fmt.Println("done:", counter.InFlight())
	// Output:
	// working: 1
	// done: 0
}
