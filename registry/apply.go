package registry

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry/format"
)

// maxRounds bounds the optimistic rounds of one attempt; one is repeated only because a key was not as last seen.
const maxRounds = 6

// plan is what is wanted of one Service's keys.
type plan struct {
	ledger  string
	record  Record            // without its Keys
	wanted  map[string]string // consumer records
	refused error             // of a format that can't write this instance
	keep    bool              // lifecycle.Instance.Keep
}

// apply makes etcd match d. A problem is what only others can mend (a foreign value, a rival, a rule that the instance
// breaks): around it, everything else has been written.
func (r *Registrar) apply(ctx context.Context, d lifecycle.Desired) (problem, err error) {
	if r.s.cli == nil {
		cli, err := r.cfg.Dial()
		if err != nil {
			return nil, fmt.Errorf("connecting to etcd: %w", err)
		}
		r.s.cli = cli
		r.client.Store(cli)
	}
	farewell := d.State == lifecycle.Draining
	for range maxRounds {
		if r.s.lease == 0 {
			if err := r.grant(ctx, d); err != nil {
				return nil, err
			}
		}
		plans, said, err := r.plans(d, farewell)
		if err != nil {
			return nil, err
		}
		keys := r.keys(plans)
		if r.s.stale {
			resp, err := r.commit(ctx, nil, gets(keys), nil)
			if err != nil {
				return nil, fmt.Errorf("reading from etcd: %w", err)
			}
			r.learn(resp.Responses, keys)
			r.s.stale = false
		}
		if r.lookAtHold() {
			continue
		}
		want, problem := r.arbitrate(plans)
		problem = errors.Join(problem, r.s.badHold)
		if r.s.stale { // a predecessor left keys that have not been read yet
			continue
		}
		ifs, then := r.diff(want)
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(r.holdKey), "=", r.s.known[r.holdKey].rev))
		if len(then) == 0 && !said {
			r.rewatch(keys)
			return problem, nil
		}
		resp, err := r.commit(ctx, ifs, then, gets(keys))
		switch {
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			r.loseLease()
			continue
		case errors.Is(err, rpctypes.ErrNoSpace) && said:
			farewell = false
			continue
		case errors.Is(err, rpctypes.ErrNoSpace):
			return nil, fmt.Errorf("writing to etcd: %w", errors.Join(err, r.onlyDelete(ctx, ifs, want)))
		case err != nil:
			r.s.stale = true // it may have been carried out all the same
			return nil, fmt.Errorf("writing to etcd: %w", err)
		case !resp.Succeeded:
			r.learn(resp.Responses, keys)
			continue
		}
		for key, value := range want {
			if value == nil {
				r.s.known[key] = known{}
			} else if kn := r.s.known[key]; kn.value != *value || kn.lease != r.s.lease {
				r.s.known[key] = known{resp.Header.Revision, *value, r.s.lease}
			}
		}
		for _, p := range plans {
			if want[p.ledger] != nil {
				r.s.held[p.ledger] = true
			}
		}
		if said {
			farewell = false // now the records go
			continue
		}
		r.rewatch(keys)
		return problem, nil
	}
	return nil, errors.New("the records change faster than they can be written")
}

// onlyDelete carries out what an etcd without space still does: an instance that is not ready must not stay advertised
// until somebody has made room.
func (r *Registrar) onlyDelete(ctx context.Context, ifs []clientv3.Cmp, want map[string]*string) error {
	var gone []string
	var deletes []clientv3.Op
	for key, value := range want {
		if value == nil {
			gone, deletes = append(gone, key), append(deletes, clientv3.OpDelete(key))
		}
	}
	r.s.stale = true
	if len(deletes) == 0 {
		return nil
	}
	resp, err := r.commit(ctx, ifs, deletes, nil)
	if err != nil {
		return fmt.Errorf("deleting from etcd: %w", err)
	}
	if resp.Succeeded {
		for _, key := range gone {
			r.s.known[key] = known{}
		}
	}
	return nil
}

func (r *Registrar) commit(ctx context.Context, ifs []clientv3.Cmp, then, otherwise []clientv3.Op) (*clientv3.TxnResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r.Counters.Transactions.Add(1)
	// A member that has lost the others says so at once, instead of holding the request until it times out.
	resp, err := r.s.cli.Txn(clientv3.WithRequireLeader(ctx)).If(ifs...).Then(then...).Else(otherwise...).Commit()
	if err == nil {
		if resp.Header.Revision < r.s.revision {
			r.unwatch() // etcd lost its data: the watch waits for a revision that is far off
		}
		r.s.revision = resp.Header.Revision
	}
	return resp, r.unanswered(err)
}

