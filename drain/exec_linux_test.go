package drain

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newExec(t *testing.T, timeout time.Duration, script string) *Exec {
	t.Helper()
	e, err := NewExec(ExecConfig{Command: []string{"sh", "-c", script, "sh", t.TempDir()}, Timeout: timeout})
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestExecCounts(t *testing.T) {
	t.Setenv("IN_FLIGHT", "17")
	for _, tc := range []struct {
		name, script string
		want         int
		wantErr      string
	}{
		{name: "a number", script: "echo 3", want: 3},
		{name: "zero, blanks around it", script: "echo; echo ' 0'; echo; echo something >&2", want: 0},
		{name: "of the environment", script: "echo $IN_FLIGHT", want: 17},
		{name: "of standard input, which is empty", script: "wc -c", want: 0},
		{name: "nothing", script: "true", wantErr: `sh printed "", must be a whole number from 0 to 2147483647`},
		{name: "no number", script: "echo none; echo no server >&2", wantErr: `sh printed "none", must be a whole number from 0 to 2147483647, and it said: "no server"`},
		{name: "two numbers", script: "echo 1; echo 2", wantErr: `sh printed "1\n2"`},
		{name: "a negative number", script: "echo -1", wantErr: `sh printed "-1"`},
		{name: "a fraction", script: "echo 1.0", wantErr: `sh printed "1.0"`},
		{name: "too much", script: "echo 2147483648", wantErr: `sh printed "2147483648"`},
		{name: "a failure", script: "echo 0; echo no server >&2; exit 3", wantErr: `running sh: exit status 3, and it said: "no server"`},
		{name: "a silent failure", script: "exit 3", wantErr: "running sh: exit status 3"},
		{name: "a signal", script: "kill -9 $$", wantErr: "running sh: signal: killed"},
		{name: "a long complaint", script: "head -c 1000000 /dev/zero | tr '\\0' x >&2; exit 1", wantErr: `"` + strings.Repeat("x", 200) + `..."`},
		{name: "a number and much after it", script: "echo 1; head -c 1000000 /dev/zero | tr '\\0' ' '", wantErr: `sh printed "1"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := newExec(t, 10*time.Second, tc.script).Sample(t.Context())
			if tc.wantErr != "" {
				if err == nil || !strings.HasSuffix(err.Error(), tc.wantErr) && !strings.HasPrefix(err.Error(), tc.wantErr) {
					t.Fatalf("got %+v, %v, want an error with %q", got, err, tc.wantErr)
				}
				return
			}
			if err != nil || got != (Sample{InFlight: tc.want}) {
				t.Fatalf("got %+v, %v, want %d in flight", got, err, tc.want)
			}
		})
	}
}

func TestExecSaysThatThereIsNoSuchCommand(t *testing.T) {
	for _, name := range []string{"usher-no-such-command", "/usher/no/such/command"} {
		e, err := NewExec(ExecConfig{Command: []string{name}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.Sample(t.Context()); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want an error that names %s", err, name)
		}
	}
}

// TestExecLeavesNothingBehind has the test's process adopt orphans, as process id 1 of the agent's container does, and looks
// for processes that are alive, or dead and not reaped.
func TestExecLeavesNothingBehind(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
	for _, tc := range []struct {
		name, script string
		timeout      time.Duration
		wantErr      string
	}{
		{"a command that does not end", `echo $$ >$1/a; echo waiting >&2; sleep 600`, time.Second, `no end within 1s: context deadline exceeded, and it said: "waiting"`},
		{"one that has children", `echo $$ >$1/a; (echo $$; exec sleep 600) & echo $! >$1/b; wait`, time.Second, "no end within 1s"},
		{"one that ignores signals", `trap '' TERM INT; echo $$ >$1/a; while :; do sleep 1; done`, time.Second, "no end within 1s"},
		{"one that ends before its child, which holds the output", `echo 3; sleep 600 & echo $! >$1/a`, time.Minute, ""},
		{"one that ends before its child", `echo 3; sleep 600 >/dev/null 2>&1 & echo $! >$1/a`, time.Minute, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			e := newExec(t, tc.timeout, tc.script)
			got, err := e.Sample(t.Context())
			if tc.wantErr == "" && (err != nil || got.InFlight != 3) || tc.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tc.wantErr)) {
				t.Errorf("got %+v, %v, want 3 or an error with %q", got, err, tc.wantErr)
			}
			files, err := filepath.Glob(filepath.Join(e.cfg.Command[4], "*"))
			if err != nil || len(files) == 0 {
				t.Fatalf("no process wrote its id: %v", err)
			}
			for _, f := range files {
				text, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
				if err != nil {
					t.Fatal(err)
				}
				// Zombies can be signalled too.
				if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
					stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
					t.Errorf("process %d is still there: %s", pid, stat)
				}
			}
		})
	}
}

func TestExecEndsWithItsContext(t *testing.T) {
	e := newExec(t, time.Hour, "echo >$1/started; sleep 600")
	cause := errors.New("the drain is over")
	ctx, cancel := context.WithCancelCause(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := e.Sample(ctx)
		done <- err
	}()
	waitFor(t, filepath.Join(e.cfg.Command[4], "started"))
	cancel(cause)
	select {
	case err := <-done:
		if !errors.Is(err, cause) {
			t.Errorf("got %v, want the cause", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the command outlives its context")
	}
}

func TestExecNeverRunsTwice(t *testing.T) {
	// mkdir fails when another has made the directory and not removed it yet.
	e := newExec(t, time.Minute, "mkdir $1/one && sleep 0.05 && rmdir $1/one && echo 0")
	var calls sync.WaitGroup
	for range 5 {
		calls.Go(func() {
			if _, err := e.Sample(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()

	e = newExec(t, time.Minute, "echo >$1/started; until [ -e $1/go ]; do sleep 0.01; done; echo 0")
	calls.Go(func() {
		if _, err := e.Sample(t.Context()); err != nil {
			t.Error(err)
		}
	})
	waitFor(t, filepath.Join(e.cfg.Command[4], "started"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := e.Sample(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "waiting for the last run of sh") {
		t.Errorf("got %v while the command runs, want the context's error", err)
	}
	if err := os.WriteFile(filepath.Join(e.cfg.Command[4], "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	calls.Wait()
}

func waitFor(t *testing.T, file string) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the command did not write %s", file)
		}
	}
}

func TestNewExecNamesWhatIsWrong(t *testing.T) {
	for _, tc := range []struct {
		cfg  ExecConfig
		want string
	}{
		{ExecConfig{}, "exec source: Command is [], must be a program and its arguments"},
		{ExecConfig{Command: []string{""}}, `Command is [""], must be a program`},
		{ExecConfig{Command: []string{"a", "b\x00"}}, `Command is ["a" "b\x00"], must be without zero bytes`},
		{ExecConfig{Command: []string{"a"}, Timeout: -1}, "Timeout is -1ns, must be positive"},
	} {
		if _, err := NewExec(tc.cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("NewExec(%+v): got %v, want %q", tc.cfg, err, tc.want)
		}
	}
}
