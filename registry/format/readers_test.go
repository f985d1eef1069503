package format

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// reading is what a client makes of one record.
type reading struct {
	Scheme, Address string // Address is host:port
	Weight          int    // 0 for a reader that knows none
	Version         string
	Metadata        map[string]string
	Down            bool // gets no traffic
}

// reader does what the real client does with all that etcd holds. An error is one that takes the whole service from
// its clients, or a record that they would drop.
type reader func(s Spec, store []Record) ([]reading, error)

var readers = map[string]reader{
	"grpc": readGRPC, "gozero": readGoZero, "kratos": readKratos, "kitex": readKitex, "hertz": readHertz, "skydns": readSkyDNS,
	"traefik": readTraefik, "go-micro": readGoMicro, "rpcx": readRPCX,
}

func under(store []Record, prefix string) []Record {
	return slices.DeleteFunc(slices.Clone(store), func(r Record) bool { return !strings.HasPrefix(r.Key, prefix) })
}

func readGRPC(s Spec, store []Record) (out []reading, err error) {
	for _, r := range under(store, s.Target+"/") {
		var v struct {
			Op       uint8
			Addr     string
			Metadata any
		}
		if err := json.Unmarshal([]byte(r.Value), &v); err != nil {
			return nil, err
		}
		if v.Op != 0 || v.Metadata != nil {
			return nil, fmt.Errorf("%s: %+v", r.Key, v)
		}
		out = append(out, reading{Address: v.Addr})
	}
	return out, nil
}

func readGoZero(s Spec, store []Record) (out []reading, err error) {
	u, err := url.Parse("etcd://127.0.0.1/" + s.Target) // as clients before 1.10.3 do
	if err != nil {
		return nil, err
	}
	for _, r := range under(store, strings.Trim(u.Path, "/")+"/") {
		out = append(out, reading{Address: r.Value})
	}
	return out, nil
}

func readKratos(s Spec, store []Record) (out []reading, err error) {
	for _, r := range under(store, cmp.Or(s.Prefix, "/microservices")+"/"+s.Name) {
		var v struct {
			ID, Name, Version string
			Metadata          map[string]string
			Endpoints         []string
		}
		if err := json.Unmarshal([]byte(r.Value), &v); err != nil {
			return nil, err
		}
		if v.Name != s.Name {
			continue
		}
		weight := 100
		if w, ok := v.Metadata["weight"]; ok {
			if weight, err = strconv.Atoi(w); err != nil {
				return nil, err
			}
		}
		for _, scheme := range []string{"http", "https", "grpc", "grpcs"} {
			for _, e := range v.Endpoints {
				u, err := url.Parse(e)
				if err != nil {
					return nil, err
				}
				if u.Scheme == scheme {
					out = append(out, reading{scheme, u.Host, weight, v.Version, without(v.Metadata, "weight"), weight == 0})
					break
				}
			}
		}
	}
	return out, nil
}

func without(m map[string]string, keys ...string) map[string]string {
	m = maps.Clone(m)
	for _, k := range keys {
		delete(m, k)
	}
	return m
}

func readKitex(s Spec, store []Record) ([]reading, error) {
	return readCloudWeGo(under(store, cmp.Or(s.Prefix, "kitex/registry-etcd")+"/"+s.Name))
}

func readHertz(s Spec, store []Record) ([]reading, error) {
	return readCloudWeGo(under(store, "hertz/registry-etcd/"+strings.ToLower(s.Name)+"/"))
}

func readCloudWeGo(recs []Record) (out []reading, err error) {
	for _, r := range recs {
		var v struct {
			Network, Address string
			Weight           int
			Tags             map[string]string
		}
		if err := json.Unmarshal([]byte(r.Value), &v); err != nil {
			return nil, err
		}
		if v.Network != "tcp" || !strings.HasSuffix(r.Key, "/"+v.Address) {
			return nil, fmt.Errorf("%s: %+v", r.Key, v)
		}
		if v.Weight <= 0 {
			v.Weight = 10
		}
		out = append(out, reading{Address: v.Address, Weight: v.Weight, Metadata: v.Tags})
	}
	return out, nil
}

