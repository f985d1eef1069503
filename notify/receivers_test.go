package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"usher.dev/usher/internal/api"
)

// app answers webhooks; a fake, since real sockets don't go with synctest's time.
type app struct {
	mu     sync.Mutex
	answer func(e api.Event, attempt int) (code int, after time.Duration, err error)
	calls  []string // "type+offset of each attempt"
	began  time.Time
	tries  map[uint64]int
	busy   int
	most   int
}

func (a *app) RoundTrip(r *http.Request) (*http.Response, error) {
	var e api.Event
	if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.tries[e.ID]++
	a.calls = append(a.calls, fmt.Sprintf("%s+%s", e.Type, time.Since(a.began).Truncate(100*time.Millisecond)))
	a.busy++
	a.most = max(a.most, a.busy)
	code, after, err := a.answer(e, a.tries[e.ID])
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		a.busy--
		a.mu.Unlock()
	}()
	select {
	case <-time.After(after):
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	if err != nil {
		return nil, err
	}
	rec := httptest.NewRecorder()
	rec.WriteHeader(code)
	rec.WriteString("because")
	return rec.Result(), nil
}

// rig is one webhook, running.
type rig struct {
	hub  *Hub
	app  *app
	rs   *Receivers
	logs *observer.ObservedLogs
	stop func()
}

func newRig(t *testing.T, w Webhook, answer func(e api.Event, attempt int) (int, time.Duration, error)) *rig {
	core, logs := observer.New(zapcore.WarnLevel)
	r := &rig{hub: NewHub(), logs: logs, app: &app{answer: answer, began: time.Now(), tries: map[uint64]int{}}}
	w.URL = "http://user:hunter2@app/hook?key=hunter2"
	rs, err := New(Config{Settings: Settings{Webhooks: []Webhook{w}}, Hub: r.hub, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	rs.list[0] = rs.webhook(w, r.app)
	r.rs = rs
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- rs.Run(ctx) }()
	r.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	return r
}

func (r *rig) publish(events ...api.EventType) {
	for _, e := range events {
		r.hub.Publish(api.Event{Type: e, State: string(e)})
	}
}

func (r *rig) expect(t *testing.T, delivered, failed int64, calls ...string) {
	t.Helper()
	c := &r.rs.Webhooks
	r.app.mu.Lock()
	defer r.app.mu.Unlock()
	if c.Delivered.Load() != delivered || c.Failed.Load() != failed || calls != nil && !slices.Equal(r.app.calls, calls) {
		t.Errorf("%d delivered, %d failed, calls %q; want %d, %d, %q", c.Delivered.Load(), c.Failed.Load(), r.app.calls, delivered, failed, calls)
	}
	if r.app.most > 1 {
		t.Errorf("%d at once", r.app.most)
	}
	for _, l := range r.logs.All() {
		if text := fmt.Sprint(l.Message, l.ContextMap()); strings.Contains(text, "hunter2") {
			t.Errorf("a secret is logged: %s", text)
		}
	}
}

func ok(api.Event, int) (int, time.Duration, error) { return 204, 0, nil }

func TestWebhookGetsEachEventOnceAndInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{}, func(api.Event, int) (int, time.Duration, error) { return 200, 300 * time.Millisecond, nil })
		r.publish(api.EventOnline, api.EventOffline, api.EventOnline, api.EventDraining, api.EventReleased)
		time.Sleep(5 * time.Second)
		r.expect(t, 5, 0, "online+0s", "offline+300ms", "online+600ms", "draining+900ms", "released+1.2s")
		r.stop()
	})
}

func TestWebhookGetsOnlyWhatItWants(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Events: []api.EventType{api.EventHeld, api.EventDraining}}, ok)
		r.publish(api.EventOnline, api.EventHeld, api.EventResumed, api.EventDraining, api.EventReleased)
		if err := r.rs.Announced(t.Context()); err != nil {
			t.Error(err)
		}
		r.expect(t, 2, 0, "held+0s", "draining+0s")
		r.stop()
	})
}

