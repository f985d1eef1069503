package lifecycle

import "time"

// RegistryStatus is how the registry stands against what was last set.
type RegistryStatus struct {
	InSync     bool
	Advertised bool // consumer records exist
	// Inherited says that these records are those of an agent before this one, under its lease, left as they are.
	Inherited bool
	Lease     string
	Keys      []string // that exist under the lease
	Err       string   // what keeps it from being in sync
	Updated   time.Time
}
