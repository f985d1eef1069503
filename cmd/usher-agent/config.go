package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"
	"sigs.k8s.io/yaml"

	"usher.dev/usher/drain"
	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/lifecycle/health"
	"usher.dev/usher/notify"
	"usher.dev/usher/registry"
	"usher.dev/usher/registry/format"
)

// config is everything that can be set.
type config struct {
	PrintVersion bool
	Command      []string // of the application to supervise

	Cluster    string
	Services   []serviceConfig
	Attributes registry.Attributes

	Namespace, Pod, PodUID, Node string
	PodIPs                       []netip.Addr
	Kubeconfig                   string
	Readiness                    string
	Grace                        time.Duration // without Kubernetes, which says it itself

	Etcd     registry.Connection
	LeaseTTL time.Duration
	// VerdictTTL is below zero for none.
	VerdictTTL time.Duration

	HookAddress, ControlAddress, ControlSocket string
	HookToken                                  string

	Budget    lifecycle.Budget
	settleSet bool

	MinAvailable       int
	Sources            []string
	InFlightURL        string
	InFlightField      string
	InFlightMetricsURL string
	InFlightMetric     string
	InFlightCommand    []string
	MultiplexedPorts   []string
	Quiet, Interval    time.Duration
	Floor              time.Duration
	Health             health.Settings
	HealthGRPCAddress  string
	Notify             notify.Settings

	LogLevel, LogFormat string
}

// serviceConfig is one Service and the records that its consumers read.
type serviceConfig struct {
	Name    string        `json:"name"`
	Formats []format.Spec `json:"formats,omitempty"`
}

// What may be an in-flight source.
const (
	sourceSockdiag   = "sockdiag"
	sourceHTTP       = "http"
	sourcePrometheus = "prometheus"
	sourceExec       = "exec"
	sourceNone       = "none"
)

func sources() []string {
	return []string{sourceSockdiag, sourceHTTP, sourcePrometheus, sourceExec, sourceNone}
}

// setting is one thing that can be set, whichever way.
type setting struct {
	group    string // begins one in --help
	flag     string
	alias    string // a further environment variable
	arg      string // what the value is, in --help
	usage    string
	def      string
	list     bool   // may be given several times, or as a YAML list
	separate string // what separates several in the environment; default: a comma
	envOnly  bool   // a secret: no flag, which `ps` would show
	tree     bool   // YAML: a part of the file as it is, or a text elsewhere
	set      func(c *config, value string) error
}

func (s setting) env() string {
	return "USHER_" + strings.ToUpper(strings.ReplaceAll(s.flag, "-", "_"))
}

func (s setting) key() string {
	parts := strings.Split(s.flag, "-")
	for i := 1; i < len(parts); i++ {
		parts[i] = strings.ToUpper(parts[i][:1]) + parts[i][1:]
	}
	return strings.Join(parts, "")
}

func text(field func(*config) *string) func(*config, string) error {
	return func(c *config, v string) error {
		*field(c) = v
		return nil
	}
}

func duration(field func(*config) *time.Duration) func(*config, string) error {
	return func(c *config, v string) error {
		d, err := time.ParseDuration(v)
		if err != nil || d < 0 {
			return errors.New("want a duration such as 500ms, 5s or 1m")
		}
		*field(c) = d
		return nil
	}
}

// positive is a duration of which 0 would mean the default further in.
func positive(field func(*config) *time.Duration) func(*config, string) error {
	return func(c *config, v string) error {
		if err := duration(field)(c, v); err != nil {
			return err
		}
		if *field(c) == 0 {
			return errors.New("want a duration above zero, such as 500ms, 5s or 1m")
		}
		return nil
	}
}

func oneOf(field func(*config) *string, allowed ...string) func(*config, string) error {
	return func(c *config, v string) error {
		if !slices.Contains(allowed, v) {
			return fmt.Errorf("want one of %s", strings.Join(allowed, ", "))
		}
		*field(c) = v
		return nil
	}
}

func words(v string) []string {
	var out []string
	for w := range strings.SplitSeq(v, ",") {
		if w = strings.TrimSpace(w); w != "" {
			out = append(out, w)
		}
	}
	return out
}