func TestWebhookIsTriedAgain(t *testing.T) {
	for name, tc := range map[string]struct {
		code  int
		err   error
		after time.Duration
		again bool
	}{
		"500":        {code: 500, again: true},
		"503":        {code: 503, again: true},
		"408":        {code: 408, again: true},
		"429":        {code: 429, again: true},
		"refused":    {err: errors.New("connection refused"), again: true},
		"no answer":  {after: time.Hour, again: true},
		"400":        {code: 400},
		"404":        {code: 404},
		"a redirect": {code: 302},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, Webhook{}, func(e api.Event, attempt int) (int, time.Duration, error) {
					if e.Type == api.EventOnline && attempt <= 2 {
						return tc.code, tc.after, tc.err
					}
					return 200, 0, nil
				})
				r.publish(api.EventOnline, api.EventOffline)
				time.Sleep(20 * time.Second)
				if tc.again {
					r.expect(t, 2, 0)
				} else {
					r.expect(t, 1, 1, "online+0s", "offline+0s")
				}
				r.stop()
			})
		})
	}
}

func TestWebhookGivesUpAfterItsDeadlineAndGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Timeout: "2s", Deadline: "4s"}, func(e api.Event, attempt int) (int, time.Duration, error) {
			if e.Type == api.EventOnline {
				return 0, 500 * time.Millisecond, errors.New("connection refused")
			}
			return 200, 0, nil
		})
		r.publish(api.EventOnline, api.EventOffline)
		time.Sleep(10 * time.Second)
		r.expect(t, 1, 1)
		r.app.mu.Lock()
		last := r.app.calls[len(r.app.calls)-1]
		r.app.mu.Unlock()
		at, err := time.ParseDuration(strings.TrimPrefix(last, "offline+"))
		if err != nil || at < time.Second || at > 4500*time.Millisecond {
			t.Errorf("the next event's turn came with %q, want it after at most 4 s and what an attempt takes", last)
		}
		if r.logs.Len() != 1 {
			t.Errorf("logged %v, want one warning", r.logs.All())
		}
		r.stop()
	})
}

func TestShutdownDoesNotWaitBehindAnOlderEvent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Deadline: "1m"}, func(e api.Event, attempt int) (int, time.Duration, error) {
			if e.Type == api.EventDraining || e.Type == api.EventReleased {
				return 200, 0, nil
			}
			return 500, 0, nil
		})
		r.publish(api.EventOnline)
		time.Sleep(10 * time.Second)
		r.expect(t, 0, 0)
		r.publish(api.EventOffline, api.EventDraining)
		synctest.Wait()
		r.expect(t, 1, 2) // each older one had an attempt, and no other
		r.stop()
	})
}

func TestAnnouncedWaitsAndNamesWhoIsLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Timeout: "3s"}, func(e api.Event, attempt int) (int, time.Duration, error) { return 200, 2500 * time.Millisecond, nil })
		if err := r.rs.Announced(t.Context()); err != nil {
			t.Errorf("nothing is published: %v", err)
		}
		r.publish(api.EventDraining)
		began := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		err := r.rs.Announced(ctx)
		if !errors.Is(err, context.DeadlineExceeded) || err.Error() != "waiting for webhook http://app/hook to be told: context deadline exceeded" || time.Since(began) != 2*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		if err := r.rs.Announced(t.Context()); err != nil || time.Since(began) != 2500*time.Millisecond {
			t.Errorf("%v after %s", err, time.Since(began))
		}
		r.stop()
	})
}

