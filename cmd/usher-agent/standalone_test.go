package main

import (
	"slices"
	"strings"
	"testing"

	"usher.dev/usher/lifecycle"
)

func standaloneConfig(t *testing.T, services ...string) (config, error) {
	t.Helper()
	args := []string{"--readiness=probe", "--pod-ips=10.0.0.1"}
	for _, s := range services {
		args = append(args, "--service="+s)
	}
	return parse(args, lookup(nil))
}

// What readers call a port goes before its number, and there may be several, as with Kubernetes.
func TestStandaloneHasThePortsThatItsFormatsName(t *testing.T) {
	for _, tc := range []struct {
		service string
		want    []uint16
	}{
		{"a,port=8080", []uint16{8080}},
		{"a,format=kratos,port=http:8080+grpc:9090", []uint16{8080, 9090}},
		{"a,format=traefik,port=https:8443", []uint16{8443}},
		{"a,format=skydns,domain=example.com,port=http:8080+grpc:9090", []uint16{8080, 9090}},
	} {
		c, err := standaloneConfig(t, tc.service)
		if err != nil {
			t.Errorf("%s: %v", tc.service, err)
			continue
		}
		s := newStandalone(c)
		var got []uint16
		for _, p := range s.observe(lifecycle.Availability{}).Endpoints[0].Ports {
			got = append(got, p.Number)
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: ports %v, want %v", tc.service, got, tc.want)
		}
	}
}

// All that a record is made of is known at the start there, so what it lacks is told then and not while nobody is registered.
func TestStandaloneRefusesWhatNoRecordCanBeMadeOf(t *testing.T) {
	for _, tc := range []struct{ service, want string }{
		{"a", "want a number from 1 to 65535"},
		{"a,port=http", `port "http": want a number from 1 to 65535`},
		{"a,format=kratos,port=http:web", `port "http:web": want a number`},
		{"a,format=kratos,port=8080", "want what it speaks before it"},
		{"a,format=skydns,domain=example.com,port=8080+9090", "want the SRV service before it"},
		{"a,format=template,key=/x/{{.ID}}/{{.Metadata.team}},value=x,port=80", "team"},
	} {
		if _, err := standaloneConfig(t, tc.service); err == nil || !strings.Contains(err.Error(), "service a") || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.service, err, tc.want)
		}
	}
	if _, err := parse([]string{"--readiness=probe", "--config", file(t, "services: [{name: a}]")}, lookup(nil)); err == nil || !strings.Contains(err.Error(), "want a number") {
		t.Errorf("a Service of the file without a format: %v", err)
	}
}
