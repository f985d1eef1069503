package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"usher.dev/usher/lifecycle"
)

// DefaultVerdictTTL is how long a verdict can be read after the release: long enough for somebody whom an alert calls.
const DefaultVerdictTTL = 10 * time.Minute

// Verdict is the ledger's account of one Pod's last shutdown. It outlives the Pod: its lease is its own, never renewed and
// not revoked when the agent ends. Durations are milliseconds, rounded down.
type Verdict struct {
	Owner     Owner    `json:"owner"` // Lease is the verdict's own
	Namespace string   `json:"namespace"`
	Pod       string   `json:"pod"`
	Services  []string `json:"services,omitempty"`
	Node      string   `json:"node,omitempty"`
	Zone      string   `json:"zone,omitempty"`

	Outcome  string    `json:"outcome"` // a lifecycle.Outcome
	Message  string    `json:"message"` // the verdict in one sentence
	Cause    string    `json:"cause"`
	Started  time.Time `json:"started"`
	Deadline time.Time `json:"deadline,omitzero"` // of the release, the application's reserve already taken off
	Released time.Time `json:"released"`

	TotalMs    int64 `json:"totalMs"`
	GuardMs    int64 `json:"guardMs,omitempty"` // the steps, in their order
	WithdrawMs int64 `json:"withdrawMs"`
	SettleMs   int64 `json:"settleMs"`
	DrainMs    int64 `json:"drainMs"`

	GuardError    string `json:"guardError,omitempty"` // why it was withdrawn with too few others
	Withdrawn     bool   `json:"withdrawn"`            // the registry was told before the release
	WithdrawError string `json:"withdrawError,omitempty"`
	AnnounceError string `json:"announceError,omitempty"` // who could not be told of the shutdown
	ForcedBy      string `json:"forcedBy,omitempty"`

	InFlight int             `json:"inFlight"` // at the release
	Unsure   int             `json:"unsure"`   // of InFlight, how many might have been idle
	Sources  []SourceVerdict `json:"sources,omitempty"`
}

// SourceVerdict is what one source of in-flight counts said last.
type SourceVerdict struct {
	Name        string `json:"name"`
	InFlight    int    `json:"inFlight"`
	Unsure      int    `json:"unsure,omitempty"`
	Connections int    `json:"connections,omitempty"`
	Peak        int    `json:"peak"` // the most that was in flight during the drain
	Error       string `json:"error,omitempty"`
}

// VerdictKey is the ledger key of a Pod's verdict.
func VerdictKey(cluster, namespace, pod, podUID string) string {
	return VerdictPrefix(cluster, namespace, pod) + podUID
}

// VerdictPrefix is the ledger's prefix of the verdicts on all Pods of one name, of a namespace (pod "") or of a cluster
// (both "").
func VerdictPrefix(cluster, namespace, pod string) string {
	return prefixOf(cluster, "verdicts", namespace, pod)
}

// Encode is the ledger value.
func (v Verdict) Encode() ([]byte, error) { return json.Marshal(v) }

// DecodeVerdict reads a verdict's ledger value, and holds it against its key. Every error wraps ErrNotARecord. Fields of
// a later version are ignored.
func DecodeVerdict(key string, value []byte) (Verdict, error) {
	var v Verdict
	if err := decode(key, value, &v); err != nil {
		return Verdict{}, err
	}
	err := present(key, field{"owner.cluster", v.Owner.Cluster}, field{"owner.podUID", v.Owner.PodUID}, field{"owner.agent", v.Owner.Agent},
		field{"namespace", v.Namespace}, field{"pod", v.Pod}, field{"outcome", v.Outcome})
	if err != nil {
		return Verdict{}, err
	}
	if want := VerdictKey(v.Owner.Cluster, v.Namespace, v.Pod, v.Owner.PodUID); key != want {
		return Verdict{}, fmt.Errorf("%w: key %s: the value speaks of %s", ErrNotARecord, key, strings.TrimPrefix(want, Root))
	}
	if v.Started.IsZero() || v.Released.IsZero() {
		return Verdict{}, fmt.Errorf("%w: key %s: field started or released is missing", ErrNotARecord, key)
	}
	for _, n := range []struct {
		name  string
		value int64
	}{
		{"totalMs", v.TotalMs}, {"guardMs", v.GuardMs}, {"withdrawMs", v.WithdrawMs}, {"settleMs", v.SettleMs}, {"drainMs", v.DrainMs},
		{"inFlight", int64(v.InFlight)}, {"unsure", int64(v.Unsure)},
	} {
		if n.value < 0 {
			return Verdict{}, fmt.Errorf("%w: key %s: field %s is %d: want 0 or more", ErrNotARecord, key, n.name, n.value)
		}
	}
	return v, nil
}