func TestAnnouncedDoesNotWaitForWhatIsPublishedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{}, func(e api.Event, attempt int) (int, time.Duration, error) { return 200, 500 * time.Millisecond, nil })
		r.publish(api.EventDraining)
		began := time.Now()
		done := make(chan time.Duration)
		go func() {
			r.rs.Announced(t.Context())
			done <- time.Since(began)
		}()
		synctest.Wait()
		r.publish(api.EventReleased, api.EventOnline)
		if took := <-done; took != 500*time.Millisecond {
			t.Errorf("took %s", took)
		}
		r.stop()
	})
}

func TestRunEndsWithTheHubOnceAllIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{}, func(e api.Event, attempt int) (int, time.Duration, error) { return 200, 100 * time.Millisecond, nil })
		r.publish(api.EventDraining, api.EventReleased)
		r.hub.Close()
		time.Sleep(time.Second)
		r.expect(t, 2, 0)
		r.stop()
	})
}

func TestRunEndsWithItsContextInMidAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Timeout: "1h", Deadline: "2h"}, func(e api.Event, attempt int) (int, time.Duration, error) { return 200, time.Hour, nil })
		r.publish(api.EventDraining, api.EventReleased)
		synctest.Wait()
		began := time.Now()
		r.stop()
		if time.Since(began) != 0 {
			t.Errorf("took %s", time.Since(began))
		}
		r.expect(t, 0, 1, "draining+0s")
	})
}

func TestReceiverThatFellBehindSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Webhook{Timeout: "1m", Deadline: "2m"}, func(e api.Event, attempt int) (int, time.Duration, error) {
			return 200, 30 * time.Second, nil
		})
		publish(r.hub, 0, 1)
		synctest.Wait()
		publish(r.hub, 1, ringSize+10)
		time.Sleep(3 * time.Minute)
		// The first, and the newest: of the rest nothing is told.
		r.expect(t, 2, ringSize+9)
		if r.logs.Len() != 1 {
			t.Errorf("logged %v", r.logs.All())
		}
		r.stop()
	})
}

