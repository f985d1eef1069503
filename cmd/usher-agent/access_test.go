package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

const patience = 20 * time.Second

func poll(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for: %s", what)
		}
	}
}

// from dials the address from that one of the own addresses, all of 127.0.0.0/8: callers of other pods have others.
func from(t *testing.T, own, address string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(own)}, Timeout: patience}
	c, err := d.DialContext(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

const kubelet = "127.0.0.3"

// hookCall is what the kubelet sends, and what anybody can send.
func hookCall(header string) string {
	return "GET " + api.PrestopPath + " HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-lifecycle/1.36\r\n" + header + "\r\n"
}

func TestJoinedCallsGetTheSameVerdict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newTestAgent(t, zap.NewNop())
		answers := make([]string, 100)
		var wg sync.WaitGroup
		for i := range answers {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 30 * time.Millisecond) // at once, later, and after the release
				answers[i] = call(a, true, http.MethodGet).Body.String()
			})
		}
		wg.Wait()
		var v api.Verdict
		if err := json.Unmarshal([]byte(answers[0]), &v); err != nil || v.Outcome != api.Drained {
			t.Fatalf("%s, %v", answers[0], err)
		}
		for i, s := range answers {
			if s != answers[0] {
				t.Errorf("call %d got %s, the first one %s", i, s, answers[0])
			}
		}
	})
}

func TestCallerThatGoesAwayDoesNotEndTheDrain(t *testing.T) {
	a, err := listening(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	hook := a.servers[0].listener.Addr().String()
	c := from(t, kubelet, hook)
	fmt.Fprint(c, hookCall(api.TokenHeader+": "+token+"\r\n"))
	poll(t, "draining", func() bool { return a.machine.Status().State == lifecycle.Draining })
	c.Close()

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	v, err := a.machine.Stop(ctx, lifecycle.CauseHook)
	if err != nil || v.Outcome != lifecycle.Drained || v.Total() < time.Second {
		t.Errorf("%+v, %v: want the drain to its end", v, err)
	}
	if trail := fmt.Sprint(a.machine.Status().Trail); strings.Count(trail, "Online Draining") != 1 {
		t.Errorf("trail %s: want one shutdown", trail)
	}
}