// dnsName is msg.Domain of CoreDNS, with its targetstrip.
func dnsName(key string, strip int) string {
	l := strings.Split(key, "/")[2:]
	slices.Reverse(l)
	return strings.Join(l[strip:], ".")
}

// readSkyDNS asks for the SRV records of the name, and for A and AAAA of their targets. Scheme is the SRV service.
func readSkyDNS(s Spec, store []Record) (out []reading, err error) {
	lookup := func(name string) (keys []Record) {
		l := strings.Split(name, ".")
		if slices.Contains(l, "any") || slices.Contains(l, "*") {
			return nil
		}
		slices.Reverse(l)
		path := "/" + cmp.Or(s.Prefix, "skydns") + "/" + strings.Join(l, "/")
		if keys = under(store, path+"/"); len(keys) == 0 {
			keys = slices.DeleteFunc(slices.Clone(store), func(r Record) bool { return r.Key != path })
		}
		return keys
	}
	type service struct {
		Host                                     string
		Port, Priority, Weight, TTL, TargetStrip int
	}
	decode := func(r Record) (v service, err error) {
		if err = json.Unmarshal([]byte(r.Value), &v); err == nil && (v.TTL < 1 || v.Weight < 1 || net.ParseIP(v.Host) == nil) {
			err = fmt.Errorf("%s: %+v", r.Key, v)
		}
		return v, err
	}
	seen := map[string]bool{}
	for _, r := range lookup(s.Name + "." + s.Domain) {
		v, err := decode(r)
		if err != nil {
			return nil, err
		}
		target := dnsName(r.Key, v.TargetStrip)
		if len(target) > 253 || strings.ToLower(target) != target {
			return nil, fmt.Errorf("bad name %q", target)
		}
		if srv := fmt.Sprint(target, v.Port); seen[srv] {
			continue
		} else {
			seen[srv] = true
		}
		service := ""
		if l := strings.Split(target, "."); strings.HasPrefix(l[1], "_") {
			service = l[1][1:]
		}
		hosts := lookup(target)
		if len(hosts) == 0 {
			return nil, fmt.Errorf("SRV target %s has no address", target)
		}
		for _, h := range hosts {
			a, err := decode(h)
			if err != nil {
				return nil, err
			}
			out = append(out, reading{Scheme: service, Address: net.JoinHostPort(a.Host, strconv.Itoa(v.Port)), Weight: v.Weight})
		}
	}
	return out, nil
}

// readTraefik decodes all keys below the root, as its provider does: what it doesn't know fails the whole.
func readTraefik(s Spec, store []Record) (out []reading, err error) {
	digits := regexp.MustCompile(`^\d+$`)
	servers := map[string]*reading{}
	root := cmp.Or(s.Prefix, "traefik")
	for _, r := range under(store, root+"/") {
		parts := strings.FieldsFunc(r.Key[len(root)+1:], func(c rune) bool { return c == '/' })
		if len(parts) != 7 || parts[0] != "http" || parts[1] != "services" || parts[3] != "loadbalancer" || parts[4] != "servers" {
			return nil, fmt.Errorf("field not found: %s", r.Key)
		}
		if digits.MatchString(parts[2]) || !digits.MatchString(parts[5]) {
			return nil, fmt.Errorf("not an index: %s", r.Key)
		}
		if !strings.EqualFold(parts[2], s.Name) {
			continue
		}
		if servers[parts[5]] == nil {
			servers[parts[5]] = &reading{Weight: 1}
		}
		v := servers[parts[5]]
		switch parts[6] {
		case "url":
			u, err := url.Parse(r.Value)
			if err != nil {
				return nil, err
			}
			v.Scheme, v.Address = u.Scheme, u.Host
		case "weight":
			if v.Weight, err = strconv.Atoi(r.Value); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("field not found: %s", r.Key)
		}
	}
	for _, v := range servers {
		out = append(out, *v)
	}
	return out, nil
}

