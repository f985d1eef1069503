// Package cluster brings up a complete Kubernetes node on this machine, and an etcd beside it as the registry, for end-to-end
// tests, demonstrations and benchmarks. Nothing in it is simulated: the kubelet that runs preStop hooks, the controller that writes
// EndpointSlices and the proxy that routes Services are the released ones, built from their Go modules.
//
//	10.n.0.1 (interface usher0)                                         pods 10.n.0.0/24, Services 10.n.128.0/20
//	  kube-apiserver --- etcd (loopback)      kubelet --- containerd --- runc --- pod  pod  pod
//	     |   |   |                               |                                  |
//	     |   |   kube-scheduler                  |          veth pairs, routed <----+
//	     |   kube-controller-manager             |
//	     +---------------------------------------+          registry: an etcd of its own, on 10.n.0.1
//	     kube-proxy (nftables)
//
// Everything a cluster has is in one folder, and each component is a process in a session of its own, so a cluster outlives
// the process that made it. The interface, kube-proxy's tables and some of the kubelet's folders are per machine: so is the
// cluster, and a second Up says who has it. What a killed process left behind is removed by the next Up.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

var (
	// ErrExists is returned by Up when a cluster stands on this machine.
	ErrExists = errors.New("a cluster stands on this machine already")
	// ErrNone is returned by Open when no cluster is up in the folder.
	ErrNone = errors.New("no cluster is up")
)

// Config says where and how a cluster is brought up. The zero value is usable.
type Config struct {
	// Dir is the cluster's folder, which is removed when it goes down. Default: usher-cluster in the system's folder for temporary
	// files. It must not exist, be empty, or be the folder of an earlier cluster.
	Dir string
	// Progress gets a line for each step that takes time. Default: nobody.
	Progress io.Writer
	// RegistryNoFsync lets the registry acknowledge a write before it is on disk. Default: it doesn't.
	RegistryNoFsync bool
	// Detach says that the cluster is to stay when this process ends without taking it down. If it is false, the next
	// Up takes such a cluster for one that a crash left behind, and removes it.
	Detach bool
}

// Cluster is a running cluster. Its methods may be called from several goroutines.
type Cluster struct {
	dir string

	mu    sync.Mutex // guards state.Daemons; the rest of state doesn't change once Up has begun
	state state
}

func (cfg Config) dir() (string, error) {
	dir := cfg.Dir
	if dir == "" {
		dir = filepath.Join(os.TempDir(), "usher-cluster")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("finding the cluster's folder: %w", err)
	}
	// Processes and mounts are found by this path, and the kernel shows them without symbolic links.
	parent, err := filepath.EvalSymlinks(filepath.Dir(dir))
	if err != nil {
		return "", fmt.Errorf("finding the cluster's folder: %w", err)
	}
	dir = filepath.Join(parent, filepath.Base(dir))
	// The longest socket in it is kubelet/pod-resources/<number>.sock; a socket's path has 107 bytes at most (unix(7)).
	if most := 70; len(dir) > most {
		return "", fmt.Errorf("the cluster's folder %s: the path has %d bytes, at most %d leave room for sockets in it",
			dir, len(dir), most)
	}
	return dir, nil
}

// Up brings a cluster up and returns when pods can be created: the node is ready and the namespace default has its service
// account. That takes a few seconds; the first time on a machine, some minutes more to build the binaries. It needs root, and installs
// missing Debian packages. When it fails, everything but the logs is removed.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	progress := cfg.Progress
	if progress == nil {
		progress = io.Discard
	}
	dir, err := cfg.dir()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("a cluster needs root: it makes network interfaces, mounts and cgroups")
	}
	if err := installPackages(ctx, progress); err != nil {
		return nil, err
	}
	binaries, err := Build(ctx, progress)
	if err != nil {
		return nil, err
	}
	unlock, err := lockFile(ctx, machineFile, func() {
		fmt.Fprintln(progress, "waiting for another cluster to come up or go down")
	})
	if err != nil {
		return nil, fmt.Errorf("waiting for another cluster to come up or go down: %w", err)
	}
	defer unlock()
	if err := makeRoom(ctx, dir, progress); err != nil {
		return nil, err
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	if err := foreignTables(ctx); err != nil {
		return nil, err
	}

	begun := time.Now()
	c := &Cluster{dir: dir}
	if err := c.prepare(cfg, binaries); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "starting Kubernetes %s\n", binaries.KubernetesVersion)
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(err, c.abandon(context.WithoutCancel(ctx)))
	}
	fmt.Fprintf(progress, "the cluster is up after %.1f s\n", time.Since(begun).Seconds())
	return c, nil
}

