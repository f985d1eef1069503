// Package registry is Usher's side of etcd: it writes what one agent wants advertised, and reads what all of them wrote.
//
// The writing side ([Registrar]) is level-triggered. Whatever it is told last ([lifecycle.Desired]) it turns into keys
// and values, compares with what it knows to be there, and sends the difference as one transaction:
//
//	If   every key is as last seen (its mod revision; 0 when absent)
//	Then put and delete the difference, every put under the agent's one lease
//	Else read all the keys, decide who owns what, and try again
//
// So one mechanism covers the first registration, a change, lease loss, a key deleted by hand and a rival: nothing is
// written on top of a value that wasn't seen before.
//
// # The fence
//
// The ledger record (`/usher/v1/<cluster>/instances/<namespace>/<service>/<pod>`, [Record]) carries the owner: cluster,
// pod UID, lease, and an id drawn by each agent process. An agent takes over
//
//   - an absent record;
//   - a record of an older Pod of the same name (StatefulSet), told by the Pod's creation time;
//   - a record of its own Pod that another process wrote before (the agent's container restarted).
//
// While it isn't known yet how the instance is ([lifecycle.Instance].Keep), the last of these is left as it is and not
// taken over: it ends with its lease unless the first word comes sooner.
//
// An agent whose record was taken over by another one never writes again while that record is there; it only takes out
// the consumer records that are under its own lease. A value that is not a [Record], or a consumer key under a lease that
// is neither its own nor its predecessor's, belongs to somebody else: it is left alone and reported. While such a value
// stands in place of the ledger record, what is advertised already stays, nothing new is written, and a withdrawal still
// happens.
//
// # Beside the records
//
// Two more kinds of key are about one Pod, told by its UID, and each value is under a lease of its own:
//
//	/usher/v1/<cluster>/verdicts/<namespace>/<pod>/<pod-uid>   how its last shutdown ended ([Verdict])
//	/usher/v1/<cluster>/holds/<namespace>/<pod-uid>            that an operator holds it offline ([PutHold])
//
// A verdict is written once, after the records, and given up for any news of what is desired. It is there for 10 minutes
// unless told otherwise, whatever becomes of the agent. A hold ends at its time by the agent's clock, or when its key is
// gone. It is one of the keys that each transaction compares and that the registrar watches, so an agent that just started
// can't bring a held instance back, not even for a moment.
//
// Where etcd has users, an agent's needs reading and writing of /usher/v1/<cluster>/ and of its formats' prefixes.
//
// # Invariants
//
//  1. Nothing is ever put without a lease: an agent that dies takes its records with it, after one TTL.
//  2. All records of an instance change in one transaction.
//  3. A ready instance that is not in the registry is being retried, with jittered back-off, unless it is held.
//  4. No consumer record of a Pod is put while there is a hold on it, whatever is desired.
package registry