// settings is the one list that flags, environment, file and --help are made from.
func settings() []setting {
	b := lifecycle.DefaultBudget()
	return []setting{
		{group: "Instance", flag: "cluster", arg: "NAME", def: "default", usage: "name of this Kubernetes cluster; it is part of the keys that usherctl reads", set: text(func(c *config) *string { return &c.Cluster })},
		{flag: "service", arg: "NAME[,format=F][,port=P][,target=T]...", list: true, separate: ";", set: setService,
			usage: "a Service whose instance this pod is, and the record that its consumers read; repeat for several. F is one of " + strings.Join(format.Types(), ", ") + "; docs/formats.md has the settings of each. Default: format grpc, target NAMESPACE/NAME, the Service's only TCP port"},
		{flag: "weight", arg: "NUMBER", usage: "share of the traffic, for formats that have it; without it, the default of each format's readers. Annotation " + registry.AnnotationWeight, set: func(c *config, v string) (err error) {
			c.Attributes.Weight, err = registry.ParseWeight(v)
			return err
		}},
		{flag: "app-version", arg: "TEXT", usage: "the application's version, for formats that have it; without it, the Pod's label " + registry.LabelVersion + ". Annotation " + registry.AnnotationVersion, set: text(func(c *config) *string { return &c.Attributes.Version })},
		{flag: "metadata", arg: "KEY=VALUE,...", list: true, usage: "further words on the instance, for formats that have them. Annotation " + registry.AnnotationMetadata + ".KEY", set: setMetadata},

		{group: "Kubernetes", flag: "pod-namespace", alias: "POD_NAMESPACE", arg: "NAME", usage: "own Pod, from metadata.namespace", set: text(func(c *config) *string { return &c.Namespace })},
		{flag: "pod-name", alias: "POD_NAME", arg: "NAME", usage: "own Pod, from metadata.name", set: text(func(c *config) *string { return &c.Pod })},
		{flag: "pod-uid", alias: "POD_UID", arg: "UID", usage: "own Pod, from metadata.uid", set: text(func(c *config) *string { return &c.PodUID })},
		{flag: "pod-ips", alias: "POD_IPS", arg: "IP,...", list: true, usage: "own Pod, from status.podIPs; serves until the API server says them", set: setPodIPs},
		{flag: "node-name", alias: "NODE_NAME", arg: "NAME", usage: "own Pod, from spec.nodeName; for Events", set: text(func(c *config) *string { return &c.Node })},
		{flag: "kubeconfig", arg: "FILE", usage: "how to reach the API server from outside of a pod", set: text(func(c *config) *string { return &c.Kubeconfig })},

		{flag: "readiness", arg: "SIGNAL", usage: "what tells that the instance is ready: " + readinessEndpoint + " (the Service's EndpointSlices) or " + readinessProbe + " (the probes of --health alone, for where there is no Kubernetes). Without it " + readinessEndpoint + "; for usher-agent run, " + readinessProbe, set: oneOf(func(c *config) *string { return &c.Readiness }, readinessEndpoint, readinessProbe)},
		{flag: "grace-period", arg: "DURATION", def: defaultStandaloneGrace.String(), usage: "readiness " + readinessProbe + ": time from SIGTERM to SIGKILL, as docker stop --time or systemd's TimeoutStopSec has it", set: duration(func(c *config) *time.Duration { return &c.Grace })},

		{group: "etcd", flag: "etcd-endpoints", arg: "URL,...", list: true, usage: "client URLs; without this and ETCDCTL_ENDPOINTS, " + registry.DefaultEndpoint, set: func(c *config, v string) error {
			c.Etcd.Endpoints = words(v)
			return nil
		}},
		{flag: "etcd-cacert", arg: "FILE", usage: "CA that etcd's certificate is held against", set: text(func(c *config) *string { return &c.Etcd.CACert })},
		{flag: "etcd-cert", arg: "FILE", usage: "client certificate", set: text(func(c *config) *string { return &c.Etcd.Cert })},
		{flag: "etcd-key", arg: "FILE", usage: "the client certificate's key", set: text(func(c *config) *string { return &c.Etcd.Key })},
		{flag: "etcd-insecure-skip-tls-verify", arg: "BOOL", usage: "true leaves etcd's certificate unchecked", set: func(c *config, v string) (err error) {
			if c.Etcd.InsecureSkipVerify, err = strconv.ParseBool(v); err != nil {
				return errors.New("want true or false")
			}
			return nil
		}},
		{flag: "etcd-user", arg: "NAME", usage: "etcd user", set: text(func(c *config) *string { return &c.Etcd.User })},
		{flag: "etcd-password", envOnly: true, usage: "etcd user's password", set: text(func(c *config) *string { return &c.Etcd.Password })},
		{flag: "etcd-password-file", arg: "FILE", usage: "file with the password instead; read on every login, so that it can be changed while the agent runs", set: text(func(c *config) *string { return &c.Etcd.PasswordFile })},
		{flag: "lease-ttl", arg: "DURATION", def: registry.DefaultTTL.String(), usage: "how long records outlive an agent that was killed", set: positive(func(c *config) *time.Duration { return &c.LeaseTTL })},

		{flag: "verdict-ttl", arg: "DURATION", def: registry.DefaultVerdictTTL.String(), usage: "how long the verdict of a shutdown can be read in etcd; 0 for not at all", set: func(c *config, v string) error {
			if err := duration(func(c *config) *time.Duration { return &c.VerdictTTL })(c, v); err != nil {
				return err
			}
			if c.VerdictTTL == 0 {
				c.VerdictTTL = -1
			}
			return nil
		}},

		{group: "Listeners", flag: "hook-address", arg: "ADDRESS", def: api.DefaultHookAddress, usage: "preStop hook, probes and metrics", set: text(func(c *config) *string { return &c.HookAddress })},
		{flag: "hook-token", envOnly: true, usage: "a hook call with this in the header " + api.TokenHeader + " is accepted without further signs", set: text(func(c *config) *string { return &c.HookToken })},
		{flag: "control-address", arg: "ADDRESS", def: api.DefaultControlAddress, usage: "the same and the status, for the processes of this pod; loopback only", set: text(func(c *config) *string { return &c.ControlAddress })},
		{flag: "control-socket", arg: "PATH", usage: "the same on a unix socket", set: text(func(c *config) *string { return &c.ControlSocket })},

		{group: "Shutdown", flag: "withdraw-timeout", arg: "DURATION", def: b.Withdraw.String(), usage: "how long a shutdown waits for etcd before it goes on", set: duration(func(c *config) *time.Duration { return &c.Budget.Withdraw })},
		{flag: "settle", arg: "DURATION", usage: "how long consumers take to learn of a withdrawal; without it, " + b.Settle.String() + " and what the readers of the formats lag (kitex, hertz and skydns: 5s)", set: func(c *config, v string) error {
			c.settleSet = true
			return duration(func(c *config) *time.Duration { return &c.Budget.Settle })(c, v)
		}},
		{flag: "reserve", arg: "DURATION", def: b.Reserve.String(), usage: "what the application keeps of the grace period, at most a third of it", set: duration(func(c *config) *time.Duration { return &c.Budget.Reserve })},
		{flag: "min-available", arg: "NUMBER", def: "0", usage: "how many other instances of the service have to be registered before a shutdown withdraws this one, as long as the application serves and a preStop hook holds SIGTERM back", set: func(c *config, v string) error {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 {
				return errors.New("want a whole number from 0")
			}
			c.MinAvailable = n
			return nil
		}},
		{flag: "min-available-timeout", arg: "DURATION", def: b.Guard.String(), usage: "how long it waits for them, at most half of the time until the latest release", set: duration(func(c *config) *time.Duration { return &c.Budget.Guard })},
		{flag: "in-flight-source", arg: "SOURCE,...", def: sourceSockdiag, list: true, usage: "what counts requests in flight: " + strings.Join(sources(), ", ") + "; all must agree; docs/drain.md", set: setSources},
		{flag: "in-flight-url", arg: "URL", usage: "source http: where the application answers the count", set: text(func(c *config) *string { return &c.InFlightURL })},
		{flag: "in-flight-field", arg: "PATH", usage: "source http: dotted path of the count in a JSON answer; without it the body is the number", set: text(func(c *config) *string { return &c.InFlightField })},
		{flag: "in-flight-metrics-url", arg: "URL", usage: "source prometheus: the application's metrics", set: text(func(c *config) *string { return &c.InFlightMetricsURL })},
		{flag: "in-flight-metric", arg: "SELECTOR", usage: `source prometheus: the gauge whose series are summed, such as http_requests_in_flight{handler!="/metrics"}`, set: text(func(c *config) *string { return &c.InFlightMetric })},
		{flag: "in-flight-command", arg: "COMMAND", usage: `source exec: a command in the agent's container that prints the count: words, or a JSON list of them`, set: setCommand(func(c *config) *[]string { return &c.InFlightCommand })},
		{flag: "multiplexed-ports", arg: "PORT,...", list: true, usage: "names or numbers of ports whose connections count until their client closes them, beside those that the Service calls grpc, h2c or http2", set: func(c *config, v string) error {
			c.MultiplexedPorts = words(v)
			return nil
		}},
		{flag: "quiet-period", arg: "DURATION", def: drain.DefaultQuiet.String(), usage: "how long nothing must have been in flight", set: positive(func(c *config) *time.Duration { return &c.Quiet })},
		{flag: "drain-interval", arg: "DURATION", def: drain.DefaultInterval.String(), usage: "time between two samples of a drain", set: positive(func(c *config) *time.Duration { return &c.Interval })},
		{flag: "drain-floor", arg: "DURATION", def: drain.DefaultFloor.String(), usage: "how long a drain waits when a source is unknown", set: positive(func(c *config) *time.Duration { return &c.Floor })},

		{group: "Application", flag: "health", arg: "YAML", tree: true, usage: "probes, workers and groups, such as {components: {db: {critical: false, readinessProbe: {tcpSocket: {port: 5432}}}}}; docs/health.md", set: setTree(func(c *config) *health.Settings { return &c.Health })},
		{flag: "health-grpc-address", arg: "ADDRESS", usage: "serve grpc.health.v1 there, with the groups as services", set: text(func(c *config) *string { return &c.HealthGRPCAddress })},
		{flag: "notify", arg: "YAML", tree: true, usage: "who is told of online, offline, draining, released, held and resumed, such as {webhooks: [{url: http://127.0.0.1:8080/usher}], stateFile: /run/usher/state.json}; docs/health.md", set: setTree(func(c *config) *notify.Settings { return &c.Notify })},

		{group: "Log", flag: "log-level", arg: "LEVEL", def: "info", usage: "debug, info, warn or error", set: oneOf(func(c *config) *string { return &c.LogLevel }, "debug", "info", "warn", "error")},
		{flag: "log-format", arg: "FORMAT", def: "json", usage: "json or console", set: oneOf(func(c *config) *string { return &c.LogFormat }, "json", "console")},
	}
}

