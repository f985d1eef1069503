package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// sweep ends every process of the cluster in dir and undoes what it did to the machine. It needs no state but the folder
// itself: what the state file adds is the machine's former settings. So it serves Down and a crash alike.
//
// Containers are killed, not stopped: at the end nobody is left to see them go gracefully, and after a crash there is no
// kubelet to do it. Processes are found by what they are and not by ids that were written down, since a crash may come between
// a start and the writing.
func sweep(ctx context.Context, dir string, s *state) error {
	ids := containerIDs(dir)
	sockets := shimSockets(dir)
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	err := poll(ctx, func(context.Context) error {
		// A shim may have begun a container since.
		ids = mergeSorted(ids, containerIDs(dir))
		pids, err := processesOf(dir, ids)
		if err != nil {
			return permanent{err}
		}
		for _, pid := range pids {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return permanent{fmt.Errorf("killing pid %d: %w", pid, err)}
			}
		}
		if len(pids) > 0 {
			return fmt.Errorf("still running: pids %v", pids)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("ending the processes of the cluster in %s: %w", dir, err)
	}
	var errs []error
	errs = append(errs, unmountUnder(dir))
	errs = append(errs, removeNetwork(ctx))
	errs = append(errs, removeCgroups(ctx, ids))
	errs = append(errs, removeStrays(dir, ids, sockets, s.Made))
	for _, name := range sysctls() {
		if was, ok := s.Sysctls[name]; ok && readSysctls()[name] != was {
			errs = append(errs, writeSysctl(name, was))
		}
	}
	return errors.Join(errs...)
}

func mergeSorted(a, b []string) []string {
	all := append(slices.Clone(a), b...)
	slices.Sort(all)
	return slices.Compact(all)
}

// containerIDs are the ids of all containers and sandboxes that containerd keeps something of.
func containerIDs(dir string) []string {
	var ids []string
	for _, pattern := range []string{
		"containerd/state/io.containerd.runtime.v2.task/k8s.io/*",
		"containerd/root/io.containerd.grpc.v1.cri/sandboxes/*",
		"containerd/root/io.containerd.grpc.v1.cri/containers/*",
	} {
		// Glob fails for a malformed pattern only.
		found, _ := filepath.Glob(filepath.Join(dir, pattern))
		for _, path := range found {
			// Short ones are not containerd's, and would be looked for in other people's cgroups.
			if id := filepath.Base(path); len(id) == 64 {
				ids = append(ids, id)
			}
		}
	}
	return mergeSorted(ids, nil)
}

// shimSockets are the sockets of this cluster's shims, which lie outside of its folder.
func shimSockets(dir string) []string {
	var sockets []string
	found, _ := filepath.Glob(filepath.Join(dir, "containerd/state/io.containerd.runtime.v2.task/k8s.io/*/address"))
	for _, file := range found {
		if text, err := os.ReadFile(file); err == nil {
			sockets = append(sockets, strings.TrimPrefix(strings.TrimSpace(string(text)), "unix://"))
		}
	}
	return sockets
}

// processesOf finds the daemons and shims, by their program and an argument that lies in dir, and the processes in
// containers, by their cgroup.
func processesOf(dir string, ids []string) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	var pids []int
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if _, status, err := readStat(pid); err != nil || status == "Z" || status == "X" {
			continue
		}
		// A process that is gone meanwhile has nothing to read.
		cmdline, _ := os.ReadFile(filepath.Join("/proc", entry.Name(), "cmdline"))
		cgroup, _ := os.ReadFile(filepath.Join("/proc", entry.Name(), "cgroup"))
		if isDaemonOf(dir, strings.Split(string(cmdline), "\x00")) || inCgroupOf(ids, string(cgroup)) {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func isDaemonOf(dir string, args []string) bool {
	programs := []string{
		"etcd", "containerd", "containerd-shim-runc-v2", "ctr", "runc",
		APIServer, ControllerManager, Scheduler, Kubelet, KubeProxy,
	}
	if !slices.Contains(programs, filepath.Base(args[0])) {
		return false
	}
	return slices.ContainsFunc(args[1:], func(arg string) bool {
		return strings.HasPrefix(arg, dir+"/") || strings.Contains(arg, "="+dir+"/")
	})
}

func inCgroupOf(ids []string, cgroup string) bool {
	return slices.ContainsFunc(ids, func(id string) bool { return strings.Contains(cgroup, id) })
}

func unmountUnder(dir string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("listing mounts: %w", err)
	}
	defer f.Close()
	var under []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if point := mountPoint(lines.Text()); strings.HasPrefix(point, dir+"/") {
			under = append(under, point)
		}
	}
	var errs []error
	// Later mounts lie on earlier ones.
	for _, point := range slices.Backward(under) {
		if err := syscall.Unmount(point, syscall.MNT_DETACH); err != nil && !errors.Is(err, syscall.EINVAL) {
			errs = append(errs, fmt.Errorf("unmounting %s: %w", point, err))
		}
	}
	return errors.Join(errs...)
}

