package probe

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
)

// Kind says what a probe is for.
type Kind int

const (
	// Startup holds the other two back until it has succeeded once.
	Startup Kind = iota
	// Liveness says whether the application can go on, or needs a restart.
	Liveness
	// Readiness says whether the application takes requests.
	Readiness

	kinds = iota
)

func (k Kind) String() string {
	switch k {
	case Startup:
		return "startup"
	case Liveness:
		return "liveness"
	case Readiness:
		return "readiness"
	}
	return "Kind(" + strconv.Itoa(int(k)) + ")"
}

// Spec is a probe as a container's spec has it (core/v1 Probe). Numbers that are 0 stand for their defaults
// (apis/core/v1/defaults.go: SetDefaults_Probe).
type Spec struct {
	// Exactly one of these four.
	HTTPGet   *HTTPGet   `json:"httpGet,omitempty"`
	TCPSocket *TCPSocket `json:"tcpSocket,omitempty"`
	GRPC      *GRPC      `json:"grpc,omitempty"`
	Exec      *Exec      `json:"exec,omitempty"`

	// InitialDelaySeconds after the container's start in which it isn't probed.
	InitialDelaySeconds int32 `json:"initialDelaySeconds,omitempty"`
	// TimeoutSeconds that one run may take; default 1.
	TimeoutSeconds int32 `json:"timeoutSeconds,omitempty"`
	// PeriodSeconds between the starts of two runs; default 10.
	PeriodSeconds int32 `json:"periodSeconds,omitempty"`
	// SuccessThreshold is how many successes in a row turn the state; default 1, and nothing else for startup and liveness.
	SuccessThreshold int32 `json:"successThreshold,omitempty"`
	// FailureThreshold is how many failures in a row turn the state; default 3.
	FailureThreshold int32 `json:"failureThreshold,omitempty"`
}

// HTTPGet succeeds if a GET is answered with 200 to 399.
type HTTPGet struct {
	// Path with its query; default "/".
	Path string `json:"path,omitempty"`
	Port Port   `json:"port"`
	// Host to connect to; default Config.Host. For a virtual host, set the header Host instead.
	Host string `json:"host,omitempty"`
	// Scheme is HTTP or HTTPS, whose certificate isn't verified; default HTTP.
	Scheme      string       `json:"scheme,omitempty"`
	HTTPHeaders []HTTPHeader `json:"httpHeaders,omitempty"`
}

// HTTPHeader is sent with a request. A name may be there several times.
type HTTPHeader struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// TCPSocket succeeds if a connection can be opened.
type TCPSocket struct {
	Port Port `json:"port"`
	// Host to connect to; default Config.Host.
	Host string `json:"host,omitempty"`
}

// GRPC succeeds if grpc.health.v1.Health/Check, without TLS, says SERVING.
type GRPC struct {
	Port int32 `json:"port"`
	// Service asked for; default "", which is the server as a whole.
	Service string `json:"service,omitempty"`
}

// Exec succeeds if a command exits with 0. No shell is involved.
type Exec struct {
	// Command and its arguments. $(NAME) stands for an environment variable, $$ for a dollar sign.
	Command []string `json:"command,omitempty"`
}

// Port is a number or, if Name isn't empty, a name that Config.Ports knows. In JSON it is a number or a string.
type Port struct {
	Number int
	Name   string
}

func (p Port) String() string {
	if p.Name != "" {
		return strconv.Quote(p.Name)
	}
	return strconv.Itoa(p.Number)
}

// MarshalJSON gives a number or a string.
func (p Port) MarshalJSON() ([]byte, error) {
	if p.Name != "" {
		return json.Marshal(p.Name)
	}
	return json.Marshal(p.Number)
}

// UnmarshalJSON takes a whole number or a string.
func (p *Port) UnmarshalJSON(data []byte) error {
	*p = Port{}
	var err error
	if len(data) > 0 && data[0] == '"' {
		err = json.Unmarshal(data, &p.Name)
	} else {
		err = json.Unmarshal(data, &p.Number)
	}
	if err != nil {
		return fmt.Errorf("port is %.40s, must be a number from 1 to 65535 or a port's name", data)
	}
	return nil
}

// defaulted is s as the API server would store it (apis/core/v1/defaults.go: SetDefaults_Probe, SetDefaults_HTTPGetAction).
func (s Spec) defaulted() Spec {
	for _, d := range []struct {
		field *int32
		value int32
	}{{&s.TimeoutSeconds, 1}, {&s.PeriodSeconds, 10}, {&s.SuccessThreshold, 1}, {&s.FailureThreshold, 3}} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	if s.HTTPGet != nil {
		h := *s.HTTPGet
		if h.Path == "" {
			h.Path = "/"
		}
		if h.Scheme == "" {
			h.Scheme = "HTTP"
		}
		s.HTTPGet = &h
	}
	return s
}

// Validate says what is wrong with s as a probe of that kind, an error for each problem, joined; nil if nothing is. The
// rules are the API server's (apis/core/validation/validation.go: validateProbe, validateHandler), and a few more, where
// it lets pass what no probe could carry out: a host that is none, a path that is a URL, a header value with control characters.
func (s Spec) Validate(kind Kind) error { return errors.Join(s.problems(kind)...) }

