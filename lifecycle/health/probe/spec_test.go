package probe

import (
	"encoding/json"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
)

func TestDefaultsAreTheAPIServers(t *testing.T) {
	// apis/core/v1/defaults.go: SetDefaults_Probe, SetDefaults_HTTPGetAction.
	s := Spec{HTTPGet: &HTTPGet{Port: Port{Number: 80}}}
	d := s.defaulted()
	if d.InitialDelaySeconds != 0 || d.TimeoutSeconds != 1 || d.PeriodSeconds != 10 || d.SuccessThreshold != 1 || d.FailureThreshold != 3 {
		t.Errorf("numbers: %+v", d)
	}
	if d.HTTPGet.Path != "/" || d.HTTPGet.Scheme != "HTTP" {
		t.Errorf("httpGet: %+v", d.HTTPGet)
	}
	if s.HTTPGet.Path != "" {
		t.Error("the defaults changed the Spec that they were taken from")
	}
	set := Spec{InitialDelaySeconds: 5, TimeoutSeconds: 6, PeriodSeconds: 7, SuccessThreshold: 8, FailureThreshold: 9}
	if set.defaulted() != set {
		t.Errorf("what was set became %+v", set.defaulted())
	}
}

// TestValidate reads Specs as a manifest has them. Cases without want are right; the others name all that is wrong.
func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		rule string
		kind Kind
		spec string
		want string
	}{
		{"a whole one", Readiness, `{"httpGet":{"path":"/ready?x=1","port":"http","host":"10.0.0.1","scheme":"HTTPS","httpHeaders":[{"name":"X-A","value":"b"},{"name":"Accept","value":""}]},"initialDelaySeconds":1,"timeoutSeconds":2,"periodSeconds":3,"successThreshold":4,"failureThreshold":5}`, ""},
		{"the least", Liveness, `{"tcpSocket":{"port":1}}`, ""},
		{"a path without a slash", Liveness, `{"httpGet":{"path":"healthz","port":80}}`, ""},
		{"IPv6", Liveness, `{"tcpSocket":{"port":65535,"host":"::1"}}`, ""},
		{"a service", Liveness, `{"grpc":{"port":9000,"service":"x"}}`, ""},
		{"a command", Startup, `{"exec":{"command":["cat","/tmp/x"]},"failureThreshold":30}`, ""},

		{"validateHandler: must specify a handler type", Readiness, `{}`, "readiness: says not what to do, must have exactly one of httpGet, tcpSocket, grpc or exec"},
		{"validateHandler: not more than one", Readiness, `{"grpc":{"port":1},"exec":{"command":["x"]}}`, "readiness: has grpc and exec, must have exactly one of httpGet, tcpSocket, grpc or exec"},
		{"validateLivenessProbe: successThreshold 1", Liveness, `{"grpc":{"port":1},"successThreshold":2}`, "liveness.successThreshold: is 2, must be 1 for a liveness probe"},
		{"validateStartupProbe: successThreshold 1", Startup, `{"grpc":{"port":1},"successThreshold":2}`, "startup.successThreshold: is 2, must be 1 for a startup probe"},
		{"validateProbe: nothing negative", Readiness, `{"grpc":{"port":1},"initialDelaySeconds":-1,"timeoutSeconds":-2,"periodSeconds":-3,"successThreshold":-4,"failureThreshold":-5}`,
			"readiness.initialDelaySeconds: is -1, must not be negative\nreadiness.timeoutSeconds: is -2, must not be negative\nreadiness.periodSeconds: is -3, must not be negative\n" +
				"readiness.failureThreshold: is -5, must not be negative\nreadiness.successThreshold: is -4, must not be negative"},
		{"validateExecAction: a command", Readiness, `{"exec":{}}`, "readiness.exec.command: is empty, must be a program and its arguments"},
		{"a command that is none", Readiness, `{"exec":{"command":["","x"]}}`, `readiness.exec.command[0]: is "", must be a program`},
		{"an argument no kernel takes", Readiness, `{"exec":{"command":["x","\u0000"]}}`, `readiness.exec.command[1]: is "\x00", must be without NUL bytes`},
		{"validateHTTPGetAction: scheme", Readiness, `{"httpGet":{"port":1,"scheme":"https"}}`, `readiness.httpGet.scheme: is "https", must be HTTP or HTTPS`},
		{"validateHTTPGetAction: IsHTTPHeaderName", Readiness, `{"httpGet":{"port":1,"httpHeaders":[{"name":"X-A","value":"b"},{"name":"X A","value":"b"}]}}`, `readiness.httpGet.httpHeaders[1].name: is "X A", must be letters, digits and hyphens`},
		{"a header without name", Readiness, `{"httpGet":{"port":1,"httpHeaders":[{"value":"b"}]}}`, `readiness.httpGet.httpHeaders[0].name: is "", must be letters, digits and hyphens`},
		{"a header that smuggles another", Readiness, `{"httpGet":{"port":1,"httpHeaders":[{"name":"X","value":"b\r\nY: c"}]}}`, `readiness.httpGet.httpHeaders[0].value: is "b\r\nY: c", must be without control characters`},
		{"a URL for a path", Readiness, `{"httpGet":{"port":1,"path":"http://x/y"}}`, `readiness.httpGet.path: is "http://x/y", must be a path alone: scheme, host and port have fields of their own`},
		{"a URL for a host", Readiness, `{"httpGet":{"port":1,"host":"http://x"}}`, `readiness.httpGet.host: is "http://x", must be a name or an IP address alone, without brackets: scheme and port have fields of their own`},
		{"a host with its port", Readiness, `{"tcpSocket":{"port":1,"host":"x:1"}}`, `readiness.tcpSocket.host: is "x:1", must be a name or an IP address alone, without brackets: scheme and port have fields of their own`},
		{"no port", Readiness, `{"httpGet":{}}`, `readiness.httpGet.port: is 0, must be 1 to 65535 or a port's name`},
		{"IsValidPortNum", Readiness, `{"tcpSocket":{"port":65536}}`, `readiness.tcpSocket.port: is 65536, must be 1 to 65535 or a port's name`},
		{"validateGRPCAction: no name", Readiness, `{"grpc":{"port":-1}}`, `readiness.grpc.port: is -1, must be 1 to 65535`},
		{"IsValidPortName: a letter at least", Readiness, `{"tcpSocket":{"port":"80"}}`, `readiness.tcpSocket.port: is the text "80", must be a number without quotes, or a port's name`},
		{"IsValidPortName: at most 15", Readiness, `{"tcpSocket":{"port":"abcdefghijklmnop"}}`, portName("abcdefghijklmnop")},
		{"IsValidPortName: 15 will do", Readiness, `{"tcpSocket":{"port":"abcdefghijklmno"}}`, ""},
		{"IsValidPortName: lower case", Readiness, `{"tcpSocket":{"port":"HTTP"}}`, portName("HTTP")},
		{"IsValidPortName: hyphens single", Readiness, `{"tcpSocket":{"port":"a--b"}}`, portName("a--b")},
		{"IsValidPortName: hyphens inside", Readiness, `{"tcpSocket":{"port":"a-"}}`, portName("a-")},
		{"no kind", Kind(7), `{"grpc":{"port":1}}`, "Kind(7) is no kind of probe, must be startup, liveness or readiness"},
	} {
		t.Run(tc.rule, func(t *testing.T) {
			var s Spec
			if err := json.Unmarshal([]byte(tc.spec), &s); err != nil {
				t.Fatal(err)
			}
			got := ""
			if err := s.Validate(tc.kind); err != nil {
				got = err.Error()
			}
			if got != tc.want {
				t.Errorf("got  %s\nwant %s", got, tc.want)
			}
		})
	}
}

