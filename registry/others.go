package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/lifecycle"
)

const (
	// othersPage is how many records WaitOthers reads at a time: about 70 kB, which is more than enough where few others
	// are asked for.
	othersPage = 100
	// othersRetry is the longest pause after a failure to read or watch.
	othersRetry = time.Second
)

// Others counts the other instances of a Service that are advertised now: records of other Pods, in the state Online and
// with consumer keys. One that died counts until its lease ends. It reads every record of the Service, about 0.7 kB each.
func (r *Registrar) Others(ctx context.Context, service string) (int, error) {
	cli := r.client.Load()
	if cli == nil {
		return 0, fmt.Errorf("counting the instances of service %s: %w", service, ErrNotConnected)
	}
	c := r.census(cli, service)
	if err := c.read(ctx, catalogPage, 0); err != nil {
		return 0, fmt.Errorf("counting the instances of service %s: %w", service, err)
	}
	return len(c.online), nil
}

// WaitOthers returns once each Service that should advertise this instance has at least least others, as Others counts.
// Services without a format have no consumers and don't count. When ctx ends first, the error says which Service had how
// many.
//
// It reads page by page and stops as soon as it has found enough, so in a Service with enough of them it costs one request
// of at most 100 records. With too few it reads all, and from there on watches the Service's part of the ledger until it
// returns: that many events are delivered as records change, to each agent that waits.
func (r *Registrar) WaitOthers(ctx context.Context, least int) error {
	services := r.guarded()
	for least > 0 {
		waited := false
		for _, service := range services {
			w, err := r.waitOthers(ctx, service, least)
			if err != nil {
				return err
			}
			waited = waited || w
		}
		// What an earlier Service had may have changed while a later one was waited for.
		if !waited || len(services) == 1 {
			break
		}
	}
	return nil
}

// guarded are the Services that should advertise this instance.
func (r *Registrar) guarded() (services []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.desired == nil {
		return nil
	}
	for _, in := range r.desired.Instances {
		if in.Advertise && len(r.cfg.Formats[in.Service]) > 0 {
			services = append(services, in.Service)
		}
	}
	return services
}

// waitOthers waits for one Service. waited is false when it had enough at the first look.
func (r *Registrar) waitOthers(ctx context.Context, service string, least int) (waited bool, err error) {
	var c *census
	var again pause
	for {
		err := ErrNotConnected
		if cli := r.client.Load(); cli != nil {
			next := r.census(cli, service)
			if err = next.read(ctx, othersPage, least); err == nil {
				if c = next; len(c.online) >= least {
					return waited, nil
				}
				again.reset()
				waited = true
				if err = c.watch(ctx, least); err == nil {
					return true, nil
				}
			}
		}
		waited = true
		select {
		case <-ctx.Done():
			if c == nil {
				return true, fmt.Errorf("the other instances of service %s could not be counted: %w (%w)", service, err, context.Cause(ctx))
			}
			return true, fmt.Errorf("service %s has %d other instances advertised, want %d: %w", service, len(c.online), least, context.Cause(ctx))
		case <-time.After(again.next(othersRetry)):
		}
	}
}

// census is what is known of the other instances of a Service.
type census struct {
	Catalog
	prefix, podUID string
	online         map[string]bool // the keys of those that are advertised
	rev            int64           // of the reading
}

func (r *Registrar) census(cli *clientv3.Client, service string) *census {
	return &census{Catalog: Catalog{cli, r.cfg.Cluster}, prefix: InstancePrefix(r.cfg.Cluster, r.cfg.Namespace, service),
		podUID: r.cfg.PodUID, online: map[string]bool{}}
}

// read counts until there are enough; 0 counts all.
func (c *census) read(ctx context.Context, page int64, enough int) (err error) {
	c.rev, err = c.scan(clientv3.WithRequireLeader(ctx), c.prefix, page, func(first bool, kvs []*mvccpb.KeyValue) bool {
		if first {
			clear(c.online)
		}
		for _, kv := range kvs {
			c.put(kv)
		}
		return enough == 0 || len(c.online) < enough
	})
	return err
}

// watch goes on from a reading to the end, until there are enough.
func (c *census) watch(ctx context.Context, enough int) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	for resp := range c.cli.Watch(ctx, c.prefix, clientv3.WithPrefix(), clientv3.WithRev(c.rev+1)) {
		if err := resp.Err(); err != nil {
			return fmt.Errorf("watching %s in etcd: %w", c.prefix, err)
		}
		for _, ev := range resp.Events {
			if ev.Type == clientv3.EventTypeDelete {
				delete(c.online, string(ev.Kv.Key))
			} else {
				c.put(ev.Kv)
			}
		}
		if len(c.online) >= enough {
			return nil
		}
	}
	return errors.New("the watch ended")
}

// put takes in one record. What is none advertises nobody.
func (c *census) put(kv *mvccpb.KeyValue) {
	var rec struct { // the part of a Record that counts: the rest is not worth its allocations a thousand times
		Owner struct {
			PodUID string `json:"podUID"`
		} `json:"owner"`
		State string            `json:"state"`
		Keys  []json.RawMessage `json:"keys"`
	}
	key := string(kv.Key)
	if json.Unmarshal(kv.Value, &rec) == nil && rec.State == lifecycle.Online.String() && rec.Owner.PodUID != c.podUID && len(rec.Keys) > 0 {
		c.online[key] = true
	} else {
		delete(c.online, key)
	}
}