func setService(c *config, v string) error {
	parts := strings.Split(v, ",")
	name := strings.TrimSpace(parts[0])
	if name == "" || strings.Contains(name, "=") {
		return errors.New("want NAME[,format=F][,port=P][,target=T]..., the Service's name first")
	}
	spec, seen := format.Spec{}, map[string]bool{}
	for _, p := range parts[1:] {
		k, val, ok := strings.Cut(strings.TrimSpace(p), "=")
		if !ok || val == "" {
			return fmt.Errorf("%q: want SETTING=VALUE, such as port=http", p)
		}
		if seen[k] {
			return fmt.Errorf("%q: %s is there twice; several records of a Service are several --service", p, k)
		}
		seen[k] = true
		if err := spec.Set(k, val); err != nil {
			return err
		}
	}
	for i := range c.Services {
		if c.Services[i].Name == name {
			c.Services[i].Formats = append(c.Services[i].Formats, spec)
			return nil
		}
	}
	c.Services = append(c.Services, serviceConfig{Name: name, Formats: []format.Spec{spec}})
	return nil
}

func setMetadata(c *config, v string) error {
	c.Attributes.Metadata = map[string]string{}
	for _, w := range words(v) {
		key, value, ok := strings.Cut(w, "=")
		if !ok || key == "" {
			return fmt.Errorf("%q: want KEY=VALUE", w)
		}
		if _, twice := c.Attributes.Metadata[key]; twice {
			return fmt.Errorf("%q: %s is there twice", w, key)
		}
		c.Attributes.Metadata[key] = value
	}
	return nil
}

