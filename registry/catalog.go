package registry

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/lifecycle"
)

const (
	// catalogPage is how many records, of about a kilobyte each, one request reads.
	catalogPage = 500
	// catalogTimeout bounds one request of the Catalog.
	catalogTimeout = 5 * time.Second
	// catalogProbe is how often a watch asks etcd for its revision. The client reconnects silently, so only this tells
	// an outage from a quiet registry, and finds an etcd that lost its data: a watch there would wait for a revision
	// that is far away.
	catalogProbe = 5 * time.Second
	// catalogRetry is the wait after a failed attempt of a watch.
	catalogRetry = time.Second
	// txnOps stays below etcd's default limit of operations in a transaction (--max-txn-ops, 128).
	txnOps = 100
)

// Catalog reads the ledger, as operators do. All reads are linearizable.
type Catalog struct {
	cli     *clientv3.Client
	cluster string
}

// NewCatalog reads one cluster's ledger, or that of all clusters when cluster is empty. The client stays the caller's.
func NewCatalog(cli *clientv3.Client, cluster string) *Catalog {
	return &Catalog{cli: cli, cluster: cluster}
}

// Entry is one key of the ledger.
type Entry struct {
	Key string
	// Cluster, Namespace, Service and Pod are the key's. They are set as far as the key has them.
	Cluster, Namespace, Service, Pod string
	// Record is zero when Err is set.
	Record Record
	// Err says why the value is no ledger record. It wraps ErrNotARecord.
	Err error
	// Lease is the one that the key is under, whatever the record says. 0 is none.
	Lease LeaseID
	// ModRevision is etcd's revision of the last change.
	ModRevision int64
}

// List reads all entries of a Service, of a namespace (service empty), or of all namespaces (namespace empty), in the
// order of their keys and as of one revision. A value that is no record is an Entry with Err.
func (c *Catalog) List(ctx context.Context, namespace, service string) ([]Entry, error) {
	entries, _, err := c.list(ctx, namespace, service)
	return entries, err
}

func (c *Catalog) list(ctx context.Context, namespace, service string) ([]Entry, int64, error) {
	prefix := c.prefix(namespace, service)
	var entries []Entry
	rev, err := c.scan(ctx, prefix, catalogPage, func(first bool, kvs []*mvccpb.KeyValue) bool {
		if first {
			entries = nil
		}
		for _, kv := range kvs {
			if e, ok := c.entry(string(kv.Key), namespace, service); ok {
				e.fill(kv.Value, kv.Lease, kv.ModRevision)
				entries = append(entries, e)
			}
		}
		return true
	})
	if err != nil {
		return nil, 0, err
	}
	return entries, rev, nil
}

// scan hands over all keys under prefix in their order and as of one revision, at most limit at a time, until more is
// false. first says that they begin, or begin anew.
func (c *Catalog) scan(ctx context.Context, prefix string, limit int64, page func(first bool, kvs []*mvccpb.KeyValue) (more bool)) (rev int64, err error) {
	// Compaction may take the revision away between two pages. It happens every few minutes at most.
	for range 3 {
		rev, err := c.scanOnce(ctx, prefix, limit, page)
		if err == nil {
			return rev, nil
		}
		if !errors.Is(err, rpctypes.ErrCompacted) {
			return 0, fmt.Errorf("reading %s from etcd: %w", prefix, err)
		}
	}
	return 0, fmt.Errorf("reading %s from etcd: compacted faster than it could be read", prefix)
}

