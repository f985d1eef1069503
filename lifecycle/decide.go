package lifecycle

import (
	"fmt"
	"slices"
	"strings"
)

// Phase is how far a shutdown is.
type Phase int

const (
	NotStopping  Phase = iota
	StopGuarded        // under way, and still advertised for the sake of the service
	StopUnderWay       // withdrawn or about to be, requests in flight are waited for
	StopReleased       // SIGTERM may proceed
	StopForGood        // and has reached the agent: no way back online
)

// Inputs are all that Decide looks at.
type Inputs struct {
	Observation
	Availability Availability
	Hold         *Hold // nil without one
	Phase        Phase
	StopCause    string // what began the shutdown that Phase is of
	WasOnline    bool   // tells Offline from Pending
}

// Decision is what should be, and why.
type Decision struct {
	State     State
	Cause     string
	Advertise []bool // by Service, as in Observation.Endpoints
	Keep      []bool // likewise, and never both; Instance.Keep has the meaning
}

// Decide is a pure function from what is seen and what is under way to what should be.
func Decide(in Inputs) Decision {
	d := Decision{Advertise: make([]bool, len(in.Endpoints)), Keep: make([]bool, len(in.Endpoints)), Cause: in.StopCause}
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
	case StopGuarded:
		in.guard()
	}
	switch {
	case !in.Pod.Known: // the registry's fence needs the Pod's creation time
		d.State, d.Cause = offline(in.WasOnline), "own Pod not seen yet"
		return d
	case in.Pod.Gone:
		d.State, d.Cause = offline(in.WasOnline), "own Pod is gone"
		return d
	}
	if in.Hold != nil {
		d.State, d.Cause = Offline, in.Hold.String() // whether this agent saw it online or one before
		return d
	}
	refusal, refusing := in.Availability.Refusing()
	if refusing && !in.Availability.Undecided {
		d.State, d.Cause = offline(in.WasOnline), refusal
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
			d.Advertise[i], d.Keep[i] = !refusing, refusing
			up = append(up, fmt.Sprintf("endpoint ready in service %s", e.Service))
		}
	}
	switch {
	case refusing && len(up) > 0:
		d.State, d.Cause = Pending, refusal
	case refusing:
		d.State, d.Cause = offline(in.WasOnline), refusal
	case len(up) > 0 && in.Phase == StopGuarded:
		d.State, d.Cause = Online, in.StopCause+", waiting for other instances"
	case len(up) > 0:
		d.State, d.Cause = Online, strings.Join(append(up, down...), ", ")
	default:
		d.State, d.Cause = offline(in.WasOnline), strings.Join(down, ", ")
	}
	return d
}

// guard makes the endpoints count as what they are for whoever has their address: a terminating endpoint is never ready,
// and serving as long as the application says that it is.
func (in *Inputs) guard() {
	in.Endpoints = slices.Clone(in.Endpoints)
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		e.Ready, e.Terminating = e.Ready || e.Serving, false
	}
}

func (d Decision) advertised() bool { return slices.Contains(d.Advertise, true) }

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
		in := Instance{Service: e.Service, Advertise: d.Advertise[i], Keep: d.Keep[i], Addresses: e.Addresses, Ports: e.Ports, Zone: e.Zone}
		if len(in.Addresses) == 0 {
			in.Addresses = o.Pod.IPs
		}
		want.Instances = append(want.Instances, in)
	}
	return want
}
