// Command usherctl shows operators what Usher's ledger in etcd has of their instances, and lets them hold one. Installed as
// kubectl-usher it is the kubectl plugin `kubectl usher`.
//
//	usherctl get instances [SERVICE]   the instances, as a table
//	usherctl get verdicts [POD]        how the last shutdowns ended, also of pods that are gone
//	usherctl watch [SERVICE]           the instances, then a line for each change
//	usherctl status POD                all about one pod, held against what etcd really has, and its last shutdown
//	usherctl hold POD --reason TEXT    take a pod out of the registry for a while
//	usherctl resume POD                take the hold back
//
// It asks etcd and nothing else: no Kubernetes API, no kubeconfig. So the namespace is what -n or USHER_NAMESPACE says,
// else "default"; the cluster what --cluster or USHER_CLUSTER says, else "default". The etcd flags and the ETCDCTL_*
// environment are etcdctl's.
//
// The exit code is 0, also when nothing is found, and 1 after any error.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"usher.dev/usher/registry"
)

// version is set by the linker (-X main.version=...).
var version string

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Getenv, os.Stdout, os.Stderr))
}

func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	name := "usherctl"
	if strings.HasPrefix(filepath.Base(args[0]), "kubectl-") {
		name = "kubectl usher"
	}
	a := &app{name: name, getenv: getenv, stdout: stdout, stderr: stderr}
	root := a.command()
	root.SetArgs(args[1:])
	root.SetOut(stdout)
	root.SetErr(stderr)
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	return 0
}

// app is what the subcommands share.
type app struct {
	name           string
	getenv         func(string) string
	stdout, stderr io.Writer

	namespace, cluster string
	allNamespaces      bool
	output             string
	noHeaders          bool
	flags              registry.Connection // what the command line says
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:         strings.ReplaceAll(a.name, " ", "-"),
		Short:       "Show the service instances that Usher keeps in etcd, and hold one",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: a.name},
		Version:     buildVersion(),
		Args:        noSuchCommand,
		RunE:        func(cmd *cobra.Command, _ []string) error { return cmd.Help() },

		DisableFlagsInUseLine: true,
		SilenceErrors:         true,
		SilenceUsage:          true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return a.check(cmd)
		},
	}
	root.SetVersionTemplate("usherctl {{.Version}}\n")
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w (%s --help lists the flags)", err, cmd.CommandPath())
	})
	f := root.PersistentFlags()
	f.StringVarP(&a.namespace, "namespace", "n", "", `namespace (default "default"; env USHER_NAMESPACE)`)
	f.BoolVarP(&a.allNamespaces, "all-namespaces", "A", false, "all namespaces")
	f.StringVar(&a.cluster, "cluster", "", `cluster, as the agents are told (default "default"; env USHER_CLUSTER)`)
	f.StringVarP(&a.output, "output", "o", "table", "table, wide, json or yaml")
	f.BoolVar(&a.noHeaders, "no-headers", false, "leave out the table's header")
	c := &a.flags
	f.StringSliceVar(&c.Endpoints, "endpoints", nil, "etcd endpoints (default "+registry.DefaultEndpoint+"; env ETCDCTL_ENDPOINTS)")
	f.StringVar(&c.CACert, "cacert", "", "CA bundle of the etcd servers (env ETCDCTL_CACERT)")
	f.StringVar(&c.Cert, "cert", "", "TLS client certificate (env ETCDCTL_CERT)")
	f.StringVar(&c.Key, "key", "", "key of the TLS client certificate (env ETCDCTL_KEY)")
	f.BoolVar(&c.InsecureSkipVerify, "insecure-skip-tls-verify", false, "don't check the servers' certificates (env ETCDCTL_INSECURE_SKIP_TLS_VERIFY)")
	f.StringVar(&c.User, "user", "", "etcd user, or user:password (env ETCDCTL_USER)")
	f.StringVar(&c.Password, "password", "", "password of the etcd user (env ETCDCTL_PASSWORD)")
	f.DurationVar(&c.DialTimeout, "dial-timeout", 0, "limit of one connection attempt (default 2s; env ETCDCTL_DIAL_TIMEOUT)")
	root.MarkFlagsMutuallyExclusive("namespace", "all-namespaces")
	// The errors are about names that don't exist, which is ours alone.
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(outputs, cobra.ShellCompDirectiveNoFileComp))

	get := &cobra.Command{Use: "get", Short: "Show instances, or the verdicts of shutdowns", Args: noSuchCommand, RunE: func(cmd *cobra.Command, _ []string) error {
		return fmt.Errorf("get what? want: %[1]s instances [SERVICE], or %[1]s verdicts [POD]", cmd.CommandPath())
	}}
	get.AddCommand(a.getInstances(), a.getVerdicts())
	root.AddCommand(get, a.watch(), a.status(), a.hold(), a.resume())
	return root
}

// noSuchCommand refuses what follows a command that has subcommands, and is none of them.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var names []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "completion" {
			names = append(names, c.Name())
		}
	}
	return fmt.Errorf("unknown command %q: want one of %s (%s --help)", args[0], strings.Join(names, ", "), cmd.CommandPath())
}

// arguments refuses fewer and more than a command's line of use shows.
func arguments(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		use := cmd.CommandPath() + strings.TrimPrefix(cmd.Use, cmd.Name())
		switch {
		case len(args) < least:
			return fmt.Errorf("an argument is missing: want %s", use)
		case len(args) > most:
			return fmt.Errorf("%q is one argument too many: want %s", args[most], use)
		}
		return nil
	}
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); version == "" && ok {
		return info.Main.Version
	}
	return version
}

