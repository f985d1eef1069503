package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/notify"
)

// patience is for what a loaded machine may take to get to.
const patience = 20 * time.Second

// following is a usher-prestop that runs.
type following struct {
	t              *testing.T
	cmd            *exec.Cmd
	stdout, stderr <-chan string // lines
}

// follow starts usher-prestop follow, with a line of shell as the command.
func follow(t *testing.T, env []string, script string, flags ...string) *following {
	t.Helper()
	cmd := exec.Command(binary, append(append([]string{"follow"}, flags...), "--", "/bin/sh", "-c", script)...)
	cmd.Env = append(env, "PATH="+os.Getenv("PATH"))
	f := &following{t: t, cmd: cmd}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	errs, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	f.stdout, f.stderr = lines(out), lines(errs)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return f
}

func lines(r io.Reader) <-chan string {
	c := make(chan string, 1000)
	go func() {
		defer close(c)
		for s := bufio.NewScanner(r); s.Scan(); {
			c <- s.Text()
		}
	}()
	return c
}

// next is the next line; "" at the end.
func next(t *testing.T, lines <-chan string) string {
	t.Helper()
	select {
	case line := <-lines:
		return line
	case <-time.After(patience):
		t.Fatal("no line came")
		return ""
	}
}

func (f *following) expect(want ...string) {
	f.t.Helper()
	for _, w := range want {
		if got := next(f.t, f.stdout); got != w {
			f.t.Fatalf("got %q, want %q", got, w)
		}
	}
}

func (f *following) signal(s os.Signal) {
	f.t.Helper()
	if err := f.cmd.Process.Signal(s); err != nil {
		f.t.Fatal(err)
	}
}

// end is the exit code, and what was printed that nobody has read yet.
func (f *following) end() result {
	f.t.Helper()
	var r result
	for line := next(f.t, f.stdout); line != ""; line = next(f.t, f.stdout) {
		r.stdout += line + "\n"
	}
	for line := next(f.t, f.stderr); line != ""; line = next(f.t, f.stderr) {
		r.stderr += line + "\n"
	}
	var exit *exec.ExitError
	if err := f.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		f.t.Fatal(err)
	}
	r.code = f.cmd.ProcessState.ExitCode()
	return r
}