func setPodIPs(c *config, v string) error {
	c.PodIPs = nil
	for _, w := range words(v) {
		ip, err := netip.ParseAddr(w)
		if err != nil {
			return fmt.Errorf("%q: want IP addresses separated by commas", w)
		}
		c.PodIPs = append(c.PodIPs, ip)
	}
	return nil
}

func setSources(c *config, v string) error {
	c.Sources = nil
	for _, w := range words(v) {
		switch {
		case !slices.Contains(sources(), w):
			return fmt.Errorf("%q: want one of %s", w, strings.Join(sources(), ", "))
		case slices.Contains(c.Sources, w):
			return fmt.Errorf("%s is there twice", w)
		}
		c.Sources = append(c.Sources, w)
	}
	if len(c.Sources) == 0 || len(c.Sources) > 1 && slices.Contains(c.Sources, sourceNone) {
		return fmt.Errorf("want %s alone, or others without it", sourceNone)
	}
	c.Sources = slices.DeleteFunc(c.Sources, func(s string) bool { return s == sourceNone })
	return nil
}

// setTree reads YAML strictly, and replaces what was there.
func setTree[T any](field func(*config) *T) func(*config, string) error {
	return func(c *config, v string) error {
		var t T
		err := oneDocument(v)
		if err == nil {
			err = yaml.UnmarshalStrict([]byte(v), &t)
		}
		if err != nil {
			return plainly(err, "docs/health.md")
		}
		*field(c) = t
		return nil
	}
}

