package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"usher.dev/usher/internal/api"
)

var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if os.Getenv(leavesZombie) != "" {
		if err := leaveZombie(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	dir, err := os.MkdirTemp("", "usher-prestop")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	binary = filepath.Join(dir, "usher-prestop")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=v0.0.0-test", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "building usher-prestop: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

type result struct {
	code           int
	stdout, stderr string
}

// hook runs usher-prestop with nothing but these variables in its environment.
func hook(t *testing.T, env []string, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary, args...)
	cmd.Env = env
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// listen returns a listener and the --agent that leads to it.
func listen(t *testing.T, network string) (net.Listener, string) {
	t.Helper()
	address, prefix := "127.0.0.1:0", "http://"
	if network == "unix" {
		address, prefix = filepath.Join(t.TempDir(), "agent.sock"), "unix://"
	}
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, prefix + l.Addr().String()
}

func serve(t *testing.T, network string, handler http.HandlerFunc) string {
	t.Helper()
	l, agent := listen(t, network)
	srv := &http.Server{Handler: handler}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	return agent
}

// raw serves bytes that an http.Server wouldn't, then hangs up.
func raw(t *testing.T, answer string) string {
	t.Helper()
	l, agent := listen(t, "tcp")
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Read(make([]byte, 4096))
			io.WriteString(conn, answer)
			conn.Close()
		}
	}()
	return agent
}

func answer(status int, body any) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(body)
	}
}

func verdict(o api.Outcome, message string, inFlight int) api.Verdict {
	return api.Verdict{Outcome: o, Message: message, Cause: "prestop hook", TotalMs: 1300, WithdrawMs: 12, SettleMs: 1000, DrainMs: 288,
		Withdrawn: true, InFlight: inFlight}
}

