// Package format turns an instance into the etcd records that existing discovery clients read. Codecs are pure: they
// never touch etcd, and they validate strictly, since one malformed record can break a whole service for its readers.
//
//	Spec --New--> Format           settings are checked once, before anything starts
//	Instance --Records--> []Record all or nothing: keys and values that keep every rule, or an *Error
//
// docs/formats.md has the formats, their readers and what those can be told.
package format

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Instance is what a format may say of an instance. What a format has no place for (see docs/formats.md) it leaves out.
type Instance struct {
	ID        string // unique among all instances that ever were: the pod's UID
	Namespace string
	Service   string
	Addresses []netip.Addr // the primary one first; formats of one address use it
	Ports     []Port
	Weight    int // share of the traffic; 0: the default of the format's readers
	Version   string
	Zone      string
	Metadata  map[string]string
	// Draining asks readers for no more new requests. A format that can't say so has no records then.
	Draining bool
}

// Port is one port of an instance.
type Port struct {
	Name     string
	Number   uint16
	Protocol string // "TCP" when empty
}

// Record is one etcd key with its value.
type Record struct{ Key, Value string }

// Format is one kind of record.
type Format interface {
	// Records are the keys and values of an instance; none for a draining one if the format can't say so. A rule that
	// the instance breaks is an *Error, and there are no records then.
	Records(Instance) ([]Record, error)
	// Prefix is what the keys of all records begin with.
	Prefix() string
	// CanDrain tells whether a draining instance has records that say so. It is then said before the records go.
	CanDrain() bool
	// Lag is how long readers may go on after the records are gone, on top of the milliseconds of an etcd watch.
	Lag() time.Duration
}

// Spec is a format as it is configured. A field that the format doesn't use is refused.
type Spec struct {
	Type string `json:"type"`
	// Target is the key that clients ask for (grpc: they dial etcd:///<target>; gozero: Etcd.Key).
	Target string `json:"target,omitempty"`
	// Name is what clients call the service (kratos, kitex, hertz, skydns, traefik, go-micro, rpcx).
	Name string `json:"name,omitempty"`
	// Prefix is the path that all services lie under (kratos, kitex, skydns, traefik, go-micro, rpcx). Each format but
	// rpcx has its readers' default.
	Prefix string `json:"prefix,omitempty"`
	// Domain is the zone, or a domain in it, that Name belongs to (skydns).
	Domain string `json:"domain,omitempty"`
	// Port is the name or number of a TCP port; empty means the only one. kratos and skydns take several, as in
	// grpc+http. What readers call a port may go before it, as in http:web+grpc:9090: the URL's scheme (kratos,
	// traefik), or the service of an SRV name (skydns).
	Port string `json:"port,omitempty"`
	// TTL is how long resolvers may keep a record, in seconds (skydns); 0 means 5.
	TTL int `json:"ttl,omitempty"`
	// Key and Value are Go text/templates over the instance (template).
	Key   string `json:"key,omitempty"`
	Value string `json:"value,omitempty"`
}

// Error names the format, the field and the rule that was broken.
type Error struct{ Format, Field, Value, Rule string }

func (e *Error) Error() string {
	v := e.Value
	if len(v) > 200 {
		v = v[:200] + "..."
	}
	where := ""
	if e.Format != "" {
		where = "format " + e.Format + ": "
	}
	return fmt.Sprintf("%s%s %q: %s", where, e.Field, v, e.Rule)
}

// kind is a type of format: how it is built, and of which fields of Spec.
type kind struct {
	build func(Spec) (codec, error)
	uses  []string
}

var kinds = map[string]kind{
	"grpc":     {newGRPC, []string{"target", "port"}},
	"gozero":   {newGoZero, []string{"target", "port"}},
	"kratos":   {newKratos, []string{"name", "prefix", "port"}},
	"kitex":    {newKitex, []string{"name", "prefix", "port"}},
	"hertz":    {newHertz, []string{"name", "port"}},
	"skydns":   {newSkyDNS, []string{"name", "prefix", "domain", "port", "ttl"}},
	"traefik":  {newTraefik, []string{"name", "prefix", "port"}},
	"go-micro": {newGoMicro, []string{"name", "prefix", "port"}},
	"rpcx":     {newRPCX, []string{"name", "prefix", "port"}},
	"template": {newTemplate, []string{"port", "key", "value"}},
}

// Types are the names that Spec.Type may have.
func Types() []string { return slices.Sorted(maps.Keys(kinds)) }