func (c *Catalog) scanOnce(ctx context.Context, prefix string, limit int64, page func(first bool, kvs []*mvccpb.KeyValue) bool) (rev int64, err error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for {
		resp, err := c.get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(rev))
		if err != nil {
			return 0, err
		}
		first := rev == 0
		if first {
			rev = resp.Header.Revision
		}
		if !page(first, resp.Kvs) || !resp.More {
			return rev, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (c *Catalog) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	return c.cli.Get(ctx, key, opts...)
}

// prefix is the shortest that holds what is asked for.
func (c *Catalog) prefix(namespace, service string) string {
	if c.cluster == "" {
		return Root
	}
	return InstancePrefix(c.cluster, namespace, service)
}

// entry takes a key apart, and says whether it is one that is asked for.
func (c *Catalog) entry(key, namespace, service string) (Entry, bool) {
	e := Entry{Key: key}
	if !c.cut(key, "instances", &e.Cluster, &e.Namespace, &e.Service, &e.Pod) {
		return Entry{}, false
	}
	return e, (namespace == "" || e.Namespace == namespace) && (service == "" || e.Service == service)
}

// cut takes a key of one kind apart as far as it goes, and says whether it is of that kind and of the Catalog's cluster.
func (c *Catalog) cut(key, kind string, cluster *string, fields ...*string) bool {
	name, rest, ok := strings.Cut(strings.TrimPrefix(key, Root), "/"+kind+"/")
	if !ok || strings.Contains(name, "/") || (c.cluster != "" && name != c.cluster) {
		return false
	}
	*cluster = name
	for i, part := range strings.SplitN(rest, "/", len(fields)) {
		*fields[i] = part
	}
	return true
}

func (e *Entry) fill(value []byte, lease, modRevision int64) {
	e.Record, e.Err = DecodeRecord(e.Key, value)
	e.Lease, e.ModRevision = LeaseID(lease), modRevision
}

// EventType says what an Event is about.
type EventType int

const (
	// Put: an entry is there, new or changed.
	Put EventType = iota
	// Delete: an entry is gone, taken away or its lease expired.
	Delete
	// Synced comes once, after the Puts of what was there at first.
	Synced
)

// Event is one change of the ledger.
type Event struct {
	Type EventType
	// Entry is how it is now; for Delete as it was last.
	Entry Entry
	// Old is how it was before; nil when it was not there.
	Old *Entry
}

// Watch yields a Put for everything that is there, then Synced, then each change, until ctx ends or the caller breaks.
// What List's arguments select is what they select here.
//
// An error means that the ledger can't be followed at the moment. Watch goes on trying by itself, so a caller that goes
// on ranging misses nothing in effect: what changed meanwhile comes out as the difference between before and after, each
// entry once, and changes that cancelled each other out don't show.
func (c *Catalog) Watch(ctx context.Context, namespace, service string) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		w := catalogWatch{Catalog: c, namespace: namespace, service: service, known: map[string]Entry{}, yield: yield}
		for {
			err := w.follow(ctx)
			if w.stopped || ctx.Err() != nil {
				return
			}
			if errors.Is(err, errRelist) {
				continue
			}
			if !yield(Event{}, err) {
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(catalogRetry):
			}
		}
	}
}

// errRelist ends a watch that can't go on from where it was, with nothing wrong.
var errRelist = errors.New("list again")

type catalogWatch struct {
	*Catalog
	namespace, service string
	known              map[string]Entry
	synced, stopped    bool
	yield              func(Event, error) bool
}

func (w *catalogWatch) emit(e Event) bool {
	w.stopped = w.stopped || !w.yield(e, nil)
	return !w.stopped
}

// follow lists, tells the difference, and watches from there on until something comes in between.
func (w *catalogWatch) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	entries, rev, err := w.list(ctx, w.namespace, w.service)
	if err != nil {
		return err
	}
	if !w.difference(entries) {
		return nil
	}
	if !w.synced {
		w.synced = true
		if !w.emit(Event{Type: Synced}) {
			return nil
		}
	}

	prefix := w.prefix(w.namespace, w.service)
	// Watch waits until the server has answered, for ever if need be.
	giveUp := time.AfterFunc(catalogTimeout, cancel)
	// Without a leader a member would go on serving a watch on which nothing ever comes.
	changes := w.cli.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix(), clientv3.WithRev(rev+1))
	if !giveUp.Stop() {
		return fmt.Errorf("watching %s in etcd: no answer within %s", prefix, catalogTimeout)
	}
	probe := time.NewTicker(catalogProbe)
	defer probe.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case resp, ok := <-changes:
			switch err := resp.Err(); {
			case !ok:
				return fmt.Errorf("watching %s in etcd: the watch ended", prefix)
			case errors.Is(err, rpctypes.ErrCompacted):
				return errRelist
			case err != nil:
				return fmt.Errorf("watching %s in etcd: %w", prefix, err)
			}
			rev = max(rev, resp.Header.Revision)
			for _, ev := range resp.Events {
				if !w.apply(ev) {
					return nil
				}
			}
		case <-probe.C:
			resp, err := w.get(ctx, prefix, clientv3.WithCountOnly(), clientv3.WithPrefix())
			if err != nil {
				return fmt.Errorf("watching %s in etcd: %w", prefix, err)
			}
			if resp.Header.Revision < rev {
				return errRelist
			}
		}
	}
}

// difference tells what a new list changes.
func (w *catalogWatch) difference(entries []Entry) bool {
	gone := maps.Clone(w.known)
	for _, e := range entries {
		delete(gone, e.Key)
		if !w.put(e) {
			return false
		}
	}
	for _, key := range slices.Sorted(maps.Keys(gone)) {
		if !w.delete(key) {
			return false
		}
	}
	return true
}

func (w *catalogWatch) apply(ev *clientv3.Event) bool {
	key := string(ev.Kv.Key)
	e, ok := w.entry(key, w.namespace, w.service)
	if !ok {
		return true
	}
	if ev.Type == clientv3.EventTypeDelete {
		return w.delete(key)
	}
	e.fill(ev.Kv.Value, ev.Kv.Lease, ev.Kv.ModRevision)
	return w.put(e)
}

