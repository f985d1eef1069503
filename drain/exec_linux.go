package drain

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// DefaultExecTimeout of one run of the command.
	DefaultExecTimeout = time.Second
	// maxExecOutput is how much of the command's output is kept; the rest is read and dropped, so that it never blocks.
	maxExecOutput = 4 << 10
	// pipeDelay is how long output is waited for once all processes of the command have been killed: what holds it then has
	// left their group.
	pipeDelay = 100 * time.Millisecond
)

// ExecConfig configures the exec source.
type ExecConfig struct {
	// Command and its arguments; no shell. It runs in the agent's container, with the agent's user, environment and working
	// directory. The agent's image holds no programs, no shell and no C library: the command has to be a static binary
	// that is added to that image or lies on a volume which both containers mount. A name without a slash is looked up
	// in PATH.
	Command []string
	// Timeout of one run, after which all its processes are killed; default 1 s. Config.SampleTimeout of the Drainer, when
	// shorter, ends it before.
	Timeout time.Duration
}

// Exec asks a command, which prints the number of requests in flight, a whole number, to its standard output and exits
// with 0. It is started anew for each sample, so it should take little.
//
// The command is the leader of a process group. However it ends, what is left of the group is killed and, when it has come
// to the agent as an orphan (which is so where the agent has process id 1), reaped.
type Exec struct {
	cfg ExecConfig
	// running is full while the command runs: there are never two of it.
	running chan struct{}
}

// NewExec checks cfg. It doesn't look for the command, which may come to its volume later.
func NewExec(cfg ExecConfig) (*Exec, error) {
	if len(cfg.Command) == 0 || cfg.Command[0] == "" {
		return nil, fmt.Errorf("exec source: Command is %q, must be a program and its arguments", cfg.Command)
	}
	for _, s := range cfg.Command {
		if strings.ContainsRune(s, 0) {
			return nil, fmt.Errorf("exec source: Command is %q, must be without zero bytes", cfg.Command)
		}
	}
	if cfg.Timeout < 0 {
		return nil, fmt.Errorf("exec source: Timeout is %v, must be positive (0 means the default, %v)", cfg.Timeout, DefaultExecTimeout)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultExecTimeout
	}
	cfg.Command = slices.Clone(cfg.Command)
	return &Exec{cfg: cfg, running: make(chan struct{}, 1)}, nil
}

// Name is "exec".
func (e *Exec) Name() string { return "exec" }

// Sample runs the command once. A second call waits for the first one.
func (e *Exec) Sample(ctx context.Context) (Sample, error) {
	select {
	case e.running <- struct{}{}:
		defer func() { <-e.running }()
	case <-ctx.Done():
		return Sample{}, fmt.Errorf("waiting for the last run of %s: %w", e.cfg.Command[0], context.Cause(ctx))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, e.cfg.Timeout, fmt.Errorf("no end within %v: %w", e.cfg.Timeout, context.DeadlineExceeded))
	defer cancel()
	var stdout, stderr head
	if err := e.run(ctx, &stdout, &stderr); err != nil {
		said := strings.TrimSpace(string(stderr.kept))
		if said == "" {
			return Sample{}, fmt.Errorf("running %s: %w", e.cfg.Command[0], err)
		}
		return Sample{}, fmt.Errorf("running %s: %w, and it said: %q", e.cfg.Command[0], err, shortenTo(said, maxShown))
	}
	text := strings.TrimSpace(string(stdout.kept))
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil || stdout.dropped {
		err := fmt.Errorf("%s printed %q, must be a whole number from 0 to %d", e.cfg.Command[0], shorten(text), 1<<31-1)
		if said := strings.TrimSpace(string(stderr.kept)); said != "" {
			err = fmt.Errorf("%w, and it said: %q", err, shortenTo(said, maxShown))
		}
		return Sample{}, err
	}
	return Sample{InFlight: int(n)}, nil
}

func (e *Exec) run(ctx context.Context, stdout, stderr *head) error {
	cmd := exec.Command(e.cfg.Command[0], e.cfg.Command[1:]...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = pipeDelay
	if err := cmd.Start(); err != nil {
		return err
	}
	pid := cmd.Process.Pid
	// Its end is awaited without reaping it: until then its id, the group's too, can't become another's.
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
				return
			}
		}
	}()
	var late error
	select {
	case <-ended:
	case <-ctx.Done():
		late = context.Cause(ctx)
	}
	// An error is that there is nobody left to kill.
	_ = unix.Kill(-pid, unix.SIGKILL)
	<-ended
	err := cmd.Wait()
	for {
		if _, err := unix.Wait4(-pid, nil, 0, nil); err != nil && err != unix.EINTR {
			break
		}
	}
	if late != nil {
		return late
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		return errors.New("a process that it left behind holds its output")
	}
	return err
}

// head keeps what is written first.
type head struct {
	kept    []byte
	dropped bool
}

func (h *head) Write(p []byte) (int, error) {
	n := min(len(p), maxExecOutput-len(h.kept))
	h.kept = append(h.kept, p[:n]...)
	h.dropped = h.dropped || n < len(p)
	return len(p), nil
}
