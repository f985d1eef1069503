package client_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"time"

	"usher.dev/usher/client"
	"usher.dev/usher/notify"
)

// An application that stops taking background work as soon as its shutdown begins, long before SIGTERM.
func ExampleClient_Events() {
	agent := notify.NewHub() // stands for the agent here
	server := httptest.NewServer(agent)
	defer server.Close()
	defer agent.Close()
	agent.Publish(client.Event{Type: client.EventOnline, State: "Online", Cause: "endpoint ready in service api"})

	c, err := client.New(client.Config{Address: server.URL})
	if err != nil {
		fmt.Println(err)
		return
	}
	for e, err := range c.Events(context.Background()) {
		if err != nil {
			fmt.Println(err) // the agent can't be reached; the loop goes on when it can
			continue
		}
		fmt.Printf("%s: %s\n", e.Type, e.Cause)
		switch e.Type {
		case client.EventOnline:
			agent.Publish(client.Event{Type: client.EventDraining, State: "Draining", Cause: "prestop hook"})
		case client.EventDraining:
			fmt.Println("no more background work")
			return
		}
	}
	// Output:
	// online: endpoint ready in service api
	// draining: prestop hook
	// no more background work
}

// One worker process of several says how it is for as long as it runs.
func ExampleClient_Worker() {
	c, err := client.New(client.Config{Address: os.Getenv("USHER_AGENT")})
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, leave := context.WithTimeout(context.Background(), time.Minute)
	defer leave()
	var queue []string
	err = c.Worker(ctx, fmt.Sprintf("worker-%d", os.Getpid()), func() client.Worker {
		if len(queue) > 1000 {
			return client.Worker{State: client.WorkerNotReady, Cause: "queue is full"}
		}
		return client.Worker{State: client.WorkerReady}
	})
	if err != nil {
		fmt.Println(err) // the agent knows no such worker
	}
}

// A service that the application can do without is asked for, and done without.
func ExampleClient_Health() {
	agent := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { // stands for the agent here
		fmt.Fprintln(w, `{"status": "DEGRADED"}`)
	}))
	defer agent.Close()

	c, err := client.New(client.Config{Address: agent.URL})
	if err != nil {
		fmt.Println(err)
		return
	}
	reviews, err := c.Health(context.Background(), "reviews")
	switch {
	case err != nil:
		fmt.Println(err)
	case reviews.Status == client.HealthUp:
		fmt.Println("reviews are shown")
	default:
		fmt.Println("reviews are", reviews.Status, "and left out")
	}
	// Output: reviews are DEGRADED and left out
}