// oneDocument refuses what the library would leave out without a word: all documents but the first.
func oneDocument(text string) error {
	documents := 0
	for _, part := range regexp.MustCompile(`(?m)^---(?:[ \t]|\r?$)`).Split(text, -1) { // YAML 1.2, 9.1.2
		if slices.ContainsFunc(strings.Split(part, "\n"), func(line string) bool {
			line = strings.TrimSpace(line)
			return line != "" && line[0] != '#' && line[0] != '%'
		}) {
			documents++
		}
	}
	if documents > 1 {
		return fmt.Errorf("there are %d documents: want one YAML document", documents)
	}
	return nil
}

// plainly says what is wrong with YAML without what the libraries say of their own work. doc is where the fields are told.
func plainly(err error, doc string) error {
	if wrong := (*json.UnmarshalTypeError)(nil); errors.As(err, &wrong) {
		want := map[reflect.Kind]string{
			reflect.Bool: "true or false", reflect.String: "a text, in quotes", reflect.Slice: "a list", reflect.Map: "a map", reflect.Struct: "a map",
		}[wrong.Type.Kind()]
		if want == "" {
			want = "a whole number"
		}
		where := wrong.Field
		if where == "" {
			where = "the whole"
		}
		is, ok := map[string]string{"array": "list", "object": "map"}[wrong.Value]
		if !ok {
			is = wrong.Value
		}
		return fmt.Errorf("%s is a %s: want %s; %s has the fields", where, is, want, doc)
	}
	text := err.Error()
	for _, noise := range []string{"error unmarshaling JSON: ", "while decoding JSON: ", "json: ", "error converting YAML to JSON: ", "yaml: "} {
		text = strings.TrimPrefix(text, noise)
	}
	return errors.New(text + "; " + doc + " has the fields")
}

// setCommand reads words, or a JSON list where a word has spaces in it.
func setCommand(field func(*config) *[]string) func(*config, string) error {
	return func(c *config, v string) error {
		words := strings.Fields(v)
		if strings.HasPrefix(strings.TrimSpace(v), "[") {
			words = nil
			if err := json.Unmarshal([]byte(v), &words); err != nil {
				return fmt.Errorf(`want words, or a JSON list such as ["sh","-c","cat /run/in-flight"]: %w`, err)
			}
		}
		*field(c) = words
		return nil
	}
}

