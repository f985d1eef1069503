package registry

import (
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

const (
	testVerdictKey = "/usher/v1/c/verdicts/ns/pod-0/uid"
	testHoldKey    = "/usher/v1/c/holds/ns/uid"
)

func testVerdict() Verdict {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	return Verdict{
		Owner: Owner{Cluster: "c", PodUID: "uid", PodCreated: at, Lease: 0x7b, Agent: "a"}, Namespace: "ns", Pod: "pod-0", Services: []string{"svc"},
		Outcome: "drained", Message: "drained in 1s", Cause: "SIGTERM", Started: at, Deadline: at, Released: at, TotalMs: 1000,
		Sources: []SourceVerdict{{Name: "http", Peak: 2}},
	}
}

func TestVerdictReadsAsItWasWritten(t *testing.T) {
	v := testVerdict()
	b, err := v.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := DecodeVerdict(VerdictKey("c", "ns", "pod-0", "uid"), b); err != nil || !reflect.DeepEqual(got, v) {
		t.Errorf("got %+v, %v; want %+v", got, err, v)
	}
}

// What the hook's caller reads and what the ledger has are one account.
func TestVerdictHasTheNamesOfTheHooksAnswer(t *testing.T) {
	names := func(v any) (out []string) {
		for f := range reflect.TypeOf(v).Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			out = append(out, name)
		}
		return out
	}
	ledger := names(Verdict{})
	for _, name := range names(api.Verdict{}) {
		if !slices.Contains(ledger, name) {
			t.Errorf("the ledger's verdict lacks %s", name)
		}
	}
	if got, want := names(SourceVerdict{}), names(api.SourceVerdict{}); !slices.Equal(got, want) {
		t.Errorf("a source has %q, want %q", got, want)
	}
}

// spoilt is value with some fields replaced; nil takes one out.
func spoilt(t *testing.T, value []byte, fields map[string]any) []byte {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(value, &m); err != nil {
		t.Fatal(err)
	}
	maps.Copy(m, fields)
	maps.DeleteFunc(m, func(_ string, v any) bool { return v == nil })
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestVerdictThatIsNoneIsRefused(t *testing.T) {
	good, err := testVerdict().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		key   string
		value []byte
		want  string
	}{
		{testVerdictKey, []byte("by hand"), "invalid character"},
		{testVerdictKey, []byte("null"), "field owner.cluster is missing or empty"},
		{testVerdictKey, append(good, '}'), "more than one JSON value"},
		{testVerdictKey, append(good, "{}"...), "more than one JSON value"},
		{testVerdictKey + "2", good, "the value speaks of c/verdicts/ns/pod-0/uid"},
		{testVerdictKey, spoilt(t, good, map[string]any{"outcome": nil}), "field outcome is missing or empty"},
		{testVerdictKey, spoilt(t, good, map[string]any{"released": nil}), "field started or released is missing"},
		{testVerdictKey, spoilt(t, good, map[string]any{"drainMs": -1}), "field drainMs is -1: want 0 or more"},
		{testVerdictKey, spoilt(t, good, map[string]any{"inFlight": "3"}), "inFlight"},
	} {
		v, err := DecodeVerdict(tc.key, tc.value)
		if !errors.Is(err, ErrNotARecord) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), tc.key) || !reflect.DeepEqual(v, Verdict{}) {
			t.Errorf("%s %s: %+v, %v; want %q", tc.key, tc.value, v, err, tc.want)
		}
	}
	if _, err := DecodeVerdict(testVerdictKey, spoilt(t, good, map[string]any{"later": 1})); err != nil {
		t.Errorf("a field of a later version: %v", err)
	}
}

const goodHold = `{"reason":"disk","actor":"ann","since":"2026-03-01T12:00:00Z","expires":"2026-03-01T14:00:00+01:00","lease":"7b"}`