func TestExitCodeAndOutputOfEachOutcome(t *testing.T) {
	nobody := func(t *testing.T) string {
		l, agent := listen(t, "tcp")
		l.Close()
		return agent
	}
	for _, tc := range []struct {
		name           string
		agent          func(t *testing.T) string
		args           []string
		code           int
		stdout, stderr string // parts of them; empty: nothing at all
	}{
		{"drained", func(t *testing.T) string {
			return serve(t, "tcp", answer(200, verdict(api.Drained, "drained in 1.3s, nothing in flight", 0)))
		}, nil, 0, "drained in 1.3s, nothing in flight (cause: prestop hook; withdraw 12ms, settle 1s, drain 288ms)", ""},
		{"drained over unix socket", func(t *testing.T) string {
			return serve(t, "unix", answer(200, verdict(api.Drained, "drained in 1.3s, nothing in flight", 0)))
		}, nil, 0, "drained in 1.3s", ""},
		{"skipped", func(t *testing.T) string {
			return serve(t, "tcp", answer(200, verdict(api.Skipped, "nothing to wait for", 0)))
		},
			nil, 0, "nothing to wait for", ""},
		{"timed out", func(t *testing.T) string {
			return serve(t, "tcp", answer(200, verdict(api.TimedOut, "timed out after 15s with 3 in flight", 3)))
		}, nil, 3, "with 3 in flight", ""},
		{"unmeasured", func(t *testing.T) string {
			return serve(t, "tcp", answer(200, verdict(api.Unmeasured, "without knowing what was in flight", 0)))
		}, nil, 4, "without knowing", ""},
		{"forced", func(t *testing.T) string {
			return serve(t, "tcp", answer(200, verdict(api.Forced, "released by alice with 3 in flight", 3)))
		}, nil, 8, "released by alice with 3 in flight (cause: prestop hook", ""},
		{"refused", func(t *testing.T) string { return serve(t, "tcp", answer(403, api.Error{Error: "not terminating"})) },
			nil, 5, "", "refused by the agent: not terminating"},
		{"nobody listens, fail open", nobody, nil, 0, "", "agent unreachable: dial tcp"},
		{"nobody listens, fail closed", nobody, []string{"--fail-open=false"}, 6, "", "agent unreachable: dial tcp"},
		{"no socket", func(t *testing.T) string { return "unix:///nonexistent/agent.sock" }, []string{"--fail-open=false"}, 6, "", "agent unreachable: dial unix"},
		{"dies before an answer, fail open", func(t *testing.T) string { return raw(t, "") }, nil, 0, "", "SIGTERM goes ahead without a drain"},
		{"dies before an answer", func(t *testing.T) string { return raw(t, "") }, []string{"--fail-open=false"}, 6, "", "not back in 2s"},
		{"dies inside the answer", func(t *testing.T) string { return raw(t, "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{\"outc") },
			[]string{"--fail-open=false"}, 6, "", "agent gone during the call"},
		{"no HTTP", func(t *testing.T) string { return raw(t, "SSH-2.0-OpenSSH_9.2\r\n\r\n") }, nil, 1, "", "not an agent's answer"},
		{"no JSON", func(t *testing.T) string {
			return serve(t, "tcp", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") })
		}, nil, 1, "", "not an agent's answer"},
		{"unknown outcome", func(t *testing.T) string { return serve(t, "tcp", answer(200, verdict("paused", "", 0))) }, nil, 1, "", `outcome "paused": want drained`},
		{"another server", func(t *testing.T) string { return serve(t, "tcp", http.NotFound) }, nil, 1, "", "agent answered 404 Not Found"},
		{"server error", func(t *testing.T) string { return serve(t, "tcp", answer(500, api.Error{Error: "broken"})) }, nil, 1, "", "500 Internal Server Error: broken"},
		{"own timeout", func(t *testing.T) string {
			return serve(t, "tcp", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		}, []string{"--timeout", "100ms"}, 7, "", "gave up after --timeout 100ms"},
		{"own timeout while the agent keeps dying", func(t *testing.T) string { return raw(t, "") }, []string{"--timeout", "300ms"}, 7, "", "gave up after --timeout 300ms"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got := hook(t, nil, append([]string{"--agent", tc.agent(t)}, tc.args...)...)
			if got.code != tc.code {
				t.Errorf("exit code %d, want %d", got.code, tc.code)
			}
			for _, s := range []struct{ name, got, want string }{{"stdout", got.stdout, tc.stdout}, {"stderr", got.stderr, tc.stderr}} {
				if s.want == "" && s.got != "" || !strings.Contains(s.got, s.want) || strings.Count(s.got, "\n") > 1 {
					t.Errorf("%s %q, want one line with %q", s.name, s.got, s.want)
				}
			}
		})
	}
}

func TestWaitsAsLongAsTheAgentDoes(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	agent := serve(t, "tcp", func(w http.ResponseWriter, _ *http.Request) {
		close(asked)
		<-release
		json.NewEncoder(w).Encode(verdict(api.Drained, "drained", 0))
	})
	done := make(chan result)
	go func() { done <- hook(t, nil, "--agent", agent) }()
	<-asked
	select {
	case r := <-done:
		t.Fatalf("ended before the agent answered: %+v", r)
	case <-time.After(connectTimeout + 500*time.Millisecond): // beyond the connect timeout, which must not bound the answer
	}
	close(release)
	if r := <-done; r.code != 0 {
		t.Errorf("%+v", r)
	}
}

// An agent that is restarted in mid-call finds the caller again: the call is joined anew, each time with 2 s to come back.
func TestRejoinsAnAgentThatComesBack(t *testing.T) {
	t.Parallel()
	for _, network := range []string{"tcp", "unix"} {
		t.Run(network, func(t *testing.T) {
			t.Parallel()
			l, agent := listen(t, network)
			done := make(chan result, 1)
			go func() { done <- hook(t, nil, "--agent", agent, "--fail-open=false") }()
			for _, life := range []time.Duration{0, rejoinFor + 100*time.Millisecond} {
				conn, err := l.Accept()
				if err != nil {
					t.Fatal(err)
				}
				conn.Read(make([]byte, 4096))
				time.Sleep(life) // so long the agent has the caller wait
				l.Close()
				conn.Close()
				if l, err = net.Listen(network, l.Addr().String()); err != nil {
					t.Fatal(err)
				}
			}
			srv := &http.Server{Handler: answer(200, verdict(api.Drained, "drained in 1.3s", 0))}
			go srv.Serve(l)
			defer srv.Close()
			if r := <-done; r.code != 0 || !strings.Contains(r.stdout, "drained in 1.3s") || r.stderr != "" {
				t.Errorf("%+v", r)
			}
		})
	}
}

func TestTokenIsSentFromEachSource(t *testing.T) {
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte("from-file\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	type request struct{ path, token string }
	got := make(chan request, 1)
	agent := serve(t, "tcp", func(w http.ResponseWriter, r *http.Request) {
		got <- request{r.URL.Path, r.Header.Get(api.TokenHeader)}
		json.NewEncoder(w).Encode(verdict(api.Drained, "drained", 0))
	})
	for _, tc := range []struct {
		name, want string
		env, args  []string
	}{
		{"none", "", nil, nil},
		{"variable", "from-env", []string{"USHER_TOKEN=from-env"}, nil},
		{"flag", "from-flag", []string{"USHER_TOKEN=from-env"}, []string{"--token", "from-flag"}},
		{"file", "from-file", []string{"USHER_TOKEN=from-env"}, []string{"--token-file", file}},
	} {
		if r := hook(t, append(tc.env, "USHER_AGENT="+agent), tc.args...); r.code != 0 {
			t.Errorf("%s: %+v", tc.name, r)
			continue
		}
		if r := <-got; r.token != tc.want || r.path != api.PrestopPath {
			t.Errorf("%s: got %+v, want token %q at %s", tc.name, r, tc.want, api.PrestopPath)
		}
	}
}

func TestJSONIsOneObjectForEveryOutcome(t *testing.T) {
	for _, tc := range []struct {
		agent   string
		outcome api.Outcome
		code    int
	}{
		{serve(t, "tcp", answer(200, verdict(api.TimedOut, "m", 3))), "timed-out", 3},
		{serve(t, "tcp", answer(403, api.Error{Error: "no"})), "refused", 5},
		{"unix:///nonexistent", "unreachable", 0},
	} {
		r := hook(t, nil, "--agent", tc.agent, "--output=json")
		var v api.Verdict
		if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || v.Outcome != tc.outcome || v.Message == "" || r.code != tc.code || r.stderr != "" {
			t.Errorf("%s: %+v, %v", tc.outcome, r, err)
		}
		if tc.outcome == api.TimedOut && (v.InFlight != 3 || v.DrainMs != 288) {
			t.Errorf("the agent's figures were lost: %+v", v)
		}
	}
}

func TestBadInputIsOneLineThatNamesIt(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		env, args []string
		want      string
	}{
		{nil, []string{"--nope"}, "-nope"},
		{nil, []string{"now"}, `argument "now": want flags only`},
		{nil, []string{"install"}, "want one folder"},
		{nil, []string{"install", "/a", "/b"}, "want one folder"},
		{nil, []string{"install", "--now"}, "want one folder"},
		{nil, []string{"--agent", "127.0.0.1:7401"}, `--agent is "127.0.0.1:7401": want unix:///path`},
		{nil, []string{"--agent", "https://a:1"}, `--agent is "https://a:1"`},
		{nil, []string{"--agent", "http://a"}, `--agent is "http://a"`},
		{nil, []string{"--agent", "http://a:1/prestop"}, `--agent is "http://a:1/prestop"`},
		{nil, []string{"--agent", "http://a:65536"}, `--agent is "http://a:65536"`},
		{nil, []string{"--agent", "http://a:0"}, `--agent is "http://a:0"`},
		{nil, []string{"--agent", "unix://agent.sock"}, `--agent is "unix://agent.sock"`},
		{[]string{"USHER_AGENT=agent"}, nil, `USHER_AGENT is "agent"`},
		{nil, []string{"--timeout", "5"}, `"5"`},
		{nil, []string{"--timeout", "-1s"}, "--timeout is -1s: want 0 or more"},
		{nil, []string{"--output", "yaml"}, `--output is "yaml": want text or json`},
		{nil, []string{"--token", "a", "--token-file", "b"}, "want one of them"},
		{nil, []string{"--token", ""}, "--token is empty"},
		{nil, []string{"--token-file", empty}, "is empty: want a token"},
		{nil, []string{"--token-file", "/nonexistent"}, "--token-file: want a readable file"},
		{[]string{"USHER_TOKEN=a\nb"}, nil, `USHER_TOKEN has the character '\n'`},
		{nil, []string{"--fail-open=maybe"}, "fail-open"},
	} {
		r := hook(t, tc.env, tc.args...)
		if r.code != exitUsage || r.stdout != "" || !strings.Contains(r.stderr, tc.want) || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%q %q: %+v, want one line with %q", tc.env, tc.args, r, tc.want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	if r := hook(t, nil, "--version"); r.code != 0 || r.stdout != "usher-prestop v0.0.0-test\n" {
		t.Errorf("%+v", r)
	}
	r := hook(t, nil, "--help")
	if r.code != 0 || r.stderr != "" {
		t.Errorf("%+v", r)
	}
	for _, want := range []string{"--agent", "--token-file", "USHER_TOKEN", "--fail-open", "--log-to-pid1", "  7  ", "  8  forced", "  9  install failed", "FailedPreStopHook", "usher-prestop install FOLDER"} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("--help doesn't say %q", want)
		}
	}
}