func readGoMicro(s Spec, store []Record) (out []reading, err error) {
	for _, r := range under(store, cmp.Or(s.Prefix, "/micro/registry")+"/"+s.Name+"/") {
		var v struct {
			Name, Version string
			Metadata      map[string]string
			Endpoints     []any
			Nodes         []struct {
				ID, Address string
				Metadata    map[string]string
			}
		}
		if err := json.Unmarshal([]byte(r.Value), &v); err != nil {
			return nil, err
		}
		if v.Name != s.Name || len(v.Nodes) != 1 || !strings.HasSuffix(r.Key, "/"+v.Nodes[0].ID) {
			return nil, fmt.Errorf("%s: %+v", r.Key, v)
		}
		out = append(out, reading{Address: v.Nodes[0].Address, Version: v.Version, Metadata: v.Nodes[0].Metadata})
	}
	return out, nil
}

func readRPCX(s Spec, store []Record) (out []reading, err error) {
	for _, r := range under(store, s.Prefix+"/"+s.Name+"/") {
		network, addr, ok := strings.Cut(strings.TrimPrefix(r.Key, s.Prefix+"/"+s.Name+"/"), "@")
		if !ok || network != "tcp" {
			return nil, fmt.Errorf("%s: network %q", r.Key, network)
		}
		q, err := url.ParseQuery(r.Value)
		if err != nil {
			return nil, err
		}
		v := reading{Address: addr, Weight: 1, Down: q.Get("state") == "inactive", Metadata: map[string]string{}}
		if w := q.Get("weight"); w != "" {
			if v.Weight, err = strconv.Atoi(w); err != nil {
				return nil, err
			}
		}
		for k := range q {
			if k != "weight" && k != "state" {
				v.Metadata[k] = q.Get(k)
			}
		}
		out = append(out, v)
	}
	return out, nil
}

// TestWhatIsWrittenIsReadBack: with a second instance of the service, and one of a service that is called alike.
func TestWhatIsWrittenIsReadBack(t *testing.T) {
	a, b, alike := instance(), instance(), instance()
	a.Weight, a.Version, a.Zone, a.Metadata = 20, "v1", "z1", map[string]string{"k&": "v =;%"}
	b.ID, b.Addresses = "7a7a", []netip.Addr{v6, netip.MustParseAddr("10.0.0.2")}
	alike.ID, alike.Addresses = "8b8b", []netip.Addr{netip.MustParseAddr("10.0.0.3")}
	md := map[string]string{"k&": "v =;%", "zone": "z1"}
	tags := map[string]string{"k&": "v =;%", "zone": "z1", "version": "v1"}
	none := map[string]string{}
	for name, want := range map[string][]reading{
		"grpc":   {{Address: "10.0.0.1:9090"}, {Address: "[fd00::1]:9090"}},
		"gozero": {{Address: "10.0.0.1:9090"}, {Address: "[fd00::1]:9090"}},
		"kratos": {
			{"grpc", "10.0.0.1:9090", 20, "v1", md, false}, {"http", "10.0.0.1:8080", 20, "v1", md, false},
			{"grpc", "[fd00::1]:9090", 100, "", none, false}, {"http", "[fd00::1]:8080", 100, "", none, false},
		},
		"kitex": {{"", "10.0.0.1:9090", 20, "", tags, false}, {"", "[fd00::1]:9090", 10, "", none, false}},
		"hertz": {{"", "10.0.0.1:8080", 20, "", tags, false}, {"", "[fd00::1]:8080", 10, "", none, false}},
		"skydns": {
			{Scheme: "http", Address: "10.0.0.1:8080", Weight: 20}, {Scheme: "grpc", Address: "10.0.0.1:9090", Weight: 20},
			{Scheme: "http", Address: "[fd00::1]:8080", Weight: 10}, {Scheme: "grpc", Address: "[fd00::1]:9090", Weight: 10},
			{Scheme: "http", Address: "10.0.0.2:8080", Weight: 10}, {Scheme: "grpc", Address: "10.0.0.2:9090", Weight: 10},
		},
		"traefik":  {{Scheme: "http", Address: "10.0.0.1:8080", Weight: 20}, {Scheme: "http", Address: "[fd00::1]:8080", Weight: 1}},
		"go-micro": {{"", "10.0.0.1:9090", 0, "v1", md, false}, {"", "[fd00::1]:9090", 0, "latest", none, false}},
		"rpcx":     {{"", "10.0.0.1:9090", 20, "", tags, false}, {"", "[fd00::1]:9090", 1, "", none, false}},
	} {
		t.Run(name, func(t *testing.T) {
			s := specs()[name]
			if name == "skydns" {
				s.Port = "http+grpc"
			}
			v2 := s
			if v2.Target != "" {
				v2.Target += "-v2"
			} else {
				v2.Name += "-v2"
			}
			type written struct {
				s  Spec
				in Instance
			}
			all := []written{{s, a}, {s, b}, {v2, alike}}
			if name == "kitex" { // whose readers take a service that is called alike for the same
				all = all[:2]
			}
			var store []Record
			for _, w := range all {
				f, err := New(w.s)
				if err != nil {
					t.Fatal(err)
				}
				recs, err := f.Records(w.in)
				if err != nil {
					t.Fatal(err)
				}
				store = append(store, recs...)
			}
			got, err := readers[name](s, store)
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range [][]reading{got, want} {
				slices.SortFunc(l, func(x, y reading) int { return strings.Compare(x.Address+x.Scheme, y.Address+y.Scheme) })
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got\n%+v\nwant\n%+v", got, want)
			}
		})
	}
}

