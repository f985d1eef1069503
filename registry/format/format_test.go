package format

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func instance() Instance {
	return Instance{
		ID: "6f0d", Namespace: "shop", Service: "api",
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Ports:     []Port{{"http", 8080, "TCP"}, {"grpc", 9090, "TCP"}, {"dns", 53, "UDP"}},
	}
}

func TestGRPCGoldenRecord(t *testing.T) {
	v6 := instance()
	v6.Addresses = []netip.Addr{netip.MustParseAddr("fd00::1")}
	for _, c := range []struct {
		name string
		port string
		in   Instance
		want Record
	}{
		{"named port", "grpc", instance(), Record{"shop/api/6f0d", `{"Op":0,"Addr":"10.0.0.1:9090"}`}},
		{"number that the Service doesn't list", "7000", instance(), Record{"shop/api/6f0d", `{"Op":0,"Addr":"10.0.0.1:7000"}`}},
		{"IPv6 in brackets", "http", v6, Record{"shop/api/6f0d", `{"Op":0,"Addr":"[fd00::1]:8080"}`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := New(Spec{Type: "grpc", Target: "shop/api", Port: c.port})
			if err != nil {
				t.Fatal(err)
			}
			got, err := f.Records(c.in)
			if err != nil || len(got) != 1 || got[0] != c.want {
				t.Fatalf("got %v, %v; want %v", got, err, c.want)
			}
		})
	}
}

func TestOnlyTCPPortIsTheDefault(t *testing.T) {
	f, _ := New(Spec{Type: "grpc", Target: "shop/api"})
	in := instance()
	if _, err := f.Records(in); err == nil || !strings.Contains(err.Error(), "http (8080), grpc (9090)") {
		t.Errorf("two TCP ports: got %v, want an error that lists them", err)
	}
	in.Ports = in.Ports[1:]
	got, err := f.Records(in)
	if err != nil || got[0].Value != `{"Op":0,"Addr":"10.0.0.1:9090"}` {
		t.Errorf("one TCP port: got %v, %v", got, err)
	}
}

func TestBadSpecNamesFieldAndValue(t *testing.T) {
	for _, c := range []struct {
		spec  Spec
		field string
	}{
		{Spec{Type: "zookeeper"}, "type"},
		{Spec{Type: "grpc"}, "target"},
		{Spec{Type: "grpc", Target: "a//b"}, "target"},
		{Spec{Type: "grpc", Target: "a/"}, "target"},
		{Spec{Type: "grpc", Target: "a b"}, "target"},
		{Spec{Type: "grpc", Target: "/usher/v1/x"}, "target"},
		{Spec{Type: "grpc", Target: "a", Port: "70000"}, "port"},
		{Spec{Type: "grpc", Target: "a", Port: "0"}, "port"},
	} {
		_, err := New(c.spec)
		var e *Error
		if !errors.As(err, &e) || e.Field != c.field || e.Rule == "" {
			t.Errorf("%+v: got %v, want an *Error about %s", c.spec, err, c.field)
		}
	}
}

func TestInstanceThatBreaksARuleIsRefused(t *testing.T) {
	f, _ := New(Spec{Type: "grpc", Target: "shop/api", Port: "http"})
	for name, change := range map[string]func(*Instance){
		"no address":   func(i *Instance) { i.Addresses = nil },
		"zero address": func(i *Instance) { i.Addresses = []netip.Addr{{}} },
		"no such port": func(i *Instance) { i.Ports = i.Ports[1:] },
		"empty id":     func(i *Instance) { i.ID = "" },
	} {
		in := instance()
		change(&in)
		var e *Error
		if got, err := f.Records(in); !errors.As(err, &e) {
			t.Errorf("%s: got %v, %v; want an *Error", name, got, err)
		}
	}
}

// FuzzGRPC: whatever is written, etcd's readers decode to the same address under the target's prefix.
func FuzzGRPC(f *testing.F) {
	f.Add("shop/api", "http", "6f0d", []byte{10, 0, 0, 1}, uint16(8080))
	f.Fuzz(func(t *testing.T, target, port, id string, ip []byte, number uint16) {
		g, err := New(Spec{Type: "grpc", Target: target, Port: port})
		if err != nil {
			return
		}
		addr, _ := netip.AddrFromSlice(ip)
		recs, err := g.Records(Instance{ID: id, Addresses: []netip.Addr{addr}, Ports: []Port{{"http", number, "TCP"}}})
		if err != nil {
			return
		}
		for _, r := range recs {
			var v struct {
				Op       int
				Addr     string
				Metadata any
			}
			if err := json.Unmarshal([]byte(r.Value), &v); err != nil || v.Op != 0 || v.Metadata != nil {
				t.Fatalf("%q: %v, %+v", r.Value, err, v)
			}
			ap, err := netip.ParseAddrPort(v.Addr)
			if err != nil || ap.Addr() != addr.WithZone("") || ap.Port() == 0 {
				t.Fatalf("%q: %v, want address %s", v.Addr, err, addr)
			}
			if !strings.HasPrefix(r.Key, target+"/") || strings.HasPrefix(r.Key, "/usher/") {
				t.Fatalf("key %q is outside of target %q", r.Key, target)
			}
		}
	})
}
