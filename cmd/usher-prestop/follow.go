package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"usher.dev/usher/client"
	"usher.dev/usher/internal/api"
)

const (
	// defaultCommandTimeout and outputDelay are those of the agent's own commands (package notify).
	defaultCommandTimeout = 5 * time.Second
	// outputDelay is how long the pipes of what a command left running are waited for.
	outputDelay = 500 * time.Millisecond
	// complainEvery is how often the same trouble with the agent is reported, at most.
	complainEvery = time.Minute
)

const followUsage = `usher-prestop follow runs a command in this container for each event of this instance, in order, one at a
time: first for how the instance stands, then for each change. It goes on until SIGTERM or SIGINT.

Usage: usher-prestop follow [flags] -- COMMAND [ARGUMENT]...

  --agent URL         unix:///path/to/agent.sock or http://host:port (default http://127.0.0.1:7401; env USHER_AGENT)
  --events LIST       those that the command is run for, such as online,offline (default: all)
                      online    advertised from now on
                      offline   no longer advertised, and it may come back
                      held      an operator holds it offline
                      resumed   the hold is over
                      draining  a shutdown began: requests in flight are waited for
                      released  the shutdown is over: SIGTERM may come
  --timeout DURATION  kill the command, and all that it has started, after this long (default 5s)

The command has USHER_EVENT, USHER_STATE and USHER_CAUSE in its environment and the event as JSON at its standard input.
No shell is involved. What it prints goes where usher-prestop's own output goes. One that fails is reported on standard
error, and not run again. After the agent was restarted it is run for a state that it may have been told of already.

On SIGTERM or SIGINT a command under way has until --timeout to finish; then the exit code is 0. So where this is a
container of its own, its preStop hook should be usher-prestop as well: else SIGTERM comes as soon as the Pod is deleted.

Exit codes:
  0  ended by a signal
  2  bad flag, variable or command
`

type follower struct {
	client  *client.Client
	events  []api.EventType // nil: all
	timeout time.Duration   // of a command
	path    string          // of the program
	argv    []string
	env     []string

	stdout, stderr io.Writer
}

func runFollow(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	f, err := newFollower(args, getenv, stdout, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, followUsage)
		return exitDrained
	case err != nil:
		fmt.Fprintf(stderr, "usher-prestop: follow: %v (follow --help lists the flags)\n", err)
		return exitUsage
	}
	// Until the end, so that a second signal doesn't leave a command behind: its timeout bounds the wait for it.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	f.run(ctx)
	return exitDrained
}

func newFollower(args []string, getenv func(string) string, stdout, stderr io.Writer) (*follower, error) {
	f := &follower{stdout: stdout, stderr: stderr}
	fs := flag.NewFlagSet("usher-prestop follow", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	agent := fs.String("agent", "http://"+api.DefaultControlAddress, "")
	events := fs.String("events", "", "")
	fs.DurationVar(&f.timeout, "timeout", defaultCommandTimeout, "")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	set := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { set[f.Name] = true })

	address, source := chosenAgent(*agent, set["agent"], getenv)
	err := new(config).setAgent(address)
	if err == nil {
		f.client, err = client.New(client.Config{Address: address})
	}
	if err != nil {
		return nil, fmt.Errorf("%s is %q: %w", source, address, err)
	}
	if set["events"] {
		for name := range strings.SplitSeq(*events, ",") {
			e := api.EventType(strings.TrimSpace(name))
			if !slices.Contains(api.EventTypes(), e) {
				return nil, fmt.Errorf("--events is %q: %q is none of %s", *events, e, strings.Trim(fmt.Sprint(api.EventTypes()), "[]"))
			}
			f.events = append(f.events, e)
		}
	}
	if f.timeout <= 0 {
		return nil, fmt.Errorf("--timeout is %s: want more than 0", f.timeout)
	}

	f.argv = fs.Args()
	flags := args[:len(args)-len(f.argv)]
	if len(f.argv) > 0 && (len(flags) == 0 || flags[len(flags)-1] != "--") { // else a word too many would be the command
		return nil, fmt.Errorf("argument %q: want flags, then -- and a command", f.argv[0])
	}
	if len(f.argv) == 0 || f.argv[0] == "" {
		return nil, errors.New("no command: want -- and a program with its arguments, such as -- /app/bin/tell --now")
	}
	if f.path, err = exec.LookPath(f.argv[0]); err != nil {
		return nil, fmt.Errorf("command: %w: want a program that this container has", err)
	}
	// A command that is told of something is told nothing secret.
	f.env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "USHER_TOKEN=") })
	return f, nil
}

// run goes through the events until ctx ends.
func (f *follower) run(ctx context.Context) {
	var trouble complaint
	for e, err := range f.client.Events(ctx) {
		switch {
		case ctx.Err() != nil:
			return // what has been received already may come all the same
		case err != nil:
			if trouble.due(err) {
				fmt.Fprintf(f.stderr, "usher-prestop: follow: %s; trying again\n", strings.ReplaceAll(err.Error(), "\n", " "))
			}
		case len(f.events) == 0 || slices.Contains(f.events, e.Type):
			if err := f.tell(context.WithoutCancel(ctx), e); err != nil {
				fmt.Fprintf(f.stderr, "usher-prestop: follow: event %d, %s: %s: %v\n", e.ID, e.Type, f.argv[0], err)
			}
		}
	}
}

// tell runs the command once. It is done when the program is, or has been killed.
func (f *follower) tell(ctx context.Context, e api.Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, f.timeout, fmt.Errorf("killed, still running after %s", f.timeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, f.path)
	cmd.Args = f.argv
	cmd.Env = append(slices.Clip(f.env), "USHER_EVENT="+string(e.Type), "USHER_STATE="+e.State,
		"USHER_CAUSE="+strings.ReplaceAll(e.Cause, "\x00", ""))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(append(body, '\n')), f.stdout, f.stderr
	// A group of its own, so that what it has started ends with it, and a terminal's Ctrl-C isn't for it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = outputDelay
	err = cmd.Run()
	if os.Getpid() == 1 {
		reap()
	}
	switch {
	case errors.Is(err, exec.ErrWaitDelay):
		return nil // it is done, and has left something running that holds a pipe
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return err
}

// reap ends what commands left to the first process of the container, as far as it has exited. No command is running.
func reap() {
	for {
		if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); err != nil || pid == 0 {
			return
		}
	}
}

// complaint is the last trouble reported.
type complaint struct {
	root string
	at   time.Time
}

// due says whether err is to be reported: it is another trouble than before, or a while has passed. What counts is the
// error's root, since the whole names ports that differ from attempt to attempt.
func (c *complaint) due(err error) bool {
	for next := err; next != nil; next = errors.Unwrap(next) {
		err = next
	}
	now := time.Now()
	if err.Error() == c.root && now.Sub(c.at) < complainEvery {
		return false
	}
	*c = complaint{err.Error(), now}
	return true
}