func TestWebhookPostsTheEvent(t *testing.T) {
	type call struct {
		method, contentType, token, host, body string
	}
	calls := make(chan call, 1)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		calls <- call{r.Method, r.Header.Get("Content-Type"), r.Header.Get("X-Token"), r.Host, string(body)}
	}))
	defer srv.Close()
	h := NewHub()
	dialled := make(chan string, 1)
	rs, err := New(Config{
		Settings: Settings{Webhooks: []Webhook{{URL: srv.URL, Timeout: "10s", Headers: map[string]string{"X-Token": "t", "host": "app"}}}}, Hub: h,
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			dialled <- address
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	go rs.Run(t.Context())
	deadline := time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)
	h.Publish(api.Event{Type: api.EventDraining, State: "Draining", Cause: "prestop hook", Time: deadline.Add(-time.Minute), Deadline: &deadline})
	got := <-calls
	want := call{"POST", "application/json", "t", "app", `{"id":1,"run":"` + h.run + `","time":"2030-01-02T03:03:05Z","type":"draining","state":"Draining","cause":"prestop hook","deadline":"2030-01-02T03:04:05Z"}`}
	if got != want {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	if addr := <-dialled; addr != srv.Listener.Addr().String() {
		t.Errorf("dialled %s", addr)
	}
}

// script is a shell script as a command.
func script(text string) []string { return []string{"/bin/sh", "-c", text} }

// run tells one command of the events, and waits until it was.
func run(t *testing.T, c Command, events ...api.Event) (*Receivers, *observer.ObservedLogs) {
	t.Helper()
	core, logs := observer.New(zapcore.WarnLevel)
	h := NewHub()
	rs, err := New(Config{Settings: Settings{Commands: []Command{c}}, Hub: h, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		h.Publish(e)
	}
	h.Close()
	if err := rs.Run(t.Context()); err != nil {
		t.Error(err)
	}
	return rs, logs
}

func TestCommandIsToldByEnvironmentAndStandardInput(t *testing.T) {
	t.Setenv("USHER_ETCD_PASSWORD", "hunter2")
	t.Setenv("ETCDCTL_PASSWORD", "hunter2")
	t.Setenv("OTHER", "stays")
	out := filepath.Join(t.TempDir(), "out")
	rs, logs := run(t, Command{Events: []api.EventType{api.EventOffline}, Command: append(script(`{ echo "$USHER_EVENT/$USHER_STATE/$USHER_CAUSE/$OTHER/$1"; cat; env; } >>"$0"`), out, "argument")},
		api.Event{Type: api.EventOnline, State: "Online"},
		api.Event{Type: api.EventOffline, State: "Offline", Cause: "endpoint $HOME not ready"})
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	first, rest, _ := strings.Cut(string(text), "\n")
	if first != "offline/Offline/endpoint $HOME not ready/stays/argument" {
		t.Errorf("told %q", first)
	}
	var e api.Event
	if err := json.NewDecoder(strings.NewReader(rest)).Decode(&e); err != nil || e.ID != 2 || e.Type != api.EventOffline {
		t.Errorf("standard input %+v, %v", e, err)
	}
	if strings.Contains(rest, "hunter2") {
		t.Error("the command sees the agent's secrets")
	}
	if d, f := rs.Commands.Delivered.Load(), rs.Commands.Failed.Load(); d != 1 || f != 0 || logs.Len() > 0 {
		t.Errorf("%d delivered, %d failed, %v", d, f, logs.All())
	}
}

func TestFailedCommandIsLoggedWithItsOutputAndNotRunAgain(t *testing.T) {
	count := filepath.Join(t.TempDir(), "count")
	rs, logs := run(t, Command{Command: append(script(`echo x >>"$0"; echo out; echo err >&2; head -c 100000 /dev/zero | tr '\0' y; exit 3`), count)},
		api.Event{Type: api.EventOnline, State: "Online"})
	text, _ := os.ReadFile(count)
	if string(text) != "x\n" || rs.Commands.Failed.Load() != 1 || rs.Commands.Delivered.Load() != 0 {
		t.Errorf("run %q, %d failed", text, rs.Commands.Failed.Load())
	}
	if logs.Len() != 1 {
		t.Fatalf("logged %v", logs.All())
	}
	if got := fmt.Sprint(logs.All()[0].ContextMap()["error"]); !strings.HasPrefix(got, `exit status 3; output "out\nerr\nyyy`) || !strings.HasSuffix(got, `y..."`) || len(got) > maxOutput+100 {
		t.Errorf("logged %q", got)
	}
}

func TestCommandThatHangsIsKilledWithAllItStarted(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	began := time.Now()
	rs, logs := run(t, Command{Timeout: "300ms", Command: append(script(`trap '' TERM; sleep 300 & echo $! >"$0"; wait`), pids)},
		api.Event{Type: api.EventDraining, State: "Draining"})
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("took %s", took)
	}
	if rs.Commands.Failed.Load() != 1 || logs.Len() != 1 || !strings.Contains(fmt.Sprint(logs.All()[0].ContextMap()["error"]), "killed, still running after 300ms") {
		t.Errorf("%d failed, logged %v", rs.Commands.Failed.Load(), logs.All())
	}
	text, _ := os.ReadFile(pids)
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	until(t, "the child's end", func() bool {
		if syscall.Kill(pid, 0) != nil {
			return true
		}
		stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // dead, and waits for a parent that collects it
		return strings.Contains(string(stat), ") Z ")
	})
}

func TestCommandMayLeaveSomethingRunning(t *testing.T) {
	pids := filepath.Join(t.TempDir(), "pids")
	rs, logs := run(t, Command{Timeout: "1m", Command: append(script(`sleep 300 & echo $! >"$0"`), pids)}, api.Event{Type: api.EventOnline, State: "Online"})
	text, _ := os.ReadFile(pids)
	if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		t.Error(err)
	} else if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("what it left is gone: %v", err)
	}
	if rs.Commands.Delivered.Load() != 1 || logs.Len() != 0 {
		t.Errorf("%d delivered, logged %v", rs.Commands.Delivered.Load(), logs.All())
	}
}

