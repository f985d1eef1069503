package cluster

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// nonroot is the user and group that images run as unless a pod says otherwise: numeric, since the kubelet can't check
// runAsNonRoot against a name.
const nonroot = "65532"

// Image is a container image of one layer that holds static programs, /etc/passwd with the user nonroot (65532, which it
// runs as), and a /tmp that all may write to.
type Image struct {
	Name       string            // such as usher-agent:dev, as a pod's image field has it; pods need imagePullPolicy: Never
	Files      map[string]string // absolute path in the image -> file on this machine; all become executable
	Entrypoint []string
}

func (i Image) validate() error {
	if i.Name == "" || strings.ContainsAny(i.Name, " \t\n@") {
		return fmt.Errorf("image name %q: want NAME:TAG", i.Name)
	}
	if len(i.Files) == 0 {
		return fmt.Errorf("image %s: no files", i.Name)
	}
	for in := range i.Files {
		if !path.IsAbs(in) || path.Clean(in) != in || in == "/" {
			return fmt.Errorf("image %s: path %q: want a clean absolute path such as /app", i.Name, in)
		}
	}
	if len(i.Entrypoint) == 0 {
		return fmt.Errorf("image %s: no entrypoint", i.Name)
	}
	return nil
}

// reference is the image's full name, the way the kubelet completes a short one before it asks the runtime.
func (i Image) reference() string {
	name := i.Name
	if !strings.Contains(name[strings.LastIndexByte(name, '/')+1:], ":") {
		name += ":latest"
	}
	first, _, hasSlash := strings.Cut(name, "/")
	switch {
	case !hasSlash:
		return "docker.io/library/" + name
	case strings.ContainsAny(first, ".:") || first == "localhost":
		return name
	default:
		return "docker.io/" + name
	}
}

// pack writes the image as an archive of the form that `docker save` has and containerd imports. The same files give
// the same bytes.
func (i Image) pack(w io.Writer) error {
	if err := i.validate(); err != nil {
		return err
	}
	// A layer is named by its digest, in front of its content, so it is written twice: first into the hash.
	digest := sha256.New()
	size := &counter{}
	if err := i.layer(io.MultiWriter(digest, size)); err != nil {
		return fmt.Errorf("packing image %s: %w", i.Name, err)
	}
	diffID := hex.EncodeToString(digest.Sum(nil))
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           runtime.GOOS,
		"config": map[string]any{
			"User":       nonroot + ":" + nonroot,
			"Entrypoint": i.Entrypoint,
			"WorkingDir": "/",
			"Env":        []string{"PATH=/usr/local/bin:/usr/bin:/bin:/"},
		},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + diffID}},
	})
	if err != nil {
		return err
	}
	configSum := sha256.Sum256(config)
	configName := hex.EncodeToString(configSum[:]) + ".json"
	manifest, err := json.Marshal([]map[string]any{{
		"Config":   configName,
		"RepoTags": []string{i.reference()},
		"Layers":   []string{diffID + ".tar"},
	}})
	if err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	for _, f := range []struct {
		name string
		data []byte
	}{{"manifest.json", manifest}, {configName, config}} {
		if err := addFile(tw, f.name, 0o644, int64(len(f.data)), bytes.NewReader(f.data)); err != nil {
			return fmt.Errorf("packing image %s: %w", i.Name, err)
		}
	}
	if err := tw.WriteHeader(&tar.Header{Name: diffID + ".tar", Mode: 0o644, Size: size.n}); err != nil {
		return fmt.Errorf("packing image %s: %w", i.Name, err)
	}
	if err := i.layer(tw); err != nil {
		return fmt.Errorf("packing image %s: %w", i.Name, err)
	}
	return tw.Close()
}