// hub is the agent's events, and the --agent that leads to them.
func hub(t *testing.T, network string) (*notify.Hub, string) {
	t.Helper()
	h := notify.NewHub()
	t.Cleanup(h.Close)
	return h, serve(t, network, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != api.EventsPath {
			http.NotFound(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

func publish(h *notify.Hub, types ...api.EventType) {
	for _, e := range types {
		h.Publish(api.Event{Type: e, State: "state of " + string(e), Cause: "test"})
	}
}

func TestFollowTellsTheCommandByEnvironmentAndStandardInput(t *testing.T) {
	for _, network := range []string{"tcp", "unix"} {
		h, agent := hub(t, network)
		f := follow(t, []string{"USHER_AGENT=" + agent, "USHER_TOKEN=secret", "USHER_STATE=old", "KEPT=1"},
			`echo "$USHER_EVENT/$USHER_STATE/$USHER_CAUSE/$USHER_TOKEN/$KEPT"; cat`)
		for i, e := range []api.Event{
			{Type: api.EventOnline, State: "Online", Cause: "endpoint ready"},
			{Type: api.EventReleased, State: "Released", Cause: "a $(b) \x00'c'", Verdict: &api.Verdict{Outcome: api.Drained, InFlight: 3}},
		} {
			h.Publish(e)
			f.expect(fmt.Sprintf("%s/%s/%s//1", e.Type, e.State, strings.ReplaceAll(e.Cause, "\x00", "")))
			var got api.Event
			if err := json.Unmarshal([]byte(next(t, f.stdout)), &got); err != nil || got.ID != uint64(i+1) || got.Run == "" || got.Cause != e.Cause || got.Time.IsZero() {
				t.Errorf("standard input: %+v, %v", got, err)
			}
			if e.Verdict != nil && (got.Verdict == nil || got.Verdict.InFlight != 3) {
				t.Errorf("standard input: %+v, want the verdict", got.Verdict)
			}
		}
		f.signal(syscall.SIGTERM)
		if r := f.end(); r != (result{}) {
			t.Errorf("%+v, want code 0 and nothing more", r)
		}
	}
}

// Events that come while a command runs wait for it, and a lost connection neither repeats nor loses one.
func TestFollowRunsOneCommandAtATimeOnceAndInOrder(t *testing.T) {
	h := notify.NewHub()
	srv := httptest.NewServer(h)
	defer srv.Close()
	defer h.Close()
	out, in := io.Pipe()
	script := `echo "begin $USHER_STATE"; sleep 0.01; echo "end $USHER_STATE"`
	f, err := newFollower([]string{"--agent", srv.URL, "--", "/bin/sh", "-c", script}, os.Getenv, in, in)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		f.run(ctx)
		in.Close()
	}()
	said := lines(out)
	const events = 20
	h.Publish(api.Event{Type: api.EventOnline, State: "0"})
	for i := range events {
		if got := next(t, said); got != fmt.Sprint("begin ", i) {
			t.Fatalf("got %q, want event %d to begin", got, i)
		}
		if i == 0 {
			for i := 1; i < events; i++ {
				h.Publish(api.Event{Type: api.EventOnline, State: fmt.Sprint(i)})
			}
		}
		if i%7 == 3 {
			srv.CloseClientConnections()
		}
		if got := next(t, said); got != fmt.Sprint("end ", i) {
			t.Fatalf("got %q, want event %d to end", got, i)
		}
	}
	cancel()
	<-done
	if rest := next(t, said); rest != "" {
		t.Errorf("and then %q", rest)
	}
}

func TestFollowRunsForTheEventsThatAreWanted(t *testing.T) {
	h, agent := hub(t, "tcp")
	f := follow(t, nil, `echo $USHER_EVENT`, "--agent", agent, "--events", "online, released")
	publish(h, api.EventOnline)
	f.expect("online")
	publish(h, api.EventHeld, api.EventOffline, api.EventResumed, api.EventDraining, api.EventReleased)
	f.expect("released")
	f.signal(syscall.SIGTERM)
	if r := f.end(); r != (result{}) {
		t.Errorf("%+v, want code 0 and nothing more", r)
	}
}

func TestFollowGoesOnAfterACommandThatFails(t *testing.T) {
	h, agent := hub(t, "tcp")
	program := filepath.Join(t.TempDir(), "tell")
	if err := os.WriteFile(program, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	f := follow(t, nil, `echo said >&2; case $USHER_EVENT in online) exit 3;; offline) kill -TERM $$;; esac`, "--agent", agent)
	gone := exec.Command(binary, "follow", "--agent", agent, "--events", "draining", "--", program)
	errs, err := gone.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	defer gone.Wait()
	defer gone.Process.Kill()
	until(t, "both follow", func() bool { return h.Streams() == 2 })
	for _, tc := range []struct {
		event api.EventType
		want  string
	}{
		{api.EventOnline, "usher-prestop: follow: event 1, online: /bin/sh: exit status 3"},
		{api.EventOffline, "usher-prestop: follow: event 2, offline: /bin/sh: signal: terminated"},
		{api.EventDraining, ""},
	} {
		if tc.event == api.EventDraining {
			os.Remove(program)
		}
		publish(h, tc.event)
		if got := next(t, f.stderr); got != "said" {
			t.Errorf("%s: got %q, want what the command says", tc.event, got)
		}
		if tc.want != "" {
			if got := next(t, f.stderr); got != tc.want {
				t.Errorf("%s: got %q, want %q", tc.event, got, tc.want)
			}
		}
	}
	if got := next(t, lines(errs)); !strings.HasPrefix(got, "usher-prestop: follow: event 3, draining: "+program) || !strings.Contains(got, "no such file") {
		t.Errorf("a program that is gone: %q", got)
	}
	f.signal(syscall.SIGTERM)
	if r := f.end(); r != (result{}) {
		t.Errorf("%+v, want code 0 and nothing more", r)
	}
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never came: %s", what)
		}
	}
}

// over says whether a process is gone, or dead and only not waited for yet.
func over(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := bytes.Cut(stat, []byte(") "))
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) || bytes.HasPrefix(after, []byte("Z"))
}

func TestFollowKillsACommandThatHangsWithAllItStarted(t *testing.T) {
	h, agent := hub(t, "tcp")
	f := follow(t, nil, `[ $USHER_EVENT = online ] || exec echo $USHER_EVENT; trap "" TERM; sleep 600 & echo $!; wait`, "--agent", agent, "--timeout", "300ms")
	until(t, "it follows", func() bool { return h.Streams() == 1 })
	publish(h, api.EventOnline, api.EventOffline)
	child, err := strconv.Atoi(next(t, f.stdout))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(child, syscall.SIGKILL) })
	f.expect("offline")
	if got, want := next(t, f.stderr), "usher-prestop: follow: event 1, online: /bin/sh: killed, still running after 300ms"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	until(t, "the end of the command's child", func() bool { return over(child) })
}

