package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// Root is the first part of every key that is Usher's own.
const Root = "/usher/v1/"

// Record is the ledger's account of one instance of one Service: what operators read, and the fence of all writes.
type Record struct {
	Owner     Owner     `json:"owner"`
	Namespace string    `json:"namespace"`
	Service   string    `json:"service"`
	Pod       string    `json:"pod"`
	Node      string    `json:"node,omitempty"`
	Zone      string    `json:"zone,omitempty"`
	Version   string    `json:"version,omitempty"` // of the application
	Addresses []string  `json:"addresses,omitempty"`
	Ports     []Port    `json:"ports,omitempty"`
	State     string    `json:"state"`
	Since     time.Time `json:"since"`
	Cause     string    `json:"cause,omitempty"`
	Verdict   string    `json:"verdict,omitempty"` // in one sentence, from Released on
	Formats   []string  `json:"formats,omitempty"` // of the consumer records
	Keys      []string  `json:"keys,omitempty"`    // of the consumer records that exist now
}

// Port is one port of an instance.
type Port struct {
	Name        string `json:"name,omitempty"`
	Port        uint16 `json:"port"`
	Protocol    string `json:"protocol,omitempty"`
	AppProtocol string `json:"appProtocol,omitempty"`
}

// Owner is who wrote a record.
type Owner struct {
	Cluster    string    `json:"cluster"`
	PodUID     string    `json:"podUID"`
	PodCreated time.Time `json:"podCreated"`
	Lease      LeaseID   `json:"lease"`
	Agent      string    `json:"agent"` // drawn at random by each agent process
}

// LeaseID is an etcd lease, in hexadecimal as etcdctl prints it: JSON readers lose digits of a 64-bit number.
type LeaseID int64

// String is the form that `etcdctl lease list` prints.
func (l LeaseID) String() string { return strconv.FormatInt(int64(l), 16) }

// MarshalText writes the hexadecimal form.
func (l LeaseID) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads the hexadecimal form.
func (l *LeaseID) UnmarshalText(b []byte) error {
	n, err := strconv.ParseInt(string(b), 16, 64)
	if err != nil {
		return fmt.Errorf("lease %q: want hexadecimal digits", b)
	}
	*l = LeaseID(n)
	return nil
}

// ErrNotARecord says that a value under Usher's prefix is not a ledger record.
var ErrNotARecord = errors.New("not a ledger record")

// InstanceKey is the ledger key of one instance of one Service.
func InstanceKey(cluster, namespace, service, pod string) string {
	return InstancePrefix(cluster, namespace, service) + pod
}

// InstancePrefix is the ledger's prefix of a Service, of a namespace (service "") or of a cluster (both "").
func InstancePrefix(cluster, namespace, service string) string {
	return prefixOf(cluster, "instances", namespace, service)
}

func prefixOf(cluster, kind, namespace, name string) string {
	p := Root + cluster + "/" + kind + "/"
	if namespace != "" {
		p += namespace + "/"
		if name != "" {
			p += name + "/"
		}
	}
	return p
}

// Encode is the ledger value.
func (r Record) Encode() ([]byte, error) { return json.Marshal(r) }

// DecodeRecord reads a ledger value, and holds it against its key. Every error wraps ErrNotARecord. Fields of a later
// version are ignored.
func DecodeRecord(key string, value []byte) (Record, error) {
	var r Record
	if err := decode(key, value, &r); err != nil {
		return Record{}, err
	}
	err := present(key, field{"owner.cluster", r.Owner.Cluster}, field{"owner.podUID", r.Owner.PodUID}, field{"owner.agent", r.Owner.Agent},
		field{"namespace", r.Namespace}, field{"service", r.Service}, field{"pod", r.Pod}, field{"state", r.State})
	if err != nil {
		return Record{}, err
	}
	if want := InstanceKey(r.Owner.Cluster, r.Namespace, r.Service, r.Pod); key != want {
		return Record{}, fmt.Errorf("%w: key %s: the value speaks of %s", ErrNotARecord, key, strings.TrimPrefix(want, Root))
	}
	return r, nil
}

// decode reads one JSON value.
func decode(key string, value []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(value))
	if err := dec.Decode(into); err != nil {
		return fmt.Errorf("%w: key %s: %v", ErrNotARecord, key, err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return fmt.Errorf("%w: key %s: more than one JSON value", ErrNotARecord, key)
	}
	return nil
}

type field struct{ name, value string }

// present refuses a value that lacks a field.
func present(key string, fields ...field) error {
	for _, f := range fields {
		if f.value == "" {
			return fmt.Errorf("%w: key %s: field %s is missing or empty", ErrNotARecord, key, f.name)
		}
	}
	return nil
}
