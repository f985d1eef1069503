// Package stack puts Usher on a real cluster, the way a user would: programs built, packed as images and loaded, a
// namespace with the example's permissions and the registry's address, manifests applied with kubectl.
package stack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"

	"usher.dev/usher/integration/cluster"
)

// Images that the example manifests name.
const (
	AgentImage = "usher-agent:dev"
	AppImage   = "sample-app:dev"
)

// Config of Up.
type Config struct {
	Cluster cluster.Config
	// Progress gets a line for each step that takes long; nil: nobody does.
	Progress io.Writer
}

// Stack is a cluster with Usher's and the sample application's images, and clients for all that can be asked.
type Stack struct {
	*cluster.Cluster
	Programs Programs
	Client   kubernetes.Interface
	Etcd     *clientv3.Client // the registry
	attached bool
}

// Programs are the paths of what was built. All are static.
type Programs struct{ Agent, Prestop, Ctl, App string }

// Root is the project's folder.
func Root(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "usher.dev/usher").Output()
	if err != nil {
		return "", fmt.Errorf("finding the project's folder (run this inside of it): %w", describe(err))
	}
	return strings.TrimSpace(string(out)), nil
}

// Build builds the programs into the folder bin of the project, as `make build` does, and the sample application beside
// them.
func Build(ctx context.Context) (Programs, error) {
	root, err := Root(ctx)
	if err != nil {
		return Programs{}, err
	}
	bin := filepath.Join(root, "bin")
	for _, b := range []struct{ dir, out, pkg string }{
		{root, bin + "/", "./cmd/..."},
		{filepath.Join(root, "integration"), filepath.Join(bin, "sample-app"), "./app"},
	} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-tags", "grpcnotrace", "-ldflags", "-s -w", "-o", b.out, b.pkg)
		cmd.Dir, cmd.Env = b.dir, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return Programs{}, fmt.Errorf("building %s: %w\n%s", b.pkg, err, out)
		}
	}
	return Programs{
		Agent: filepath.Join(bin, "usher-agent"), Prestop: filepath.Join(bin, "usher-prestop"),
		Ctl: filepath.Join(bin, "usherctl"), App: filepath.Join(bin, "sample-app"),
	}, nil
}

// Up builds everything and brings a cluster up with it. Where one is up already (`make cluster`), that one is used, and
// Down leaves it.
func Up(ctx context.Context, cfg Config) (_ *Stack, err error) {
	say := func(format string, args ...any) {
		if cfg.Progress != nil {
			fmt.Fprintf(cfg.Progress, format+"\n", args...)
		}
	}
	s := &Stack{}
	say("building Usher and the sample application")
	if s.Programs, err = Build(ctx); err != nil {
		return nil, err
	}
	if cfg.Cluster.Progress == nil {
		cfg.Cluster.Progress = cfg.Progress
	}
	s.Cluster, err = cluster.Up(ctx, cfg.Cluster)
	if errors.Is(err, cluster.ErrExists) {
		if s.Cluster, err = cluster.Open(cfg.Cluster); err == nil {
			s.attached = true
			say("using the cluster that is up")
		}
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.Down(context.WithoutCancel(ctx))
		}
	}()
	say("loading the images")
	// usher-prestop is in the application's image too, for an exec hook.
	err = s.Load(ctx,
		cluster.Image{Name: AgentImage, Files: map[string]string{"/usher-agent": s.Programs.Agent, "/usher-prestop": s.Programs.Prestop}, Entrypoint: []string{"/usher-agent"}},
		cluster.Image{Name: AppImage, Files: map[string]string{"/app": s.Programs.App, "/usher-prestop": s.Programs.Prestop}, Entrypoint: []string{"/app"}},
	)
	if err != nil {
		return nil, err
	}
	if s.Client, err = kubernetes.NewForConfig(s.RESTConfig()); err != nil {
		return nil, fmt.Errorf("making the Kubernetes client: %w", err)
	}
	s.Etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{s.RegistryEndpoint()}, DialTimeout: 5 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("connecting to the registry: %w", err)
	}
	return s, nil
}

// Down takes the cluster down, unless it was up before.
func (s *Stack) Down(ctx context.Context) error {
	if s.Etcd != nil {
		s.Etcd.Close()
	}
	if s.attached {
		return nil
	}
	return s.Cluster.Down(ctx)
}

// Attached says that the cluster was up before, and stays.
func (s *Stack) Attached() bool { return s.attached }

// Namespace makes a namespace in which the example can be applied: with its permissions, and with the registry's address
// in the ConfigMap that the manifests name.
func (s *Stack) Namespace(ctx context.Context, name string) error {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := s.Client.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making namespace %s: %w", name, err)
	}
	registry := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "usher-registry", Namespace: name},
		Data:       map[string]string{"ETCDCTL_ENDPOINTS": s.RegistryEndpoint()},
	}
	if _, err := s.Client.CoreV1().ConfigMaps(name).Create(ctx, registry, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		return fmt.Errorf("making the ConfigMap usher-registry: %w", err)
	}
	rbac, err := Example(ctx, "rbac.yaml")
	if err != nil {
		return err
	}
	if err := s.Apply(ctx, name, rbac); err != nil {
		return err
	}
	// Pods are refused until the namespace's default service account is there. The controller that makes it looks again
	// after up to half a minute when the API server has been away.
	err = wait.PollUntilContextTimeout(ctx, 50*time.Millisecond, 2*time.Minute, true, func(ctx context.Context) (bool, error) {
		_, err := s.Client.CoreV1().ServiceAccounts(name).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	})
	if err != nil {
		return fmt.Errorf("waiting for the default service account of namespace %s: %w", name, err)
	}
	return nil
}

// Example is a manifest of deploy/example, as it stands.
func Example(ctx context.Context, name string) (string, error) {
	root, err := Root(ctx)
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile(filepath.Join(root, "deploy", "example", name))
	return string(b), err
}

// Apply is `kubectl apply` in a namespace.
func (s *Stack) Apply(ctx context.Context, namespace, manifest string) error {
	_, err := s.Run(ctx, strings.NewReader(manifest), "--namespace", namespace, "apply", "-f", "-")
	return err
}

// Run is kubectl with any arguments; it returns what kubectl prints.
func (s *Stack) Run(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, s.Kubectl(), append([]string{"--kubeconfig", s.Kubeconfig()}, args...)...)
	cmd.Stdin = stdin
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("kubectl %s: %w", strings.Join(args, " "), describe(err))
	}
	return string(out), nil
}

// describe adds what a failed command said.
func describe(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}