// mountPoint is the fifth field of a line of proc(5)'s mountinfo, in which blanks and backslashes are written in octal.
func mountPoint(line string) string {
	fields := strings.Fields(line)
	if len(fields) < 5 {
		return ""
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(fields[4])
}

// removeCgroups removes the groups of containers, which stay when runc is not there to remove them, and their parent once it
// is empty.
func removeCgroups(ctx context.Context, ids []string) error {
	var groups []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			// A group that went away while being listed.
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV) {
				return nil
			}
			return err
		}
		if d.IsDir() && slices.Contains(ids, d.Name()) {
			groups = append(groups, path)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("listing cgroups: %w", err)
	}
	var errs []error
	for _, group := range groups {
		// A killed process leaves its group a moment later.
		err := poll(ctx, func(context.Context) error {
			if err := os.Remove(group); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("removing a container's cgroup: %w", err))
		}
		// Fails while it has other groups in it, as it should.
		if parent := filepath.Dir(group); filepath.Base(parent) == "k8s.io" {
			_ = os.Remove(parent)
		}
	}
	return errors.Join(errs...)
}

// outsideDirs are the folders outside of the cluster's own that its components use without being asked, children first.
func outsideDirs() []string {
	return []string{
		"/var/lib/kubelet/device-plugins", "/var/lib/kubelet", "/var/lib/cni/results", "/var/lib/cni", "/var/log/containers",
		"/run/containerd/s", "/run/containerd",
	}
}

// absentDirs are those of outsideDirs that are not there.
func absentDirs() []string {
	var absent []string
	for _, dir := range outsideDirs() {
		if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
			absent = append(absent, dir)
		}
	}
	return absent
}

// removeStrays removes what components wrote outside of the cluster's folder.
func removeStrays(dir string, ids, sockets, made []string) error {
	var errs []error
	remove := func(path string) {
		if err := os.RemoveAll(path); err != nil {
			errs = append(errs, err)
		}
	}
	for _, socket := range sockets {
		remove(socket)
	}
	results, _ := filepath.Glob("/var/lib/cni/results/*")
	for _, path := range results {
		name := filepath.Base(path)
		if strings.HasPrefix(name, cniNetwork+"-") || inCgroupOf(ids, name) {
			remove(path)
		}
	}
	logs, _ := filepath.Glob("/var/log/containers/*")
	for _, path := range logs {
		if target, err := os.Readlink(path); err == nil && strings.HasPrefix(target, dir+"/") {
			remove(path)
		}
	}
	for _, path := range made {
		switch path {
		case "/var/lib/kubelet/device-plugins":
			remove(path)
		default:
			// Fails when somebody else has put something there since, which stays.
			_ = os.Remove(path)
		}
	}
	return errors.Join(errs...)
}