func TestStateFileIsTheNewestEventAndAlwaysWhole(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state.json")
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	h := NewHub()
	rs, err := New(Config{Settings: Settings{StateFile: path}, Hub: h, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	victim := filepath.Join(t.TempDir(), "victim")
	if err := os.WriteFile(victim, []byte("untouched"), 0o600); err != nil {
		t.Fatal(err)
	}
	// What somebody laid where the temporary file will be.
	if err := os.Symlink(victim, filepath.Join(dir, ".state.json.usher")); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- rs.Run(t.Context()) }()
	reading, seen := make(chan bool), make(chan uint64)
	go func() {
		var last uint64
		defer func() { seen <- last }()
		for {
			text, err := os.ReadFile(path)
			var e api.Event
			if err == nil {
				err = json.Unmarshal(text, &e)
			} else if os.IsNotExist(err) && last == 0 {
				err = nil
			}
			if err != nil || e.ID < last {
				t.Errorf("after event %d: %+v, %v in %q", last, e, err, text)
				return
			}
			last = e.ID
			select {
			case <-reading:
				return
			default:
			}
		}
	}()
	publish(h, 0, 500)
	h.Publish(api.Event{Type: api.EventReleased, State: "Stopped"})
	if err := rs.Announced(t.Context()); err != nil {
		t.Error(err)
	}
	close(reading)
	<-seen
	h.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
	var e api.Event
	text, _ := os.ReadFile(path)
	if err := json.Unmarshal(text, &e); err != nil || e.ID != 501 || e.State != "Stopped" || e.Missed {
		t.Errorf("left behind: %+v, %v", e, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o644 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	if text, _ := os.ReadFile(victim); string(text) != "untouched" {
		t.Error("wrote through a link")
	}
}

func TestStateFileIsTriedUntilItIsWrittenOrOvertaken(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "shared")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "state.json")
	core, logs := observer.New(zapcore.DebugLevel)
	h := NewHub()
	rs, err := New(Config{Settings: Settings{StateFile: path}, Hub: h, Logger: zap.New(core)})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	go rs.Run(t.Context())
	publish(h, 0, 1)
	until(t, "a second attempt", func() bool { return logs.FilterMessage("could not be told").Len() > 1 })
	if n := rs.StateFile.Failed.Load(); n != 0 {
		t.Errorf("%d given up, though nothing newer is there", n)
	}
	if n := logs.Filter(func(e observer.LoggedEntry) bool { return e.Level == zapcore.WarnLevel }).Len(); n != 1 {
		t.Errorf("%d warnings of a file that is stale, want one", n)
	}
	publish(h, 1, 1)
	until(t, "the first is given up for the second", func() bool { return rs.StateFile.Failed.Load() == 1 })
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := rs.Announced(t.Context()); err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), `"id": 2`) {
		t.Errorf("%s, %v", text, err)
	}
}

