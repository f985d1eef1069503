package lifecycle

import (
	"fmt"
	"strings"
)

// Phase is how far a shutdown is.
type Phase int

const (
	NotStopping  Phase = iota
	StopUnderWay       // withdrawn or about to be, requests in flight are waited for
	StopReleased       // SIGTERM may proceed
	StopForGood        // and has reached the agent: no way back online
)

// Inputs are all that Decide looks at.
type Inputs struct {
	Observation
	Phase     Phase
	StopCause string // what began the shutdown that Phase is of
	WasOnline bool   // tells Offline from Pending
}

// Decision is what should be, and why.
type Decision struct {
	State     State
	Cause     string
	Advertise []bool // by Service, as in Observation.Endpoints
}

// Decide is a pure function from what is seen and what is under way to what should be.
func Decide(in Inputs) Decision {
	d := Decision{Advertise: make([]bool, len(in.Endpoints)), Cause: in.StopCause}
	switch in.Phase {
	case StopUnderWay:
		d.State = Draining
		return d
	case StopReleased:
		d.State = Released
		return d
	case StopForGood:
		d.State, d.Cause = Stopped, CauseSignal
		return d
	}
	switch {
	case !in.Pod.Known: // the registry's fence needs the Pod's creation time
		d.State, d.Cause = offline(in.WasOnline), "own Pod not seen yet"
		return d
	case in.Pod.Gone:
		d.State, d.Cause = offline(in.WasOnline), "own Pod is gone"
		return d
	}
	var up, down []string
	for i, e := range in.Endpoints {
		switch {
		case !e.Found:
			down = append(down, fmt.Sprintf("no endpoint in service %s", e.Service))
		case e.Terminating: // ready stays true with publishNotReadyAddresses
			down = append(down, fmt.Sprintf("endpoint terminating in service %s", e.Service))
		case !e.Ready:
			down = append(down, fmt.Sprintf("endpoint not ready in service %s", e.Service))
		default:
			d.Advertise[i] = true
			up = append(up, fmt.Sprintf("endpoint ready in service %s", e.Service))
		}
	}
	if len(up) > 0 {
		d.State, d.Cause = Online, strings.Join(append(up, down...), ", ")
	} else {
		d.State, d.Cause = offline(in.WasOnline), strings.Join(down, ", ")
	}
	return d
}

func offline(wasOnline bool) State {
	if wasOnline {
		return Offline
	}
	return Pending
}

// desire turns a decision into what the registry should say.
func desire(o Observation, d Decision) Desired {
	want := Desired{State: d.State, Cause: d.Cause, Pod: o.Pod}
	if !o.Pod.Known {
		return want
	}
	for i, e := range o.Endpoints {
		in := Instance{Service: e.Service, Advertise: d.Advertise[i], Addresses: e.Addresses, Ports: e.Ports, Zone: e.Zone}
		if len(in.Addresses) == 0 {
			in.Addresses = o.Pod.IPs
		}
		want.Instances = append(want.Instances, in)
	}
	return want
}
