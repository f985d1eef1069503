// Command cluster brings a real Kubernetes up on this machine, and takes it down:
//
//	go run ./cmd/cluster up
//	go run ./cmd/cluster load usher-agent:dev ../bin/usher-agent ../bin/usher-prestop
//	kubectl --kubeconfig "$(go run ./cmd/cluster kubeconfig)" get pods -A
//	go run ./cmd/cluster down
//
// See package cluster for what it consists of.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"usher.dev/usher/integration/cluster"
)

const usage = `Brings a real Kubernetes of one node up on this machine, with an etcd beside it as the registry. Needs root.

  cluster up [--registry-no-fsync]    bring it up; it stays until "cluster down". The first time, some minutes go
                                      into building Kubernetes. Prints what to export. Does nothing if it is up
  cluster down                        take it down, or remove what a crashed one left
  cluster load NAME[:TAG] FILE...     pack static programs as an image and import it. A FILE lands at /BASENAME in
                                      the image, or where you say: /path/in/image=FILE. The first is the entrypoint.
                                      Pods need imagePullPolicy: Never
  cluster kubeconfig                  print the path of the administrator's kubeconfig file

Run it in the integration folder: go run ./cmd/cluster up

Flags of all commands:
  --dir DIR    the cluster's folder, removed when it goes down (default: usher-cluster in the folder for temporary files)

Exit codes: 0 done, 1 failed, 2 used wrongly.
`

// errUsage marks errors of the command line.
var errUsage = errors.New(`see "cluster --help"`)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
		fmt.Print(usage)
	default:
		fmt.Fprintf(os.Stderr, "cluster: %v\n", err)
		if errors.Is(err, errUsage) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("no command: want up, down, load or kubeconfig; %w", errUsage)
	}
	command := args[0]
	if command == "-h" || command == "--help" || command == "help" {
		return flag.ErrHelp
	}
	cfg := cluster.Config{Progress: stderr, Detach: true}
	flags := flag.NewFlagSet(command, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&cfg.Dir, "dir", "", "")
	if command == "up" {
		flags.BoolVar(&cfg.RegistryNoFsync, "registry-no-fsync", false, "")
	}
	if err := flags.Parse(args[1:]); errors.Is(err, flag.ErrHelp) {
		return err
	} else if err != nil {
		return fmt.Errorf("%s: %w; %w", command, err, errUsage)
	}
	if command != "load" && flags.NArg() > 0 {
		return fmt.Errorf("%s: unexpected argument %q; %w", command, flags.Arg(0), errUsage)
	}
	switch command {
	case "up":
		return up(ctx, cfg, stdout)
	case "down":
		if err := cluster.Remove(ctx, cfg); err != nil && !errors.Is(err, cluster.ErrNone) {
			return err
		} else if err != nil {
			fmt.Fprintln(stderr, "nothing to take down:", err)
		}
		return nil
	case "load":
		image, err := parseImage(flags.Args())
		if err != nil {
			return fmt.Errorf("load: %w; %w", err, errUsage)
		}
		c, err := cluster.Open(cfg)
		if err != nil {
			return err
		}
		return c.Load(ctx, image)
	case "kubeconfig":
		c, err := cluster.Open(cfg)
		if err != nil {
			return err
		}
		fmt.Fprintln(stdout, c.Kubeconfig())
		return nil
	}
	return fmt.Errorf("unknown command %q: want up, down, load or kubeconfig; %w", command, errUsage)
}

func up(ctx context.Context, cfg cluster.Config, stdout io.Writer) error {
	c, err := cluster.Open(cfg)
	if errors.Is(err, cluster.ErrNone) {
		c, err = cluster.Up(ctx, cfg)
	}
	if err != nil {
		return err
	}
	down := "go run ./cmd/cluster down"
	if cfg.Dir != "" {
		down += " --dir " + cfg.Dir
	}
	fmt.Fprintf(stdout, `export KUBECONFIG=%s
export ETCDCTL_ENDPOINTS=%s
export PATH=%s:$PATH   # kubectl, etcdctl
# take it down: %s
`, c.Kubeconfig(), c.RegistryEndpoint(), filepath.Dir(c.Kubectl()), down)
	return nil
}

// parseImage reads NAME FILE..., where a FILE may say its path in the image: /path=FILE.
func parseImage(args []string) (cluster.Image, error) {
	if len(args) < 2 {
		return cluster.Image{}, errors.New("want NAME FILE")
	}
	image := cluster.Image{Name: args[0], Files: map[string]string{}}
	for _, arg := range args[1:] {
		in, file, given := strings.Cut(arg, "=")
		if !given || !strings.HasPrefix(in, "/") {
			in, file = "/"+filepath.Base(arg), arg
		}
		if other, twice := image.Files[in]; twice {
			return cluster.Image{}, fmt.Errorf("%s and %s would both be %s in the image", other, file, in)
		}
		image.Files[in] = file
		if image.Entrypoint == nil {
			image.Entrypoint = []string{in}
		}
	}
	return image, nil
}
