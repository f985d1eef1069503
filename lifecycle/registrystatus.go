package lifecycle

import "time"

// RegistryStatus is how the registry stands against what was last set.
type RegistryStatus struct {
	InSync     bool
	Advertised bool // consumer records exist
	Lease      string
	Keys       []string // that exist under the lease
	Err        string   // what keeps it from being in sync
	Updated    time.Time
}
