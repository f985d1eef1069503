package format

import (
	"errors"
	"regexp"
	"strings"
	"testing"
	gotemplate "text/template"

	template "github.com/DataDog/datadog-agent/pkg/template/text"
)

// goTemplates are rendered by Go's text/template and by ours; the docs promise that it is one language.
var goTemplates = []string{
	`/services/{{.Service}}/{{.ID}}`,
	`{{.Port}} {{printf "%05d" .Port}} {{eq .Port 8080}} {{hostport .Address .Port | json}} {{$.Port}} {{(.Port)}}`,
	`{{hostport "10.0.0.1" 80}} {{bracket "fd00::1"}} {{lower .Version | printf "%q"}} {{json .Ports}} {{json .}}`,
	`{{.Metadata.shard}} {{index .Metadata "a.b"}} {{index .Metadata "nope"}} {{range $k, $v := .Metadata}}{{$k}}={{$v}};{{end}}`,
	`{{range $i, $p := .Ports}}{{if $i}},{{end}}{{if eq .Protocol "UDP"}}{{continue}}{{end}}{{.Name}}:{{.Number}}{{else}}none{{end}}`,
	`{{range .Addresses}}{{.}}{{break}}{{end}}{{range 3}}{{.}}{{end}}{{range .Zone}}{{.}}{{else}}x{{end}}`,
	`{{with .Zone}}{{.}}{{else with .Version}}{{.}}{{else}}none{{end}}{{with $x := 1}}{{$x = 2}}{{$x}}{{end}}`,
	`{{if and .Draining .Weight}}a{{else if or .Zone (not .Draining)}}b{{else}}c{{end}}`,
	`{{/* nothing */ -}}  {{- len .Ports}} {{slice .ID 1 3}} {{ne 1 2}} {{lt 1 2}} {{le 2 2}} {{gt .Weight 1}} {{ge 1.5 1.2}}`,
	`{{define "t"}}[{{.}}]{{end}}{{template "t" .ID}}{{block "u" .Ports}}{{len .}}{{end}}`,
	`{{print 1 nil "a" true 'x' 1i}}{{println .Weight}}{{urlquery "a b&c"}}{{html "<"}}{{js "'"}}{{(index .Ports 0).Name}}{{.}}`,
	`{{"a" | printf "%s%s" "b"}} {{true}} {{.Draining | not}} {{1e3}} {{0x10}}`,
	// not in any language
	`{{.ID`, `{{end}}`, `{{env}}`, `{{$x}}`, `{{break}}`, `{{if}}{{end}}`, `{{nil}}`,
	// fails when it is rendered
	`{{.Pod}}`, `{{.ID.Name}}`, `{{.Metadata.nope}}`, `{{.Metadata.nope.more}}`, `{{.Port.Number}}`, `{{index .Addresses 9}}`, `{{lower 1}}`,
	`{{hostport "x" 1}}`, `{{hostport .Address 70000}}`, `{{hostport .Address}}`, `{{template "none"}}`, `{{eq .Ports 1}}`, `{{lt 1 "a"}}`,
	`{{.ID 1}}`, `{{len 3}}`, `{{call .ID}}`, `{{range .Weight}}{{.x}}{{end}}`, `{{slice .ID 3 1}}`, `{{json (printf "%70000d" 1)}}`, `{{1 | 2}}`,
}

// FuzzTemplateIsGos: the same text, or a mistake for both.
func FuzzTemplateIsGos(f *testing.F) {
	for _, text := range goTemplates {
		f.Add(text)
	}
	long := regexp.MustCompile(`(?is)range.*(\d{4}|0x|e\d|'|define|template)`) // 'range 1000000000' is lawful
	f.Fuzz(func(t *testing.T, text string) {
		if long.MatchString(text) {
			return
		}
		in := instance()
		in.Weight, in.Version, in.Metadata = 20, "V1", map[string]string{"shard": "7", "a.b": "<c>"}
		data := templateDataPort{newTemplateData(in), 8080}
		ours, err := template.New("key").Funcs(templateFuncs).Parse(text)
		gos, goErr := gotemplate.New("key").Funcs(templateFuncs).Parse(text)
		if (err == nil) != (goErr == nil) {
			t.Fatalf("%q: got %v, Go %v", text, err, goErr)
		}
		if err != nil {
			return
		}
		for _, option := range []string{"missingkey=zero", "missingkey=error"} {
			got, err := execute(ours.Option(option), data)
			var want limited
			goErr := gos.Option(option).Execute(&want, data)
			if (err == nil) != (goErr == nil) || err == nil && got != want.b.String() {
				t.Fatalf("%q, %s: got %q, %v; Go %q, %v", text, option, got, err, &want.b, goErr)
			}
		}
	})
}

// TestTemplateAsksForThePortWhenItComesToIt: an instance without the port is refused for the port only if it is used.
func TestTemplateAsksForThePortWhenItComesToIt(t *testing.T) {
	for value, field := range map[string]string{
		`{{.ID}}`:                             "",
		`{{if .Zone}}{{.Port}}{{end}}{{.ID}}`: "",
		`{{.Port}}`:                           "port",
		`{{.ID}}{{with .Ports}}{{$.Port}}{{end}}`: "port",
		`{{.Port}}{{.Metadata.nope}}`:             "value",
	} {
		recs, err := spec(t, "template", func(s *Spec) { s.Port, s.Value = "", value }).Records(instance())
		var e *Error
		switch errors.As(err, &e); {
		case field == "" && (err != nil || recs[0].Value != "6f0d"):
			t.Errorf("%s: got %v, %v", value, recs, err)
		case field != "" && (e == nil || e.Format != "template" || e.Field != field || len(recs) > 0):
			t.Errorf("%s: got %v, %v; want an *Error about %s", value, recs, err, field)
		case field == "port" && !strings.Contains(e.Rule, "choose one of http (8080), grpc (9090)"):
			t.Errorf("%s: got %v, want the ports to choose from", value, err)
		}
	}
}
