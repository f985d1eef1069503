package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPinsNameOneVersionOfEachModule(t *testing.T) {
	kubernetes, err := pinnedVersion("pins/kubernetes/go.mod", "k8s.io/kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	// The staging modules' versions are Kubernetes' with 0 for 1.
	text, err := os.ReadFile("pins/kubernetes/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	want := "v0" + strings.TrimPrefix(kubernetes, "v1")
	for line := range strings.Lines(string(text)) {
		if _, target, ok := strings.Cut(line, "=> k8s.io/"); ok && !strings.HasSuffix(strings.TrimSpace(target), " "+want) {
			t.Errorf("a staging module is not at %s: %s", want, line)
		}
	}
	if _, err := pinnedVersion("pins/etcd/go.mod", "go.etcd.io/etcd/server/v3"); err != nil {
		t.Error(err)
	}
}

func TestRequiredVersion(t *testing.T) {
	for _, mod := range []string{
		"module m\nrequire example.org/a v1.2.3\n",
		"module m\nrequire (\n\texample.org/ab v9.9.9\n\texample.org/a v1.2.3 // indirect\n)\nreplace example.org/a => example.org/a v0.0.1\n",
	} {
		if got, err := requiredVersion([]byte(mod), "example.org/a"); err != nil || got != "v1.2.3" {
			t.Errorf("got %q, %v from\n%s", got, err, mod)
		}
	}
	if got, err := requiredVersion([]byte("module m\n"), "example.org/a"); err == nil {
		t.Errorf("got %q where nothing is required", got)
	}
}

func TestParseStatOfAProgramWithAnOddName(t *testing.T) {
	start, status, err := parseStat("42 (a) R (b) Z 1 42 42 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 987654 1 2\n")
	if err != nil || start != 987654 || status != "Z" {
		t.Errorf("got %d, %q, %v; want 987654, Z", start, status, err)
	}
	if _, _, err := parseStat("42 (a) Z 1"); err == nil {
		t.Error("a cut line was accepted")
	}
}

func TestAnotherProcessWithTheSameIDIsNotAlive(t *testing.T) {
	self, err := findProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	if !self.alive() {
		t.Error("this process is not alive")
	}
	self.Start--
	if self.alive() {
		t.Error("a process that started at another time is taken for this one")
	}
	if (process{}).alive() {
		t.Error("no process is alive")
	}
}

func TestMountPointWithBlanks(t *testing.T) {
	line := `36 35 98:0 /mnt1 /a\040b\134c rw,noatime master:1 - ext3 /dev/root rw`
	if got := mountPoint(line); got != `/a b\c` {
		t.Errorf("got %q", got)
	}
}

func TestOnlyProcessesOfTheFolderAreDaemons(t *testing.T) {
	for _, c := range []struct {
		args string
		want bool
	}{
		{"/cache/kubelet --config /tmp/c/kubelet.yaml", true},
		{"/usr/bin/containerd-shim-runc-v2 -namespace k8s.io -address /tmp/c/containerd.sock", true},
		{"/cache/etcd --data-dir=/tmp/c/etcd", true},
		{"/cache/etcd --data-dir /tmp/cc/etcd", false},
		{"/cache/etcd --data-dir /var/tmp/c/etcd", false},
		{"/usr/bin/vim /tmp/c/logs/kubelet.log", false},
		{"", false}, // a kernel thread
	} {
		if got := isDaemonOf("/tmp/c", strings.Split(c.args, " ")); got != c.want {
			t.Errorf("%q: got %v", c.args, got)
		}
	}
}

func TestPickSubnetAvoidsThisMachines(t *testing.T) {
	parse := func(cidrs ...string) []net.Addr {
		var addrs []net.Addr
		for _, cidr := range cidrs {
			ip, in, err := net.ParseCIDR(cidr)
			if err != nil {
				t.Fatal(err)
			}
			addrs = append(addrs, &net.IPNet{IP: ip, Mask: in.Mask})
		}
		return addrs
	}
	for _, c := range []struct {
		addrs []net.Addr
		want  int
	}{
		{parse("127.0.0.1/8", "192.168.1.2/24", "::1/128"), 244},
		{parse("10.244.7.1/24"), 245},
		{parse("10.244.0.1/32", "10.245.255.255/32", "10.247.0.1/16"), 246},
	} {
		if got, err := pickSubnet(c.addrs); err != nil || got != c.want {
			t.Errorf("with %v: got %d, %v; want %d", c.addrs, got, err, c.want)
		}
	}
	if got, err := pickSubnet(parse("10.1.2.3/8")); err == nil {
		t.Errorf("10.%d.0.0/16 was picked on a machine in 10.0.0.0/8", got)
	}
}

func TestFreePortsAreDistinctAndNotEphemeral(t *testing.T) {
	ports, err := freePorts(portNames())
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]string{}
	for name, port := range ports {
		if port < 21000 || port > 29999 {
			t.Errorf("%s has port %d", name, port)
		}
		if other, twice := seen[port]; twice {
			t.Errorf("%s and %s have the port %d", name, other, port)
		}
		seen[port] = name
	}
	if len(ports) != len(portNames()) {
		t.Errorf("%d ports for %d names", len(ports), len(portNames()))
	}
}

func TestLockFileWaitsForItsHolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "lock")
	unlock, err := lockFile(t.Context(), file, nil)
	if err != nil {
		t.Fatal(err)
	}
	waiting := make(chan struct{})
	locked := make(chan error, 1)
	go func() {
		unlock, err := lockFile(t.Context(), file, func() { close(waiting) })
		if err == nil {
			unlock()
		}
		locked <- err
	}()
	<-waiting
	select {
	case err := <-locked:
		t.Fatalf("two hold the lock: %v", err)
	default:
	}
	unlock()
	select {
	case err := <-locked:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the lock was given back, and its next holder waits on")
	}
}

func TestADirTooLongForSocketsIsRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 80))
	if _, err := Open(Config{Dir: dir}); err == nil || !strings.Contains(err.Error(), "at most 70") {
		t.Errorf("got %v, want an error that names the limit", err)
	}
}

func TestImageReferenceIsTheKubelets(t *testing.T) {
	for name, want := range map[string]string{
		"app":                     "docker.io/library/app:latest",
		"app:dev":                 "docker.io/library/app:dev",
		"team/app:dev":            "docker.io/team/app:dev",
		"usher.dev/app":           "usher.dev/app:latest",
		"localhost/app:1":         "localhost/app:1",
		"localhost:5000/team/app": "localhost:5000/team/app:latest",
	} {
		if got := (Image{Name: name}).reference(); got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
}

func TestImageHasTheFilesANonRootUserAndATmp(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(binary, []byte("the program"), 0o600); err != nil {
		t.Fatal(err)
	}
	image := Image{Name: "app:dev", Files: map[string]string{"/opt/bin/app": binary, "/b": binary}, Entrypoint: []string{"/opt/bin/app", "-x"}}
	var archive, again bytes.Buffer
	if err := image.pack(&archive); err != nil {
		t.Fatal(err)
	}
	if err := image.pack(&again); err != nil || !bytes.Equal(archive.Bytes(), again.Bytes()) {
		t.Errorf("the same files give another image: %v", err)
	}
	outer, _ := untar(t, archive.Bytes())
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}
	if err := json.Unmarshal(outer["manifest.json"], &manifest); err != nil || len(manifest) != 1 || len(manifest[0].Layers) != 1 {
		t.Fatalf("manifest %s: %v", outer["manifest.json"], err)
	}
	if want := []string{"docker.io/library/app:dev"}; !slices.Equal(manifest[0].RepoTags, want) {
		t.Errorf("tags %v, want %v", manifest[0].RepoTags, want)
	}
	var config struct {
		Config struct {
			User       string
			Entrypoint []string
		}
		Rootfs struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	if err := json.Unmarshal(outer[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}
	if config.Config.User != "65532:65532" || !slices.Equal(config.Config.Entrypoint, image.Entrypoint) {
		t.Errorf("config %+v", config.Config)
	}
	layer := outer[manifest[0].Layers[0]]
	if sum := sha256.Sum256(layer); !slices.Equal(config.Rootfs.DiffIDs, []string{"sha256:" + hex.EncodeToString(sum[:])}) {
		t.Errorf("the layer's digest is %x, the config says %v", sum, config.Rootfs.DiffIDs)
	}
	files, modes := untar(t, layer)
	for name, mode := range map[string]int64{
		"opt/": 0o755, "opt/bin/": 0o755, "opt/bin/app": 0o755, "b": 0o755, "tmp/": 0o1777, "etc/passwd": 0o644,
	} {
		if modes[name] != mode {
			t.Errorf("%s has mode %o, want %o", name, modes[name], mode)
		}
	}
	if string(files["opt/bin/app"]) != "the program" || !strings.Contains(string(files["etc/passwd"]), "nonroot:x:65532:") {
		t.Errorf("files %q", files)
	}
}

func untar(t *testing.T, archive []byte) (files map[string][]byte, modes map[string]int64) {
	t.Helper()
	files, modes = map[string][]byte{}, map[string]int64{}
	for tr := tar.NewReader(bytes.NewReader(archive)); ; {
		header, err := tr.Next()
		if err == io.EOF {
			return files, modes
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[header.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
		modes[header.Name] = header.Mode
	}
}

func TestImageSaysWhatIsWrong(t *testing.T) {
	files := map[string]string{"/app": "/nonexistent/file"}
	for _, c := range []struct {
		image Image
		want  string
	}{
		{Image{Files: files, Entrypoint: []string{"/app"}}, `image name ""`},
		{Image{Name: "a b", Files: files, Entrypoint: []string{"/app"}}, `image name "a b"`},
		{Image{Name: "app", Entrypoint: []string{"/app"}}, "image app: no files"},
		{Image{Name: "app", Files: files}, "image app: no entrypoint"},
		{Image{Name: "app", Files: map[string]string{"../app": "x"}, Entrypoint: []string{"/app"}}, `path "../app"`},
		{Image{Name: "app", Files: map[string]string{"/a/../../app": "x"}, Entrypoint: []string{"/app"}}, "clean absolute path"},
		{Image{Name: "app", Files: files, Entrypoint: []string{"/app"}}, "/nonexistent/file"},
		{Image{Name: "app", Files: map[string]string{"/app": "/"}, Entrypoint: []string{"/app"}}, "/ is no regular file"},
	} {
		if err := c.image.pack(io.Discard); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v, want %q in it", c.image, err, c.want)
		}
	}
}

func TestTailIsTheLogsEnd(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	text := strings.Repeat("an earlier line\n", 5000) + "one\ntwo\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, want := tail(file, 2), "  one\n  two"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := tail(file+".none", 2); !strings.Contains(got, "no such file") {
		t.Errorf("got %q for a missing log", got)
	}
}