var outputs = []string{"table", "wide", "json", "yaml"}

// check fills in the environment, and looks at what cobra doesn't.
func (a *app) check(cmd *cobra.Command) error {
	changed := cmd.Flags().Changed
	if !slices.Contains(outputs, a.output) {
		return fmt.Errorf("--output is %q: want table, wide, json or yaml", a.output)
	}
	for _, f := range []struct {
		flag, env string
		value     *string
	}{{"namespace", "USHER_NAMESPACE", &a.namespace}, {"cluster", "USHER_CLUSTER", &a.cluster}} {
		source := "--" + f.flag
		if !changed(f.flag) {
			source = f.env
			if *f.value = a.getenv(f.env); *f.value == "" {
				*f.value = "default"
			}
		}
		if *f.value == "" || strings.Contains(*f.value, "/") {
			return fmt.Errorf("%s is %q: want a name without '/'", source, *f.value)
		}
	}
	if a.allNamespaces {
		a.namespace = ""
	}
	return nil
}

// catalog is connect for those who only read.
func (a *app) catalog(cmd *cobra.Command) (c *registry.Catalog, explain func(error) error, stop func(), err error) {
	e, err := a.connect(cmd)
	if err != nil {
		return nil, nil, nil, err
	}
	return registry.NewCatalog(e.cli, a.cluster), e.explain, e.stop, nil
}

// etcd is a connection.
type etcd struct {
	cli     *clientv3.Client
	explain func(error) error // makes the best of an error of the client
}

// stop drops the error: what is written has been answered, so nothing can be lost.
func (e etcd) stop() { _ = e.cli.Close() }

// connect connects to etcd. The caller ends with stop.
func (a *app) connect(cmd *cobra.Command) (etcd, error) {
	conn := registry.Connection{}
	if err := conn.FromETCDCTL(a.getenv); err != nil {
		return etcd{}, err
	}
	changed := cmd.Flags().Changed
	for _, f := range []struct {
		flag string
		set  func()
	}{
		{"endpoints", func() { conn.Endpoints = a.flags.Endpoints }},
		{"cacert", func() { conn.CACert = a.flags.CACert }},
		{"cert", func() { conn.Cert = a.flags.Cert }},
		{"key", func() { conn.Key = a.flags.Key }},
		{"insecure-skip-tls-verify", func() { conn.InsecureSkipVerify = a.flags.InsecureSkipVerify }},
		{"user", func() { conn.User = a.flags.User }},
		{"password", func() { conn.Password = a.flags.Password }},
		{"dial-timeout", func() { conn.DialTimeout = a.flags.DialTimeout }},
	} {
		if changed(f.flag) {
			f.set()
		}
	}
	last := &lastError{}
	explain := func(err error) error {
		if detail := last.text(); errors.Is(err, context.DeadlineExceeded) && detail != "" {
			return fmt.Errorf("etcd at %s doesn't answer: %s", strings.Join(conn.Endpoints, ","), detail)
		}
		return err
	}
	cli, err := conn.Dial(zap.New(last))
	if err != nil {
		return etcd{}, explain(err)
	}
	return etcd{cli, explain}, nil
}

// lastError is a log core that keeps the last error that the etcd client logged. The client's own errors say only that
// the time was up; the reason (connection refused, a certificate) is in its log.
type lastError struct {
	mu  sync.Mutex
	err string
}

func (l *lastError) Enabled(level zapcore.Level) bool  { return level >= zapcore.WarnLevel }
func (l *lastError) With([]zapcore.Field) zapcore.Core { return l }
func (l *lastError) Sync() error                       { return nil }
func (l *lastError) Check(e zapcore.Entry, c *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if l.Enabled(e.Level) {
		return c.AddCore(e, l)
	}
	return c
}

func (l *lastError) Write(_ zapcore.Entry, fields []zapcore.Field) error {
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok && f.Key == "error" {
			l.mu.Lock()
			l.err = err.Error()
			l.mu.Unlock()
		}
	}
	return nil
}

// text is the innermost reason.
func (l *lastError) text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.err
	if i := strings.LastIndex(s, "desc = "); i >= 0 {
		s = strings.Trim(s[i+len("desc = "):], `"`)
	}
	for _, prefix := range []string{"transport: Error while dialing: ", "transport: authentication handshake failed: "} {
		s = strings.TrimPrefix(s, prefix)
	}
	return s
}

// nothingFound is kubectl's way to say so.
func (a *app) nothingFound(what, more string) {
	if a.namespace == "" {
		fmt.Fprintf(a.stderr, "No %s found%s.\n", what, more)
		return
	}
	fmt.Fprintf(a.stderr, "No %s found in namespace %q%s.\n", what, a.namespace, more)
}

// noRecord is the error for a pod that isn't found.
func (a *app) noRecord(pod string) error {
	where := fmt.Sprintf("namespace %q", a.namespace)
	if a.allNamespaces {
		where = "any namespace"
	}
	return fmt.Errorf("pod %q has no record in %s of cluster %q", pod, where, a.cluster)
}

// ages counts every age of one output from the same moment.
func (a *app) ages() func(time.Time) string {
	now := time.Now()
	return func(t time.Time) string {
		if t.IsZero() {
			return "<unknown>"
		}
		return shortDuration(now.Sub(t))
	}
}