func TestReadersSendNothingToADrainingInstance(t *testing.T) {
	for _, name := range []string{"kratos", "rpcx"} {
		in := instance()
		in.Weight, in.Draining = 20, true
		recs, err := spec(t, name, nil).Records(in)
		if err != nil {
			t.Fatal(err)
		}
		got, err := readers[name](specs()[name], recs)
		if err != nil || len(got) == 0 || slices.ContainsFunc(got, func(r reading) bool { return !r.Down }) {
			t.Errorf("%s: got %+v, %v; want all down", name, got, err)
		}
	}
}

// input is what a fuzzer may choose. Two of its texts are settings, whose meaning is the format's.
type input struct {
	a, b, port, id, key, value, zone string
	ip, ip2                          []byte
	number                           uint16
	weight, ttl                      int
	draining                         bool
}

// fuzz: what is written is read back, beside a record that is as it should be, which stays readable; everything else is
// refused with an *Error. Nothing is ever outside of the prefix.
func fuzz(f *testing.F, settings func(*Spec, input)) {
	name := strings.ToLower(strings.TrimPrefix(f.Name(), "Fuzz"))
	if name == "gomicro" {
		name = "go-micro"
	}
	good := specs()[name]
	for _, s := range []struct{ a, b, port string }{
		{good.Target + good.Name + good.Key, good.Prefix + good.Domain + good.Value, good.Port}, {"", "", ""}, {"a/../b", "/usher", "http+x:grpc"},
	} {
		f.Add(s.a, s.b, s.port, "6f0d", "k", "v", "z", []byte{10, 0, 0, 1}, []byte{}, uint16(8080), 20, 5, false)
		f.Add(s.a, s.b, s.port, "6f0d", "k&", "=;%", "", v6.AsSlice(), []byte{10, 0, 0, 1}, uint16(1), 0, 0, true)
		f.Add(s.a, s.b, s.port, "../x", "weight", "\xff", "a\nb", []byte{}, []byte{0, 0, 0, 0}, uint16(0), -1, -1, false)
	}
	f.Fuzz(func(t *testing.T, a, b, port, id, key, value, zone string, ip, ip2 []byte, number uint16, weight, ttl int, draining bool) {
		in := input{a, b, port, id, key, value, zone, ip, ip2, number, weight, ttl, draining}
		s := Spec{Type: name, Port: port}
		settings(&s, in)
		refused := func(err error) {
			var e *Error
			if !errors.As(err, &e) || e.Format != name || e.Field == "" || e.Rule == "" {
				t.Fatalf("%+v: %v is no *Error with format, field and rule", s, err)
			}
		}
		codec, err := New(s)
		if err != nil {
			refused(err)
			return
		}
		i := Instance{
			ID: id, Namespace: "shop", Service: "api", Ports: []Port{{"http", number, "TCP"}, {"grpc", 9090, ""}},
			Weight: weight, Version: value, Zone: zone, Metadata: map[string]string{key: value}, Draining: draining,
		}
		for _, raw := range [][]byte{ip, ip2} {
			if addr, ok := netip.AddrFromSlice(raw); ok {
				i.Addresses = append(i.Addresses, addr)
			}
		}
		recs, err := codec.Records(i)
		if err != nil {
			refused(err)
			if recs != nil {
				t.Fatalf("records %v together with %v", recs, err)
			}
			return
		}
		if len(recs) == 0 != (draining && !codec.CanDrain()) {
			t.Fatalf("records %v, draining %t, can say so %t", recs, draining, codec.CanDrain())
		}
		for _, r := range recs {
			if !strings.HasPrefix(r.Key, codec.Prefix()) || strings.HasPrefix(r.Key, "/usher/") || len(r.Value) > maxValue {
				t.Fatalf("%q=%q is outside of %q", r.Key, r.Value, codec.Prefix())
			}
		}
		if readers[name] == nil || len(recs) == 0 {
			return
		}
		neighbour := Instance{ID: "neighbour", Addresses: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Ports: i.Ports, Weight: 7}
		beside, err := codec.Records(neighbour)
		if err != nil {
			t.Fatalf("the neighbour, whose ports are the same: %v", err)
		}
		alone, err := readers[name](s, beside)
		if err != nil || len(alone) == 0 {
			t.Fatalf("the neighbour alone: %v, %v", alone, err)
		}
		if slices.ContainsFunc(recs, func(r Record) bool { return slices.ContainsFunc(beside, func(o Record) bool { return o.Key == r.Key }) }) {
			return // a pod of the same name or address: not two instances
		}
		got, err := readers[name](s, append(recs, beside...))
		if err != nil {
			t.Fatalf("%v: %v", recs, err)
		}
		mine := 0
		for _, r := range got {
			if slices.ContainsFunc(alone, func(o reading) bool { return reflect.DeepEqual(o, r) }) {
				continue
			}
			mine++
			ap, err := netip.ParseAddrPort(r.Address)
			if err != nil || ap.Port() == 0 || !slices.ContainsFunc(i.Addresses, func(a netip.Addr) bool { return a.Unmap() == ap.Addr() }) {
				t.Fatalf("read address %q, %v of %v", r.Address, err, i.Addresses)
			}
			if r.Down != draining {
				t.Fatalf("read down %t, is draining %t", r.Down, draining)
			}
			if weight != 0 && r.Weight != 0 && r.Weight != weight {
				t.Fatalf("read weight %d, is %d", r.Weight, weight)
			}
			if r.Metadata != nil && r.Metadata[key] != value {
				t.Fatalf("read metadata %q=%q, is %q", key, r.Metadata[key], value)
			}
		}
		if len(got)-mine < len(alone) || mine == 0 && !slices.Equal(i.Addresses, neighbour.Addresses) {
			t.Fatalf("read %+v of %v beside %v", got, recs, alone)
		}
	})
}

