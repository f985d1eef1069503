package usherctl_test

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry"
)

// verdict writes the verdict on a shutdown that was released so long ago.
func (l ledger) verdict(namespace, pod, uid string, ago time.Duration, more func(*registry.Verdict)) {
	l.t.Helper()
	released := time.Now().UTC().Add(-ago)
	v := registry.Verdict{
		Owner:     registry.Owner{Cluster: "default", PodUID: uid, Lease: leaseB, Agent: "agent-1"},
		Namespace: namespace, Pod: pod, Services: []string{"checkout"}, Node: "node-1", Zone: "zone-a",
		Outcome: "drained", Message: "drained in 1.25s, nothing in flight", Cause: "prestop hook",
		Started: released.Add(-1250 * time.Millisecond), Released: released, TotalMs: 1250, WithdrawMs: 4, SettleMs: 996, DrainMs: 250, Withdrawn: true,
	}
	if more != nil {
		more(&v)
	}
	value, err := v.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	l.put(registry.VerdictKey("default", namespace, pod, uid), string(value), leaseB)
}

func (l ledger) fillVerdicts() {
	l.verdict("shop", "checkout-1", "uid-1", 5*time.Minute, nil)
	l.verdict("shop", "checkout-2", "uid-2", 3*time.Minute, func(v *registry.Verdict) {
		v.Outcome, v.InFlight, v.Unsure, v.TotalMs = "timed-out", 3, 1, 25000
	})
	l.verdict("shop", "checkout-2", "uid-3", 9*time.Hour, func(v *registry.Verdict) { v.Outcome, v.Zone = "unmeasured", "" })
	l.put(registry.VerdictKey("default", "shop", "checkout-3", "uid-4"), "by hand", 0)
	l.verdict("default", "web-0", "uid-5", 7*time.Minute, func(v *registry.Verdict) { v.Cause = "SIGTERM" })
}

func TestGetVerdictsTables(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fill()
	l.fillVerdicts()
	const warning = "Warning: not a ledger record: key /usher/v1/default/verdicts/shop/checkout-3/uid-4: invalid character 'b' looking for beginning of value\n"
	for _, tc := range []struct {
		args           string
		stdout, stderr string
	}{
		{"get verdicts -n shop", `
POD          OUTCOME      IN FLIGHT      TOOK        AGE         CAUSE
checkout-2   timed-out    3 (1 unsure)   25s         3m          prestop hook
checkout-1   drained      0              1.25s       5m          prestop hook
checkout-2   unmeasured   <unknown>      1.25s       9h          prestop hook
checkout-3   Unreadable   <unknown>      <unknown>   <unknown>   <unknown>
`, warning},
		{"get verdict checkout-1 -n shop -o wide", `
POD          OUTCOME   IN FLIGHT   TOOK    AGE   CAUSE          GUARD   WITHDRAW   SETTLE   DRAIN   SERVICES   NODE     ZONE     UID
checkout-1   drained   0           1.25s   5m    prestop hook   0s      4ms        996ms    250ms   checkout   node-1   zone-a   uid-1
`, ""},
		{"get verdicts web-0 -A --no-headers", `
default   web-0   drained   0   1.25s   7m   SIGTERM
`, ""},
		{"get verdicts checkout -n shop", "\n", "No verdicts found in namespace \"shop\".\n"},
	} {
		got := ctl(t, l.endpoint, strings.Fields(tc.args)...)
		// Some seconds may have gone by.
		stdout := "\n" + regexp.MustCompile(`(\dm)[1-5]?\ds( *)`).ReplaceAllString(got.stdout, "$1$2")
		if squeezed(stdout) != squeezed(tc.stdout) || got.code != 0 || got.stderr != tc.stderr {
			t.Errorf("%s: code %d\n%s%s\nwant%s%s", tc.args, got.code, got.stdout, got.stderr, tc.stdout, tc.stderr)
		}
	}
}

// squeezed leaves column widths out.
func squeezed(s string) string { return regexp.MustCompile(` {2,}`).ReplaceAllString(s, "   ") }

