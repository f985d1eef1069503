package format

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	// Go's text/template without calls of methods by name: for these the linker would keep every exported method of every
	// type, which is 4 MB of the agent's binary.
	template "github.com/DataDog/datadog-agent/pkg/template/text"
)

// templateData is what Spec.Key and Spec.Value see, together with .Port.
type templateData struct {
	ID, Namespace, Service string
	Address                string // the primary one
	Addresses              []string
	Ports                  []Port
	Weight                 int // 0 when not set
	Version, Zone          string
	Metadata               map[string]string
	Draining               bool
}

// templateDataPort is the data of an instance that has the port that Spec.Port means.
type templateDataPort struct {
	templateData
	Port uint16
}

var templateFuncs = template.FuncMap{
	"hostport": templateHostPort, "bracket": templateBracket, "json": templateJSON, "lower": strings.ToLower,
}

func newTemplateData(i Instance) templateData {
	d := templateData{
		ID: i.ID, Namespace: i.Namespace, Service: i.Service, Address: i.Addresses[0].String(), Ports: i.Ports,
		Weight: i.Weight, Version: i.Version, Zone: i.Zone, Metadata: i.Metadata, Draining: i.Draining,
	}
	for _, a := range i.Addresses {
		d.Addresses = append(d.Addresses, a.String())
	}
	return d
}

// newTemplate is a record of the user's own, a Go text/template over the instance each for key and value, for readers
// that Usher doesn't know. Functions beside text/template's own: hostport ADDRESS PORT, bracket ADDRESS (IPv6 only), json
// VALUE, lower TEXT. A key of Metadata that is missing is an error when the record is made.
//
// The key has to begin with a fixed path and to hold .ID or an address, and draining can be said if .Draining changes
// the value: all of this is found out by rendering made-up instances.
func newTemplate(s Spec) (codec, error) {
	fail := func(field, value, rule string) (codec, error) {
		return codec{}, &Error{Format: s.Type, Field: field, Value: value, Rule: rule}
	}
	ref, err := onePort(s.Type, s.Port)
	if err != nil {
		return codec{}, err
	}
	parsed := map[string]*template.Template{}
	for _, f := range []struct{ field, text string }{{"key", s.Key}, {"value", s.Value}} {
		if f.text == "" {
			return fail(f.field, f.text, "want a Go text/template, as in /services/{{.Service}}/{{.ID}} and {{hostport .Address .Port}}")
		}
		t, err := template.New(f.field).Funcs(templateFuncs).Parse(f.text)
		if err != nil {
			return fail(f.field, f.text, "no Go text/template: "+err.Error())
		}
		parsed[f.field] = t
	}
	// What made-up instances lack in metadata is no mistake of the template.
	sample := func(field string, i Instance) (string, error) {
		return render(parsed[field].Option("missingkey=zero"), i, ref)
	}
	one := Instance{
		ID: "0a", Namespace: "0b", Service: "0c",
		Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("1000::1")},
		Ports:     []Port{{Name: ref.want, Number: 1}}, Version: "0d", Zone: "0e",
	}
	sibling := one
	sibling.ID, sibling.Addresses = "1a", []netip.Addr{netip.MustParseAddr("20.0.0.2"), netip.MustParseAddr("2000::2")}
	stranger := sibling
	stranger.Namespace, stranger.Service, stranger.Version, stranger.Zone = "1b", "1c", "1d", "1e"
	stranger.Ports, stranger.Weight = []Port{{Name: ref.want, Number: 2}}, 2
	draining := one
	draining.Draining = true
	out := map[string]string{}
	for _, r := range []struct {
		as, field string
		of        Instance
	}{
		{"key", "key", one}, {"sibling", "key", sibling}, {"stranger", "key", stranger}, {"key draining", "key", draining},
		{"value", "value", one}, {"value draining", "value", draining},
	} {
		if out[r.as], err = sample(r.field, r.of); err != nil {
			return fail(r.field, map[string]string{"key": s.Key, "value": s.Value}[r.field], "can't be rendered: "+err.Error())
		}
	}
	prefix := commonPath(out["key"], out["stranger"])
	switch {
	case out["key"] == out["sibling"]:
		return fail("key", s.Key, "want .ID or .Address in it: two instances would have the same key")
	case out["key"] != out["key draining"]:
		return fail("key", s.Key, "want the same key for a draining instance")
	case strings.Trim(prefix, "/") == "":
		return fail("key", s.Key, "want a fixed path at its start, as in /services/{{.ID}}")
	case strings.TrimSpace(out["value"]) == "" || strings.TrimSpace(out["value draining"]) == "":
		return fail("value", s.Value, "want one that is not empty, draining or not")
	}
	whole := out["key"]
	if strings.Contains(s.Key, "Metadata") {
		whole = strings.TrimRight(prefix, "/") // the rest may be empty without the metadata
	}
	if err := checkPath(s.Type, "key", whole); err != nil {
		return codec{}, err
	}
	for _, t := range parsed {
		t.Option("missingkey=error")
	}
	return codec{prefix: prefix, drains: out["value"] != out["value draining"], encode: func(i Instance) ([]Record, error) {
		var r Record
		for field, to := range map[string]*string{"key": &r.Key, "value": &r.Value} {
			text, err := render(parsed[field], i, ref)
			if e := (*Error)(nil); errors.As(err, &e) {
				return nil, e
			}
			if err != nil {
				return nil, &Error{Format: s.Type, Field: field, Value: map[string]string{"key": s.Key, "value": s.Value}[field], Rule: "can't be rendered: " + err.Error()}
			}
			*to = text
		}
		return []Record{r}, nil
	}}, nil
}

// commonPath is what a and b begin with, up to its last slash.
func commonPath(a, b string) string {
	n := 0
	for n < len(a) && n < len(b) && a[n] == b[n] {
		n++
	}
	return a[:strings.LastIndex(a[:n], "/")+1]
}

// render executes t over i. That i has no port as ref means is an *Error, if it is what t fails of.
func render(t *template.Template, i Instance, ref portRef) (string, error) {
	d := newTemplateData(i)
	p, noPort := ref.find("template", i.Ports)
	if noPort == nil {
		return execute(t, templateDataPort{d, p.Number})
	}
	out, err := execute(t, d)
	if err == nil {
		return out, nil
	}
	if _, err := execute(t, templateDataPort{d, 1}); err != nil {
		return "", err // not even with a port
	}
	return "", noPort
}

// execute stops a text that grows beyond any record.
func execute(t *template.Template, data any) (string, error) {
	var out limited
	if err := t.Execute(&out, data); err != nil {
		return "", err
	}
	return out.b.String(), nil
}

type limited struct{ b bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if l.b.Len()+len(p) > maxValue {
		return 0, fmt.Errorf("more than %d bytes", maxValue)
	}
	return l.b.Write(p)
}

func templateHostPort(address string, port uint16) (string, error) {
	a, err := netip.ParseAddr(address)
	if err != nil {
		return "", fmt.Errorf("hostport: %w", err)
	}
	return hostPort(a, port), nil
}

func templateBracket(address string) string {
	if strings.Contains(address, ":") {
		return "[" + address + "]"
	}
	return address
}

func templateJSON(v any) (string, error) {
	b, err := json.Marshal(v)
	return string(b), err
}