func (i Image) layer(w io.Writer) error {
	tw := tar.NewWriter(w)
	dirs := map[string]int64{"etc/": 0o755, "tmp/": 0o1777}
	for in := range i.Files {
		for dir := path.Dir(in); dir != "/"; dir = path.Dir(dir) {
			if name := dir[1:] + "/"; dirs[name] == 0 {
				dirs[name] = 0o755
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(dirs)) {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: dirs[name]}); err != nil {
			return err
		}
	}
	for _, f := range []struct{ name, text string }{
		{"etc/passwd", "root:x:0:0:root:/:/none\nnonroot:x:" + nonroot + ":" + nonroot + ":nonroot:/tmp:/none\n"},
		{"etc/group", "root:x:0:\nnonroot:x:" + nonroot + ":\n"},
	} {
		if err := addFile(tw, f.name, 0o644, int64(len(f.text)), strings.NewReader(f.text)); err != nil {
			return err
		}
	}
	for _, in := range slices.Sorted(maps.Keys(i.Files)) {
		if err := addHostFile(tw, in[1:], i.Files[in]); err != nil {
			return err
		}
	}
	return tw.Close()
}

func addHostFile(tw *tar.Writer, name, file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", file)
	}
	return addFile(tw, name, 0o755, info.Size(), f)
}

func addFile(tw *tar.Writer, name string, mode, size int64, r io.Reader) error {
	if err := tw.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size}); err != nil {
		return err
	}
	if _, err := io.Copy(tw, r); err != nil {
		return fmt.Errorf("copying %s: %w", name, err)
	}
	return nil
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

// Load packs images and imports them into the cluster's containerd, replacing those of the same names. When it returns, the
// kubelet can use them.
func (c *Cluster) Load(ctx context.Context, images ...Image) error {
	for _, image := range images {
		if err := c.load(ctx, image); err != nil {
			return fmt.Errorf("loading image %s: %w", image.Name, err)
		}
	}
	return nil
}

func (c *Cluster) load(ctx context.Context, image Image) (err error) {
	archive, err := os.CreateTemp(c.dir, "image-*.tar")
	if err != nil {
		return err
	}
	defer os.Remove(archive.Name())
	err = image.pack(archive)
	if err := errors.Join(err, archive.Close()); err != nil {
		return err
	}
	if _, err := c.ctr(ctx, "images", "import", "--snapshotter", c.state.Snapshotter, archive.Name()); err != nil {
		return err
	}
	// containerd's CRI plugin learns of the image by an event, and labels it as it does. A pod started before would
	// fail with ErrImageNeverPull and be tried again ten seconds later.
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return poll(ctx, func(ctx context.Context) error {
		list, err := c.ctr(ctx, "images", "ls", "name=="+image.reference())
		if err != nil {
			return err
		}
		if !strings.Contains(list, "io.cri-containerd.image=managed") {
			return errors.New("containerd has not offered the image to the kubelet yet")
		}
		return nil
	})
}

func (c *Cluster) ctr(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"-a", c.path("containerd.sock"), "-n", "k8s.io"}, args...)
	output, err := run(ctx, nil, "ctr", args...)
	if err != nil {
		return "", fmt.Errorf("ctr %s: %w: %s", strings.Join(args[4:], " "), err, strings.TrimSpace(output))
	}
	return output, nil
}

// loadPause builds the sandbox's process from its source, so that no registry is needed, and imports it.
func (c *Cluster) loadPause(ctx context.Context) error {
	binary := filepath.Join(c.dir, "pause")
	if output, err := run(ctx, []string{"CGO_ENABLED=0"}, "go", "build", "-ldflags", "-s -w", "-o", binary,
		modulePath+"/cluster/pause"); err != nil {
		return fmt.Errorf("building the pause program: %w\n%s", err, output)
	}
	if err := c.waitFor(ctx, Containerd); err != nil {
		return err
	}
	return c.Load(ctx, Image{Name: pauseImage, Files: map[string]string{"/pause": binary}, Entrypoint: []string{"/pause"}})
}
