package cluster_test

import (
	"context"
	"fmt"
	"os"

	"usher.dev/usher/integration/cluster"
)

func Example() {
	ctx := context.Background()
	c, err := cluster.Up(ctx, cluster.Config{Progress: os.Stderr})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer c.Down(ctx)
	err = c.Load(ctx, cluster.Image{
		Name:       "usher-agent:dev",
		Files:      map[string]string{"/usher-agent": "../bin/usher-agent", "/usher-prestop": "../bin/usher-prestop"},
		Entrypoint: []string{"/usher-agent"},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	fmt.Println("kubectl --kubeconfig", c.Kubeconfig(), "get pods")
	fmt.Println("etcdctl --endpoints", c.RegistryEndpoint(), "get --prefix /")
}
