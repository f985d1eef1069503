package load

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.uber.org/zap"
)

// watchAgain is the pause before a registry that could not be watched is watched again.
const watchAgain = 200 * time.Millisecond

var errNoInstance = errors.New("no instance in the registry")

// instance is one address from the registry, for as long as it is registered.
type instance struct {
	addr string
	tr   *http.Transport
	gone atomic.Bool
	// users is how many requests are on their way through tr.
	users atomic.Int64
}

func newInstance(addr string) *instance { return &instance{addr: addr, tr: newTransport()} }

// leave closes the idle connections now. Those in use are closed as they become idle, by the last release at the latest.
func (i *instance) leave() {
	i.gone.Store(true)
	i.tr.CloseIdleConnections()
}

func (i *instance) release() {
	if i.users.Add(-1) == 0 && i.gone.Load() {
		i.tr.CloseIdleConnections()
	}
}

// watching is the part of endpoints.Manager that a follower needs.
type watching interface {
	NewWatchChannel(context.Context) (endpoints.WatchChannel, error)
}

// follower keeps the instances under one target as etcd's naming package reports them. Only run changes them.
type follower struct {
	target string
	source watching
	log    *zap.Logger
	seen   chan struct{} // closed when the first instance was seen

	mu    sync.RWMutex
	byKey map[string]*instance
	list  []*instance
	next  atomic.Uint64
}

func newFollower(cli *clientv3.Client, target string, log *zap.Logger) (*follower, error) {
	m, err := endpoints.NewManager(cli, target)
	if err != nil {
		return nil, err
	}
	return &follower{target: target, source: m, log: log, seen: make(chan struct{}), byKey: map[string]*instance{}}, nil
}

// run follows the registry until ctx ends, then lets all instances go.
func (f *follower) run(ctx context.Context) {
	defer f.replace(nil)
	for ctx.Err() == nil {
		err := f.watch(ctx)
		if ctx.Err() != nil {
			return
		}
		f.log.Warn("following the registry again", zap.String("target", f.target), zap.Error(err))
		select {
		case <-ctx.Done():
		case <-time.After(watchAgain):
		}
	}
}

// watch follows one watch to its end. What its first read finds replaces everything known before, since deletions may
// have been missed between two watches.
func (f *follower) watch(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ch, err := f.source.NewWatchChannel(ctx)
	if err != nil {
		return err
	}
	// The channel holds what was read, unless nothing was there: an empty read sends nothing.
	known := map[string]*instance{}
	select {
	case ups := <-ch:
		f.apply(known, ups)
	default:
	}
	f.replace(known)
	for ups := range ch {
		f.mu.RLock()
		known := make(map[string]*instance, len(f.byKey)+1)
		for k, i := range f.byKey {
			known[k] = i
		}
		f.mu.RUnlock()
		f.apply(known, ups)
		f.replace(known)
	}
	return errors.New("the watch was closed")
}

// apply changes known, and takes over the connections to an address that was there already under the same key.
func (f *follower) apply(known map[string]*instance, ups []*endpoints.Update) {
	for _, up := range ups {
		if up.Op == endpoints.Delete {
			delete(known, up.Key)
			continue
		}
		f.mu.RLock()
		old := f.byKey[up.Key]
		f.mu.RUnlock()
		if known[up.Key] == nil && old != nil && old.addr == up.Endpoint.Addr {
			known[up.Key] = old
		}
		if now := known[up.Key]; now == nil || now.addr != up.Endpoint.Addr {
			known[up.Key] = newInstance(up.Endpoint.Addr)
		}
	}
}

// replace makes known the instances, and lets those go that are no longer among them.
func (f *follower) replace(known map[string]*instance) {
	list := make([]*instance, 0, len(known))
	for _, i := range known {
		list = append(list, i)
	}
	f.mu.Lock()
	before := f.byKey
	f.byKey, f.list = known, list
	f.mu.Unlock()
	for key, i := range before {
		if known[key] != i {
			i.leave()
		}
	}
	if len(list) > 0 {
		select {
		case <-f.seen:
		default:
			close(f.seen)
		}
	}
}

// acquire returns the next instance in turn, to be released; nil when there is none.
func (f *follower) acquire() *instance {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if len(f.list) == 0 {
		return nil
	}
	i := f.list[f.next.Add(1)%uint64(len(f.list))]
	i.users.Add(1)
	return i
}
