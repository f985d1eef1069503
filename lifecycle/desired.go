package lifecycle

import (
	"context"
	"net/netip"
	"time"
)

// Desired is what the registry should say of this instance. It is immutable once handed over.
type Desired struct {
	State State
	Cause string
	Since time.Time
	Pod   Pod
	// Instances has one entry for each Service; empty until the own Pod is known.
	Instances []Instance
	// Verdict is set from Released on.
	Verdict *Verdict
}

// Instance is the pod as one Service's instance.
type Instance struct {
	Service   string
	Advertise bool // consumers should find it
	// Keep says that it isn't known yet whether they should: nothing is put, and what an agent before this one put stays as
	// it is, under the lease that nobody renews any more.
	Keep      bool
	Addresses []netip.Addr
	Ports     []Port
	Zone      string
}

// Advertised says whether any Service should advertise the instance.
func (d Desired) Advertised() bool {
	for _, i := range d.Instances {
		if i.Advertise {
			return true
		}
	}
	return false
}

// Registrar makes the registry match what it was told last, whatever happens in between.
type Registrar interface {
	// Set replaces what is desired. It never blocks.
	Set(Desired)
	// Sync waits until the registry matches what was last set. When ctx ends first, the error says what kept it; a
	// registry that matches already is no error, even if ctx has ended.
	Sync(ctx context.Context) error
}

// Drainer waits until nothing is in flight.
type Drainer interface {
	// Wait returns once no request has been in flight for the quiet period, not before settled, and at the latest when
	// ctx ends.
	Wait(ctx context.Context, settled time.Time) DrainResult
}

// Guard knows whether the service can do without this instance.
type Guard interface {
	// Wait returns once enough other instances are there. When ctx ends first, the error says how many there were.
	Wait(ctx context.Context) error
}

// Announcer tells the application what is decided about it.
type Announcer interface {
	// Announced waits until all that was decided so far has been told. When ctx ends first, the error says who has not
	// been told.
	Announced(ctx context.Context) error
}
