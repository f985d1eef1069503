package cluster

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"
)

const modulePath = "usher.dev/usher/integration"

// Binaries says where the programs of a cluster are.
type Binaries struct {
	Dir               string // holds kube-apiserver, kubelet, kubectl, etcd, etcdctl and the others
	KubernetesVersion string // as pins/kubernetes/go.mod requires it, such as v1.36.3
	EtcdVersion       string // as pins/etcd/go.mod requires it
}

// target is one binary: its name, the pin module that builds it and the package in it.
type target struct {
	name, pin, pkg string
}

func targets() []target {
	return []target{
		{"etcd", "etcd", "go.etcd.io/etcd/server/v3"},
		{"etcdctl", "etcd", "go.etcd.io/etcd/etcdctl/v3"},
		{"kubectl", "kubernetes", "k8s.io/kubernetes/cmd/kubectl"},
		{KubeProxy, "kubernetes", "k8s.io/kubernetes/cmd/kube-proxy"},
		{Kubelet, "kubernetes", "k8s.io/kubernetes/cmd/kubelet"},
		{Scheduler, "kubernetes", "k8s.io/kubernetes/cmd/kube-scheduler"},
		{ControllerManager, "kubernetes", "k8s.io/kubernetes/cmd/kube-controller-manager"},
		{APIServer, "kubernetes", "k8s.io/kubernetes/cmd/kube-apiserver"},
	}
}

// Build compiles Kubernetes and etcd, at the versions that the modules under pins require, into the user's cache folder
// (usher/kubernetes-VERSION-etcd-VERSION-OS-ARCH), and returns at once when they are there. The first build takes
// about six minutes on two cores; progress gets a line when a program is begun, every half minute, and when it is done. The
// working directory must be inside the integration module, whose pins are used.
func Build(ctx context.Context, progress io.Writer) (*Binaries, error) {
	module, err := moduleDir(ctx)
	if err != nil {
		return nil, err
	}
	pins := filepath.Join(module, "cluster", "pins")
	kubernetes, err := pinnedVersion(filepath.Join(pins, "kubernetes", "go.mod"), "k8s.io/kubernetes")
	if err != nil {
		return nil, err
	}
	etcd, err := pinnedVersion(filepath.Join(pins, "etcd", "go.mod"), "go.etcd.io/etcd/server/v3")
	if err != nil {
		return nil, err
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("finding the cache folder for Kubernetes' binaries: %w", err)
	}
	b := &Binaries{
		Dir: filepath.Join(cache, "usher", fmt.Sprintf("kubernetes-%s-etcd-%s-%s-%s",
			kubernetes, etcd, runtime.GOOS, runtime.GOARCH)),
		KubernetesVersion: kubernetes,
		EtcdVersion:       etcd,
	}
	if b.complete() {
		return b, nil
	}
	if err := os.MkdirAll(b.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the folder for Kubernetes' binaries: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(b.Dir, ".lock"), func() {
		fmt.Fprintln(progress, "waiting for another process to finish building Kubernetes")
	})
	if err != nil {
		return nil, fmt.Errorf("waiting to build Kubernetes: %w", err)
	}
	defer unlock()

	all := targets()
	for i, p := range all {
		if _, err := os.Stat(filepath.Join(b.Dir, p.name)); err == nil {
			continue
		}
		what := fmt.Sprintf("building %s (%d of %d), first time only", p.name, i+1, len(all))
		if err := b.build(ctx, p, pins, what, progress); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *Binaries) complete() bool {
	for _, p := range targets() {
		if _, err := os.Stat(filepath.Join(b.Dir, p.name)); err != nil {
			return false
		}
	}
	return true
}

func (b *Binaries) build(ctx context.Context, p target, pins, what string, progress io.Writer) error {
	fmt.Fprintln(progress, what)
	begun := time.Now()
	done := make(chan struct{})
	reported := make(chan struct{})
	go func() {
		defer close(reported)
		tick := time.NewTicker(30 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				fmt.Fprintf(progress, "%s: %v\n", what, time.Since(begun).Round(time.Second))
			}
		}
	}()
	// The version would read v0.0.0-master if the linker were not told it. A partly written binary never gets its
	// final name.
	out := filepath.Join(b.Dir, p.name)
	output, err := run(ctx, []string{"CGO_ENABLED=0"}, "go", "-C", filepath.Join(pins, p.pin), "build", "-mod=readonly",
		"-ldflags", "-s -w -X k8s.io/component-base/version.gitVersion="+b.KubernetesVersion,
		"-o", out+".partial", p.pkg)
	close(done)
	<-reported
	if err != nil {
		return fmt.Errorf("building %s: %w\n%s", p.name, err, output)
	}
	if err := os.Rename(out+".partial", out); err != nil {
		return fmt.Errorf("putting %s in its place: %w", p.name, err)
	}
	fmt.Fprintf(progress, "built %s in %v\n", p.name, time.Since(begun).Round(time.Second))
	return nil
}

// moduleDir is where the integration module's sources are.
func moduleDir(ctx context.Context) (string, error) {
	output, err := run(ctx, nil, "go", "list", "-m", "-f", "{{.Dir}}", modulePath)
	if err != nil {
		return "", fmt.Errorf("finding the sources of %s (run this inside its folder): %w: %s", modulePath, err, output)
	}
	return strings.TrimSpace(output), nil
}

// pinnedVersion reads from a go.mod which version of a module it requires.
func pinnedVersion(file, module string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("reading the pinned version of %s: %w", module, err)
	}
	version, err := requiredVersion(text, module)
	if err != nil {
		return "", fmt.Errorf("%s: %w", file, err)
	}
	return version, nil
}

func requiredVersion(goMod []byte, module string) (string, error) {
	line := regexp.MustCompile(`(?m)^\s*(?:require\s+)?` + regexp.QuoteMeta(module) + `\s+(v\S+)`)
	match := line.FindSubmatch(goMod)
	if match == nil {
		return "", fmt.Errorf("no version of %s is required", module)
	}
	return string(match[1]), nil
}

// run executes a command to its end with extra variables in its environment, and returns what it printed.
func run(ctx context.Context, env []string, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program(name), args...)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return out.String(), err
}