// leavesZombie in the environment makes this program end with a child that has exited and that nobody has asked about.
const leavesZombie = "LEAVES_ZOMBIE"

func leaveZombie() error {
	child := exec.Command("true")
	if err := child.Start(); err != nil {
		return err
	}
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", child.Process.Pid))
		if err != nil || bytes.Contains(stat, []byte(") Z ")) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
}

// As the first process of its container it inherits what commands leave behind, which would stay as zombies for good.
func TestFollowAsFirstProcessReapsWhatCommandsLeave(t *testing.T) {
	h, agent := hub(t, "tcp")
	script := `case $USHER_EVENT in online) echo begin; ` + leavesZombie + `=1 exec "$0";; *) cat /proc/[0-9]*/stat | grep -c ") Z ";; esac`
	cmd := exec.Command("/bin/sh", "-c", `mount -t proc proc /proc && exec "$0" follow --agent "$1" -- /bin/sh -c "$2" "$3"`, binary, agent, script, os.Args[0])
	cmd.SysProcAttr = ownProcesses()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	publish(h, api.EventOnline)
	said := lines(out)
	if got := next(t, said); got != "begin" {
		t.Fatalf("said %q", got)
	}
	publish(h, api.EventOffline)
	if n := next(t, said); n != "0" {
		t.Errorf("%s zombies are left", n)
	}
}

func TestSignalEndsFollowingOnceTheCommandIsDone(t *testing.T) {
	for _, s := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(s.String(), func(t *testing.T) {
			t.Parallel()
			left := make(chan struct{})
			agent := serve(t, "tcp", func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				// In one piece: the second has arrived by the signal, and isn't told any more.
				io.WriteString(w, "id: a-1\ndata: {\"id\":1,\"type\":\"online\"}\n\nid: a-2\ndata: {\"id\":2,\"type\":\"offline\"}\n\n")
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				close(left)
			})
			gate := filepath.Join(t.TempDir(), "gate")
			if err := syscall.Mkfifo(gate, 0o600); err != nil {
				t.Fatal(err)
			}
			f := follow(t, nil, `echo begin $USHER_EVENT; [ $USHER_EVENT = online ] && cat `+gate+`; echo end`, "--agent", agent, "--timeout", "1m")
			f.expect("begin online")
			f.signal(s)
			<-left
			f.signal(s) // a second one hurries nothing
			until(t, "the command at the gate", func() bool {
				g, err := os.OpenFile(gate, os.O_WRONLY|syscall.O_NONBLOCK, 0)
				if err == nil {
					io.WriteString(g, "go\n")
					g.Close()
				}
				return err == nil
			})
			if r, want := f.end(), (result{stdout: "go\nend\n"}); r != want {
				t.Errorf("%+v, want %+v", r, want)
			}
		})
	}
	t.Run("hanging command", func(t *testing.T) {
		t.Parallel()
		h, agent := hub(t, "tcp")
		f := follow(t, nil, `echo begin; exec sleep 600`, "--agent", agent, "--timeout", "500ms")
		publish(h, api.EventOnline)
		f.expect("begin")
		f.signal(syscall.SIGTERM)
		if r := f.end(); r.code != 0 || !strings.Contains(r.stderr, "killed, still running after 500ms") {
			t.Errorf("%+v", r)
		}
	})
	t.Run("no agent", func(t *testing.T) {
		t.Parallel()
		f := follow(t, nil, `true`, "--agent", "unix:///nonexistent/agent.sock")
		if got := next(t, f.stderr); !strings.Contains(got, "no such file") {
			t.Errorf("got %q", got)
		}
		f.signal(syscall.SIGTERM)
		if r := f.end(); r != (result{}) {
			t.Errorf("%+v, want code 0 and nothing more", r)
		}
	})
}