func TestGetVerdictsJSON(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	l.fillVerdicts()
	got := ctl(t, l.endpoint, "get", "verdicts", "-n", "shop", "-o", "json")
	var list struct {
		Items []struct {
			Key, Lease, Error string
			Verdict           *registry.Verdict
		}
	}
	if err := json.Unmarshal([]byte(got.stdout), &list); err != nil || got.code != 0 || len(list.Items) != 4 {
		t.Fatalf("%+v, %v", got, err)
	}
	if i := list.Items[0]; i.Lease != "1a2c" || i.Verdict == nil || i.Verdict.InFlight != 3 || i.Verdict.TotalMs != 25000 {
		t.Errorf("first item %+v", i)
	}
	if i := list.Items[3]; i.Verdict != nil || !strings.Contains(i.Error, "not a ledger record") {
		t.Errorf("unreadable item %+v", i)
	}
	if got := ctl(t, l.endpoint, "get", "verdicts", "-n", "empty", "-o", "yaml"); got.code != 0 || got.stdout != "items: []\n" {
		t.Errorf("nothing as YAML: %+v", got)
	}
}

func TestStatusShowsTheLastShutdownOfAPodThatIsGone(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	at := time.Date(2024, 2, 3, 4, 5, 6, 789e6, time.UTC)
	l.verdict("shop", "checkout-1", "uid-old", time.Hour*24*365*10, nil)
	l.verdict("shop", "checkout-1", "uid-1", 0, func(v *registry.Verdict) {
		v.Outcome, v.Message, v.InFlight, v.Unsure = "forced", "forced by ann", 3, 1
		v.Started, v.Released, v.Deadline = at, at.Add(1500*time.Millisecond), at.Add(25*time.Second)
		v.TotalMs, v.GuardMs, v.GuardError, v.ForcedBy, v.AnnounceError = 1500, 250, "service checkout has 0 other instances advertised, want 1", "ann", "webhook: refused"
		v.Withdrawn, v.WithdrawError, v.Zone = false, "etcd has not answered", ""
		v.Sources = []registry.SourceVerdict{{Name: "sockdiag", InFlight: 3, Unsure: 1, Connections: 9, Peak: 7}, {Name: "http", Error: "connection refused"}}
	})
	got := ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop")
	stdout := regexp.MustCompile(`\(\S+ ago\)`).ReplaceAllString(got.stdout, "(AGE ago)")
	const want = `Name:     checkout-1
Cluster:  default
State:    gone

Last shutdown:  forced
  Verdict:      forced by ann
  Cause:        prestop hook
  Namespace:    shop
  Services:     checkout
  Node:         node-1
  Zone:         <none>
  Pod UID:      uid-1
  Started:      2024-02-03T04:05:06.789Z
  Released:     2024-02-03T04:05:08.289Z (AGE ago)
  Deadline:     2024-02-03T04:05:31.789Z
  Forced by:    ann
  Not told:     webhook: refused
  In flight:    3 (1 unsure)
  Took:         1.5s
    guard       250ms: service checkout has 0 other instances advertised, want 1
    withdraw    4ms: etcd has not answered
    settle      996ms
    drain       250ms
  Sources:
    sockdiag  3 in flight, 1 unsure, 9 connections, at most 7 in flight
    http      connection refused
`
	if got.code != 0 || stdout != want || got.stderr != "" {
		t.Errorf("code %d, stderr %q\n%s\nwant\n%s", got.code, got.stderr, stdout, want)
	}
	var status struct {
		Instances []any
		Verdicts  []struct{ Verdict registry.Verdict }
	}
	got = ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop", "-o", "json")
	if err := json.Unmarshal([]byte(got.stdout), &status); err != nil || status.Instances == nil || len(status.Verdicts) != 1 ||
		status.Verdicts[0].Verdict.Owner.PodUID != "uid-1" {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestHoldAndResume(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	old := time.Date(2024, 2, 3, 4, 5, 6, 0, time.UTC)
	l.record("default", "shop", "checkout", "checkout-1", "Online", func(r *registry.Record) { r.Owner.PodUID, r.Owner.PodCreated = "uid-old", old })
	l.record("default", "shop", "metrics", "checkout-1", "Online", func(r *registry.Record) { r.Owner.PodCreated = old.Add(time.Hour) })
	hold := func() *lifecycle.Hold {
		t.Helper()
		h, err := registry.NewCatalog(l.cli, "default").Hold(t.Context(), "shop", "uid-checkout-1")
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"hold", "checkout-1"}, "--reason is empty"},
		{[]string{"hold", "checkout-1", "--reason", "x", "--for", "-1s"}, "--for is -1s: want more than 0s, at most 168h0m0s"},
		{[]string{"hold", "checkout-1", "--reason", "x", "--for", "169h"}, "--for is 169h0m0s"},
		{[]string{"hold", "checkout-1", "--reason", "a\nb"}, `field reason is "a\nb"`},
		{[]string{"hold", "checkout", "--reason", "x"}, `pod "checkout" has no record in namespace "shop" of cluster "default"`},
		{[]string{"resume", "checkout"}, `pod "checkout" has no record in namespace "shop" of cluster "default"`},
	} {
		if got := ctl(t, l.endpoint, append(tc.args, "-n", "shop")...); got.code != 1 || got.stdout != "" || !strings.Contains(got.stderr, tc.want) || strings.Count(got.stderr, "\n") != 1 {
			t.Errorf("%q: %+v, want %q", tc.args, got, tc.want)
		}
	}
	if got := ctl(t, l.endpoint, "resume", "checkout-1", "-A"); got.code != 1 || !strings.Contains(got.stderr, "--all-namespaces: want the pod's own namespace") {
		t.Errorf("%+v", got)
	}
	if hold() != nil {
		t.Fatal("held by a command that was refused")
	}

	got := ctl(t, l.endpoint, "hold", "checkout-1", "-n", "shop", "--reason", "look at its heap", "--for", "30m", "--actor", "ann")
	h := hold()
	if h == nil || h.Reason != "look at its heap" || h.Actor != "ann" || h.Expires.Sub(h.Since) > 30*time.Minute || h.Expires.Sub(h.Since) < 29*time.Minute {
		t.Fatalf("%+v; hold %+v", got, h)
	}
	if want := "pod \"checkout-1\" held until " + h.Expires.Format(time.RFC3339) + "\n"; got.code != 0 || got.stdout != want || got.stderr != "" {
		t.Errorf("%+v, want %q", got, want)
	}
	want := "Held:       look at its heap (since " + h.Since.Format(time.RFC3339) + " by ann, until " + h.Expires.Format(time.RFC3339) + ")\n"
	if got := ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop"); strings.Count(got.stdout, want) != 1 {
		t.Errorf("status %s\nwant once %s", got.stdout, want)
	}
	for _, want := range []string{"pod \"checkout-1\" resumed\n", "pod \"checkout-1\" was not held\n"} {
		if got := ctl(t, l.endpoint, "resume", "checkout-1", "-n", "shop"); got.code != 0 || got.stdout != want {
			t.Errorf("%+v, want %q", got, want)
		}
	}
	if h := hold(); h != nil {
		t.Errorf("still held: %+v", h)
	}
	got = ctl(t, l.endpoint, "hold", "checkout-1", "-n", "shop", "--reason", "x", "-o", "json")
	var out struct {
		PodUID string
		Hold   struct{ Reason string }
	}
	if err := json.Unmarshal([]byte(got.stdout), &out); err != nil || out.PodUID != "uid-checkout-1" || out.Hold.Reason != "x" {
		t.Errorf("%+v, %v", got, err)
	}
	l.put(registry.HoldKey("default", "shop", "uid-checkout-1"), "{}", leaseA)
	if got := ctl(t, l.endpoint, "status", "checkout-1", "-n", "shop"); got.code != 0 || !strings.Contains(got.stdout, "Held:       no: not a ledger record") {
		t.Errorf("%+v", got)
	}
}