func (w *catalogWatch) put(e Entry) bool {
	old, had := w.known[e.Key]
	if had && old.ModRevision == e.ModRevision {
		return true
	}
	w.known[e.Key] = e
	event := Event{Type: Put, Entry: e}
	if had {
		event.Old = &old
	}
	return w.emit(event)
}

func (w *catalogWatch) delete(key string) bool {
	old, had := w.known[key]
	if !had {
		return true
	}
	delete(w.known, key)
	return w.emit(Event{Type: Delete, Entry: old, Old: &old})
}

// Standing is what etcd really has of what an entry says.
type Standing struct {
	// TTL is what is left of the entry's lease. It is 0 when there is no such lease, or when it is about to end.
	TTL time.Duration
	// GrantedTTL is what a renewal sets TTL to. It is 0 when there is no such lease.
	GrantedTTL time.Duration
	Keys       []KeyStanding // of Record.Keys, in that order
}

// KeyStanding is one consumer key.
type KeyStanding struct {
	Key    string
	Exists bool
	Lease  LeaseID // 0 when it doesn't exist or has none
}

// Standing looks up the lease of an entry and the consumer keys that its record names.
func (c *Catalog) Standing(ctx context.Context, e Entry) (Standing, error) {
	ctx, cancel := context.WithTimeout(ctx, catalogTimeout)
	defer cancel()
	var s Standing
	if e.Lease != 0 {
		resp, err := c.cli.TimeToLive(ctx, clientv3.LeaseID(e.Lease))
		if err != nil {
			return Standing{}, fmt.Errorf("reading lease %s from etcd: %w", e.Lease, err)
		}
		s.TTL = time.Duration(max(resp.TTL, 0)) * time.Second
		s.GrantedTTL = time.Duration(resp.GrantedTTL) * time.Second
	}
	for keys := range slices.Chunk(e.Record.Keys, txnOps) {
		ops := make([]clientv3.Op, len(keys))
		for i, key := range keys {
			ops[i] = clientv3.OpGet(key) // WithKeysOnly would leave out the lease as well
		}
		resp, err := c.cli.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return Standing{}, fmt.Errorf("reading the consumer keys of %s from etcd: %w", e.Key, err)
		}
		for i, key := range keys {
			k := KeyStanding{Key: key}
			if kvs := resp.Responses[i].GetResponseRange().Kvs; len(kvs) > 0 {
				k.Exists, k.Lease = true, LeaseID(kvs[0].Lease)
			}
			s.Keys = append(s.Keys, k)
		}
	}
	return s, nil
}

// VerdictEntry is one verdict of the ledger.
type VerdictEntry struct {
	Key string
	// Cluster, Namespace, Pod and PodUID are the key's. They are set as far as the key has them.
	Cluster, Namespace, Pod, PodUID string
	// Verdict is zero when Err is set.
	Verdict Verdict
	// Err says why the value is no verdict. It wraps ErrNotARecord.
	Err error
	// Lease is the one that the key is under, whatever the value says. 0 is none.
	Lease LeaseID
}

// Verdicts reads the verdicts that are still kept: on all Pods of one name, of a namespace (pod empty), or of all
// namespaces (namespace empty). The newest is first, and what is no verdict last.
func (c *Catalog) Verdicts(ctx context.Context, namespace, pod string) ([]VerdictEntry, error) {
	prefix := Root
	if c.cluster != "" {
		prefix = VerdictPrefix(c.cluster, namespace, pod)
	}
	var entries []VerdictEntry
	_, err := c.scan(ctx, prefix, catalogPage, func(first bool, kvs []*mvccpb.KeyValue) bool {
		if first {
			entries = nil
		}
		for _, kv := range kvs {
			e := VerdictEntry{Key: string(kv.Key), Lease: LeaseID(kv.Lease)}
			if !c.cut(e.Key, "verdicts", &e.Cluster, &e.Namespace, &e.Pod, &e.PodUID) ||
				namespace != "" && e.Namespace != namespace || pod != "" && e.Pod != pod {
				continue
			}
			e.Verdict, e.Err = DecodeVerdict(e.Key, kv.Value)
			entries = append(entries, e)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(entries, func(a, b VerdictEntry) int { return b.Verdict.Released.Compare(a.Verdict.Released) })
	return entries, nil
}

// Hold reads the hold on a Pod; nil when there is none. A value that is no hold is an error that wraps ErrNotARecord. It
// needs a Catalog of one cluster.
func (c *Catalog) Hold(ctx context.Context, namespace, podUID string) (*lifecycle.Hold, error) {
	if err := checkPod(c.cluster, namespace, podUID); err != nil {
		return nil, fmt.Errorf("reading a hold: %w", err)
	}
	key := HoldKey(c.cluster, namespace, podUID)
	resp, err := c.get(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("reading %s from etcd: %w", key, err)
	}
	if len(resp.Kvs) == 0 {
		return nil, nil
	}
	h, err := DecodeHold(key, resp.Kvs[0].Value)
	if err != nil {
		return nil, err
	}
	return &h, nil
}
