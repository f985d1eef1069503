// Command usher-agent is the sidecar: it registers the pod in etcd while its endpoint is ready, and takes it out, drains it
// and lets SIGTERM proceed when the pod ends. As "usher-agent run -- COMMAND" it runs the application itself, and does the
// same for it where there is no Kubernetes: its own probes say there what EndpointSlices say elsewhere.
//
// Each setting is a flag, an environment variable (the flag's name in capitals, with USHER_ before it), or a key of the
// YAML file that --config names (the flag's name in camel case: --lease-ttl is leaseTtl). A flag wins over the
// environment, the environment over the file. For etcd, etcdctl's variables (ETCDCTL_ENDPOINTS, ETCDCTL_CACERT,
// ETCDCTL_CERT, ETCDCTL_KEY, ETCDCTL_USER, ETCDCTL_PASSWORD, ...) are honoured too, before the file and behind the USHER_ ones.
//
//	USHER_CONFIG                          the YAML file
//	USHER_CLUSTER                         name of this Kubernetes cluster in the ledger
//	USHER_SERVICE                         Services and their records; several are separated by semicolons
//	USHER_WEIGHT, USHER_APP_VERSION, USHER_METADATA
//	                                      what records say of the instance
//	USHER_POD_NAMESPACE, USHER_POD_NAME, USHER_POD_UID, USHER_POD_IPS, USHER_NODE_NAME
//	                                      from the downward API; the same names without USHER_ are read as well
//	USHER_KUBECONFIG                      outside of a pod
//	USHER_READINESS, USHER_GRACE_PERIOD   without Kubernetes
//	USHER_ETCD_ENDPOINTS, USHER_ETCD_CACERT, USHER_ETCD_CERT, USHER_ETCD_KEY, USHER_ETCD_INSECURE_SKIP_TLS_VERIFY,
//	USHER_ETCD_USER, USHER_ETCD_PASSWORD, USHER_ETCD_PASSWORD_FILE, USHER_LEASE_TTL, USHER_VERDICT_TTL
//	USHER_HOOK_ADDRESS, USHER_HOOK_TOKEN, USHER_CONTROL_ADDRESS, USHER_CONTROL_SOCKET
//	USHER_MIN_AVAILABLE, USHER_MIN_AVAILABLE_TIMEOUT, USHER_WITHDRAW_TIMEOUT, USHER_SETTLE, USHER_RESERVE
//	USHER_IN_FLIGHT_SOURCE, USHER_IN_FLIGHT_URL, USHER_IN_FLIGHT_FIELD, USHER_IN_FLIGHT_METRICS_URL,
//	USHER_IN_FLIGHT_METRIC, USHER_IN_FLIGHT_COMMAND, USHER_MULTIPLEXED_PORTS,
//	USHER_QUIET_PERIOD, USHER_DRAIN_INTERVAL, USHER_DRAIN_FLOOR
//	USHER_HEALTH, USHER_HEALTH_GRPC_ADDRESS, USHER_NOTIFY
//	                                      probes and groups, and who is told of changes, in YAML
//	USHER_LOG_LEVEL, USHER_LOG_FORMAT
//
// It exits with 0 after SIGTERM or SIGINT, 1 when it can't go on, 2 when a setting is wrong. With run, it exits as the
// application did (128 and the signal's number, if one ended it).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"

	"github.com/spf13/pflag"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

// version is set by the build; a plain go build says what module version it was built from.
var version string

func main() {
	// The agent waits nearly all the time, so a second processor brings no speed. It costs, on a machine with 2 cores, 1 MB
	// of memory and a fifth of the CPU time (more threads to wake and caches to keep), and more where there are more.
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(1)
	}
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, syscall.SIGTERM)
	if !signal.Ignored(os.Interrupt) { // as a shell has it for what a script starts in the background
		signal.Notify(signals, os.Interrupt)
	}
	if len(os.Args) > 1 && os.Args[1] == "run" {
		supervised()
	}
	os.Exit(run(os.Args[1:], os.LookupEnv, signals, os.Stdout, os.Stderr))
}

func run(args []string, lookup func(string) (string, bool), signals <-chan os.Signal, stdout, stderr io.Writer) int {
	cfg, err := parse(args, lookup)
	switch {
	case errors.Is(err, pflag.ErrHelp):
		help(stdout)
		return 0
	case err != nil:
		for _, e := range flatten(err) {
			fmt.Fprintf(stderr, "usher-agent: %v\n", e)
		}
		fmt.Fprintln(stderr, "usher-agent: nothing was started; see usher-agent --help")
		return exitUsage
	case cfg.PrintVersion:
		fmt.Fprintln(stdout, "usher-agent", buildVersion())
		return 0
	}
	log, err := newLogger(cfg.LogLevel, cfg.LogFormat, stderr)
	if err != nil {
		fmt.Fprintf(stderr, "usher-agent: %v\n", err)
		return exitUsage
	}
	defer log.Sync()
	a, err := newAgent(cfg, log)
	if err != nil {
		fmt.Fprintf(stderr, "usher-agent: %v\n", err)
		return exitUsage
	}
	err = a.run(context.Background(), signals)
	switch {
	case errors.Is(err, errStopped) || errors.Is(err, errExited):
		if a.child != nil {
			return a.child.code()
		}
		return 0
	default:
		log.Error("agent failed: " + err.Error())
		return exitFailed
	}
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// flatten is the list of errors that were joined into err, in whatever depth.
func flatten(err error) []error {
	j, ok := err.(interface{ Unwrap() []error })
	if !ok || err.Error() != errors.Join(j.Unwrap()...).Error() { // of several too, but in a sentence of its own
		return []error{err}
	}
	var all []error
	for _, e := range j.Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}
