// Command usher-prestop is a preStop exec hook: it asks the agent to take the instance offline, waits until the
// requests in flight are done, and prints the verdict. The agent bounds the wait, so that SIGTERM comes inside the
// pod's grace period.
//
//	lifecycle:
//	  preStop:
//	    exec:
//	      command: [/usher/usher-prestop, --log-to-pid1]
//
// An init container brings it into the application's container, by a volume that both mount: `usher-prestop install
// /usher` copies the program there.
//
// A call that breaks off after it began, because the agent was restarted, is made again for 2 s: the agent lets it join
// the drain. The kubelet itself doesn't restart a container of a Pod whose hook runs; a supervisor in the container may.
//
// It uses the standard library only, because it starts while the grace period runs, and because it is copied into images
// of others. The hook's call takes of net/http just the parser: no http.Client.
//
// # Telling the application
//
// The same program runs a command in the application's container for each event of the agent's /v1/events, as the agent's
// own notify.commands does in the agent's: with USHER_EVENT, USHER_STATE and USHER_CAUSE in its environment, and the event
// as JSON at its standard input.
//
//	usher-prestop follow --events online,offline -- /app/bin/tell &
//
// It is a background process of the application's entrypoint, or a container of its own. The latter needs the hook, too:
// else SIGTERM ends it as soon as the Pod is deleted, before there is anything to tell. The first run is for how the
// instance stands, which after a restart of either side may be what was told already. Commands run in order and one at a
// time; one that fails, or is killed after its timeout, is reported in one line and not run again. SIGTERM or SIGINT ends
// it, with code 0, once a command under way has finished.
//
// # Flags
//
//	--agent URL        unix:///path/to/agent.sock or http://host:port; default http://127.0.0.1:7401; env USHER_AGENT
//	--token TOKEN      hook token, for an agent that can't recognise this caller; env USHER_TOKEN
//	--token-file FILE  file with the hook token
//	--timeout DURATION give up after this long; default 0, never: the agent answers inside the grace period
//	--fail-open        exit 0 when the agent can't be reached; default true
//	--output FORMAT    text or json; default text
//	--log-to-pid1      write the verdict to the container's log, too
//	--version          print the version
//
// # Exit codes
//
//	0  drained, or nothing to wait for; agent unreachable, with --fail-open; follow ended by a signal
//	1  the agent's answer makes no sense
//	2  bad flag, variable, token file or command
//	3  timed out with requests in flight
//	4  unmeasured: a source failed, so the agent waited a fixed time
//	5  refused by the agent
//	6  agent unreachable, or gone during the call, with --fail-open=false
//	7  gave up after --timeout
//	8  forced: somebody ended the wait early
//	9  install failed
//
// The codes are for scripts and people. The kubelet makes a FailedPreStopHook event of any code but 0, drops what the
// hook printed, and goes on to SIGTERM all the same.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"usher.dev/usher/internal/api"
)

const (
	exitDrained     = 0
	exitNonsense    = 1
	exitUsage       = 2
	exitTimedOut    = 3
	exitUnmeasured  = 4
	exitRefused     = 5
	exitUnreachable = 6
	exitGaveUp      = 7
	exitForced      = 8
	exitInstall     = 9

	// connectTimeout is for an agent in the same pod: it answers at once or it isn't there.
	connectTimeout = 2 * time.Second
	// rejoinFor is how long an agent that went away during the call may take to come back, asked every rejoinEvery. It is
	// short because it may be taken off the application's part of the grace period, which only the agent knew.
	rejoinFor   = 2 * time.Second
	rejoinEvery = 100 * time.Millisecond
	// maxAnswer is far more than any verdict has.
	maxAnswer = 1 << 20

	pid1Stdout = "/proc/1/fd/1"
)

// version is set by the linker (-X main.version=...).
var version string

const usage = `usher-prestop asks the Usher agent to take this instance offline, and waits until its requests in flight are done.

Usage: usher-prestop [flags]
       usher-prestop install FOLDER    copies the program to FOLDER/usher-prestop, for the containers that mount that volume
       usher-prestop follow -- COMMAND [ARGUMENT]...
                                       runs the command for each event (online, offline, draining, ...); see follow --help

  --agent URL         unix:///path/to/agent.sock or http://host:port (default http://127.0.0.1:7401; env USHER_AGENT)
  --token TOKEN       hook token; every process of the pod can read it here, so rather use one of:
  --token-file FILE   file with the hook token (env USHER_TOKEN has the token itself)
  --timeout DURATION  give up after this long (default 0: never, since the agent answers inside the grace period)
  --fail-open         exit 0 when the agent can't be reached (default true)
  --output FORMAT     text or json (default text)
  --log-to-pid1       write the verdict to standard output of process 1, too, which is the container's log;
                      the kubelet drops what a hook prints
  --version           print the version

Exit codes:
  0  drained, or nothing to wait for; also: agent unreachable, with --fail-open
  1  the agent's answer makes no sense
  2  bad flag, variable or token file
  3  timed out with requests in flight
  4  unmeasured: a source failed, so the agent waited a fixed time
  5  refused by the agent
  6  agent unreachable, or gone during the call, with --fail-open=false
  7  gave up after --timeout
  8  forced: somebody ended the wait early
  9  install failed

The kubelet makes a FailedPreStopHook event of any code but 0, and goes on to SIGTERM all the same.
`

