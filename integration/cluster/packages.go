package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// cniDirs are where distributions put the CNI plugins.
func cniDirs() []string { return []string{"/usr/lib/cni", "/opt/cni/bin", "/usr/libexec/cni"} }

// findCNI is the folder that has the plugins a cluster uses.
func findCNI() (string, error) {
	for _, dir := range cniDirs() {
		complete := true
		for _, plugin := range []string{"ptp", "host-local", "loopback"} {
			if _, err := os.Stat(filepath.Join(dir, plugin)); err != nil {
				complete = false
			}
		}
		if complete {
			return dir, nil
		}
	}
	return "", fmt.Errorf("no CNI plugins (ptp, host-local, loopback) in any of %s", strings.Join(cniDirs(), ", "))
}

// program is the path of a program, which is looked for in PATH and in the folders for root's programs, which a PATH
// may lack. It is the name alone when there is no such program.
func program(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, name)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return name
}

func isProgram(name string) bool { return program(name) != name }

// missingPackages names the Debian packages whose programs this machine lacks.
func missingPackages() []string {
	var missing []string
	for _, need := range []struct{ program, pkg string }{
		{"containerd", "containerd"}, {"containerd-shim-runc-v2", "containerd"}, {"ctr", "containerd"},
		{"runc", "runc"}, {"nft", "nftables"}, {"ip", "iproute2"}, {"mount", "mount"},
	} {
		if !isProgram(need.program) && !slices.Contains(missing, need.pkg) {
			missing = append(missing, need.pkg)
		}
	}
	if _, err := findCNI(); err != nil {
		missing = append(missing, "containernetworking-plugins")
	}
	return missing
}

// installPackages installs what is missing with apt-get. The caller is root.
func installPackages(ctx context.Context, progress io.Writer) error {
	missing := missingPackages()
	if len(missing) == 0 {
		return nil
	}
	list := strings.Join(missing, " ")
	if !isProgram("apt-get") {
		return fmt.Errorf("programs are missing on this machine: install what Debian has in the packages %s", list)
	}
	fmt.Fprintln(progress, "installing the packages", list)
	env := []string{"DEBIAN_FRONTEND=noninteractive"}
	install := append([]string{"install", "-y", "-q", "--no-install-recommends"}, missing...)
	for _, args := range [][]string{{"update", "-q"}, install} {
		if output, err := run(ctx, env, "apt-get", args...); err != nil {
			return fmt.Errorf("apt-get %s: %w\n%s", strings.Join(args, " "), err, output)
		}
	}
	if still := missingPackages(); len(still) > 0 {
		return errors.New("after apt-get install these packages' programs are still missing: " + strings.Join(still, " "))
	}
	return nil
}
