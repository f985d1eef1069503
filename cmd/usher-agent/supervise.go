package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
)

// exitKilled is added to the number of the signal that ended the application, as shells do.
const exitKilled = 128

// passedOn are the signals that a supervised application gets as if there were nobody between. SIGTERM and SIGINT begin a
// shutdown first.
//
// SIGHUP is left alone where it is ignored already, as under nohup: so it is for the application, too.
func passedOn() []os.Signal {
	signals := []os.Signal{syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH}
	if !signal.Ignored(syscall.SIGHUP) {
		signals = append(signals, syscall.SIGHUP)
	}
	return signals
}

// supervised keeps the application's signals from ending the agent, for good: before there is an application, and after.
func supervised() { signal.Notify(make(chan os.Signal, 1), passedOn()...) }

// child is the application that `usher-agent run -- COMMAND` supervises. It has the agent's standard streams, folder and
// environment, and a process group of its own, so that a terminal's Ctrl-C reaches it through the shutdown only. That makes
// it a background process of the terminal: the kernel stops one that reads from there.
type child struct {
	cmd  *exec.Cmd
	log  *zap.Logger
	done chan struct{} // closed when it has exited
}

// startChild runs the command. It isn't started anew when it exits: that is for whoever restarts containers or units.
func startChild(command []string, log *zap.Logger) (*child, error) {
	c := &child{cmd: exec.Command(command[0], command[1:]...), log: log, done: make(chan struct{})}
	c.cmd.Stdin, c.cmd.Stdout, c.cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// Not by the agent's own channel: what comes there during a drain is somebody's impatience.
	others := make(chan os.Signal, 8)
	signal.Notify(others, passedOn()...)
	if err := c.cmd.Start(); err != nil {
		signal.Stop(others)
		return nil, fmt.Errorf("starting the application: %w", err)
	}
	log.Info("application started", zap.Strings("command", command), zap.Int("pid", c.cmd.Process.Pid))
	go func() {
		c.cmd.Wait() // what came of it is in ProcessState
		log.Info("application exited", zap.Stringer("state", c.cmd.ProcessState))
		close(c.done)
	}()
	go func() {
		defer signal.Stop(others)
		for {
			select {
			case sig := <-others:
				c.signal(sig)
			case <-c.done:
				return
			}
		}
	}()
	return c, nil
}

// exited is closed when the application has exited; nil, on which nobody ever hears anything, without one.
func (c *child) exited() <-chan struct{} {
	if c == nil {
		return nil
	}
	return c.done
}

func (c *child) signal(sig os.Signal) {
	if c == nil {
		return
	}
	if err := c.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		c.log.Error("application", zap.Stringer("signal", sig), zap.Error(err))
	}
}

// code is the application's exit code, once it has exited.
func (c *child) code() int {
	if ws, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return exitKilled + int(ws.Signal())
	}
	return c.cmd.ProcessState.ExitCode()
}

// stop passes the signal that ended the drain on, and whatever comes after it, and waits for the application's end. There is
// no time limit of its own: who sent SIGTERM sends SIGKILL when the grace period is over.
func (c *child) stop(sig os.Signal, signals <-chan os.Signal) {
	if c == nil {
		return
	}
	c.signal(sig)
	c.signal(syscall.SIGCONT) // one that is stopped would never act upon it
	for {
		select {
		case <-c.done:
			return
		case sig := <-signals:
			c.signal(sig)
		}
	}
}

// reapEvery is how often the first process of a container looks for what nobody waits for.
const reapEvery = 10 * time.Second

// reapOrphans ends what others left behind: their children become those of the container's first process, and stay as zombies
// until it has asked for their exit. Its own children have somebody who waits for each, so what is a zombie at two looks
// in a row is an orphan.
func reapOrphans(ctx context.Context) error {
	if os.Getpid() != 1 {
		return nil
	}
	tick := time.NewTicker(reapEvery)
	defer tick.Stop()
	for before := map[int]bool{}; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := map[int]bool{}
		for _, pid := range zombies(os.Getpid()) {
			if before[pid] {
				syscall.Wait4(pid, nil, syscall.WNOHANG, nil) // gone by now: all the better
			}
			now[pid] = true
		}
		before = now
	}
}

// zombies are a process' children that have exited and that nobody has asked about (proc(5): /proc/PID/stat).
func zombies(parent int) []int {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return nil
	}
	var pids []int
	for _, file := range stats {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it is gone
		}
		// The name, in parentheses, may hold anything.
		_, rest, _ := strings.Cut(string(text[max(0, bytes.LastIndexByte(text, ')')):]), " ")
		fields := strings.Fields(rest)
		if len(fields) < 2 || fields[0] != "Z" || fields[1] != strconv.Itoa(parent) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