func portName(name string) string {
	return `readiness.tcpSocket.port: is "` + name + `", must be 1 to 65535 or a port's name: at most 15 of a-z, 0-9 and single hyphens inside, with a letter`
}

func TestPortInJSON(t *testing.T) {
	for text, want := range map[string]Port{`8080`: {Number: 8080}, `"http"`: {Name: "http"}, `-1`: {Number: -1}} {
		var p Port
		if err := json.Unmarshal([]byte(text), &p); err != nil || p != want {
			t.Errorf("%s: got %+v, %v", text, p, err)
		}
		back, err := json.Marshal(p)
		if err != nil || string(back) != text {
			t.Errorf("%+v became %s, %v", p, back, err)
		}
	}
	for _, text := range []string{`80.5`, `true`, `{}`, `[1]`, `1e99`} {
		var s Spec
		err := json.Unmarshal([]byte(`{"tcpSocket":{"port":`+text+`}}`), &s)
		if err == nil || !strings.Contains(err.Error(), "port is "+text+", must be a number from 1 to 65535 or a port's name") {
			t.Errorf("%s: got %v", text, err)
		}
	}
}

func TestNewNamesEverythingThatIsWrong(t *testing.T) {
	_, err := New(Config{
		Name: "db", Host: "x:1",
		Startup:   &Spec{},
		Liveness:  &Spec{GRPC: &GRPC{}, PeriodSeconds: -1},
		Readiness: &Spec{TCPSocket: &TCPSocket{Port: Port{Name: "http"}}},
	})
	want := []string{
		`probes of "db": Host: is "x:1", must be a name or an IP address alone, without brackets: scheme and port have fields of their own`,
		`probes of "db": startup: says not what to do, must have exactly one of httpGet, tcpSocket, grpc or exec`,
		`probes of "db": liveness.grpc.port: is 0, must be 1 to 65535`,
		`probes of "db": liveness.periodSeconds: is -1, must not be negative`,
		`probes of "db": readiness: port is "http", must be a number: no named ports are known here`,
	}
	if err == nil || err.Error() != strings.Join(want, "\n") {
		t.Errorf("got:\n%v\nwant:\n%s", err, strings.Join(want, "\n"))
	}
	if _, err := New(Config{Name: "db"}); err == nil || !strings.Contains(err.Error(), "there is no probe") {
		t.Errorf("without probes: %v", err)
	}
}

