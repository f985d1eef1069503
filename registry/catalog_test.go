package registry

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

func testRecord(cluster, namespace, service, pod, state string) (string, []byte) {
	r := Record{Owner: Owner{Cluster: cluster, PodUID: "uid-" + pod, Agent: "a1", Lease: 0x7b},
		Namespace: namespace, Service: service, Pod: pod, State: state, Since: time.Unix(1700000000, 0).UTC()}
	b, err := r.Encode()
	if err != nil {
		panic(err)
	}
	return InstanceKey(cluster, namespace, service, pod), b
}

func TestEntrySelectsByClusterNamespaceAndService(t *testing.T) {
	keys := []string{
		"/usher/v1/c1/instances/ns1/svc1/p", "/usher/v1/c1/instances/ns1/svc2/p", "/usher/v1/c1/instances/ns2/svc1/p",
		"/usher/v1/c2/instances/ns1/svc1/p", "/usher/v1/c1/holds/ns1/uid", "/usher/v1/c1/instances/ns1/broken",
		"/usher/v1/c1/holds/ns1/instances/x",
	}
	for _, tc := range []struct {
		cluster, namespace, service string
		want                        []int
	}{
		{"c1", "ns1", "svc1", []int{0}},
		{"c1", "ns1", "", []int{0, 1, 5}},
		{"c1", "", "svc1", []int{0, 2}},
		{"c1", "", "", []int{0, 1, 2, 5}},
		{"", "ns1", "svc1", []int{0, 3}},
		{"", "", "", []int{0, 1, 2, 3, 5}},
	} {
		c := NewCatalog(nil, tc.cluster)
		var got []int
		for i, key := range keys {
			if e, ok := c.entry(key, tc.namespace, tc.service); ok {
				got = append(got, i)
				if e.Key != key {
					t.Errorf("key %q became %q", key, e.Key)
				}
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("cluster %q namespace %q service %q: got %v, want %v", tc.cluster, tc.namespace, tc.service, got, tc.want)
		}
	}
}

func TestEntryThatIsNoRecordKeepsItsKey(t *testing.T) {
	c := NewCatalog(nil, "c1")
	key, value := testRecord("c1", "ns", "svc", "pod-1", "Online")
	for _, tc := range []struct {
		name, key string
		value     []byte
	}{
		{"no JSON", key, []byte("hello")},
		{"another's record", key[:len(key)-1] + "2", value},
		{"too few parts", "/usher/v1/c1/instances/ns/svc", value},
		{"too many parts", key + "/x", value},
	} {
		e, ok := c.entry(tc.key, "", "")
		if !ok {
			t.Errorf("%s: left out", tc.name)
			continue
		}
		e.fill(tc.value, 0x7b, 9)
		if !errors.Is(e.Err, ErrNotARecord) || e.Key != tc.key || e.Namespace != "ns" || e.Lease != 0x7b || e.ModRevision != 9 {
			t.Errorf("%s: got %+v", tc.name, e)
		}
	}
}

// A list after an outage is told as the difference from what was known, in effect once each.
func TestDifferenceTellsEachChangeOnce(t *testing.T) {
	var got []string
	w := catalogWatch{Catalog: NewCatalog(nil, "c"), known: map[string]Entry{}, yield: func(e Event, err error) bool {
		old := int64(0)
		if e.Old != nil {
			old = e.Old.ModRevision
		}
		got = append(got, fmt.Sprintf("%d %s %d->%d", e.Type, e.Entry.Key, old, e.Entry.ModRevision))
		return true
	}}
	at := func(key string, rev int64) Entry { return Entry{Key: key, ModRevision: rev} }
	for i, step := range []struct {
		list []Entry
		want []string
	}{
		{[]Entry{at("a", 1), at("b", 2)}, []string{"0 a 0->1", "0 b 0->2"}},
		{[]Entry{at("a", 1), at("b", 2)}, nil},
		{[]Entry{at("b", 5), at("c", 4)}, []string{"0 b 2->5", "0 c 0->4", "1 a 1->1"}},
		{[]Entry{at("b", 3), at("c", 4)}, []string{"0 b 5->3"}}, // an etcd that was restored from a backup
		{nil, []string{"1 b 3->3", "1 c 4->4"}},
	} {
		got = nil
		if !w.difference(step.list) || !slices.Equal(got, step.want) {
			t.Errorf("list %d: got %q, want %q", i, got, step.want)
		}
	}
}

func TestDifferenceStopsWhenTheCallerBreaks(t *testing.T) {
	n := 0
	w := catalogWatch{Catalog: NewCatalog(nil, "c"), known: map[string]Entry{}, yield: func(Event, error) bool { n++; return false }}
	if w.difference([]Entry{{Key: "a", ModRevision: 1}, {Key: "b", ModRevision: 2}}) || n != 1 || !w.stopped {
		t.Errorf("yielded %d times, stopped %v", n, w.stopped)
	}
}
