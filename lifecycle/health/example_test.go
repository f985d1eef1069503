package health_test

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"usher.dev/usher/lifecycle/health"
)

// An application says that it takes no requests right now; the kubelet's probe of the group readiness fails at once. Why is
// shown to authorized callers only.
func Example() {
	h, err := health.New(health.Config{})
	if err != nil {
		log.Fatal(err)
	}
	hook, control := http.NewServeMux(), http.NewServeMux()
	h.Routes(hook, control)
	forKubelet, forApplication := httptest.NewServer(hook), httptest.NewServer(control)
	defer forKubelet.Close()
	defer forApplication.Close()

	put, err := http.NewRequest(http.MethodPut, forApplication.URL+"/v1/availability/readiness",
		strings.NewReader(`{"state":"REFUSING_TRAFFIC","cause":"rebuilding the cache"}`))
	if err != nil {
		log.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(put)
	if err != nil {
		log.Fatal(err)
	}
	answer.Body.Close()

	if answer, err = http.Get(forKubelet.URL + "/health/readiness?verbose"); err != nil {
		log.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(answer.Status)
	fmt.Printf("%s", body)
	// Output:
	// 503 Service Unavailable
	// [+]lifecycle ok
	// [-]readinessState failed: reason withheld
	// readiness check failed
}
