package catalog_test

import (
	"context"
	"fmt"
	"log"
	"os"

	"usher.dev/usher/registry"
)

// List what the ledger has of one Service, then follow it.
func Example() {
	conn := registry.Connection{Endpoints: []string{endpoint}}
	if err := conn.FromETCDCTL(os.Getenv); err != nil {
		log.Fatal(err)
	}
	cli, err := conn.Dial(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer cli.Close()
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	catalog := registry.NewCatalog(cli, "default")

	entries, err := catalog.List(ctx, "shop", "checkout")
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range entries {
		fmt.Println(e.Pod, e.Record.State, e.Record.Addresses)
	}
	for event, err := range catalog.Watch(ctx, "shop", "checkout") {
		switch {
		case err != nil:
			log.Print(err) // Watch goes on trying
		case event.Type == registry.Put:
			fmt.Println("put", event.Entry.Pod, event.Entry.Record.State)
		case event.Type == registry.Synced:
			stop() // an operator's program would go on
		}
	}
	// Output:
	// checkout-1 Online [10.0.0.1]
	// checkout-2 Draining [10.0.0.2]
	// put checkout-1 Online
	// put checkout-2 Draining
}

// Find out how the last shutdowns of a pod ended, also when it is gone.
func ExampleCatalog_Verdicts() {
	cli, err := registry.Connection{Endpoints: []string{endpoint}}.Dial(nil)
	if err != nil {
		log.Fatal(err)
	}
	defer cli.Close()
	verdicts, err := registry.NewCatalog(cli, "default").Verdicts(context.Background(), "shop", "checkout-0")
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range verdicts {
		if e.Err != nil {
			log.Print(e.Err)
			continue
		}
		v := e.Verdict
		fmt.Printf("%s: %s, withdrawn after %d ms\n", v.Pod, v.Message, v.WithdrawMs)
		for _, s := range v.Sources {
			fmt.Printf("%s saw at most %d requests at a time\n", s.Name, s.Peak)
		}
	}
	// Output:
	// checkout-0: drained in 1.2s, nothing in flight, withdrawn after 4 ms
	// sockdiag saw at most 17 requests at a time
}
