// Command go follows what the Usher agent decides about this instance, and says that it is ready.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"usher.dev/usher/client"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := client.New(client.Config{Address: os.Getenv("USHER_AGENT")})
	if err != nil {
		log.Fatal(err)
	}
	report := func() { // until the agent has heard it
		for ctx.Err() == nil {
			err := c.SetReadiness(ctx, true, "caches are warm")
			if err == nil {
				return
			}
			log.Printf("%v, trying again", err)
			time.Sleep(time.Second)
		}
	}
	go report()
	working := false // on what nobody waits for: queues, timers
	for e, err := range c.Events(ctx) {
		if err != nil {
			log.Printf("%v, trying again", err)
			continue
		}
		if e.Missed {
			go report() // to an agent that was restarted
		}
		working = e.Type == client.EventOnline || working && e.Type != client.EventDraining
		fmt.Printf("%s: %s; background work: %t\n", e.Type, e.Cause, working)
	}
}