func FuzzGRPC(f *testing.F)   { fuzz(f, func(s *Spec, in input) { s.Target = in.a }) }
func FuzzGoZero(f *testing.F) { fuzz(f, func(s *Spec, in input) { s.Target = in.a }) }
func FuzzKratos(f *testing.F) { fuzz(f, func(s *Spec, in input) { s.Name, s.Prefix = in.a, in.b }) }
func FuzzKitex(f *testing.F)  { fuzz(f, func(s *Spec, in input) { s.Name, s.Prefix = in.a, in.b }) }
func FuzzHertz(f *testing.F)  { fuzz(f, func(s *Spec, in input) { s.Name = in.a }) }
func FuzzSkyDNS(f *testing.F) {
	fuzz(f, func(s *Spec, in input) { s.Name, s.Domain, s.TTL = in.a, in.b, in.ttl })
}
func FuzzTraefik(f *testing.F)  { fuzz(f, func(s *Spec, in input) { s.Name, s.Prefix = in.a, in.b }) }
func FuzzGoMicro(f *testing.F)  { fuzz(f, func(s *Spec, in input) { s.Name, s.Prefix = in.a, in.b }) }
func FuzzRPCX(f *testing.F)     { fuzz(f, func(s *Spec, in input) { s.Name, s.Prefix = in.a, in.b }) }
func FuzzTemplate(f *testing.F) { fuzz(f, func(s *Spec, in input) { s.Key, s.Value = in.a, in.b }) }
