package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"

	"usher.dev/usher/integration/stack"
)

const startTimeout = 2 * time.Minute

// cost is what a process takes.
type cost struct {
	rss, anon int64   // bytes
	cpu       float64 // share of a core
}

// startSidecars applies the example with n replicas, waits until each has registered, and returns the agents' processes.
func startSidecars(ctx context.Context, s *stack.Stack, namespace string, n int) (pids []int, err error) {
	manifest, err := stack.Example(ctx, "shop.yaml")
	if err != nil {
		return nil, err
	}
	// Readers of the example's own targets, in a cluster that was up before, are not to find these pods.
	manifest = strings.ReplaceAll(manifest, "target=shop/", "target="+namespace+"/")
	if err := s.Apply(ctx, namespace, manifest); err != nil {
		return nil, err
	}
	if _, err := s.Run(ctx, nil, "--namespace", namespace, "scale", "deployment/shop", "--replicas", strconv.Itoa(n)); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var pods []corev1.Pod
	seen := "no pods"
	err = wait.PollUntilContextCancel(ctx, 500*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		list, err := s.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=shop"})
		if err != nil {
			return false, err
		}
		pods = list.Items
		registered := 0
		for _, p := range pods {
			resp, err := s.Etcd.Get(ctx, namespace+"/http/"+string(p.UID), clientv3.WithPrefix(), clientv3.WithCountOnly())
			if err != nil {
				return false, err
			}
			registered += int(resp.Count)
		}
		seen = fmt.Sprintf("%d pods, %d registered", len(pods), registered)
		return len(pods) == n && registered == n, nil
	})
	if err != nil {
		return nil, fmt.Errorf("waiting for %d pods to be registered, saw %s: %w", n, seen, err)
	}
	for _, p := range pods {
		var id string
		for _, c := range p.Status.InitContainerStatuses {
			if c.Name == "usher" {
				_, id, _ = strings.Cut(c.ContainerID, "://")
			}
		}
		pid, err := containerPID(id)
		if err != nil {
			return nil, fmt.Errorf("finding the agent of pod %s: %w", p.Name, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// containerPID finds a container's process by its cgroup.
func containerPID(id string) (int, error) {
	if id == "" {
		return 0, errors.New("its container has no id")
	}
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil || !strings.Contains(string(b), id) { // gone meanwhile, or another
			continue
		}
		return strconv.Atoi(filepath.Base(filepath.Dir(f)))
	}
	return 0, fmt.Errorf("no process is in a cgroup of container %s", id)
}

// idle counts CPU time for that long, then reads the memory.
func idle(ctx context.Context, pids []int, during time.Duration) ([]cost, error) {
	before := make([]time.Duration, len(pids))
	begun := make([]time.Time, len(pids))
	for i, pid := range pids {
		var err error
		if before[i], err = cpuTime(pid); err != nil {
			return nil, err
		}
		begun[i] = time.Now()
	}
	select {
	case <-time.After(during):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	out := make([]cost, len(pids))
	for i, pid := range pids {
		after, err := cpuTime(pid)
		if err != nil {
			return nil, err
		}
		out[i].cpu = (after - before[i]).Seconds() / time.Since(begun[i]).Seconds()
		if out[i].rss, out[i].anon, err = memory(pid); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// cpuTime is what all threads of a process have run, in nanoseconds: the first field of schedstat (proc(5)). The times in
// /proc/PID/stat are ticks of 10 ms, too coarse here. Go ends no threads, so none drops out between two calls.
func cpuTime(pid int) (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil {
		return 0, err
	}
	if len(files) == 0 {
		return 0, fmt.Errorf("process %d is gone, or the kernel has no schedstat", pid)
	}
	var sum time.Duration
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return 0, fmt.Errorf("reading CPU time: %w", err)
		}
		first, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading %s: %w", f, err)
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// memory is the resident set in bytes, and the anonymous part of it, as /proc/PID/smaps_rollup counts them: page by page,
// while /proc/PID/status may lag behind (proc(5)).
func memory(pid int) (rss, anon int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, fmt.Errorf("reading memory: %w", err)
	}
	return parseRollup(string(b))
}

func parseRollup(text string) (rss, anon int64, err error) {
	rss, anon = -1, -1
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) != 3 || fields[2] != "kB" {
			continue
		}
		n, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("reading smaps_rollup: line %q: %w", line, err)
		}
		switch fields[0] {
		case "Rss:":
			rss = n << 10
		case "Anonymous:":
			anon = n << 10
		}
	}
	if rss < 0 || anon < 0 {
		return 0, 0, errors.New("reading smaps_rollup: want the lines Rss and Anonymous")
	}
	return rss, anon, nil
}