// makeRoom removes the remains of the machine's former cluster, or says that it stands. The caller holds the machine's lock.
func makeRoom(ctx context.Context, dir string, progress io.Writer) error {
	former, err := claimed()
	if err != nil {
		return fmt.Errorf("looking for another cluster: %w", err)
	}
	// The machine's record is lost with a restart, a folder isn't.
	for _, d := range slices.Compact([]string{former, dir}) {
		if d == "" {
			continue
		}
		s, err := readState(d)
		gone := errors.Is(err, fs.ErrNotExist)
		if gone && d != former {
			continue
		}
		if gone {
			// Somebody removed the folder. Its daemons are found all the same.
			s, err = &state{}, nil
		}
		if err != nil {
			return fmt.Errorf("looking for another cluster: %w", err)
		}
		name, pid := s.anyAlive()
		switch {
		case pid != 0 && s.Owner.alive():
			return fmt.Errorf("%w, in %s (%s has pid %d), made by process %d, which still runs: wait for it, or take the cluster down",
				ErrExists, d, name, pid, s.Owner.PID)
		case pid != 0 && s.Owner.PID == 0:
			return fmt.Errorf("%w, in %s (%s has pid %d): attach to it, or take it down", ErrExists, d, name, pid)
		}
		fmt.Fprintf(progress, "removing what an earlier cluster left in %s\n", d)
		if err := sweep(ctx, d, s); err != nil {
			return fmt.Errorf("removing what an earlier cluster left: %w", err)
		}
		if gone {
			continue
		}
		if err := os.RemoveAll(d); err != nil {
			return fmt.Errorf("removing what an earlier cluster left: %w", err)
		}
	}
	return claim("")
}

// checkDir refuses a folder that has somebody's files.
func checkDir(dir string) error {
	if err := checkOwner(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("the cluster's folder: %w", err)
	}
	if len(entries) > 0 {
		return fmt.Errorf("the cluster's folder %s holds other files, such as %s: want an empty one", dir, entries[0].Name())
	}
	return nil
}

// prepare decides everything that the components have to know, and writes it down before anything of the machine is changed.
func (c *Cluster) prepare(cfg Config, binaries *Binaries) error {
	c.state = state{
		Binaries:        *binaries,
		RegistryNoFsync: cfg.RegistryNoFsync,
		Daemons:         map[string]process{},
		Sysctls:         readSysctls(),
		Made:            absentDirs(),
	}
	s := &c.state
	var err error
	if s.CNIDir, err = findCNI(); err != nil {
		return err
	}
	if s.Subnet, err = freeSubnet(); err != nil {
		return err
	}
	if s.Ports, err = freePorts(portNames()); err != nil {
		return err
	}
	if !cfg.Detach {
		if s.Owner, err = findProcess(os.Getpid()); err != nil {
			return fmt.Errorf("finding this process's start time: %w", err)
		}
	}
	// Other users' pods are none of this folder's business; containers see their mounts, not this path.
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return fmt.Errorf("making the cluster's folder: %w", err)
	}
	if s.Snapshotter, err = snapshotter(c.dir); err != nil {
		return err
	}
	if err := claim(c.dir); err != nil {
		return fmt.Errorf("recording the cluster: %w", err)
	}
	if err := s.write(c.dir); err != nil {
		return fmt.Errorf("recording the cluster: %w", err)
	}
	for _, sub := range []string{"logs", "pki", "kubelet", "containerd"} {
		if err := os.MkdirAll(c.path(sub), 0o755); err != nil {
			return fmt.Errorf("making the cluster's folder: %w", err)
		}
	}
	return nil
}

