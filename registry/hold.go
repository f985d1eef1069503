package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"usher.dev/usher/lifecycle"
)

// A hold always ends: it is written under a lease of its own, so that nothing is left of one that everybody forgot.
const (
	// DefaultHold is how long a hold lasts that names no end.
	DefaultHold = time.Hour
	// MaxHold is the longest.
	MaxHold = 7 * 24 * time.Hour

	maxReason = 1024 // bytes of a hold's reason, and of its actor
)

// ErrBadHold says that a hold is not as it has to be.
var ErrBadHold = errors.New("bad hold")

// ErrNotConnected says that the Registrar has not reached etcd since its start.
var ErrNotConnected = errors.New("not connected to etcd yet")

// holdRecord is a hold's ledger value.
type holdRecord struct {
	Reason  string    `json:"reason"`
	Actor   string    `json:"actor,omitempty"`
	Since   time.Time `json:"since"`
	Expires time.Time `json:"expires"`
	Lease   LeaseID   `json:"lease"` // the hold's own
}

// HoldKey is the ledger key of the hold on a Pod.
func HoldKey(cluster, namespace, podUID string) string {
	return prefixOf(cluster, "holds", namespace, "") + podUID
}

// DecodeHold reads a hold's ledger value. Every error wraps ErrNotARecord. Fields of a later version are ignored.
func DecodeHold(key string, value []byte) (lifecycle.Hold, error) {
	rec, err := decodeHold(key, value)
	return rec.hold(), err
}

func decodeHold(key string, value []byte) (holdRecord, error) {
	var rec holdRecord
	if err := decode(key, value, &rec); err != nil {
		return holdRecord{}, err
	}
	if err := checkHold(rec.hold()); err != nil {
		return holdRecord{}, fmt.Errorf("%w: key %s: %w", ErrNotARecord, key, err)
	}
	return rec, nil
}

func (h holdRecord) hold() lifecycle.Hold {
	return lifecycle.Hold{Reason: h.Reason, Actor: h.Actor, Since: h.Since.UTC(), Expires: h.Expires.UTC()}
}

func checkHold(h lifecycle.Hold) error {
	for _, f := range []field{{"reason", h.Reason}, {"actor", h.Actor}} {
		switch {
		case len(f.value) > maxReason:
			return fmt.Errorf("field %s has %d bytes: want at most %d", f.name, len(f.value), maxReason)
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, func(r rune) bool { return r < ' ' || r == 0x7f }):
			return fmt.Errorf("field %s is %q: want UTF-8 without control characters", f.name, f.value)
		}
	}
	switch {
	case strings.TrimSpace(h.Reason) == "":
		return errors.New("field reason is missing or empty")
	case h.Since.IsZero():
		return errors.New("field since is missing")
	case h.Expires.IsZero():
		return errors.New("field expires is missing")
	case !h.Expires.After(h.Since):
		return fmt.Errorf("field expires is %s: want a time after %s", h.Expires.Format(time.RFC3339), h.Since.Format(time.RFC3339))
	case h.Expires.Sub(h.Since) > MaxHold:
		return fmt.Errorf("field expires is %s: want at most %s after %s", h.Expires.Format(time.RFC3339), MaxHold, h.Since.Format(time.RFC3339))
	}
	return nil
}