func flags() (fs *pflag.FlagSet, file *string, printVersion *bool) {
	fs = pflag.NewFlagSet("usher-agent", pflag.ContinueOnError)
	fs.Usage = func() {}
	file = fs.String("config", "", "")
	printVersion = fs.Bool("version", false, "")
	for _, s := range settings() {
		switch {
		case s.envOnly:
		case s.list:
			fs.StringArray(s.flag, nil, "")
		default:
			fs.String(s.flag, s.def, "")
		}
	}
	return fs, file, printVersion
}

func help(w io.Writer) {
	fmt.Fprint(w, `usher-agent registers its pod in etcd while the pod's endpoint is ready, and drains it when the pod ends.

Usage:
  usher-agent --service NAME [flags]                  the sidecar
  usher-agent run --service NAME [flags] -- COMMAND   runs the application itself: registers it while its probes say
                                                      that it is ready, and drains it before SIGTERM reaches it

A setting is a flag, an environment variable, or a key of the YAML file: --lease-ttl, USHER_LEASE_TTL, leaseTtl. A flag
wins over the environment, the environment over the file. etcdctl's variables (ETCDCTL_ENDPOINTS, ETCDCTL_USER, ...)
come between the USHER_ ones and the file.

  --config FILE                 the YAML file (USHER_CONFIG)
  --version                     print the version

Exit codes: 0 after SIGTERM or SIGINT, 1 when it can't go on, 2 when a setting is wrong. With run, that of the
application, or 128 and the number of the signal that ended it.
`)
	for _, s := range settings() {
		if s.group != "" {
			fmt.Fprintf(w, "\n%s:\n", s.group)
		}
		name := "--" + s.flag + " " + s.arg
		if s.envOnly {
			name = s.env() + " (no flag)"
		}
		about := s.usage
		if s.def != "" {
			about += " (default " + s.def + ")"
		}
		if s.alias != "" {
			about += " (or " + s.alias + ")"
		}
		lines := wrap(about, 88)
		if len(name) > 28 {
			fmt.Fprintf(w, "  %s\n", name)
			name = ""
		}
		for _, l := range lines {
			fmt.Fprintf(w, "  %-28s  %s\n", name, l)
			name = ""
		}
	}
}

// wrap breaks text into lines of at most width.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for w := range strings.FieldsSeq(text) {
		if line != "" && len(line)+1+len(w) > width {
			lines = append(lines, line)
			line = ""
		}
		line = strings.TrimSpace(line + " " + w)
	}
	return append(lines, line)
}