func TestFollowSaysOnceThatTheAgentIsAwayAndGoesOn(t *testing.T) {
	l, agent := listen(t, "tcp")
	l.Close()
	f := follow(t, nil, `echo $USHER_EVENT`, "--agent", agent)
	if got := next(t, f.stderr); !strings.Contains(got, "connection refused; trying again") {
		t.Errorf("got %q", got)
	}
	l, err := net.Listen("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	h := notify.NewHub()
	defer h.Close()
	asked := 0
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked++; asked < 4 { // one after the other
			http.Error(w, "two\nlines", http.StatusServiceUnavailable)
			return
		}
		h.ServeHTTP(w, r)
	})}
	defer srv.Close()
	publish(h, api.EventOnline)
	go srv.Serve(l)
	f.expect("online")
	f.signal(syscall.SIGTERM)
	if r := f.end(); r.code != 0 || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "answered 503: two lines; trying again") {
		t.Errorf("%+v, want one line more", r)
	}
}

func TestTheSameTroubleIsDueOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var c complaint
		var got []int
		for i := range 12 {
			err := fmt.Errorf("from port %d: %w", i, syscall.ECONNREFUSED)
			if i == 3 || i == 4 {
				err = errors.New("not found")
			}
			if c.due(err) {
				got = append(got, i)
			}
			time.Sleep(15 * time.Second)
		}
		if want := []int{0, 3, 5, 9}; !slices.Equal(got, want) {
			t.Errorf("due at %d, want %d", got, want)
		}
	})
}

func TestBadInputToFollowIsOneLineThatNamesIt(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		env, args []string
		want      string
	}{
		{nil, nil, "no command: want -- and a program"},
		{nil, []string{"--"}, "no command"},
		{nil, []string{"--", ""}, "no command"},
		{nil, []string{"true"}, `argument "true": want flags, then -- and a command`},
		{nil, []string{"--events", "online", "offline", "--", "true"}, `argument "offline": want flags, then --`},
		{nil, []string{"--", "/nonexistent/tell"}, "/nonexistent/tell"},
		{nil, []string{"--", "no-such-program"}, `"no-such-program": executable file not found`},
		{nil, []string{"--", plain}, "permission denied: want a program"},
		{nil, []string{"--events", "online,gone", "--", "true"}, `--events is "online,gone": "gone" is none of online offline held resumed draining released`},
		{nil, []string{"--events", "", "--", "true"}, `"" is none of`},
		{nil, []string{"--events", "online,", "--", "true"}, `"" is none of`},
		{nil, []string{"--events", "Online", "--", "true"}, `"Online" is none of`},
		{nil, []string{"--agent", "127.0.0.1:7401", "--", "true"}, `--agent is "127.0.0.1:7401": want unix:///path`},
		{nil, []string{"--agent", "", "--", "true"}, `--agent is "": want`},
		{nil, []string{"--agent", "http://a:1/v1/events", "--", "true"}, `--agent is "http://a:1/v1/events"`},
		{nil, []string{"--agent", "unix:///a?b", "--", "true"}, `--agent is "unix:///a?b"`},
		{[]string{"USHER_AGENT=agent"}, []string{"--", "true"}, `USHER_AGENT is "agent"`},
		{nil, []string{"--timeout", "0s", "--", "true"}, "--timeout is 0s: want more than 0"},
		{nil, []string{"--timeout", "-1s", "--", "true"}, "--timeout is -1s"},
		{nil, []string{"--timeout", "5", "--", "true"}, `"5"`},
		{nil, []string{"--token", "a", "--", "true"}, "-token"},
	} {
		r := hook(t, append(tc.env, "PATH="+os.Getenv("PATH")), append([]string{"follow"}, tc.args...)...)
		if r.code != exitUsage || r.stdout != "" || !strings.Contains(r.stderr, tc.want) || !strings.HasPrefix(r.stderr, "usher-prestop: follow: ") || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%q %q: %+v, want one line with %q", tc.env, tc.args, r, tc.want)
		}
	}
}

func TestHelpOfFollow(t *testing.T) {
	r := hook(t, nil, "follow", "--help")
	if r.code != 0 || r.stderr != "" {
		t.Errorf("%+v", r)
	}
	for _, want := range []string{"follow [flags] -- COMMAND", "--agent", "--timeout", "USHER_EVENT", "preStop", "  2  bad"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("follow --help doesn't say %q", want)
		}
	}
	for _, e := range api.EventTypes() {
		if !strings.Contains(r.stdout, " "+string(e)+" ") {
			t.Errorf("follow --help doesn't say %q", e)
		}
	}
	if r := hook(t, nil, "--help"); !strings.Contains(r.stdout, "follow --help") {
		t.Error("--help doesn't lead to follow --help")
	}
}
