package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"

	"usher.dev/usher/integration/internal/need"
)

const testImage = "usher-cluster-test:dev"

func TestPodRunsAndReachesTheAPI(t *testing.T) {
	need.Root(t)
	c := up(t, Config{Dir: shortDir(t)})
	createPod(t, c, "app")

	logs := kubectl(t, c, "logs", "app")
	for _, want := range []string{"api: 200", `"gitVersion": "` + c.state.Binaries.KubernetesVersion, "registry: 200", "user: 65532"} {
		if !strings.Contains(logs, want) {
			t.Errorf("the pod's log lacks %q:\n%s", want, logs)
		}
	}
	client := clientset(t, c)
	service, err := client.CoreV1().Services("default").Get(t.Context(), "app", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + service.Spec.ClusterIP
	// The rules are written a moment after the endpoint is ready.
	eventually(t, "the Service answers on this machine", func() error { return get(t.Context(), url) })
	if out := kubectl(t, c, "exec", "app", "--", "/app", url); !strings.Contains(out, "answer: 200 hello") {
		t.Errorf("the Service's only pod asked it and got %q", out)
	}
}

func TestComponentsStopAndStart(t *testing.T) {
	need.Root(t)
	c := up(t, Config{Dir: shortDir(t)})
	createPod(t, c, "app")
	// As another process would.
	c, err := Open(Config{Dir: c.Dir()})
	if err != nil {
		t.Fatal(err)
	}
	started := func() (string, int32) {
		pod, err := clientset(t, c).CoreV1().Pods("default").Get(t.Context(), "app", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		status := pod.Status.ContainerStatuses[0]
		return status.ContainerID, status.RestartCount
	}
	id, _ := started()

	etcdctl(t, c, "put", "key", "kept")
	for _, component := range components() {
		end := c.Stop
		if component == APIServer {
			end = c.Kill
		}
		if err := end(t.Context(), component); err != nil {
			t.Fatal(err)
		}
		if err := c.probe(t.Context(), component); err == nil {
			t.Errorf("%s is stopped, and yet it answers", component)
		}
		if err := c.Start(t.Context(), component); err != nil {
			t.Fatal(err)
		}
	}
	if got := etcdctl(t, c, "get", "key", "--print-value-only"); got != "kept\n" {
		t.Errorf("the registry has %q after a restart, want what was put before", got)
	}
	if now, restarts := started(); now != id || restarts != 0 {
		t.Errorf("the pod's container is %s with %d restarts, want %s as before", now, restarts, id)
	}

	if err := c.Start(t.Context(), Kubelet); err == nil || !strings.Contains(err.Error(), "runs already") {
		t.Errorf("starting what runs: %v", err)
	}
	if err := c.Stop(t.Context(), "kubelt"); err == nil || !strings.Contains(err.Error(), "want one of etcd, registry") {
		t.Errorf("stopping an unknown component: %v", err)
	}
	if err := c.Stop(t.Context(), Kubelet); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(c.path("kubelet.yaml"), []byte("kind: Nonsense"), 0o644); err != nil {
		t.Fatal(err)
	}
	err = c.Start(t.Context(), Kubelet)
	if err == nil || !strings.Contains(err.Error(), "starting kubelet: it ended") || !strings.Contains(err.Error(), "Nonsense") {
		t.Errorf("starting a kubelet that dies: %v\nwant its name and the end of its log", err)
	}
}

func TestDownLeavesNothingBehind(t *testing.T) {
	need.Root(t)
	dir := shortDir(t)
	before := traces(t, dir)
	c := up(t, Config{Dir: dir})
	createPod(t, c, "app")
	if during := traces(t, dir); len(added(before, during)) < 10 {
		t.Fatalf("a running cluster shows in these only, so the test can't see what one leaves: %v", added(before, during))
	}
	if err := c.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left := added(before, traces(t, dir)); len(left) > 0 {
		t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	if err := c.Down(t.Context()); err != nil {
		t.Errorf("a second Down: %v", err)
	}
	if _, err := Open(Config{Dir: dir}); !errors.Is(err, ErrNone) {
		t.Errorf("opening a cluster that is down: %v, want ErrNone", err)
	}
}

func TestUpAfterCrashCleansUp(t *testing.T) {
	need.Root(t)
	if dir := os.Getenv("USHER_TEST_CRASH_DIR"); dir != "" {
		crash(t, dir)
	}
	for name, sameDir := range map[string]bool{"in the same folder": true, "in another folder": false} {
		t.Run(name, func(t *testing.T) {
			dir := shortDir(t)
			before := traces(t, dir)
			crashing := exec.Command(os.Args[0], "-test.run=^TestUpAfterCrashCleansUp$")
			crashing.Env = append(os.Environ(), "USHER_TEST_CRASH_DIR="+dir)
			if out, err := crashing.CombinedOutput(); err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("the process that should crash: %v\n%s", err, out)
			}
			if left := added(before, traces(t, dir)); len(left) < 10 {
				t.Fatalf("the crash left these only: %v", left)
			}
			next := dir
			if !sameDir {
				next = shortDir(t)
			}
			c := up(t, Config{Dir: next})
			createPod(t, c, "app")
			if !sameDir {
				if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the crashed cluster's folder %s is still there: %v", dir, err)
				}
			}
			if err := c.Down(t.Context()); err != nil {
				t.Fatal(err)
			}
			if left := added(before, traces(t, dir)); len(left) > 0 {
				t.Errorf("left behind:\n%s", strings.Join(left, "\n"))
			}
		})
	}
}

// crash brings a cluster up and dies without a chance to take it down.
func crash(t *testing.T, dir string) {
	c, err := Up(t.Context(), Config{Dir: dir, Progress: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	createPod(t, c, "app")
	self, err := os.FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if err := self.Kill(); err != nil {
		t.Fatal(err)
	}
	select {}
}

func TestSecondClusterSaysWhyNot(t *testing.T) {
	need.Root(t)
	c := up(t, Config{Dir: shortDir(t)})
	for name, dir := range map[string]string{"in another folder": shortDir(t), "in the same folder": c.Dir()} {
		_, err := Up(t.Context(), Config{Dir: dir})
		if !errors.Is(err, ErrExists) || !strings.Contains(err.Error(), c.Dir()) ||
			!strings.Contains(err.Error(), "process "+strconv.Itoa(os.Getpid())) {
			t.Errorf("a second cluster %s: %v\nwant ErrExists with the first's folder and owner", name, err)
		}
	}
	if err := c.probe(t.Context(), APIServer); err != nil {
		t.Errorf("the first cluster suffered: %v", err)
	}
	other := shortDir(t)
	if _, err := Open(Config{Dir: other}); !errors.Is(err, ErrNone) {
		t.Errorf("opening a cluster where there is none: %v, want ErrNone", err)
	}

	// One that a command line made is nobody's remains, though the process that made it is gone.
	c.state.Owner = process{}
	if err := c.state.write(c.dir); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Config{Dir: c.Dir()}); !errors.Is(err, ErrExists) {
		t.Errorf("a second cluster in the folder of a detached one: %v, want ErrExists", err)
	}
}

func TestUpRefusesAFolderWithOtherFiles(t *testing.T) {
	need.Root(t)
	dir := shortDir(t)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "thesis.txt")
	if err := os.WriteFile(file, []byte("years of work"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Up(t.Context(), Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "thesis.txt") {
		t.Errorf("Up in a folder that is in use: %v, want an error that names a file", err)
	}
	if err := Remove(t.Context(), Config{Dir: dir}); !errors.Is(err, ErrNone) {
		t.Errorf("Remove of a folder that is no cluster's: %v, want ErrNone", err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

func TestUpThatFailsLeavesTheLogsOnly(t *testing.T) {
	need.Root(t)
	dir := shortDir(t)
	before := traces(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		// In the midst of starting.
		for ctx.Err() == nil {
			if _, err := os.Stat(filepath.Join(dir, "logs", "kube-apiserver.log")); err == nil {
				cancel()
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	if _, err := Up(ctx, Config{Dir: dir, Progress: t.Output()}); !errors.Is(err, context.Canceled) {
		t.Fatalf("Up that is cancelled: %v, want context.Canceled", err)
	}
	left := added(before, traces(t, dir))
	if !slices.Equal(left, []string{"folder " + dir}) {
		t.Errorf("left behind:\n%s\nwant the folder with the logs only", strings.Join(left, "\n"))
	}
	if _, err := os.Stat(filepath.Join(dir, "logs", "etcd.log")); err != nil {
		t.Error(err)
	}
	if err := Remove(t.Context(), Config{Dir: dir}); err != nil {
		t.Error(err)
	}
}

// shortDir is a folder name that is free. t.TempDir's are too long for the sockets in it.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "usher-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "c")
}

func up(t *testing.T, cfg Config) *Cluster {
	t.Helper()
	cfg.Progress = t.Output()
	c, err := Up(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return c
}

func clientset(t *testing.T, c *Cluster) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(c.RESTConfig())
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// createPod loads the test's image and waits until a pod of it is ready, under the profile restricted and with a read-only root. A Service
// of the same name leads to it.
func createPod(t *testing.T, c *Cluster, name string) {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "app")
	if out, err := run(t.Context(), []string{"CGO_ENABLED=0"}, "go", "build", "-o", binary, "./testdata/app"); err != nil {
		t.Fatalf("building the test's pod: %v\n%s", err, out)
	}
	image := Image{Name: testImage, Files: map[string]string{"/app": binary}, Entrypoint: []string{"/app"}}
	if err := c.Load(t.Context(), image); err != nil {
		t.Fatal(err)
	}
	client := clientset(t, c)
	labels := map[string]string{"app": name}
	probe := &corev1.Probe{
		ProbeHandler:  corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: "/", Port: intstr.FromInt32(8080)}},
		PeriodSeconds: 1,
	}
	yes, no := true, false
	_, err := client.CoreV1().Pods("default").Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{
			Name: "app", Image: testImage, ImagePullPolicy: corev1.PullNever, ReadinessProbe: probe,
			Env: []corev1.EnvVar{{Name: "REGISTRY", Value: c.RegistryEndpoint()}},
			SecurityContext: &corev1.SecurityContext{
				RunAsNonRoot: &yes, ReadOnlyRootFilesystem: &yes, AllowPrivilegeEscalation: &no,
				Capabilities:   &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
				SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			},
		}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = client.CoreV1().Services("default").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{
			Selector: labels,
			Ports:    []corev1.ServicePort{{Port: 80, TargetPort: intstr.FromInt32(8080)}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is ready", func() error {
		pod, err := client.CoreV1().Pods("default").Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, condition := range pod.Status.Conditions {
			if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("status %+v", pod.Status)
	})
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := poll(ctx, func(context.Context) error { return try() }); err != nil {
		t.Fatalf("waiting until %s: %v", what, err)
	}
}

func kubectl(t *testing.T, c *Cluster, args ...string) string {
	t.Helper()
	return command(t, c.Kubectl(), append([]string{"--kubeconfig", c.Kubeconfig()}, args...)...)
}

func etcdctl(t *testing.T, c *Cluster, args ...string) string {
	t.Helper()
	return command(t, c.Binary("etcdctl"), append([]string{"--endpoints", c.RegistryEndpoint()}, args...)...)
}

func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", filepath.Base(name), strings.Join(args, " "), err, &stderr)
	}
	return string(out)
}

// traces lists all that a cluster in dir may leave on this machine, by means other than the package's own.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	var found []string
	add := func(kind, what string) { found = append(found, kind+" "+what) }

	if _, err := os.Stat(dir); err == nil {
		add("folder", dir)
	}
	processes, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, file := range processes {
		// Empty for a zombie.
		text, _ := os.ReadFile(file)
		args := strings.Split(strings.TrimRight(string(text), "\x00"), "\x00")
		pid := filepath.Base(filepath.Dir(file))
		if pid != strconv.Itoa(os.Getpid()) && (strings.Contains(string(text), dir) || args[0] == "/app" || args[0] == "/pause") {
			add("process", pid+" "+strings.Join(args, " "))
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) || strings.Contains(line, "/cni-") {
			add("mount", line)
		}
	}
	for line := range strings.Lines(command(t, program("ip"), "-brief", "link")) {
		if name, _, _ := strings.Cut(line, "@"); strings.HasPrefix(name, "veth") || strings.HasPrefix(line, "usher") {
			add("interface", name)
		}
	}
	for line := range strings.Lines(command(t, program("ip"), "route", "show", "type", "unreachable")) {
		add("route", line)
	}
	for line := range strings.Lines(command(t, program("nft"), "list", "tables")) {
		add("nftables", line)
	}
	for _, pattern := range []string{
		"/run/netns/*", "/var/lib/kubelet*", "/var/lib/kubelet/*", "/var/lib/cni*", "/var/lib/cni/*/*", "/var/log/containers*", "/var/log/containers/*",
		"/var/log/pods*", "/run/containerd*", "/run/containerd/*/*", "/var/lib/containerd*", "/opt/containerd*", "/opt/cni*", "/etc/cni*",
		"/var/run/kubernetes*", "/sys/fs/cgroup/k8s.io*", "/sys/fs/cgroup/*/k8s.io*", "/sys/fs/cgroup/*/k8s.io/*", "/sys/fs/cgroup/*/kube*",
	} {
		paths, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			add("path", path)
		}
	}
	for name, value := range readSysctls() {
		add("sysctl", name+"="+value)
	}
	slices.Sort(found)
	return slices.Compact(found)
}

func added(before, after []string) []string {
	return slices.DeleteFunc(slices.Clone(after), func(s string) bool { return slices.Contains(before, s) })
}
