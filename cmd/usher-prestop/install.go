package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const program = "usher-prestop"

func runInstall(args []string, stdout, stderr io.Writer) int {
	if len(args) == 1 && (args[0] == "--help" || args[0] == "-h") {
		io.WriteString(stdout, usage)
		return exitDrained
	}
	if len(args) != 1 || args[0] == "" || args[0][0] == '-' {
		fmt.Fprintf(stderr, "usher-prestop: install %q: want one folder, such as `usher-prestop install /usher`\n", args)
		return exitUsage
	}
	path, err := install(args[0])
	if err != nil {
		fmt.Fprintf(stderr, "usher-prestop: install %q: %v\n", args[0], err)
		return exitInstall
	}
	fmt.Fprintf(stdout, "usher-prestop: installed %s\n", path)
	return exitDrained
}

// install copies the running program into the folder and returns the path there. What was there is replaced in one step,
// and stays as it is when something fails.
func install(dir string) (path string, err error) {
	const want = "want a folder that exists, such as where a volume is mounted"
	switch info, err := os.Stat(dir); {
	case errors.Is(err, fs.ErrNotExist):
		return "", errors.New("no such folder: " + want)
	case err != nil:
		return "", fmt.Errorf("%w: %s", err, want)
	case !info.IsDir():
		return "", errors.New("not a folder: " + want)
	}
	path = filepath.Join(dir, program)
	if info, err := os.Lstat(path); err == nil && info.IsDir() {
		return "", fmt.Errorf("%s is a folder: want it away, or another folder to install to", path)
	}

	// Not by its name, which may lead to another file by now.
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", fmt.Errorf("reading the program itself: %w", err)
	}
	defer src.Close()
	tmp, err := os.CreateTemp(dir, "."+program+"-*")
	switch {
	case errors.Is(err, syscall.EROFS):
		return "", errors.New("on a read-only file system: want a volume that is mounted for writing, such as an emptyDir")
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("not writable for user %d, group %d: want a volume that is, such as an emptyDir, or the Pod's fsGroup set", os.Getuid(), os.Getgid())
	case err != nil:
		return "", err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	if _, err := io.Copy(tmp, src); err != nil {
		return "", err
	}
	if err := tmp.Chmod(0o755); err != nil { // CreateTemp's 0600, and the umask, would lock the application's user out
		return "", err
	}
	if err := tmp.Close(); err != nil {
		return "", err
	}
	return path, os.Rename(tmp.Name(), path)
}