// fields are those of Spec beside the type, by their keys in a file, in the order of the struct.
func (s *Spec) fields() []struct {
	key  string
	text *string
} {
	return []struct {
		key  string
		text *string
	}{
		{"target", &s.Target}, {"name", &s.Name}, {"prefix", &s.Prefix}, {"domain", &s.Domain},
		{"port", &s.Port}, {"key", &s.Key}, {"value", &s.Value},
	}
}

// Set sets the field that is key in a file, as "target=shop/api" on a command line does; "format" is the type too.
func (s *Spec) Set(key, value string) error {
	switch key {
	case "type", "format":
		s.Type = value
		return nil
	case "ttl":
		n, err := strconv.Atoi(value)
		if err != nil {
			return &Error{Format: s.Type, Field: "ttl", Value: value, Rule: "want a number of seconds"}
		}
		s.TTL = n
		return nil
	}
	keys := []string{"format", "ttl"}
	for _, f := range s.fields() {
		if f.key == key {
			*f.text = value
			return nil
		}
		keys = append(keys, f.key)
	}
	return &Error{Format: s.Type, Field: key, Value: value, Rule: "no such setting, want one of " + strings.Join(keys, ", ")}
}

// WithDefaults fills in what follows from the Service: type grpc, target <namespace>/<service>, name <service>.
func (s Spec) WithDefaults(namespace, service string) Spec {
	if s.Type == "" {
		s.Type = "grpc"
	}
	uses := kinds[s.Type].uses
	if s.Target == "" && slices.Contains(uses, "target") {
		s.Target = namespace + "/" + service
	}
	if s.Name == "" && slices.Contains(uses, "name") {
		s.Name = service
	}
	return s
}

// Ports are the names and numbers that Port gives, without what readers call them; none where Port is empty.
func (s Spec) Ports() ([]string, error) {
	if s.Port == "" {
		return nil, nil
	}
	refs, err := parsePorts(s.Type, s.Port)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(refs))
	for i, r := range refs {
		names[i] = r.want
	}
	return names, nil
}

// New builds the format that s describes. Errors are *Error.
func New(s Spec) (Format, error) {
	k, ok := kinds[s.Type]
	if !ok {
		return nil, &Error{Format: strconv.Quote(s.Type), Field: "type", Value: s.Type, Rule: "want one of " + strings.Join(Types(), ", ")}
	}
	unused := func(key, value string) error {
		return &Error{Format: s.Type, Field: key, Value: value, Rule: "this format has no such setting, only " + strings.Join(k.uses, ", ")}
	}
	for _, f := range s.fields() {
		if *f.text != "" && !slices.Contains(k.uses, f.key) {
			return nil, unused(f.key, *f.text)
		}
	}
	if s.TTL != 0 && !slices.Contains(k.uses, "ttl") {
		return nil, unused("ttl", strconv.Itoa(s.TTL))
	}
	c, err := k.build(s)
	if err != nil {
		return nil, err
	}
	c.format = s.Type
	return c, nil
}

// codec is a Format: the rules that all have in common around the encoding of one.
type codec struct {
	format string
	prefix string
	lag    time.Duration
	drains bool
	encode func(Instance) ([]Record, error)
}

func (c codec) Prefix() string     { return c.prefix }
func (c codec) CanDrain() bool     { return c.drains }
func (c codec) Lag() time.Duration { return c.lag }

func (c codec) Records(i Instance) ([]Record, error) {
	if i.Draining && !c.drains {
		return nil, nil
	}
	if err := checkSegment(c.format, "id", i.ID); err != nil {
		return nil, err
	}
	if len(i.Addresses) == 0 {
		return nil, &Error{Format: c.format, Field: "address", Rule: "the instance has none"}
	}
	i.Addresses = slices.Clone(i.Addresses)
	for n, a := range i.Addresses {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			return nil, &Error{Format: c.format, Field: "address", Value: a.String(), Rule: "want the IP address of one host"}
		}
		i.Addresses[n] = a.WithZone("").Unmap()
	}
	recs, err := c.encode(i)
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	for _, r := range recs {
		if err := checkRecord(c.format, c.prefix, r); err != nil {
			return nil, err
		}
		if seen[r.Key] {
			return nil, &Error{Format: c.format, Field: "key", Value: r.Key, Rule: "two records of the instance would have it"}
		}
		seen[r.Key] = true
	}
	return recs, nil
}

// hostPort is addr and port as clients dial them, IPv6 in brackets.
func hostPort(addr netip.Addr, port uint16) string { return netip.AddrPortFrom(addr, port).String() }