// snapshotter is overlayfs, except on a file system that is an overlay itself, as in a container.
func snapshotter(dir string) (string, error) {
	const overlayMagic = 0x794c7630 // OVERLAYFS_SUPER_MAGIC of linux/magic.h
	var stat syscall.Statfs_t
	if err := syscall.Statfs(dir, &stat); err != nil {
		return "", fmt.Errorf("finding the file system of %s: %w", dir, err)
	}
	if stat.Type == overlayMagic {
		return "native", nil
	}
	return "overlayfs", nil
}

// start starts the components, each as soon as those that it needs work:
//
//	etcd -> kube-apiserver -> kube-controller-manager, kube-scheduler, kube-proxy
//	containerd -> pause image -> kubelet (and the API server)
//	registry
func (c *Cluster) start(ctx context.Context) error {
	if err := c.writePKI(); err != nil {
		return err
	}
	if err := c.writeConfig(); err != nil {
		return fmt.Errorf("writing the components' configuration: %w", err)
	}
	if err := c.setUpNetwork(ctx); err != nil {
		return err
	}
	for _, name := range []string{Etcd, Registry, Containerd} {
		if err := c.spawn(name); err != nil {
			return fmt.Errorf("starting %s: %w", name, err)
		}
	}
	err := parallel(ctx,
		func(ctx context.Context) error { return c.waitFor(ctx, Registry) },
		func(ctx context.Context) error { return c.loadPause(ctx) },
		func(ctx context.Context) error {
			if err := c.waitFor(ctx, Etcd); err != nil {
				return err
			}
			return c.Start(ctx, APIServer)
		},
	)
	if err != nil {
		return err
	}
	err = parallel(ctx,
		func(ctx context.Context) error { return c.Start(ctx, ControllerManager) },
		func(ctx context.Context) error { return c.Start(ctx, Scheduler) },
		func(ctx context.Context) error { return c.Start(ctx, KubeProxy) },
		func(ctx context.Context) error { return c.Start(ctx, Kubelet) },
	)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	if err := poll(ctx, c.usable); err != nil {
		return fmt.Errorf("waiting until pods can be created: %w; the components' logs are in %s", err, c.Logs())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.Ready = true
	return c.state.write(c.dir)
}

// usable says what a pod would still have to wait for.
func (c *Cluster) usable(ctx context.Context) error {
	client, err := kubernetes.NewForConfig(c.RESTConfig())
	if err != nil {
		return permanent{err}
	}
	node, err := client.CoreV1().Nodes().Get(ctx, nodeName, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("getting the node: %w", err)
	}
	ready := false
	for _, condition := range node.Status.Conditions {
		if condition.Type == corev1.NodeReady {
			if condition.Status != corev1.ConditionTrue {
				return fmt.Errorf("the node is not ready: %s", condition.Message)
			}
			ready = true
		}
	}
	if !ready || len(node.Spec.Taints) > 0 {
		return errors.New("the node is not ready")
	}
	if _, err := client.CoreV1().ServiceAccounts("default").Get(ctx, "default", metav1.GetOptions{}); err != nil {
		return fmt.Errorf("getting the default service account: %w", err)
	}
	// Each pod mounts it.
	if _, err := client.CoreV1().ConfigMaps("default").Get(ctx, "kube-root-ca.crt", metav1.GetOptions{}); err != nil {
		return fmt.Errorf("getting the authority's certificate for pods: %w", err)
	}
	return nil
}

// parallel runs functions side by side and returns the first failure, which cancels the others.
func parallel(ctx context.Context, functions ...func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make(chan error, len(functions))
	for _, f := range functions {
		go func() { errs <- f(ctx) }()
	}
	var first error
	for range functions {
		if err := <-errs; err != nil && first == nil {
			first = err
			cancel()
		}
	}
	return first
}

// abandon undoes a start that failed, and leaves the logs.
func (c *Cluster) abandon(ctx context.Context) error {
	if err := sweep(ctx, c.dir, &c.state); err != nil {
		return err
	}
	entries, err := os.ReadDir(c.dir)
	if err != nil {
		return err
	}
	for _, entry := range entries {
		// The state marks the folder as one that the next Up may remove.
		if entry.Name() != "logs" && entry.Name() != stateFile {
			if err := os.RemoveAll(c.path(entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Open attaches to the cluster in the folder that cfg names, which another process brought up. It returns ErrNone if there is none.
func Open(cfg Config) (*Cluster, error) {
	dir, err := cfg.dir()
	if err != nil {
		return nil, err
	}
	s, err := readState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w in %s", ErrNone, dir)
	}
	if err != nil {
		return nil, err
	}
	if _, pid := s.anyAlive(); !s.Ready || pid == 0 {
		return nil, fmt.Errorf("%w in %s, just the remains of one, which bringing one up or down removes", ErrNone, dir)
	}
	return &Cluster{dir: dir, state: *s}, nil
}

// Down ends the cluster and removes all that it left on this machine, its folder included. It may be called for one that is half gone.
func (c *Cluster) Down(ctx context.Context) error {
	return remove(ctx, c.dir)
}

// Remove takes the cluster in the folder that cfg names down, whatever state it is in: up, crashed or abandoned. It returns ErrNone if
// there is nothing.
func Remove(ctx context.Context, cfg Config) error {
	dir, err := cfg.dir()
	if err != nil {
		return err
	}
	if _, err := readState(dir); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w in %s", ErrNone, dir)
	}
	return remove(ctx, dir)
}

func remove(ctx context.Context, dir string) error {
	unlock, err := lockFile(ctx, machineFile, nil)
	if err != nil {
		return fmt.Errorf("waiting for another cluster to come up or go down: %w", err)
	}
	defer unlock()
	s, err := readState(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := sweep(ctx, dir, s); err != nil {
		return fmt.Errorf("taking the cluster down: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("removing the cluster's folder: %w", err)
	}
	if former, err := claimed(); err != nil || former != dir {
		return err
	}
	return claim("")
}

func (c *Cluster) path(name string) string { return filepath.Join(c.dir, name) }

func (c *Cluster) logFile(component string) string { return c.path("logs/" + component + ".log") }

func (c *Cluster) apiURL() string {
	return fmt.Sprintf("https://%s:%d", c.state.network().nodeIP, c.state.Ports[APIServer])
}

// Dir is the cluster's folder.
func (c *Cluster) Dir() string { return c.dir }

// Logs is the folder with a log file for each component, named COMPONENT.log.
func (c *Cluster) Logs() string { return c.path("logs") }

// Kubeconfig is the path of a file that makes its user a cluster administrator.
func (c *Cluster) Kubeconfig() string { return c.path("admin.kubeconfig") }

// RESTConfig makes its user a cluster administrator, as Kubeconfig does, and is not throttled. Each call returns a new one.
func (c *Cluster) RESTConfig() *rest.Config {
	return &rest.Config{
		Host: c.apiURL(),
		QPS:  -1,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: c.path("pki/ca.crt"), CertFile: c.path("pki/admin.crt"), KeyFile: c.path("pki/admin.key"),
		},
	}
}

// RegistryEndpoint is the URL of the registry's etcd, which pods and this machine reach alike.
func (c *Cluster) RegistryEndpoint() string {
	return fmt.Sprintf("http://%s:%d", c.state.network().nodeIP, c.state.Ports[Registry])
}

// NodeIP is the node's address, from which the kubelet calls pods.
func (c *Cluster) NodeIP() string { return c.state.network().nodeIP }

// Kubectl is the path of the kubectl of the cluster's version.
func (c *Cluster) Kubectl() string { return c.Binary("kubectl") }

// Binary is the path of one of the built programs: kubectl, etcd, etcdctl, or one of Kubernetes' components.
func (c *Cluster) Binary(name string) string { return filepath.Join(c.state.Binaries.Dir, name) }