// verdict is d's, as the ledger has it.
func (r *Registrar) verdict(d lifecycle.Desired, lease clientv3.LeaseID) Verdict {
	lv := *d.Verdict
	v := Verdict{
		Owner:     r.owner(d, lease),
		Namespace: r.cfg.Namespace, Pod: r.cfg.Pod, Node: d.Pod.Node,
		Outcome: string(lv.Outcome), Message: lv.Message(), Cause: lv.Cause, Started: lv.Started, Deadline: lv.Deadline, Released: lv.Released,
		TotalMs: lv.Total().Milliseconds(), GuardMs: lv.Guard.Milliseconds(), WithdrawMs: lv.Withdraw.Milliseconds(),
		SettleMs: lv.Settle.Milliseconds(), DrainMs: lv.Drain.Milliseconds(),
		GuardError: lv.GuardError, Withdrawn: lv.Withdrawn, WithdrawError: lv.WithdrawError, AnnounceError: lv.AnnounceError,
		ForcedBy: lv.ForcedBy, InFlight: lv.InFlight, Unsure: lv.Unsure,
	}
	for _, in := range d.Instances {
		v.Services = append(v.Services, in.Service)
		if v.Zone == "" {
			v.Zone = in.Zone
		}
	}
	for _, s := range lv.Sources {
		v.Sources = append(v.Sources, SourceVerdict{
			Name: s.Name, InFlight: s.InFlight, Unsure: s.Unsure, Connections: s.Connections, Peak: s.Peak, Error: s.Err,
		})
	}
	return v
}

// owesVerdict says whether d has a verdict that the ledger has not got yet.
func (r *Registrar) owesVerdict(d lifecycle.Desired) bool {
	return d.Verdict != nil && r.cfg.VerdictTTL > 0 && !reflect.DeepEqual(d.Verdict, r.s.keptVerdict)
}

// keepVerdict puts d's verdict under a lease of its own. What has become of it later is nobody's business here: it is
// meant to go.
func (r *Registrar) keepVerdict(ctx context.Context, d lifecycle.Desired) error {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), requestTimeout)
	defer cancel()
	if r.s.verdictLease == 0 {
		resp, err := r.s.cli.Grant(ctx, int64(r.cfg.VerdictTTL/time.Second))
		if err != nil {
			return fmt.Errorf("keeping the verdict: getting a lease: %w", r.unanswered(err))
		}
		r.s.verdictLease = resp.ID
	}
	lease := r.s.verdictLease
	value, err := r.verdict(d, lease).Encode()
	if err != nil {
		return fmt.Errorf("keeping the verdict: encoding it: %w", err)
	}
	// Not by commit: this must not move the revision from which on others' changes count as unseen.
	r.Counters.Transactions.Add(1)
	key := VerdictKey(r.cfg.Cluster, r.cfg.Namespace, r.cfg.Pod, r.cfg.PodUID)
	resp, err := r.s.cli.Put(ctx, key, string(value), clientv3.WithLease(lease), clientv3.WithPrevKV())
	if err != nil {
		if errors.Is(err, rpctypes.ErrLeaseNotFound) {
			r.s.verdictLease = 0
		}
		return fmt.Errorf("keeping the verdict: writing to etcd: %w", r.unanswered(err))
	}
	r.s.keptVerdict, r.s.verdictLease = d.Verdict, 0
	if resp.PrevKv == nil {
		return nil
	}
	// An earlier shutdown's, of this process or of the one before.
	old, err := DecodeVerdict(key, resp.PrevKv.Value)
	if err != nil || int64(old.Owner.Lease) != resp.PrevKv.Lease || old.Owner.Lease == LeaseID(lease) {
		return nil
	}
	if _, err := r.s.cli.Revoke(ctx, clientv3.LeaseID(old.Owner.Lease)); err != nil {
		r.log.Debug("lease of an earlier verdict not revoked, it ends by itself", zap.Stringer("lease", old.Owner.Lease), zap.Error(err))
	}
	return nil
}