// unanswered adds to a missed deadline what is known of the connection: an etcd that can't be reached is another matter
// than one that is silent (connectivity READY).
func (r *Registrar) unanswered(err error) error {
	if !errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("no answer within %s from etcd at %s, connectivity %s: %w",
		requestTimeout, strings.Join(r.s.cli.Endpoints(), ","), r.s.cli.ActiveConnection().GetState(), err)
}

// plans says what d wants, Service by Service. With farewell, records of a draining instance that can say so are wanted
// once more, to say it; said tells whether there are any.
func (r *Registrar) plans(d lifecycle.Desired, farewell bool) (plans []plan, said bool, err error) {
	taken := map[string]string{}
	about, refused := r.cfg.Attributes.of(d.Pod)
	for _, in := range d.Instances {
		in.Advertise = in.Advertise && r.s.hold == nil
		p := plan{
			ledger:  InstanceKey(r.cfg.Cluster, r.cfg.Namespace, in.Service, r.cfg.Pod),
			wanted:  map[string]string{},
			refused: refused,
			keep:    in.Keep && r.s.hold == nil,
			record: Record{
				Owner:     r.owner(d, r.s.lease),
				Namespace: r.cfg.Namespace, Service: in.Service, Pod: r.cfg.Pod,
				Node: d.Pod.Node, Zone: in.Zone, Version: about.Version,
				State: d.State.String(), Since: d.Since, Cause: d.Cause,
			},
		}
		if d.Verdict != nil {
			p.record.Verdict = d.Verdict.Message()
		}
		fi := format.Instance{
			ID: r.cfg.PodUID, Namespace: r.cfg.Namespace, Service: in.Service, Addresses: in.Addresses,
			Weight: about.Weight, Version: about.Version, Zone: in.Zone, Metadata: about.Metadata, Draining: !in.Advertise,
		}
		for _, a := range in.Addresses {
			p.record.Addresses = append(p.record.Addresses, a.String())
		}
		for _, port := range in.Ports {
			p.record.Ports = append(p.record.Ports, Port{port.Name, port.Number, port.Protocol, port.AppProtocol})
			fi.Ports = append(fi.Ports, format.Port{Name: port.Name, Number: port.Number, Protocol: port.Protocol})
		}
		for _, f := range r.cfg.Formats[in.Service] {
			p.record.Formats = append(p.record.Formats, f.Name)
			if !in.Advertise && !(farewell && f.CanDrain()) {
				continue
			}
			recs, err := f.Records(fi)
			if err != nil {
				p.refused = errors.Join(p.refused, fmt.Errorf("service %s: %w", in.Service, err))
				// What consumers have stands: a slip in an annotation is no reason to take a ready instance from them.
				for key, kn := range r.s.known {
					if kn.rev != 0 && in.Advertise && strings.HasPrefix(key, f.Prefix()) {
						p.wanted[key] = kn.value
					}
				}
			}
			for _, rec := range recs {
				if by, ok := taken[rec.Key]; ok {
					return nil, false, fmt.Errorf("formats %s and %s both write key %s", by, f.Name, rec.Key)
				}
				taken[rec.Key] = f.Name
				if !in.Advertise {
					if r.s.known[rec.Key].rev == 0 {
						continue // nobody was told of it, so nobody has to be told of its end
					}
					said = true
				}
				p.wanted[rec.Key] = rec.Value
			}
		}
		plans = append(plans, p)
	}
	return plans, said, nil
}

func (r *Registrar) owner(d lifecycle.Desired, lease clientv3.LeaseID) Owner {
	return Owner{Cluster: r.cfg.Cluster, PodUID: r.cfg.PodUID, PodCreated: d.Pod.Created, Lease: LeaseID(lease), Agent: r.agent}
}

