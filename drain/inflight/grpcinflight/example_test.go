package grpcinflight_test

import (
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"google.golang.org/grpc"

	"usher.dev/usher/drain/inflight"
	"usher.dev/usher/drain/inflight/grpcinflight"
)

// A gRPC server whose RPCs count, but for its health checks. The count is served over HTTP, on a port for the agent.
func Example() {
	counter, err := inflight.New(inflight.Config{})
	if err != nil {
		log.Fatal(err)
	}
	handler, err := grpcinflight.New(grpcinflight.Config{
		Counter: counter,
		Skip:    func(method string) bool { return strings.HasPrefix(method, "/grpc.health.v1.Health/") },
	})
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(grpc.StatsHandler(handler))
	defer server.Stop()

	forAgent := httptest.NewServer(counter) // in an application: http.ListenAndServe("127.0.0.1:8081", counter)
	defer forAgent.Close()
	resp, err := http.Get(forAgent.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	fmt.Println(resp.Status)
	// Output: 200 OK
}
