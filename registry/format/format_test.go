package format

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write testdata/*.golden anew")

var (
	v4 = netip.MustParseAddr("10.0.0.1")
	v6 = netip.MustParseAddr("fd00::1")
)

func instance() Instance {
	return Instance{
		ID: "6f0d", Namespace: "shop", Service: "api",
		Addresses: []netip.Addr{v4},
		Ports:     []Port{{"http", 8080, "TCP"}, {"grpc", 9090, "TCP"}, {"dns", 53, "UDP"}},
	}
}

// specs is a valid one of each format, with the names that its readers use by default.
func specs() map[string]Spec {
	return map[string]Spec{
		"grpc":     {Type: "grpc", Target: "shop/api", Port: "grpc"},
		"gozero":   {Type: "gozero", Target: "api.rpc", Port: "grpc"},
		"kratos":   {Type: "kratos", Name: "api", Port: "grpc+http"},
		"kitex":    {Type: "kitex", Name: "api", Port: "grpc"},
		"hertz":    {Type: "hertz", Name: "api", Port: "http"},
		"skydns":   {Type: "skydns", Name: "api", Domain: "shop.example.com", Port: "http"},
		"traefik":  {Type: "traefik", Name: "api", Port: "http"},
		"go-micro": {Type: "go-micro", Name: "api", Port: "grpc"},
		"rpcx":     {Type: "rpcx", Name: "api", Prefix: "/rpcx", Port: "grpc"},
		"template": {
			Type: "template", Port: "http",
			Key:   "/services/{{.Namespace}}/{{.Service}}/{{.ID}}",
			Value: `{"addr":{{hostport .Address .Port | json}},"up":{{not .Draining}}}`,
		},
	}
}

func spec(t testing.TB, name string, change func(*Spec)) Format {
	t.Helper()
	s := specs()[name]
	if change != nil {
		change(&s)
	}
	f, err := New(s)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestGoldenRecords(t *testing.T) {
	rich := instance()
	rich.Weight, rich.Version, rich.Zone = 20, "v1.2.3", "eu-1a"
	rich.Metadata = map[string]string{"group": "a&b=c", "team.example.com/owner": "Zoë <z>"}
	six, mapped, dual, draining := instance(), instance(), instance(), rich
	mapped.Addresses = []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1")}
	six.Addresses = []netip.Addr{v6}
	dual.Addresses = []netip.Addr{v6, v4}
	draining.Draining = true
	type golden struct {
		name   string
		change func(*Spec)
		in     Instance
	}
	common := []golden{
		{"plain", nil, instance()},
		{"weight, version, zone and metadata", nil, rich},
		{"IPv6", nil, six},
		{"IPv4 mapped to IPv6", nil, mapped},
		{"dual stack", nil, dual},
		{"draining", nil, draining},
		{"number that the Service doesn't list", func(s *Spec) {
			s.Port = "7000"
			if s.Type == "kratos" {
				s.Port = "http:7000"
			}
		}, instance()},
	}
	special := map[string][]golden{
		"kratos": {
			{"schemes and prefix said", func(s *Spec) { s.Port, s.Prefix = "https:http+grpcs:7000", "/ns/microservices" }, instance()},
			{"scheme by the name of the port that has the number", func(s *Spec) { s.Port = "9090" }, instance()},
		},
		"kitex": {{"prefix", func(s *Spec) { s.Prefix = "shop/kitex" }, instance()}},
		"skydns": {
			{"several ports answer SRV", func(s *Spec) { s.Port = "http+grpc" }, instance()},
			{"one port with its SRV service, dual stack", func(s *Spec) { s.Port = "web:http" }, dual},
			{"prefix and ttl", func(s *Spec) { s.Prefix, s.TTL = "dns", 60 }, instance()},
			{"name of several labels", func(s *Spec) { s.Name = "v1.api" }, instance()},
		},
		"traefik": {
			{"scheme by the port's name", func(s *Spec) { s.Port = "grpc" }, instance()},
			{"scheme and prefix said", func(s *Spec) { s.Port, s.Prefix = "https:http", "edge/traefik" }, instance()},
		},
		"go-micro": {{"prefix", func(s *Spec) { s.Prefix = "/micro/registry/micro" }, instance()}},
		"template": {{"no word of draining", func(s *Spec) { s.Value = "{{bracket .Address}} {{lower .Version}}" }, draining}},
	}
	for _, name := range Types() {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			for _, g := range slices.Concat(common, special[name]) {
				f := spec(t, name, g.change)
				recs, err := f.Records(g.in)
				if err != nil {
					t.Fatalf("%s: %v", g.name, err)
				}
				fmt.Fprintf(&out, "# %s\n", g.name)
				if len(recs) == 0 {
					fmt.Fprintln(&out, "no records")
				}
				for _, r := range recs {
					fmt.Fprintf(&out, "%s\n  %s\n", r.Key, r.Value)
				}
			}
			file := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if out.String() != string(want) {
				t.Errorf("got\n%s\nwant %s:\n%s", out.String(), file, want)
			}
		})
	}
}

func TestOnlyTCPPortIsTheDefault(t *testing.T) {
	f := spec(t, "grpc", func(s *Spec) { s.Port = "" })
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

func TestLagAndDraining(t *testing.T) {
	type traits struct {
		lag   time.Duration
		drain bool
	}
	want := map[string]traits{
		"grpc": {}, "gozero": {}, "go-micro": {}, "kitex": {lag: 5 * time.Second}, "hertz": {lag: 5 * time.Second},
		"skydns": {lag: 5 * time.Second}, "traefik": {lag: 2 * time.Second},
		"kratos": {drain: true}, "rpcx": {drain: true}, "template": {drain: true},
	}
	for _, name := range Types() {
		f := spec(t, name, nil)
		if got := (traits{f.Lag(), f.CanDrain()}); got != want[name] {
			t.Errorf("%s: got %+v, want %+v", name, got, want[name])
		}
		in := instance()
		in.Draining = true
		if recs, err := f.Records(in); err != nil || (len(recs) > 0) != f.CanDrain() {
			t.Errorf("%s: draining: got %v, %v", name, recs, err)
		}
	}
	for ttl, want := range map[int]time.Duration{1: 5 * time.Second, 60: time.Minute} {
		if got := spec(t, "skydns", func(s *Spec) { s.TTL = ttl }).Lag(); got != want {
			t.Errorf("skydns with ttl %d: lag %s, want %s", ttl, got, want)
		}
	}
	if spec(t, "template", func(s *Spec) { s.Value = "{{.Address}}" }).CanDrain() {
		t.Error("a template without .Draining can drain")
	}
}

// TestDrainingKeepsTheKeys: a drain that is said changes values only, so that nothing is missing in between.
func TestDrainingKeepsTheKeys(t *testing.T) {
	for _, name := range Types() {
		f := spec(t, name, nil)
		if !f.CanDrain() {
			continue
		}
		in := instance()
		before, err1 := f.Records(in)
		in.Draining = true
		after, err2 := f.Records(in)
		if err1 != nil || err2 != nil || len(before) != len(after) {
			t.Fatalf("%s: %v %v, %v %v", name, before, err1, after, err2)
		}
		same := 0
		for n := range before {
			if before[n].Key != after[n].Key {
				t.Errorf("%s: key %s became %s", name, before[n].Key, after[n].Key)
			}
			if before[n].Value == after[n].Value {
				same++
			}
		}
		if same == len(before) {
			t.Errorf("%s: draining changes nothing", name)
		}
	}
}

func TestBadSpecNamesFieldAndRule(t *testing.T) {
	type bad struct {
		change func(*Spec)
		field  string
		rule   string
	}
	badPorts := []bad{
		{func(s *Spec) { s.Port = "70000" }, "port", "1 to 65535"},
		{func(s *Spec) { s.Port = "0" }, "port", "1 to 65535"},
		{func(s *Spec) { s.Port = "-1" }, "port", "1 to 65535"},
		{func(s *Spec) { s.Port = "HTTP" }, "port", "port name"},
		{func(s *Spec) { s.Port = "http+" }, "port", "port name"},
		{func(s *Spec) { s.Port = ":http" }, "port", "before the colon"},
		{func(s *Spec) { s.Port = "http+http" }, "port", "twice"},
	}
	badTargets := []bad{
		{func(s *Spec) { s.Target = "" }, "target", "want a path"},
		{func(s *Spec) { s.Target = "a//b" }, "target", "empty segment"},
		{func(s *Spec) { s.Target = "a/" }, "target", "slash at the end"},
		{func(s *Spec) { s.Target = "a b" }, "target", "no space"},
		{func(s *Spec) { s.Target = "a\x00b" }, "target", "no control character"},
		{func(s *Spec) { s.Target = "a\xff" }, "target", "UTF-8"},
		{func(s *Spec) { s.Target = "a/../b" }, "target", ".."},
		{func(s *Spec) { s.Target = "/usher/v1/x" }, "target", "ledger"},
		{func(s *Spec) { s.Target = "/usher" }, "target", "ledger"},
		{func(s *Spec) { s.Target = "a?b" }, "target", "URL"},
		{func(s *Spec) { s.Target = "a%2fb" }, "target", "URL"},
	}
	badNames := []bad{
		{func(s *Spec) { s.Name = "" }, "name", "want"},
		{func(s *Spec) { s.Name = "a/b" }, "name", "want"},
		{func(s *Spec) { s.Name = ".." }, "name", "want"},
		{func(s *Spec) { s.Name = "a b" }, "name", "want"},
		{func(s *Spec) { s.Name = "a@etcd" }, "name", "want"},
		{func(s *Spec) { s.Name = "café" }, "name", "want"},
	}
	badPrefixes := []bad{
		{func(s *Spec) { s.Prefix = "a//b" }, "prefix", "empty segment"},
		{func(s *Spec) { s.Prefix = "a/" }, "prefix", "end"},
		{func(s *Spec) { s.Prefix = "/usher" }, "prefix", "ledger"},
	}
	onePort := bad{func(s *Spec) { s.Port = "http+grpc" }, "port", "one port"}
	noAs := bad{func(s *Spec) { s.Port = "http:web" }, "port", "one port"}
	unused := func(change func(*Spec), field string) bad { return bad{change, field, "no such setting, only"} }
	table := map[string][]bad{
		"grpc": slices.Concat(badTargets, badPorts, []bad{
			onePort, noAs,
			unused(func(s *Spec) { s.Name = "api" }, "name"), unused(func(s *Spec) { s.Prefix = "/p" }, "prefix"),
			unused(func(s *Spec) { s.Domain = "d" }, "domain"), unused(func(s *Spec) { s.TTL = 5 }, "ttl"),
			unused(func(s *Spec) { s.Key = "k" }, "key"), unused(func(s *Spec) { s.Value = "v" }, "value"),
		}),
		"gozero": slices.Concat(badTargets, badPorts, []bad{
			onePort, noAs, {func(s *Spec) { s.Target = "/api.rpc" }, "target", "no slash at the start"},
		}),
		"kratos": slices.Concat(badNames, badPrefixes, badPorts, []bad{
			{func(s *Spec) { s.Port = "ftp:web" }, "port", "http, https, grpc, grpcs"},
			unused(func(s *Spec) { s.Target = "t" }, "target"),
		}),
		"kitex": slices.Concat(badNames, badPrefixes, badPorts, []bad{onePort, noAs}),
		"hertz": slices.Concat(badNames, badPorts, []bad{
			onePort, noAs, {func(s *Spec) { s.Name = "Api" }, "name", "lower case"},
			unused(func(s *Spec) { s.Prefix = "/p" }, "prefix"),
		}),
		"skydns": slices.Concat(badNames, badPorts, []bad{
			{func(s *Spec) { s.Prefix = "a/b" }, "prefix", "one segment"},
			{func(s *Spec) { s.Prefix = "usher" }, "prefix", "ledger"},
			{func(s *Spec) { s.Name = "Api" }, "name", "lower-case"},
			{func(s *Spec) { s.Name = "a_b" }, "name", "hyphens"},
			{func(s *Spec) { s.Name = "any" }, "name", "wildcard"},
			{func(s *Spec) { s.Name = "-a" }, "name", "DNS labels"},
			{func(s *Spec) { s.Name = strings.Repeat("a", 64) }, "name", "DNS labels"},
			{func(s *Spec) { s.Domain = "" }, "domain", "DNS labels"},
			{func(s *Spec) { s.Domain = "example.com." }, "domain", "DNS labels"},
			{func(s *Spec) { s.TTL = -1 }, "ttl", "1 to 3600"},
			{func(s *Spec) { s.TTL = 3601 }, "ttl", "1 to 3600"},
			{func(s *Spec) { s.Port = "Web:http" }, "port", "SRV service"},
			{func(s *Spec) { s.Port = "_web:http" }, "port", "SRV service"},
			{func(s *Spec) { s.Port = strings.Repeat("a", 63) + ":http" }, "port", "SRV service"},
		}),
		"traefik": slices.Concat(badNames, badPrefixes, badPorts, []bad{
			onePort, {func(s *Spec) { s.Port = "ftp:http" }, "port", "h2c"},
			{func(s *Spec) { s.Name = "42" }, "name", "more than digits"},
			{func(s *Spec) { s.Prefix = "/traefik" }, "prefix", "no slash at the start"},
		}),
		"go-micro": slices.Concat(badNames, badPrefixes, badPorts, []bad{onePort, noAs}),
		"rpcx": slices.Concat(badNames, badPrefixes, badPorts, []bad{
			onePort, noAs, {func(s *Spec) { s.Prefix = "" }, "prefix", "base path"},
		}),
		"template": slices.Concat(badPorts, []bad{
			onePort, noAs, unused(func(s *Spec) { s.Name = "api" }, "name"),
			{func(s *Spec) { s.Key = "" }, "key", "text/template"},
			{func(s *Spec) { s.Value = "" }, "value", "text/template"},
			{func(s *Spec) { s.Key = "/s/{{.ID" }, "key", "text/template"},
			{func(s *Spec) { s.Key = "/s/{{.Pod}}" }, "key", "can't be rendered"},
			{func(s *Spec) { s.Value = "{{env}}" }, "value", "text/template"},
			{func(s *Spec) { s.Value = "{{printf `%70000d` 1}}" }, "value", "more than 65536 bytes"},
			{func(s *Spec) { s.Value = "{{if not .Draining}}up{{end}}" }, "value", "not empty"},
			{func(s *Spec) { s.Key = "/s/{{.Service}}" }, "key", "same key"},
			{func(s *Spec) { s.Key = "/s/{{.Metadata.name}}" }, "key", "same key"},
			{func(s *Spec) { s.Key = "/s/{{.ID}}/{{.Draining}}" }, "key", "draining"},
			{func(s *Spec) { s.Key = "{{.ID}}" }, "key", "fixed path"},
			{func(s *Spec) { s.Key = "/{{.Service}}/{{.ID}}" }, "key", "fixed path"},
			{func(s *Spec) { s.Key = "/usher/v1/{{.ID}}" }, "key", "ledger"},
			{func(s *Spec) { s.Key = "/s/{{.ID}}/" }, "key", "slash at the end"},
			{func(s *Spec) { s.Key = "/s/{{.ID}} " }, "key", "no space"},
		}),
	}
	for _, name := range Types() {
		for _, b := range table[name] {
			s := specs()[name]
			b.change(&s)
			f, err := New(s)
			var e *Error
			if !errors.As(err, &e) || f != nil || e.Format != name || e.Field != b.field || !strings.Contains(e.Rule, b.rule) {
				t.Errorf("%+v: got %v, %v; want an *Error of %s about %s: %s", s, f, err, name, b.field, b.rule)
			}
		}
		if len(table[name]) == 0 {
			t.Errorf("%s has no bad settings here", name)
		}
	}
	for _, s := range []Spec{{}, {Type: "zookeeper"}} {
		var e *Error
		if _, err := New(s); !errors.As(err, &e) || e.Field != "type" || !strings.Contains(e.Rule, "gozero") {
			t.Errorf("%+v: got %v, want an *Error that lists the types", s, err)
		}
	}
}

func TestInstanceThatBreaksARuleIsRefused(t *testing.T) {
	type bad struct {
		change func(*Instance)
		field  string
	}
	weight := func(w int) bad { return bad{func(i *Instance) { i.Weight = w }, "weight"} }
	meta := func(k, v string) bad {
		return bad{func(i *Instance) { i.Metadata = map[string]string{k: v} }, "metadata " + k}
	}
	common := map[string]bad{
		"no address":          {func(i *Instance) { i.Addresses = nil }, "address"},
		"zero address":        {func(i *Instance) { i.Addresses = []netip.Addr{{}} }, "address"},
		"unspecified address": {func(i *Instance) { i.Addresses[0] = netip.IPv6Unspecified() }, "address"},
		"multicast address":   {func(i *Instance) { i.Addresses[0] = netip.MustParseAddr("224.0.0.1") }, "address"},
		"no such port":        {func(i *Instance) { i.Ports = []Port{{"other", 1, "TCP"}} }, "port"},
		"port is UDP":         {func(i *Instance) { i.Ports = []Port{{"http", 1, "UDP"}, {"grpc", 2, "UDP"}} }, "port"},
		"empty id":            {func(i *Instance) { i.ID = "" }, "id"},
		"slash in id":         {func(i *Instance) { i.ID = "a/b" }, "id"},
		"id leads upwards":    {func(i *Instance) { i.ID = ".." }, "id"},
	}
	metadata := map[string]bad{
		"metadata without a key":      meta("", "v"),
		"metadata key with a space":   meta("a b", "v"),
		"metadata key not ASCII":      meta("é", "v"),
		"metadata value not UTF-8":    meta("k", "\xff"),
		"metadata value with newline": meta("k", "a\nb"),
		"zone not UTF-8":              {func(i *Instance) { i.Zone = "\xff" }, "zone"},
		"version with newline":        {func(i *Instance) { i.Version = "1\n" }, "version"},
		"metadata of another zone":    {func(i *Instance) { i.Zone, i.Metadata = "a", map[string]string{"zone": "b"} }, "metadata zone"},
		"value too large":             {func(i *Instance) { i.Metadata = map[string]string{"k": strings.Repeat("a", maxValue)} }, "value"},
	}
	tooLong := bad{func(i *Instance) { i.ID = strings.Repeat("a", 2000) }, "key"}
	special := map[string]map[string]bad{
		"grpc":     {"id too long": tooLong},
		"gozero":   {"id too long": tooLong},
		"go-micro": {"id too long": tooLong},
		"template": {"id too long": tooLong},
		"kratos": {
			"id too long": tooLong,

			"weight below": weight(-1), "weight above": weight(65536), "metadata that has the weight": meta("weight", "3"),
			"port that says no scheme": {func(i *Instance) { i.Ports[0].Number = 9091; i.Ports[0].Name = "web" }, "port"},
		},
		"kitex": {"weight below": weight(-1), "weight above": weight(65536)},
		"hertz": {"weight below": weight(-1), "weight above": weight(65536)},
		"skydns": {
			"weight below": weight(-1), "weight above": weight(65536),
			"id with upper case":         {func(i *Instance) { i.ID = "6F0D" }, "id"},
			"id of two labels":           {func(i *Instance) { i.ID = "a.b" }, "id"},
			"id that is a wildcard":      {func(i *Instance) { i.ID = "any" }, "id"},
			"two addresses of a family":  {func(i *Instance) { i.Addresses = []netip.Addr{v4, netip.MustParseAddr("10.0.0.2")} }, "address"},
			"three addresses":            {func(i *Instance) { i.Addresses = []netip.Addr{v4, v6, netip.MustParseAddr("10.0.0.2")} }, "address"},
			"id longer than a DNS label": {func(i *Instance) { i.ID = strings.Repeat("a", 64) }, "id"},
		},
		"traefik": {"weight below": weight(-1), "weight above": weight(65536)},
		"rpcx": {
			"weight below": weight(-1), "weight above": weight(1001),
			"metadata that has the state": meta("state", "active"), "metadata that has the weight": meta("weight", "3"),
		},
	}
	for _, name := range Types() {
		cases := []map[string]bad{common, special[name]}
		if slices.Contains([]string{"kratos", "kitex", "hertz", "go-micro", "rpcx"}, name) {
			cases = append(cases, metadata)
		}
		f := spec(t, name, nil)
		for _, c := range cases {
			for what, b := range c {
				in := instance()
				b.change(&in)
				got, err := f.Records(in)
				var e *Error
				if !errors.As(err, &e) || len(got) > 0 || e.Format != name || e.Field != b.field || e.Rule == "" {
					t.Errorf("%s, %s: got %v, %v; want an *Error about %s", name, what, got, err, b.field)
				}
			}
		}
	}
}

// TestMetadataMayRepeatTheInstance: pod labels often are called version or zone.
func TestMetadataMayRepeatTheInstance(t *testing.T) {
	for _, name := range []string{"kratos", "kitex", "hertz", "go-micro", "rpcx"} {
		in := instance()
		in.Version, in.Zone = "v1", "a"
		want, err := spec(t, name, nil).Records(in)
		if err != nil {
			t.Fatal(err)
		}
		in.Metadata = map[string]string{"zone": "a"}
		if got, err := spec(t, name, nil).Records(in); err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: got %v, %v; want %v", name, got, err, want)
		}
		in.Zone, in.Metadata = "", map[string]string{"zone": "eu-2b", "version": "v1"}
		if got, err := spec(t, name, nil).Records(in); err != nil || !strings.Contains(got[0].Value, "eu-2b") {
			t.Errorf("%s: got %v, %v; want the zone of the metadata", name, got, err)
		}
	}
}

func TestRulesThatHoldForSettingsAndInstanceTogether(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*Spec)
		in     func(*Instance)
		field  string
	}{
		{"kratos", func(s *Spec) { s.Port = "http:http+http:grpc" }, nil, "port"},
		{"kratos", func(s *Spec) { s.Port = "7000" }, nil, "port"},
		{"skydns", func(s *Spec) { s.Port = "http+7000" }, nil, "port"},
		{"skydns", func(s *Spec) { s.Port = "web:http+web:8080" }, nil, "key"},
		{"skydns", func(s *Spec) { s.Domain = strings.TrimSuffix(strings.Repeat("abcdefghi.", 25), ".") }, nil, "name"},
		{"template", func(s *Spec) { s.Key = "/s/{{.ID}}/{{.Metadata.shard}}" }, nil, "key"},
		{"template", func(s *Spec) { s.Value = "{{.Metadata.shard}}{{.Draining}}" }, nil, "value"},
		{"template", func(s *Spec) { s.Value = "{{.Zone}}" }, func(i *Instance) { i.Zone = " " }, "value"},
		{"template", func(s *Spec) { s.Key = "/s/{{.Zone}}/{{.ID}}" }, func(i *Instance) { i.Zone = "a b" }, "key"},
		{"template", func(s *Spec) { s.Key = "/s/{{.Zone}}/{{.ID}}" }, func(i *Instance) { i.Zone = ".." }, "key"},
		{"template", func(s *Spec) { s.Key = "/s{{if .Metadata}}2{{end}}/{{.ID}}" }, func(i *Instance) { i.Metadata = map[string]string{"a": "b"} }, "key"},
	} {
		in := instance()
		if c.in != nil {
			c.in(&in)
		}
		got, err := spec(t, c.name, c.change).Records(in)
		var e *Error
		if !errors.As(err, &e) || e.Format != c.name || e.Field != c.field {
			t.Errorf("%s: got %v, %v; want an *Error about %s", c.name, got, err, c.field)
		}
	}
}

// TestTemplateWithoutPortAsksForNone: a Service of several ports is no obstacle to a template that names none.
func TestTemplateWithoutPortAsksForNone(t *testing.T) {
	f := spec(t, "template", func(s *Spec) { s.Port, s.Value = "", `{{range .Ports}}{{.Name}}={{.Number}} {{end}}` })
	got, err := f.Records(instance())
	if err != nil || got[0].Value != "http=8080 grpc=9090 dns=53 " {
		t.Errorf("got %v, %v", got, err)
	}
}

func TestTemplatePrefix(t *testing.T) {
	for key, want := range map[string]string{
		"/services/{{.Service}}/{{.ID}}":   "/services/",
		"/services/api/{{.ID}}":            "/services/api/",
		"services/api-{{.Address}}":        "services/",
		"/services/{{index .Addresses 1}}": "/services/",
	} {
		if got := spec(t, "template", func(s *Spec) { s.Key = key }).Prefix(); got != want {
			t.Errorf("%s: got prefix %q, want %q", key, got, want)
		}
	}
}

func TestSetAndDefaults(t *testing.T) {
	var s Spec
	for k, v := range map[string]string{
		"format": "skydns", "target": "t", "name": "n", "prefix": "p", "domain": "d", "port": "http", "ttl": "7", "key": "k", "value": "v",
	} {
		if err := s.Set(k, v); err != nil {
			t.Error(err)
		}
	}
	if want := (Spec{"skydns", "t", "n", "p", "d", "http", 7, "k", "v"}); s != want {
		t.Errorf("got %+v, want %+v", s, want)
	}
	for k, v := range map[string]string{"zone": "x", "ttl": "5s", "": "x"} {
		var e *Error
		if err := s.Set(k, v); !errors.As(err, &e) || e.Field != k {
			t.Errorf("%s=%s: got %v, want an *Error about it", k, v, err)
		}
	}
	for _, c := range []struct{ in, want Spec }{
		{Spec{}, Spec{Type: "grpc", Target: "shop/api"}},
		{Spec{Type: "gozero", Target: "api.rpc"}, Spec{Type: "gozero", Target: "api.rpc"}},
		{Spec{Type: "kratos"}, Spec{Type: "kratos", Name: "api"}},
		{Spec{Type: "template"}, Spec{Type: "template"}},
		{Spec{Type: "zookeeper"}, Spec{Type: "zookeeper"}},
	} {
		if got := c.in.WithDefaults("shop", "api"); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: got %+v, want %+v", c.in, got, c.want)
		}
	}
}

// TestDocumentation: every format has its rows in docs/formats.md, with its lag, and the examples are valid.
func TestDocumentation(t *testing.T) {
	raw, err := os.ReadFile("../../docs/formats.md")
	if err != nil {
		t.Fatal(err)
	}
	examples := map[string]bool{"template": true} // not in the form that is read here
	rows := map[string][]string{}
	for line := range strings.Lines(string(raw)) {
		line = strings.TrimSpace(line)
		if l, ok := strings.CutPrefix(line, "- {"); ok {
			var s Spec
			for setting := range strings.SplitSeq(strings.TrimSuffix(l, "}"), ", ") {
				k, v, _ := strings.Cut(setting, ": ")
				if err := s.Set(k, strings.Trim(v, `"`)); err != nil {
					t.Errorf("%s: %v", line, err)
				}
			}
			if _, err := New(s); err != nil {
				t.Errorf("%s: %v", line, err)
			}
			examples[s.Type] = true
		}
		if cells := strings.Split(strings.Trim(line, "|"), "|"); strings.HasPrefix(line, "| `") {
			name := strings.Trim(cells[0], " `")
			rows[name] = append(rows[name], cells...)
		}
	}
	for _, name := range Types() {
		lag := "0,"
		if d := spec(t, name, nil).Lag(); d > 0 {
			lag = strings.TrimSuffix(d.String(), "s") + " s,"
		}
		if len(rows[name]) != 4+6 || !strings.HasPrefix(strings.TrimSpace(rows[name][6]), lag) || !examples[name] {
			t.Errorf("%s: rows %q, example %t; want two rows with the lag %s, and an example", name, rows[name], examples[name], lag)
		}
	}
}