// Each message has to name the field, the value, and what would be right.
func TestBadSettingsAreNamed(t *testing.T) {
	dir := t.TempDir()
	hook := func(change string) string { return `{"webhooks":[{"url":"http://a/"},{` + change + `}]}` }
	for _, tc := range []struct {
		settings string
		want     []string
	}{
		{hook(`"url":""`), []string{"notify.webhooks[1].url", `""`, "http://127.0.0.1:8080"}},
		{hook(`"url":"ftp://u:hunter2@x/"`), []string{"notify.webhooks[1].url", "ftp://u:xxxxx@x/", "http or https"}},
		{hook(`"url":"http://u:hunter2@x:port/"`), []string{"notify.webhooks[1].url", "is no URL", "http://127.0.0.1:8080"}},
		{hook(`"url":"http:///x"`), []string{"notify.webhooks[1].url", "http:///x", "host"}},
		{hook(`"url":"http://a","events":["online","onlin"]`), []string{"notify.webhooks[1].events", `"onlin"`, "online, offline, held"}},
		{hook(`"url":"http://a","timeout":"1"`), []string{"notify.webhooks[1].timeout", `"1"`, "500ms"}},
		{hook(`"url":"http://a","timeout":"-1s"`), []string{"notify.webhooks[1].timeout", `"-1s"`, "above zero"}},
		{hook(`"url":"http://a","timeout":"0s"`), []string{"notify.webhooks[1].timeout", `"0s"`, "above zero"}},
		{hook(`"url":"http://a","timeout":"20s"`), []string{"notify.webhooks[1].deadline", `"10s"`, "20s"}},
		{hook(`"url":"http://a","headers":{"A B":"x"}`), []string{"notify.webhooks[1].headers", `"A B"`, "letters"}},
		{hook(`"url":"http://a","headers":{"A":"hunter2\nB: x"}`), []string{"notify.webhooks[1].headers", "A", "one line"}},
		{hook(`"url":"http://a","headers":{"X-Token":"hunter2","x-token":"b"}`), []string{"notify.webhooks[1].headers", `"x-token"`, "twice"}},
		{hook(`"url":"http://a:65536/"`), []string{"notify.webhooks[1].url", "http://a:65536/", "port from 1 to 65535"}},
		{hook(`"url":"https://a:0/"`), []string{"notify.webhooks[1].url", "https://a:0/", "port from 1 to 65535"}},
		{`{"commands":[{}]}`, []string{"notify.commands[0].command", "[]", "a program"}},
		{`{"commands":[{"command":[""]}]}`, []string{"notify.commands[0].command", "a program"}},
		{`{"commands":[{"command":["a\u0000b"]}]}`, []string{"notify.commands[0].command", "NUL"}},
		{`{"commands":[{"command":["/bin/sh"],"timeout":"x"}]}`, []string{"notify.commands[0].timeout", `"x"`, "2s"}},
		{`{"commands":[{"command":["/bin/sh"],"events":["x"]}]}`, []string{"notify.commands[0].events", `"x"`, "released"}},
		{`{"commands":[{"command":["/no/such"]}]}`, []string{"notify.commands[0].command", "/no/such", "this container"}},
		{`{"commands":[{"command":["no-such-program"]}]}`, []string{"notify.commands[0].command", "no-such-program", "this container"}},
		{`{"stateFile":"state.json"}`, []string{"notify.stateFile", `"state.json"`, "absolute"}},
		{`{"stateFile":"/"}`, []string{"notify.stateFile", `"/"`, "absolute"}},
		{`{"stateFile":"/no/such/state.json"}`, []string{"notify.stateFile", "/no/such", "emptyDir"}},
		{`{"stateFile":"` + dir + `"}`, []string{"notify.stateFile", dir, "something else"}},
		{`{"stateFile":"/proc/state.json"}`, []string{"notify.stateFile", "/proc/state.json", "written"}},
	} {
		var s Settings
		if err := json.Unmarshal([]byte(tc.settings), &s); err != nil {
			t.Fatal(err)
		}
		_, err := New(Config{Settings: s, Hub: NewHub()})
		if err == nil {
			t.Errorf("%s is accepted", tc.settings)
			continue
		}
		for _, w := range tc.want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q doesn't say %q", tc.settings, err, w)
			}
		}
		if strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q tells a secret, or is more than one line", tc.settings, err)
		}
	}
	all := Settings{Webhooks: []Webhook{{}}, Commands: []Command{{}}, StateFile: "x"}
	if err := all.Validate(); strings.Count(err.Error(), "\n") != 2 {
		t.Errorf("%q, want all three", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("left behind: %v", entries)
	}
}
