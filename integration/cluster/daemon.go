package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
)

const (
	// readyWithin bounds each component's start. On two idle cores the slowest, the API server, takes about two seconds.
	readyWithin = 90 * time.Second
	// stopWithin is how long a component has to end by itself after SIGTERM.
	stopWithin = 10 * time.Second
)

// spawn starts a component in a session of its own, so that it outlives this process and its terminal.
func (c *Cluster) spawn(name string) error {
	command, err := c.command(name)
	if err != nil {
		return err
	}
	log, err := os.OpenFile(c.logFile(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(program(command[0]), command[1:]...)
	cmd.Dir = c.dir
	// No proxy settings and the like: the components talk to one another only. containerd looks for its shim and runc in PATH.
	cmd.Env = []string{"HOME=" + c.dir, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	p, err := findProcess(cmd.Process.Pid)
	if err != nil {
		return err
	}
	// Reaps it, should it end while this process lives.
	go cmd.Wait()

	c.mu.Lock()
	defer c.mu.Unlock()
	c.state.Daemons[name] = p
	return c.state.write(c.dir)
}

func (c *Cluster) process(name string) process {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state.Daemons[name]
}

// waitFor returns when the component works, and fails at once if it ends.
func (c *Cluster) waitFor(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	p := c.process(name)
	dead := errors.New("it ended")
	err := poll(ctx, func(ctx context.Context) error {
		if !p.alive() {
			return permanent{dead}
		}
		return c.probe(ctx, name)
	})
	if err != nil {
		return fmt.Errorf("starting %s: %w; its log %s ends:\n%s", name, err, c.logFile(name), tail(c.logFile(name), 15))
	}
	return nil
}

// Start starts a component that was stopped, with its data, port and settings as before, and returns when it works.
func (c *Cluster) Start(ctx context.Context, component string) error {
	if err := known(component); err != nil {
		return err
	}
	if p := c.process(component); p.alive() {
		return fmt.Errorf("starting %s: it runs already (pid %d)", component, p.PID)
	}
	if err := c.spawn(component); err != nil {
		return fmt.Errorf("starting %s: %w", component, err)
	}
	return c.waitFor(ctx, component)
}

// Stop ends a component with SIGTERM, and after ten seconds with SIGKILL, and returns when it is gone. The API server needs all
// of them: it takes no new connections at once, but waits for the watches of those that it has. Containers run on when the kubelet or
// containerd is stopped.
func (c *Cluster) Stop(ctx context.Context, component string) error {
	return c.end(ctx, component, syscall.SIGTERM)
}

// Kill ends a component as a crash does, with SIGKILL, and returns when it is gone.
func (c *Cluster) Kill(ctx context.Context, component string) error {
	return c.end(ctx, component, syscall.SIGKILL)
}

func (c *Cluster) end(ctx context.Context, name string, signal syscall.Signal) error {
	if err := known(name); err != nil {
		return err
	}
	p := c.process(name)
	if !p.alive() {
		return fmt.Errorf("stopping %s: it does not run", name)
	}
	if err := syscall.Kill(p.PID, signal); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("stopping %s (pid %d): %w", name, p.PID, err)
	}
	patience, cancel := context.WithTimeout(ctx, stopWithin)
	defer cancel()
	gone := func(context.Context) error {
		if p.alive() {
			return fmt.Errorf("pid %d runs on", p.PID)
		}
		return nil
	}
	if poll(patience, gone) == nil {
		return nil
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("killing %s (pid %d): %w", name, p.PID, err)
	}
	if err := poll(ctx, gone); err != nil {
		return fmt.Errorf("stopping %s: %w", name, err)
	}
	return nil
}

// permanent is an error that polling again won't mend.
type permanent struct{ error }

func (p permanent) Unwrap() error { return p.error }

// poll tries until it succeeds, fails for good, or the context ends; then the error has the last failure.
func poll(ctx context.Context, try func(context.Context) error) error {
	var last error
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		var p permanent
		if errors.As(err, &p) {
			return p.error
		}
		// A try that the context's end cut short says less than the one before.
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), last)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// tail is the end of a log file, indented.
func tail(file string, lines int) string {
	f, err := os.Open(file)
	if err != nil {
		return "  " + err.Error()
	}
	defer f.Close()
	const most = 16 << 10
	if info, err := f.Stat(); err == nil && info.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return "  " + err.Error()
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return "  " + err.Error()
	}
	all := strings.Split(string(bytes.TrimSpace(text)), "\n")
	return "  " + strings.Join(all[max(0, len(all)-lines):], "\n  ")
}