func TestHoldThatIsNoneIsRefused(t *testing.T) {
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	if h, err := DecodeHold(testHoldKey, []byte(goodHold)); err != nil || h != (lifecycle.Hold{Reason: "disk", Actor: "ann", Since: at, Expires: at.Add(time.Hour)}) {
		t.Errorf("got %+v, %v", h, err)
	}
	for _, tc := range []struct {
		fields map[string]any
		want   string
	}{
		{map[string]any{"reason": nil}, "field reason is missing or empty"},
		{map[string]any{"reason": " "}, "field reason is missing or empty"},
		{map[string]any{"reason": "a\tb"}, `field reason is "a\tb": want UTF-8 without control characters`},
		{map[string]any{"actor": strings.Repeat("x", 1025)}, "field actor has 1025 bytes: want at most 1024"},
		{map[string]any{"since": nil}, "field since is missing"},
		{map[string]any{"expires": nil}, "field expires is missing"},
		{map[string]any{"expires": "2026-03-01T12:00:00Z"}, "field expires is 2026-03-01T12:00:00Z: want a time after 2026-03-01T12:00:00Z"},
		{map[string]any{"expires": "2026-03-08T12:00:01Z"}, "want at most 168h0m0s after"},
		{map[string]any{"expires": "tomorrow"}, "tomorrow"},
		{map[string]any{"lease": "xyz"}, "want hexadecimal digits"},
	} {
		h, err := DecodeHold(testHoldKey, spoilt(t, []byte(goodHold), tc.fields))
		if !errors.Is(err, ErrNotARecord) || !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), testHoldKey) || h.Reason != "" {
			t.Errorf("%v: %+v, %v; want %q", tc.fields, h, err, tc.want)
		}
	}
}

func TestConfigRefusesAVerdictTTLThatEtcdCannotHave(t *testing.T) {
	cfg := Config{Cluster: "c", Namespace: "ns", Pod: "p", PodUID: "u", VerdictTTL: 1500 * time.Millisecond}
	if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), "verdict TTL 1.5s: want whole seconds") {
		t.Errorf("error %v", err)
	}
}

// What can be read can be written, and reads the same.
func FuzzDecodeVerdict(f *testing.F) {
	good, err := testVerdict().Encode()
	if err != nil {
		f.Fatal(err)
	}
	for _, v := range []string{string(good), "{}", "null", "[]", `{"owner":{}}`, `{"owner":{"lease":"zz"}}`} {
		f.Add(testVerdictKey, []byte(v))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		v, err := DecodeVerdict(key, value)
		if err != nil {
			if !errors.Is(err, ErrNotARecord) {
				t.Fatalf("error %v", err)
			}
			return
		}
		again, err := v.Encode()
		if err != nil {
			t.Fatalf("%+v: %v", v, err)
		}
		if w, err := DecodeVerdict(key, again); err != nil || w.Outcome != v.Outcome || !w.Released.Equal(v.Released) {
			t.Fatalf("%s became %+v, %v", again, w, err)
		}
	})
}

func FuzzDecodeHold(f *testing.F) {
	for _, v := range []string{goodHold, "{}", "null", `{"reason":1}`, strings.ReplaceAll(goodHold, "disk", `\ud800`)} {
		f.Add([]byte(v))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		h, err := DecodeHold(testHoldKey, value)
		if err != nil {
			if !errors.Is(err, ErrNotARecord) {
				t.Fatalf("error %v", err)
			}
			return
		}
		if left := h.Expires.Sub(h.Since); left <= 0 || left > MaxHold || h.Reason == "" {
			t.Fatalf("%s is a hold of %s", value, left)
		}
		again, err := json.Marshal(holdRecord{Reason: h.Reason, Actor: h.Actor, Since: h.Since, Expires: h.Expires})
		if err != nil {
			t.Fatalf("%+v: %v", h, err)
		}
		if back, err := DecodeHold(testHoldKey, again); err != nil || back != h {
			t.Fatalf("%s became %+v, %v", again, back, err)
		}
	})
}