func main() { os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr)) }

type config struct {
	network, address string // as net.Dial wants them
	host             string // of the request
	token            string
	timeout          time.Duration
	failOpen, json   bool
	logToPID1        bool
}

func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "install" {
		return runInstall(args[1:], stdout, stderr)
	}
	if len(args) > 0 && args[0] == "follow" {
		return runFollow(args[1:], getenv, stdout, stderr)
	}
	var cfg config
	fs := flag.NewFlagSet("usher-prestop", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	agent := fs.String("agent", "http://"+api.DefaultControlAddress, "")
	token := fs.String("token", "", "")
	tokenFile := fs.String("token-file", "", "")
	output := fs.String("output", "text", "")
	showVersion := fs.Bool("version", false, "")
	fs.DurationVar(&cfg.timeout, "timeout", 0, "")
	fs.BoolVar(&cfg.failOpen, "fail-open", true, "")
	fs.BoolVar(&cfg.logToPID1, "log-to-pid1", false, "")
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		io.WriteString(stdout, usage)
		return exitDrained
	case err == nil && *showVersion:
		fmt.Fprintln(stdout, "usher-prestop", buildVersion())
		return exitDrained
	case err == nil:
		err = cfg.fill(fs, *agent, *token, *tokenFile, *output, getenv)
	}
	if err != nil {
		fmt.Fprintf(stderr, "usher-prestop: %v (--help lists the flags)\n", err)
		return exitUsage
	}

	verdict, code := cfg.call()
	cfg.report(verdict, code, stdout, stderr)
	if code == exitUnreachable && cfg.failOpen {
		return exitDrained
	}
	return code
}

func buildVersion() string {
	if info, ok := debug.ReadBuildInfo(); version == "" && ok {
		return info.Main.Version
	}
	return version
}

func (c *config) fill(fs *flag.FlagSet, agent, token, tokenFile, output string, getenv func(string) string) error {
	set := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { set[f.Name] = true })
	if fs.NArg() > 0 {
		return fmt.Errorf("argument %q: want flags only, or first of all install or follow", fs.Arg(0))
	}
	agent, source := chosenAgent(agent, set["agent"], getenv)
	if err := c.setAgent(agent); err != nil {
		return fmt.Errorf("%s is %q: %w", source, agent, err)
	}

	source = "--token"
	switch {
	case set["token"] && set["token-file"]:
		return errors.New("--token and --token-file are both set: want one of them")
	case set["token-file"]:
		source = "--token-file " + tokenFile
		b, err := os.ReadFile(tokenFile)
		if err != nil {
			return fmt.Errorf("--token-file: want a readable file: %w", err)
		}
		token = strings.TrimSpace(string(b))
	case !set["token"]:
		source, token = "USHER_TOKEN", getenv("USHER_TOKEN")
	}
	if token == "" && (set["token"] || set["token-file"]) {
		return fmt.Errorf("%s is empty: want a token", source)
	}
	for _, r := range token {
		if r < '!' || r > '~' {
			return fmt.Errorf("%s has the character %q: want printable ASCII without spaces", source, r)
		}
	}
	c.token = token

	if c.timeout < 0 {
		return fmt.Errorf("--timeout is %s: want 0 or more", c.timeout)
	}
	if output != "text" && output != "json" {
		return fmt.Errorf("--output is %q: want text or json", output)
	}
	c.json = output == "json"
	return nil
}

// chosenAgent is the agent's address, and what it is from: the flag, if that is set, or the variable.
func chosenAgent(flagged string, set bool, getenv func(string) string) (agent, source string) {
	if v := getenv("USHER_AGENT"); v != "" && !set {
		return v, "USHER_AGENT"
	}
	return flagged, "--agent"
}

func (c *config) setAgent(agent string) error {
	const want = "want unix:///path/to/agent.sock or http://host:port"
	if path, ok := strings.CutPrefix(agent, "unix://"); ok {
		if !strings.HasPrefix(path, "/") {
			return errors.New(want)
		}
		c.network, c.address, c.host = "unix", path, "agent"
		return nil
	}
	u, err := url.Parse(agent)
	if err != nil || u.Scheme != "http" || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "" || u.Hostname() == "" {
		return errors.New(want)
	}
	if n, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || n == 0 {
		return errors.New(want)
	}
	c.network, c.address, c.host = "tcp", u.Host, u.Host
	return nil
}

// failed is a verdict of our own, when the agent gave none.
func failed(code int, outcome, format string, args ...any) (api.Verdict, int) {
	return api.Verdict{Outcome: api.Outcome(outcome), Message: fmt.Sprintf(format, args...)}, code
}