// parse reads every source of settings, in the order of their rank, and checks the result as a whole.
func parse(args []string, lookup func(string) (string, bool)) (config, error) {
	fs, file, printVersion := flags()
	supervise := len(args) > 0 && args[0] == "run"
	if supervise {
		args = args[1:]
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, pflag.ErrHelp) {
			return config{}, err
		}
		return config{}, fmt.Errorf("%w; usher-agent --help lists the flags", err)
	}
	c := config{PrintVersion: *printVersion}
	switch {
	case c.PrintVersion:
		return c, nil
	case supervise && (fs.ArgsLenAtDash() != 0 || fs.NArg() == 0):
		return config{}, fmt.Errorf("arguments %q: want usher-agent run [flags] -- COMMAND [ARGUMENT]..., the application after two dashes", fs.Args())
	case supervise:
		c.Command, c.Readiness = fs.Args(), readinessProbe
	case fs.NArg() > 0:
		return config{}, fmt.Errorf("argument %q: usher-agent takes flags only, but for usher-agent run", fs.Arg(0))
	default:
		c.Readiness = readinessEndpoint
	}
	if v, ok := lookup("USHER_CONFIG"); ok && !fs.Changed("config") {
		*file = v
	}

	all := settings()
	var errs []error
	apply := func(s setting, where string, values ...string) {
		if s.flag == "service" {
			c.Services = nil
		}
		if s.list && s.separate == "" {
			values = []string{strings.Join(values, ",")}
		}
		for _, v := range values {
			err := s.set(&c, v)
			switch {
			case err == nil:
			case s.tree: // which may have secrets in it, and errors name the field
				errs = append(errs, fmt.Errorf("%s: %w", where, err))
			case s.envOnly:
				errs = append(errs, fmt.Errorf("%s (secret): %w", where, err))
			default:
				errs = append(errs, fmt.Errorf("%s %q: %w", where, v, err))
			}
		}
	}
	for _, s := range all {
		if s.def != "" {
			apply(s, "default of --"+s.flag, s.def)
		}
	}
	if *file != "" {
		if err := parseFile(*file, &c, all, apply); err != nil {
			errs = append(errs, err)
		}
	}
	getenv := func(name string) string { v, _ := lookup(name); return v }
	if err := c.Etcd.FromETCDCTL(getenv); err != nil {
		errs = append(errs, err)
	}
	for _, s := range all {
		for _, name := range []string{s.alias, s.env()} {
			// As everywhere in Kubernetes' manifests, an empty variable is an unset one.
			if v := getenv(name); name != "" && v != "" {
				values := []string{v}
				if s.separate != "" {
					values = strings.Split(v, s.separate)
				}
				apply(s, "environment "+name, values...)
			}
		}
	}
	for _, s := range all {
		if f := fs.Lookup(s.flag); f != nil && f.Changed {
			values := []string{f.Value.String()}
			if sv, ok := f.Value.(pflag.SliceValue); ok {
				values = sv.GetSlice()
			}
			apply(s, "flag --"+s.flag, values...)
		}
	}
	if len(errs) > 0 {
		return config{}, errors.Join(errs...)
	}
	return c, c.validate()
}

// parseFile reads the YAML file: the settings by their keys, and services in full.
func parseFile(path string, c *config, all []setting, apply func(setting, string, ...string)) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("config file: %w", err)
	}
	if err := oneDocument(string(raw)); err != nil {
		return fmt.Errorf("config file %s: %w", path, err)
	}
	js, err := yaml.YAMLToJSONStrict(raw)
	if err != nil {
		return fmt.Errorf("config file %s: %w", path, err)
	}
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(js, &doc); err != nil {
		return fmt.Errorf("config file %s: want a map of settings", path)
	}
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(doc)) {
		where := fmt.Sprintf("config file %s: %s", path, key)
		if key == "services" {
			dec := json.NewDecoder(bytes.NewReader(doc[key]))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&c.Services); err != nil {
				errs = append(errs, fmt.Errorf("%s: %w, as a list of {name, formats: [{type, port, target, ...}]}", where, plainly(err, "docs/formats.md")))
			}
			continue
		}
		i := slices.IndexFunc(all, func(s setting) bool { return s.key() == key && s.flag != "service" })
		if i < 0 {
			want := "usher-agent --help lists the settings"
			for _, s := range all {
				if fold(s.key()) == fold(key) && s.flag != "service" {
					want = "want " + s.key()
				}
			}
			errs = append(errs, fmt.Errorf("%s: no such setting; %s", where, want))
			continue
		}
		if all[i].tree {
			apply(all[i], where, string(doc[key]))
			continue
		}
		values, err := scalars(doc[key])
		if err != nil || len(values) > 1 && !all[i].list {
			value := string(doc[key])
			if all[i].envOnly {
				value = "(secret)"
			}
			errs = append(errs, fmt.Errorf("%s %s: want %s", where, value, map[bool]string{true: "a value or a list of values", false: "one value"}[all[i].list]))
			continue
		}
		apply(all[i], where, values...)
	}
	return errors.Join(errs...)
}

// fold makes the spellings of a setting one: lease-ttl, lease_ttl, leaseTTL.
func fold(key string) string {
	return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(key))
}