func (s Spec) problems(kind Kind) []error {
	if kind < 0 || kind >= kinds {
		return []error{fmt.Errorf("%v is no kind of probe, must be startup, liveness or readiness", kind)}
	}
	var problems []error
	add := func(format string, args ...any) {
		problems = append(problems, fmt.Errorf(kind.String()+format, args...))
	}
	s = s.defaulted()

	const handlers = "httpGet, tcpSocket, grpc or exec"
	var set []string
	if h := s.HTTPGet; h != nil {
		set = append(set, "httpGet")
		if u, err := url.Parse(h.Path); err == nil && (u.Scheme != "" || u.Host != "" || u.User != nil) {
			add(".httpGet.path: is %q, must be a path alone: scheme, host and port have fields of their own", h.Path)
		}
		h.Port.problems(".httpGet.port", add)
		hostProblems(".httpGet.host", h.Host, add)
		if h.Scheme != "HTTP" && h.Scheme != "HTTPS" {
			add(".httpGet.scheme: is %q, must be HTTP or HTTPS", h.Scheme)
		}
		for i, header := range h.HTTPHeaders {
			if header.Name == "" || strings.ContainsFunc(header.Name, func(r rune) bool { return !alphanumeric(r) && r != '-' }) {
				add(".httpGet.httpHeaders[%d].name: is %q, must be letters, digits and hyphens", i, header.Name)
			}
			if strings.ContainsFunc(header.Value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
				add(".httpGet.httpHeaders[%d].value: is %q, must be without control characters", i, header.Value)
			}
		}
	}
	if t := s.TCPSocket; t != nil {
		set = append(set, "tcpSocket")
		t.Port.problems(".tcpSocket.port", add)
		hostProblems(".tcpSocket.host", t.Host, add)
	}
	if g := s.GRPC; g != nil {
		set = append(set, "grpc")
		if g.Port < 1 || g.Port > 65535 {
			add(".grpc.port: is %d, must be 1 to 65535", g.Port)
		}
	}
	if e := s.Exec; e != nil {
		set = append(set, "exec")
		switch {
		case len(e.Command) == 0:
			add(".exec.command: is empty, must be a program and its arguments")
		case e.Command[0] == "":
			add(`.exec.command[0]: is "", must be a program`)
		}
		for i, arg := range e.Command {
			if strings.ContainsRune(arg, 0) {
				add(".exec.command[%d]: is %q, must be without NUL bytes", i, arg)
			}
		}
	}
	switch len(set) {
	case 0:
		add(": says not what to do, must have exactly one of %s", handlers)
	case 1:
	default:
		add(": has %s, must have exactly one of %s", strings.Join(set, " and "), handlers)
	}

	for _, n := range []struct {
		field string
		value int32
	}{
		{"initialDelaySeconds", s.InitialDelaySeconds},
		{"timeoutSeconds", s.TimeoutSeconds},
		{"periodSeconds", s.PeriodSeconds},
		{"failureThreshold", s.FailureThreshold},
	} {
		if n.value < 0 {
			add(".%s: is %d, must not be negative", n.field, n.value)
		}
	}
	switch {
	case kind != Readiness && s.SuccessThreshold != 1:
		add(".successThreshold: is %d, must be 1 for a %v probe", s.SuccessThreshold, kind)
	case s.SuccessThreshold < 0:
		add(".successThreshold: is %d, must not be negative", s.SuccessThreshold)
	}
	return problems
}

func alphanumeric(r rune) bool {
	return 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9'
}

// problems of a port's number or name (apimachinery validation.go: IsValidPortNum, IsValidPortName).
func (p Port) problems(path string, add func(string, ...any)) {
	if p.Name == "" {
		if p.Number < 1 || p.Number > 65535 {
			add(path+": is %d, must be 1 to 65535 or a port's name", p.Number)
		}
		return
	}
	if _, err := strconv.Atoi(p.Name); err == nil {
		add(path+": is the text %q, must be a number without quotes, or a port's name", p.Name)
		return
	}
	valid := len(p.Name) <= 15 && !strings.Contains(p.Name, "--") && p.Name[0] != '-' && p.Name[len(p.Name)-1] != '-'
	letters := 0
	for _, r := range p.Name {
		switch {
		case 'a' <= r && r <= 'z':
			letters++
		case r != '-' && (r < '0' || r > '9'):
			valid = false
		}
	}
	if !valid || letters == 0 {
		add(path+": is %q, must be 1 to 65535 or a port's name: at most 15 of a-z, 0-9 and single hyphens inside, with a letter", p.Name)
	}
}

// hostProblems lets pass what a dialer can take: an address, or a name.
func hostProblems(path, host string, add func(string, ...any)) {
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return
	}
	if strings.ContainsFunc(host, func(r rune) bool { return !alphanumeric(r) && !strings.ContainsRune("-._", r) }) {
		add(path+": is %q, must be a name or an IP address alone, without brackets: scheme and port have fields of their own", host)
	}
}
