package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"usher.dev/usher/internal/api"
)

const (
	// maxOutput of a command is logged.
	maxOutput = 2 << 10
	// outputDelay is how long the output of what a command left running is waited for.
	outputDelay = 500 * time.Millisecond
)

func (rs *Receivers) command(c Command) (*receiver, error) {
	path, err := exec.LookPath(c.Command[0])
	if err != nil {
		return nil, fmt.Errorf("%w: want a program that this container has", err)
	}
	timeout, _ := duration(c.Timeout, defaultCommandTimeout) // valid, as the settings are
	return &receiver{
		name: "command " + c.Command[0], counters: &rs.Commands, events: c.Events,
		handle: func(ctx context.Context, e api.Event) error {
			output, err := execute(ctx, path, c.Command, timeout, e)
			if err != nil {
				return fmt.Errorf("%w; output %q", err, output)
			}
			rs.log.Debug("command done", zap.Strings("command", c.Command), zap.String("output", output))
			return nil
		},
	}, nil
}

func execute(ctx context.Context, path string, argv []string, timeout time.Duration, e api.Event) (output string, err error) {
	body, err := json.Marshal(e)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("killed, still running after %s", timeout))
	defer cancel()
	var out head
	cmd := exec.CommandContext(ctx, path)
	cmd.Args = argv
	cmd.Env = append(environment(), "USHER_EVENT="+string(e.Type), "USHER_STATE="+e.State, "USHER_CAUSE="+strings.ReplaceAll(e.Cause, "\x00", ""))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(append(body, '\n')), &out, &out
	// A group of its own, so that what it has started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = outputDelay
	err = cmd.Run()
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		err = nil // it is done, and has left something running that holds its output
	case err != nil && ctx.Err() != nil:
		err = context.Cause(ctx)
	}
	return out.String(), err
}

// environment is the agent's own, less its settings.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "USHER_") || strings.HasPrefix(v, "ETCDCTL_")
	})
}

// head keeps the beginning of what is written to it.
type head struct {
	kept bytes.Buffer
	more bool
}

func (h *head) Write(p []byte) (int, error) {
	room := maxOutput - h.kept.Len()
	h.more = h.more || len(p) > room
	h.kept.Write(p[:min(len(p), room)])
	return len(p), nil
}

func (h *head) String() string {
	if h.more {
		return h.kept.String() + "..."
	}
	return h.kept.String()
}
