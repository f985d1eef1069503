package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// shared is a folder that anybody may write to and nobody but root owns, as an emptyDir is.
func shared(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "usher-install") // t.TempDir's parent lets no other user in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestInstalledProgramIsTheSameAndRuns(t *testing.T) {
	dir := shared(t)
	target := filepath.Join(dir, "usher-prestop")
	old := syscall.Umask(0o077) // of a strict image; the child inherits it
	defer syscall.Umask(old)
	for range 2 { // an init container may run again
		r := hook(t, nil, "install", dir)
		if r.code != 0 || r.stderr != "" || !strings.Contains(r.stdout, target) {
			t.Fatalf("%+v", r)
		}
		want, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(target)
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("the copy differs: %v", err)
		}
		if info, err := os.Stat(target); err != nil || info.Mode() != 0o755 {
			t.Errorf("mode %v, %v: want 0755, for a container of another user", info.Mode(), err)
		}
		if names := entries(t, dir); len(names) != 1 {
			t.Errorf("the folder has %v, want the program alone", names)
		}
	}
	if out, err := exec.Command(target, "--version").Output(); err != nil || string(out) != "usher-prestop v0.0.0-test\n" {
		t.Errorf("the copy prints %q, %v", out, err)
	}
}

// A hook may run the program while an init container of a restarted Pod puts it there again.
func TestInstallReplacesAProgramThatRuns(t *testing.T) {
	dir := shared(t)
	target := filepath.Join(dir, "usher-prestop")
	if r := hook(t, nil, "install", dir); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	l, agent := listen(t, "tcp")
	running := exec.CommandContext(t.Context(), target, "--agent", agent)
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	defer running.Wait()
	defer running.Process.Kill()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if r := hook(t, nil, "install", dir); r.code != 0 {
		t.Errorf("%+v", r)
	}
}

// namespaced runs a line of shell with mounts and processes of its own; as root, or with what root is to these mounts.
func namespaced(t *testing.T, script string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/bin/sh", append([]string{"-ec", script, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // makes the mounts private
	return finish(t, cmd)
}

func finish(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// As in a pod under the restricted profile, whose image has this one file: it is static and needs nothing else.
func TestInstallWorksWithAReadOnlyRootAndWithoutPrivileges(t *testing.T) {
	image, dir := shared(t), shared(t)
	for _, d := range []string{"proc", "shared"} {
		if err := os.Mkdir(filepath.Join(image, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if r := hook(t, nil, "install", image); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	user := ""
	if os.Getuid() == 0 {
		user = "--userspec=65534:65534"
	}
	r := namespaced(t, `
		mount --bind "$1" "$1"
		mount --bind "$2" "$1/shared"
		mount -t proc proc "$1/proc"
		mount -o remount,bind,ro "$1"
		exec chroot $3 "$1" /usher-prestop install /shared`, image, dir, user)
	if r.code != 0 || !strings.Contains(r.stdout, "installed /shared/usher-prestop") {
		t.Fatalf("%+v", r)
	}
	if names := entries(t, dir); len(names) != 1 || names[0] != "usher-prestop" {
		t.Errorf("the volume has %v", names)
	}
}

func TestInstallThatFailsIsSaidAndLeavesNothing(t *testing.T) {
	public := shared(t) // the program, where any user can start it
	if r := hook(t, nil, "install", public); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	plain := func(dir string) result { return hook(t, nil, "install", dir) }
	unprivileged := func(dir string) result {
		cmd := exec.CommandContext(t.Context(), filepath.Join(public, "usher-prestop"), "install", dir)
		if os.Getuid() == 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		}
		return finish(t, cmd)
	}
	// What is left in the folder is printed after what the program says.
	mounted := func(options string) func(string) result {
		return func(dir string) result {
			return namespaced(t, `mount -t tmpfs -o "$1" tmpfs "$2"; code=0; "$3" install "$2" || code=$?; ls -A "$2"; exit $code`, options, dir, binary)
		}
	}

	file := filepath.Join(shared(t), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	locked := shared(t)
	if err := os.Chmod(locked, 0o555); err != nil {
		t.Fatal(err)
	}
	taken := shared(t)
	if err := os.Mkdir(filepath.Join(taken, "usher-prestop"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, dir string
		run       func(dir string) result
		want      string
		left      int
	}{
		{"no such folder", "/nonexistent/shared", plain, "no such folder: want a folder that exists", 0},
		{"a file", file, plain, "not a folder", 0},
		{"not writable", locked, unprivileged, "not writable for user", 0},
		{"a folder of that name", taken, plain, "usher-prestop is a folder", 1},
		{"read-only", shared(t), mounted("ro"), "on a read-only file system", 0},
		{"full", shared(t), mounted("size=1m"), "no space left on device", 0},
	} {
		r := tc.run(tc.dir)
		if r.code != exitInstall || r.stdout != "" || !strings.Contains(r.stderr, tc.want) || !strings.Contains(r.stderr, tc.dir) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: %+v, want code %d and one line with %q", tc.name, r, exitInstall, tc.want)
		}
		if info, err := os.Stat(tc.dir); err == nil && info.IsDir() {
			if names := entries(t, tc.dir); len(names) != tc.left {
				t.Errorf("%s: the folder has %v", tc.name, names)
			}
		}
	}
}