// PutHold holds a Pod: its agent keeps it out of the registry until the hold expires or DeleteHold takes it back. It takes
// the place of a hold that is there. What it returns is h as it stands: Since is now, and Expires DefaultHold from now if
// h names none. An error about h itself wraps ErrBadHold. Agents go by their own clock, and by the lease in etcd, whichever
// ends first.
func PutHold(ctx context.Context, cli *clientv3.Client, cluster, namespace, podUID string, h lifecycle.Hold) (lifecycle.Hold, error) {
	if err := checkPod(cluster, namespace, podUID); err != nil {
		return lifecycle.Hold{}, fmt.Errorf("hold: %w", err)
	}
	h.Since = time.Now().UTC().Round(0)
	if h.Expires.IsZero() {
		h.Expires = h.Since.Add(DefaultHold)
	}
	h.Expires = h.Expires.UTC().Round(0)
	if err := checkHold(h); err != nil {
		return lifecycle.Hold{}, fmt.Errorf("%w: %w", ErrBadHold, err)
	}
	asked := clientv3.WithRequireLeader(ctx)
	asked, cancel := context.WithTimeout(asked, requestTimeout)
	defer cancel()
	left := h.Expires.Sub(h.Since)
	lease, err := cli.Grant(asked, int64((left+time.Second-1)/time.Second))
	if err != nil {
		return lifecycle.Hold{}, fmt.Errorf("hold: getting a lease: %w", err)
	}
	revoke := func(id clientv3.LeaseID) {
		// Best effort: it ends by itself.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
		defer cancel()
		_, _ = cli.Revoke(ctx, id)
	}
	value, err := json.Marshal(holdRecord{h.Reason, h.Actor, h.Since, h.Expires, LeaseID(lease.ID)})
	if err != nil {
		revoke(lease.ID)
		return lifecycle.Hold{}, fmt.Errorf("hold: encoding it: %w", err)
	}
	key := HoldKey(cluster, namespace, podUID)
	resp, err := cli.Put(asked, key, string(value), clientv3.WithLease(lease.ID), clientv3.WithPrevKV())
	if err != nil {
		revoke(lease.ID) // the put may have been carried out all the same
		return lifecycle.Hold{}, fmt.Errorf("hold: writing %s to etcd: %w", key, err)
	}
	if prev := resp.PrevKv; prev != nil {
		if old, err := decodeHold(key, prev.Value); err == nil && int64(old.Lease) == prev.Lease {
			revoke(clientv3.LeaseID(prev.Lease))
		}
	}
	return h, nil
}

// DeleteHold takes a hold back, and says whether there was one.
func DeleteHold(ctx context.Context, cli *clientv3.Client, cluster, namespace, podUID string) (bool, error) {
	if err := checkPod(cluster, namespace, podUID); err != nil {
		return false, fmt.Errorf("resume: %w", err)
	}
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), requestTimeout)
	defer cancel()
	key := HoldKey(cluster, namespace, podUID)
	resp, err := cli.Delete(ctx, key, clientv3.WithPrevKV())
	if err != nil {
		return false, fmt.Errorf("resume: deleting %s from etcd: %w", key, err)
	}
	for _, prev := range resp.PrevKvs {
		if old, err := decodeHold(key, prev.Value); err == nil && int64(old.Lease) == prev.Lease {
			_, _ = cli.Revoke(ctx, clientv3.LeaseID(prev.Lease)) // else it ends by itself, with nothing under it
		}
	}
	return resp.Deleted > 0, nil
}

func checkPod(cluster, namespace, podUID string) error {
	for _, f := range []field{{"cluster", cluster}, {"namespace", namespace}, {"pod UID", podUID}} {
		if err := checkSegment(f.name, f.value); err != nil {
			return err
		}
	}
	return nil
}

// Hold is PutHold for the own Pod. OnHold tells when it has taken effect, a moment later.
func (r *Registrar) Hold(ctx context.Context, h lifecycle.Hold) (lifecycle.Hold, error) {
	cli := r.client.Load()
	if cli == nil {
		return lifecycle.Hold{}, fmt.Errorf("hold: %w", ErrNotConnected)
	}
	return PutHold(ctx, cli, r.cfg.Cluster, r.cfg.Namespace, r.cfg.PodUID, h)
}

// Resume is DeleteHold for the own Pod.
func (r *Registrar) Resume(ctx context.Context) (bool, error) {
	cli := r.client.Load()
	if cli == nil {
		return false, fmt.Errorf("resume: %w", ErrNotConnected)
	}
	return DeleteHold(ctx, cli, r.cfg.Cluster, r.cfg.Namespace, r.cfg.PodUID)
}

// lookAtHold takes in the hold that was last seen, tells of it when it is another than before, and says whether it is. A
// hold whose time is up is none.
func (r *Registrar) lookAtHold() (changed bool) {
	var now *lifecycle.Hold
	r.s.badHold = nil
	r.s.holdEnds.Stop()
	if kn := r.s.known[r.holdKey]; kn.rev != 0 {
		h, err := DecodeHold(r.holdKey, []byte(kn.value))
		left := time.Until(h.Expires)
		switch {
		case err != nil:
			r.s.badHold = fmt.Errorf("%w: %w; delete it, or write it by usherctl hold", ErrForeign, err)
		case left > 0:
			now = &h
			r.s.holdEnds.Reset(left)
		}
	}
	was := r.s.hold
	if was == nil && now == nil || was != nil && now != nil && *was == *now {
		return false
	}
	r.s.hold = now
	if now != nil {
		r.log.Info("held offline", zap.String("reason", now.Reason), zap.String("actor", now.Actor), zap.Time("expires", now.Expires))
	} else {
		r.log.Info("no longer held")
	}
	r.cfg.OnHold(now)
	return true
}
