// Package rollout counts what rolling updates lose, and how long pods linger, under one load and several ways of ending pods.
//
//	           patch               delete         preStop, SIGTERM
//	rollout ---------> Deployment ---------> pod <----------------- kubelet
//	   |                                      | ^
//	   |  deletion (watch), SIGTERM (log)     | | requests: open loop, closed loop, gRPC; one idle connection
//	   +<-------------------------------------+ +--- load <--- etcd <--- agent, or the application itself
//
// Every way has a namespace with a Deployment of its own, made from the example manifest, and the same application, which
// dies at once on SIGTERM. Bench gives them turns: one rollout each, then the next one each. Side by side they would share
// two cores, and the figures of one way would show what another one does; one way after the other, they would show how the
// machine changes in a quarter of an hour. Load goes to the way whose turn it is only, the other Deployments stand idle.
//
//	turn:   load begins .. lead .. patch .. last old pod has ended, new ones registered .. load ends .. last answers
//	                                                                                          next turn begins
//
// A pod's stop is held against what it was owed to: it is over when its last request is answered, and what SIGTERM comes
// later than that is waste.
//
//	deleted ............. last request done ..................... SIGTERM
//	   |<----- Needed ----------->|<--------- Beyond -------------->|
//	   |<------------------------ After --------------------------->|
package rollout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"usher.dev/usher/integration/load"
	"usher.dev/usher/integration/stack"
)

const (
	// replicas of each way's Deployment.
	replicas = 4
	// rate and workers are the load: 320 requests a second on schedule, and 24 clients that ask again when they are
	// answered, which adds some 150 a second.
	rate    = 320
	workers = 24
	// lead is how long the load is there before the patch. The first pod is deleted some 4 s after that, when the first
	// new one is ready: requests of all ages up to 8 s are in flight then.
	lead = 5 * time.Second
	// turnWithin bounds a rollout: four pods, each with its whole grace period of 30 s, and their starts.
	turnWithin = 4 * time.Minute
)

// Most is the time that SIGTERM may come after a pod's last answer: settle time or quiet period, and the kubelet's own.
const Most = 1500 * time.Millisecond

func mix() []load.Share {
	return []load.Share{{Kind: load.Fast, Weight: 95}, {Kind: load.Slow, Weight: 4}, {Kind: load.VerySlow, Weight: 1}}
}

// Config of Bench and Soak.
type Config struct {
	Stack *stack.Stack
	// Ways to compare, in the order of their turns. Soak is of Usher alone.
	Ways []Way
	// Rollouts of each way.
	Rollouts int
	// Progress gets a line for each step.
	Progress io.Writer
}

func (c Config) say(format string, args ...any) { fmt.Fprintf(c.Progress, format+"\n", args...) }

// tell shows the evidence of what went wrong, if anything did.
func (c Config) tell(s *site, t Turn) {
	if text := s.account(t); text != "" {
		c.say("%s", text)
	}
}

// Bench rolls the ways out in turns.
func Bench(ctx context.Context, cfg Config) (_ Report, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	sites := make([]*site, len(cfg.Ways))
	defer func() { err = errors.Join(err, removeAll(context.WithoutCancel(ctx), sites)) }()
	for i, way := range cfg.Ways {
		if sites[i], err = deploy(ctx, cfg.Stack, way); err != nil {
			return Report{}, err
		}
	}
	for _, s := range sites {
		cfg.say("waiting for %d pods: %s", replicas, s.way.Title)
		if err := s.until(ctx, turnWithin, s.settled); err != nil {
			return Report{}, err
		}
	}
	report := Report{Results: make([]Result, len(sites))}
	var answers sync.WaitGroup
	defer answers.Wait()
	for round := range cfg.Rollouts {
		for i, s := range sites {
			tr, err := s.send(ctx, stop)
			if err != nil {
				return Report{}, err
			}
			turn, err := s.rollOut(ctx, lead)
			stopped := time.Now()
			tr.stop()
			if err != nil {
				return Report{}, err
			}
			cfg.say("round %d of %d: %s: replaced in %s", round+1, cfg.Rollouts, s.way.Name, seconds(turn.Took))
			answers.Wait() // of the turn before, long since in
			answers.Go(func() {
				<-tr.ended
				turn.Load, turn.Sending = tr.report, stopped.Sub(tr.report.Started)
				turn.Stops = s.stops(turn.old)
				report.Results[i].Way = s.way
				report.Results[i].Turns = append(report.Results[i].Turns, turn)
				cfg.say("round %d of %d: %s: %s", round+1, cfg.Rollouts, s.way.Name, turn)
				if s.way.Ours {
					cfg.tell(s, turn)
				}
			})
		}
	}
	answers.Wait()
	if ctx.Err() != nil {
		return Report{}, context.Cause(ctx)
	}
	return report, nil
}