// keys are all keys that matter: those wanted, those known, and the hold.
func (r *Registrar) keys(plans []plan) []string {
	set := map[string]bool{}
	for k := range r.s.known {
		set[k] = true
	}
	for _, p := range plans {
		set[p.ledger] = true
		for k := range p.wanted {
			set[k] = true
		}
	}
	if len(set) > 0 {
		set[r.holdKey] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// arbitrate decides who owns what was last seen, and turns the plans into the value that each key should have; nil
// means deleted. Keys that are somebody else's are left out, and named in the problem.
func (r *Registrar) arbitrate(plans []plan) (want map[string]*string, problem error) {
	want = map[string]*string{}
	ours := maps.Clone(r.s.leases)
	frozen := map[string]bool{}
	for _, p := range plans {
		problem = errors.Join(problem, p.refused)
		before, err := r.claim(p)
		if err != nil {
			problem = errors.Join(problem, err)
			if errors.Is(err, ErrForeign) {
				// Without the ledger nothing is written, but what is advertised stays: a stranger's slip there is no
				// reason to take a ready instance from its consumers.
				for key := range p.wanted {
					frozen[key] = true
				}
			}
			continue
		}
		predecessor := clientv3.LeaseID(before.Owner.Lease)
		if before.Owner.PodUID == r.cfg.PodUID {
			ours[predecessor] = true
		}
		if p.keep && r.inherits(before) {
			// Not taken over either: under a lease that is renewed they would outlive what is known of the instance.
			r.s.inherited = predecessor
			frozen[p.ledger] = true
			for _, key := range before.Keys {
				frozen[key] = true
			}
			continue
		}
		for key, value := range p.wanted {
			if kn := r.s.known[key]; kn.rev != 0 && !ours[kn.lease] {
				problem = errors.Join(problem, fmt.Errorf("%w: key %s has a value under %s, which this agent never had; delete it to have the instance registered", ErrForeign, key, leaseText(kn.lease)))
				continue
			}
			want[key] = &value
			p.record.Keys = append(p.record.Keys, key)
		}
		slices.Sort(p.record.Keys)
		v, err := p.record.Encode()
		if err != nil {
			problem = errors.Join(problem, fmt.Errorf("encoding the ledger record: %w", err))
			continue
		}
		ledger := string(v)
		want[p.ledger] = &ledger
	}
	// What this process or its predecessor wrote and nobody wants any more goes. That holds beside a rival too: a lease
	// of ours is never a rival's.
	for key, kn := range r.s.known {
		if _, ok := want[key]; !ok && !frozen[key] && kn.rev != 0 && ours[kn.lease] {
			want[key] = nil
		}
	}
	return want, problem
}

// inherits says whether consumers find the instance by what another agent of this Pod left.
func (r *Registrar) inherits(before Record) bool {
	if before.Owner.PodUID != r.cfg.PodUID || before.Owner.Agent == r.agent {
		return false
	}
	return slices.ContainsFunc(before.Keys, func(key string) bool {
		kn := r.s.known[key]
		return kn.rev != 0 && kn.lease == clientv3.LeaseID(before.Owner.Lease)
	})
}

// claim says whether the ledger key of p may be written, and what is there.
func (r *Registrar) claim(p plan) (before Record, err error) {
	kn := r.s.known[p.ledger]
	if kn.rev == 0 {
		return Record{}, nil
	}
	rec, err := DecodeRecord(p.ledger, []byte(kn.value))
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w; delete it to have the instance registered", ErrForeign, err)
	}
	switch mine := p.record.Owner; {
	case rec.Owner.Agent == r.agent:
	case rec.Owner.PodUID != mine.PodUID && rec.Owner.PodCreated.After(mine.PodCreated):
		return Record{}, fmt.Errorf("%w: key %s belongs to a newer Pod of this name, UID %s", ErrSuperseded, p.ledger, rec.Owner.PodUID)
	case r.s.held[p.ledger]:
		return Record{}, fmt.Errorf("%w: key %s was taken over by agent %s of Pod UID %s", ErrSuperseded, p.ledger, rec.Owner.Agent, rec.Owner.PodUID)
	case rec.Owner.PodUID == mine.PodUID:
		for _, key := range rec.Keys {
			if _, ok := r.s.known[key]; !ok {
				r.s.known[key] = known{}
				r.s.stale = true
			}
		}
	}
	return rec, nil
}

// diff is the transaction that turns what is known into what is wanted.
func (r *Registrar) diff(want map[string]*string) (ifs []clientv3.Cmp, then []clientv3.Op) {
	for _, key := range slices.Sorted(maps.Keys(want)) {
		value, kn := want[key], r.s.known[key]
		ifs = append(ifs, clientv3.Compare(clientv3.ModRevision(key), "=", kn.rev))
		switch {
		case value == nil:
			then = append(then, clientv3.OpDelete(key))
		case kn.rev == 0 || kn.value != *value || kn.lease != r.s.lease:
			then = append(then, clientv3.OpPut(key, *value, clientv3.WithLease(r.s.lease)))
		}
	}
	return ifs, then
}

func gets(keys []string) []clientv3.Op {
	ops := make([]clientv3.Op, len(keys))
	for i, k := range keys {
		ops[i] = clientv3.OpGet(k)
	}
	return ops
}

// learn takes over what gets answered.
func (r *Registrar) learn(responses []*etcdserverpb.ResponseOp, keys []string) {
	r.s.known = make(map[string]known, len(keys))
	for i, resp := range responses {
		kn := known{}
		if kvs := resp.GetResponseRange().Kvs; len(kvs) > 0 {
			kn = known{kvs[0].ModRevision, string(kvs[0].Value), clientv3.LeaseID(kvs[0].Lease)}
		}
		r.s.known[keys[i]] = kn
	}
}

func isLedger(key string) bool { return strings.HasPrefix(key, Root) }

func leaseText(l clientv3.LeaseID) string {
	if l == 0 {
		return "no lease"
	}
	return "lease " + LeaseID(l).String()
}
