// Package e2e tests Usher whole: the real agent in real pods, under the real kubelet, with clients of a real registry.
//
//	deploy/example/*.yaml -> API server -> kubelet -> pod: agent, sample application (dies at once on SIGTERM)
//	                                                        |              ^
//	       etcd <----- registers, withdraws ----------------+              | requests, fast and slow
//	         +------- watch -------> this process, load generator ---------+
//
// Every test has a namespace of its own, and its own keys in the registry. What it asserts is seen from outside: by a watch
// of the registry, by the clients, by the containers' logs, by Kubernetes.
//
// Tests that need a whole machine to themselves, because of their load or because they take a part of the cluster down, run
// first and one by one; the others run side by side, since most of their time is spent waiting.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"testing"

	"usher.dev/usher/integration/stack"
)

// sideBySide is how many tests with t.Parallel run at once, unless -parallel says otherwise: they wait more than they
// compute.
const sideBySide = "6"

// shared is brought up once for all tests.
var shared *stack.Stack

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 {
		fmt.Println("end-to-end tests left out: a real cluster needs root")
		if os.Getenv("CI") == "true" {
			fmt.Println("CI=true wants every test to run")
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	given := false
	flag.Visit(func(f *flag.Flag) { given = given || f.Name == "test.parallel" })
	if !given {
		if err := flag.Set("test.parallel", sideBySide); err != nil {
			panic(err)
		}
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	ctx := context.Background()
	var err error
	if shared, err = stack.Up(ctx, stack.Config{Progress: os.Stderr}); err != nil {
		fmt.Fprintln(os.Stderr, "bringing the cluster up:", err)
		return 1
	}
	code := m.Run()
	if err := shared.Down(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "taking the cluster down:", err)
		return 1
	}
	return code
}
