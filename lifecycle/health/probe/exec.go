package probe

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

// outputDelay is for how long a command's output is waited for after its end: something that it started may hold on to it.
const outputDelay = 100 * time.Millisecond

// execHandler is probe/exec/exec.go, with the container runtime's part of it.
type execHandler struct {
	command []string
	timeout time.Duration
	output  capture
}

func (h *execHandler) probe(ctx context.Context) (verdict, string, error) {
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	argv := make([]string, len(h.command))
	for i, arg := range h.command {
		argv[i] = expand(arg, os.LookupEnv)
	}
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	h.output.reset()
	cmd.Stdout, cmd.Stderr = &h.output, &h.output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = outputDelay
	killed := false
	cmd.Cancel = func() error {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			return err // it is no more: its process group's number may be another's
		}
		killed = true
		return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if err := cmd.Start(); err != nil {
		// The runtime has no exit code to tell of, and the kubelet doesn't count that.
		return unknown, "", fmt.Errorf("starting %q: %w", argv, err)
	}
	err := cmd.Wait()
	if killed {
		// If this process is the first of its container, it inherits what the command had started, and only it can clear that away.
		for {
			if _, err := syscall.Wait4(-cmd.Process.Pid, nil, 0, nil); err != nil && !errors.Is(err, syscall.EINTR) {
				break
			}
		}
		// The message is cri-client's (remote_runtime.go: execSyncV1).
		return failure, fmt.Sprintf("command timed out: %q timed out after %v", strings.Join(argv, " "), h.timeout), nil
	}
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return failure, h.output.String(), nil
	}
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return unknown, "", fmt.Errorf("waiting for %q: %w", argv, err)
	}
	return success, h.output.String(), nil
}

// expand replaces $(NAME) by the variable's value, if there is one, and $$ by $ (kubelet/container/helpers.go:
// ExpandContainerCommandOnlyStatic, third_party/forked/golang/expansion).
func expand(s string, lookup func(string) (string, bool)) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 || i == len(s)-1 {
			b.WriteString(s)
			return b.String()
		}
		b.WriteString(s[:i])
		reference, width := "$", 1
		switch end := strings.IndexByte(s[i:], ')'); {
		case s[i+1] == '$':
			width = 2
		case s[i+1] == '(' && end > 0:
			reference, width = s[i:i+end+1], end+1
			if value, ok := lookup(s[i+2 : i+end]); ok {
				reference = value
			}
		}
		b.WriteString(reference)
		s = s[i+width:]
	}
}