// ownProcesses has a command be process 1 of a namespace of its own, and lets it mount /proc.
func ownProcesses() *syscall.SysProcAttr {
	a := &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if os.Getuid() != 0 {
		a.Cloneflags |= syscall.CLONE_NEWUSER
		a.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
	}
	a.Unshareflags = syscall.CLONE_NEWNS // makes the mount private
	return a
}

// The shell is process 1 of a namespace of its own, as an application is in its container: what the hook prints goes
// to a file that nobody reads (in a subshell, so that the shell's own output stays where it is), and the verdict must still show up where the shell's own output goes.
func TestLogToPID1ReachesTheContainersLog(t *testing.T) {
	agent := serve(t, "tcp", answer(200, verdict(api.Drained, "drained in 1.3s", 0)))
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c",
		`mount -t proc proc /proc && (exec "$0" --agent "$1" --log-to-pid1 >/dev/null); echo "code $?"`, binary, agent)
	cmd.SysProcAttr = ownProcesses()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &stderr)
	}
	if out := stdout.String(); !strings.HasPrefix(out, "usher-prestop: drained in 1.3s") || !strings.HasSuffix(out, "code 0\n") {
		t.Errorf("process 1 printed %q (stderr %q)", out, &stderr)
	}
}

// A process 1 whose output can't be opened, as another user's, costs the log line and nothing else.
func TestLogToPID1ThatFailsIsSaid(t *testing.T) {
	if err := logTo("/nonexistent/fd/1", "x"); err == nil {
		t.Error("no error")
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := logTo(fifo, "x"); !errors.Is(err, syscall.ENXIO) {
		t.Errorf("a pipe that nobody reads: %v, want ENXIO at once", err)
	}
	r, err := os.OpenFile(fifo, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := logTo(fifo, strings.Repeat("x", 1<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a full pipe: %v, want a deadline", err)
	}
}

func TestBinaryIsSmall(t *testing.T) {
	info, err := os.Stat(binary)
	if err != nil {
		t.Fatal(err)
	}
	const limit = 7_000_000
	if info.Size() >= limit {
		t.Errorf("%d bytes, want less than %d", info.Size(), limit)
	}
}