// call asks the agent and waits, and asks again where the agent went away meanwhile.
func (c *config) call() (api.Verdict, int) {
	var deadline time.Time // none
	if c.timeout > 0 {
		deadline = time.Now().Add(c.timeout)
	}
	var lost api.Verdict // of the call that broke off
	var until time.Time
	for {
		asked := time.Now()
		v, code, gone := c.ask(deadline)
		switch {
		case code != exitUnreachable:
			return v, code
		case gone && (until.IsZero() || time.Since(asked) > rejoinFor):
			lost, until = v, time.Now().Add(rejoinFor)
		case until.IsZero():
			return v, code
		}
		if time.Now().Add(rejoinEvery).After(until) {
			lost.Message += fmt.Sprintf("; not back in %s", rejoinFor)
			return lost, exitUnreachable
		}
		time.Sleep(rejoinEvery)
	}
}

// ask makes one call, until deadline if that isn't zero. gone: it broke off after it began.
func (c *config) ask(deadline time.Time) (v api.Verdict, code int, gone bool) {
	lost := func(what string, err error) (api.Verdict, int) {
		if c.timeout > 0 && !time.Now().Before(deadline) {
			return failed(exitGaveUp, "gave-up", "gave up after --timeout %s, without a verdict", c.timeout)
		}
		return failed(exitUnreachable, "unreachable", "%s: %v", what, err)
	}

	dialer := net.Dialer{Timeout: connectTimeout, Deadline: deadline}
	conn, err := dialer.Dial(c.network, c.address)
	if err == nil {
		defer conn.Close()
		err = conn.SetDeadline(deadline)
	}
	if err != nil {
		v, code = lost("agent unreachable", err)
		return v, code, false
	}
	req := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: api.PrestopPath}, Host: c.host, Close: true,
		ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{"User-Agent": {"usher-prestop"}}}
	if c.token != "" {
		req.Header.Set(api.TokenHeader, c.token)
	}
	var resp *http.Response
	var body []byte
	if err = req.Write(conn); err == nil {
		resp, err = http.ReadResponse(bufio.NewReader(conn), req)
	}
	if err == nil {
		body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	}
	var netErr net.Error
	switch {
	case errors.As(err, &netErr), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		v, code = lost("agent gone during the call", err)
		return v, code, true
	case err != nil:
		v, code = failed(exitNonsense, "nonsense", "not an agent's answer: %v", err)
	default:
		v, code = judge(resp.Status, resp.StatusCode, body)
	}
	return v, code, false
}

// judge reads an answer.
func judge(status string, code int, body []byte) (api.Verdict, int) {
	if code != http.StatusOK {
		var e api.Error
		if json.Unmarshal(body, &e) != nil || e.Error == "" {
			e.Error = "no reason given"
		}
		if code == http.StatusForbidden {
			return failed(exitRefused, "refused", "refused by the agent: %s", e.Error)
		}
		return failed(exitNonsense, "nonsense", "agent answered %s: %s", status, e.Error)
	}
	var v api.Verdict
	if err := json.Unmarshal(body, &v); err != nil {
		return failed(exitNonsense, "nonsense", "not an agent's answer: %v", err)
	}
	switch v.Outcome {
	case api.Drained, api.Skipped:
		return v, exitDrained
	case api.TimedOut:
		return v, exitTimedOut
	case api.Unmeasured:
		return v, exitUnmeasured
	case api.Forced:
		return v, exitForced
	}
	return failed(exitNonsense, "nonsense", "agent answered outcome %q: want %s, %s, %s, %s or %s",
		v.Outcome, api.Drained, api.TimedOut, api.Unmeasured, api.Skipped, api.Forced)
}

// report prints the verdict: on standard output when it is the agent's, or JSON; else on standard error.
func (c *config) report(v api.Verdict, code int, stdout, stderr io.Writer) {
	fromAgent := code == exitDrained || code == exitTimedOut || code == exitUnmeasured || code == exitForced
	out, line := stderr, "usher-prestop: "+v.Message
	switch {
	case fromAgent:
		out = stdout
		line = fmt.Sprintf("usher-prestop: %s (cause: %s; withdraw %s, settle %s, drain %s)", v.Message, v.Cause,
			ms(v.WithdrawMs), ms(v.SettleMs), ms(v.DrainMs))
	case code == exitUnreachable && c.failOpen:
		line += "; SIGTERM goes ahead without a drain"
	}
	if c.json {
		out = stdout
		var value any = v
		if !fromAgent {
			value = struct {
				Outcome api.Outcome `json:"outcome"`
				Message string      `json:"message"`
			}{v.Outcome, v.Message}
		}
		b, err := json.Marshal(value)
		if err != nil {
			b = fmt.Appendf(nil, "%q", err)
		}
		line = string(b)
	}
	fmt.Fprintln(out, line)
	if c.logToPID1 {
		if err := logTo(pid1Stdout, line); err != nil {
			fmt.Fprintf(stderr, "usher-prestop: --log-to-pid1: %v\n", err)
		}
	}
}

func ms(n int64) time.Duration { return time.Duration(n) * time.Millisecond }

// logTo writes a line to where another process writes. It can't block: the pipe may be full, or nobody may read it.
func logTo(path, line string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	// Files and terminals have no deadline; they don't need one.
	_ = f.SetWriteDeadline(time.Now().Add(time.Second))
	_, err = io.WriteString(f, line+"\n")
	return err
}