// FuzzSpec: whatever a manifest has, there is an error or a prober, and an http probe asks no other than its host and port.
func FuzzSpec(f *testing.F) {
	for _, seed := range []string{
		`{"httpGet":{"path":"/ready?x=1","port":"http","host":"::1","scheme":"HTTPS","httpHeaders":[{"name":"X-A","value":"b"}]},"periodSeconds":3}`,
		`{"httpGet":{"path":"//x@y:1/%zz","port":80}}`, `{"httpGet":{"path":"a:b","port":80,"host":"fe80::1%a"}}`,
		`{"tcpSocket":{"port":1},"exec":{"command":["x"]}}`, `{"grpc":{"port":-1}}`, `{"exec":{"command":["$(", "$$"]},"periodSeconds":2147483647}`, `{"tcpSocket":{"port":null}}`,
	} {
		f.Add(seed, 0)
		f.Add(seed, int(Readiness))
	}
	f.Fuzz(func(t *testing.T, text string, kind int) {
		var s Spec
		if json.Unmarshal([]byte(text), &s) != nil {
			return
		}
		err := s.Validate(Kind(kind))
		p, errNew := New(Config{Readiness: &s, Ports: func(string) (int, bool) { return 1234, true }})
		if Kind(kind) == Readiness && (err == nil) != (errNew == nil) {
			t.Fatalf("Validate: %v, New: %v", err, errNew)
		}
		if errNew != nil {
			return
		}
		switch h := p.probes[Readiness].handler.(type) {
		case *httpHandler:
			port, host := s.HTTPGet.Port.Number, h.host
			if s.HTTPGet.Port.Name != "" {
				port = 1234
			}
			asked := ""
			h.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
				asked = r.URL.Host
				return &http.Response{StatusCode: 200, Body: http.NoBody, Request: r}, nil
			})
			v, output, err := h.probe(t.Context())
			if v != success || asked != net.JoinHostPort(host, strconv.Itoa(port)) {
				t.Fatalf("%v, %q, %v; asked %q, want %q, port %d", v, output, err, asked, host, port)
			}
		case *execHandler:
			for _, arg := range h.command {
				expand(arg, func(name string) (string, bool) { return name, len(name)%2 == 0 })
			}
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