// scalars reads a JSON string, number, boolean, or a list of these.
func scalars(raw json.RawMessage) ([]string, error) {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil {
		list = []json.RawMessage{raw}
	}
	var out []string
	for _, r := range list {
		var v any
		dec := json.NewDecoder(bytes.NewReader(r))
		dec.UseNumber()
		if err := dec.Decode(&v); err != nil {
			return nil, err
		}
		switch v := v.(type) {
		case string:
			out = append(out, v)
		case json.Number:
			out = append(out, v.String())
		case bool:
			out = append(out, strconv.FormatBool(v))
		default:
			return nil, errors.New("neither a value nor a list of values")
		}
	}
	return out, nil
}

// validate fills in what depends on other settings, and holds them against each other.
func (c *config) validate() error {
	var errs []error
	var lag time.Duration
	if len(c.Services) == 0 {
		errs = append(errs, errors.New("--service: none is given; name the Service whose instance this pod is"))
	}
	if c.Readiness == readinessProbe {
		errs = append(errs, c.identify())
	}
	for i, s := range c.Services {
		if slices.ContainsFunc(c.Services[:i], func(o serviceConfig) bool { return o.Name == s.Name }) {
			errs = append(errs, fmt.Errorf("service %s: is there twice: want one, with both lists of formats", s.Name))
		}
	}
	for _, f := range []struct{ flag, value, path string }{
		{"pod-namespace", c.Namespace, "metadata.namespace"}, {"pod-name", c.Pod, "metadata.name"}, {"pod-uid", c.PodUID, "metadata.uid"},
	} {
		if f.value == "" {
			errs = append(errs, fmt.Errorf("--%s: empty; set the environment variable %s with valueFrom.fieldRef.fieldPath %s", f.flag, strings.ToUpper(strings.ReplaceAll(f.flag, "-", "_")), f.path))
		}
	}
	for i := range c.Services {
		s := &c.Services[i]
		if len(s.Formats) == 0 {
			s.Formats = []format.Spec{{}}
		}
		for j := range s.Formats {
			s.Formats[j] = s.Formats[j].WithDefaults(c.Namespace, s.Name)
			f, err := format.New(s.Formats[j])
			if err == nil && c.Readiness == readinessProbe && len(c.PodIPs) > 0 {
				err = c.checkRecords(s.Formats[j], f)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("service %s: %w", s.Name, err))
				continue
			}
			lag = max(lag, f.Lag())
		}
	}
	if !c.settleSet {
		c.Budget.Settle = lifecycle.DefaultBudget().Settle + lag
	}
	if err := c.Etcd.Validate(); err != nil {
		errs = append(errs, fmt.Errorf("etcd: %w", err))
	}
	for _, f := range []struct {
		flag, value, source string
	}{
		{"in-flight-url", c.InFlightURL, sourceHTTP}, {"in-flight-metrics-url", c.InFlightMetricsURL, sourcePrometheus},
		{"in-flight-metric", c.InFlightMetric, sourcePrometheus}, {"in-flight-command", strings.Join(c.InFlightCommand, " "), sourceExec},
	} {
		if slices.Contains(c.Sources, f.source) != (f.value != "") {
			errs = append(errs, fmt.Errorf("--%s %q: it goes with --in-flight-source %s, and that with it", f.flag, f.value, f.source))
		}
	}
	if c.HookToken != "" && len(c.HookToken) < 16 {
		errs = append(errs, errors.New("USHER_HOOK_TOKEN: want at least 16 characters, so that it can't be guessed"))
	}
	if i := strings.IndexFunc(c.HookToken, func(r rune) bool { return r < '!' || r > '~' }); i >= 0 {
		r, _ := utf8.DecodeRuneInString(c.HookToken[i:])
		errs = append(errs, fmt.Errorf("USHER_HOOK_TOKEN: has the character %q: want printable ASCII without spaces, as a header carries it", r))
	}
	if err := c.Budget.Validate(); err != nil {
		errs = append(errs, err)
	} else if c.Readiness == readinessProbe { // elsewhere the Pod says the grace
		if err := c.Budget.Fit(c.Grace, c.Quiet); err != nil {
			errs = append(errs, fmt.Errorf("--grace-period %s, which stands for a Pod's: %w", c.Grace, err))
		}
	}
	if err := c.Health.Validate(); err != nil {
		errs = append(errs, err)
	}
	if err := c.Notify.Validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
