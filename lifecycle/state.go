package lifecycle

import "fmt"

// State is where an instance is in its life. The package comment has the diagram.
type State int

const (
	Pending  State = iota // its endpoint was never ready, or it isn't known yet how it is
	Online                // its endpoint is ready: advertised
	Offline               // it was online once, and isn't now; or an operator holds it
	Draining              // withdrawn, requests in flight are waited for
	Released              // drained, or out of time: SIGTERM may proceed
	Stopped               // the agent is done
)

var stateNames = [...]string{"Pending", "Online", "Offline", "Draining", "Released", "Stopped"}

// String is the name used in the ledger, in logs and in metrics.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("State(%d)", int(s))
	}
	return stateNames[s]
}

// States are all states, in order.
func States() []State { return []State{Pending, Online, Offline, Draining, Released, Stopped} }
