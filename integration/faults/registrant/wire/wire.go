// Package wire is what a registrant prints.
package wire

import "time"

// Line is a request that etcd answered (Request is set), or else a change of one instance's status.
type Line struct {
	At      time.Time
	Request string `json:",omitempty"` // txn or grant

	UID                string   `json:",omitempty"`
	InSync, Advertised bool     `json:",omitempty"`
	Lease              string   `json:",omitempty"`
	Keys               []string `json:",omitempty"`
	Err                string   `json:",omitempty"`
}
