package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"usher.dev/usher/internal/api"
	"usher.dev/usher/lifecycle"
)

const stranger = "127.0.0.2"

func readAnswer(t *testing.T, c net.Conn) (int, string) {
	t.Helper()
	c.SetReadDeadline(time.Now().Add(patience))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

// inUse is what goroutines and what they hold take now.
func inUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// An agent has 64 MiB in the example, of which it takes 25: strangers' connections must not add as much as there is left.
const floodMemory = 20 << 20

// 10,000 calls of a stranger, none of which waits for its answer, while the kubelet makes its one.
func TestFloodTakesLittleMemoryAndDoesNotKeepTheKubeletOut(t *testing.T) {
	core, logs := observer.New(zap.WarnLevel)
	a, err := listening(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.log = zap.New(core)
	hook := a.servers[0].listener.Addr().String()
	before, goroutines := inUse(), runtime.NumGoroutine()

	var open []net.Conn
	var peak uint64
	var most int
	for wave := range 10 {
		for i := range 1000 {
			c := from(t, stranger, hook)
			if i%10 == 9 { // some are slow with their headers
				fmt.Fprint(c, "GET /prestop HTTP/1.1\r\nHost: ")
			} else {
				fmt.Fprint(c, hookCall(""))
			}
			open = append(open, c)
		}
		most = max(most, runtime.NumGoroutine()-goroutines)
		if wave%3 == 0 {
			peak = max(peak, inUse()-before)
		}
		if wave == 5 {
			c := from(t, kubelet, hook)
			asked := time.Now()
			fmt.Fprint(c, hookCall(api.TokenHeader+": "+token+"\r\n"))
			code, body := readAnswer(t, c)
			if took := time.Since(asked); code != http.StatusOK || took > 10*time.Second { // the drain takes 2 s
				t.Errorf("the kubelet's call: %d %s after %v", code, body, took)
			}
		}
		if wave < 9 {
			for _, c := range open {
				c.Close()
			}
			open = open[:0]
		}
	}
	t.Logf("%d KiB and %d goroutines at the most", peak>>10, most)
	if peak > floodMemory {
		t.Errorf("%d MiB in use during the flood, want at most %d", peak>>20, floodMemory>>20)
	}
	for _, c := range open {
		c.Close()
	}
	poll(t, "goroutines are as before", func() bool { return runtime.NumGoroutine() <= goroutines+2 })
	if n := logs.FilterMessage("hook call refused").Len(); n > 5 {
		t.Errorf("%d lines for %d refusals, want one in 10 s", n, a.hook.refused.Load())
	}
}

// The kubelet's calls, those that wait and those that come, outlast a flood of another address.
func TestFloodDisplacesItselfAlone(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	limited := limitCallers(ln, 4)
	accepted := make(chan net.Conn)
	go func() {
		for {
			c, err := limited.Accept()
			if err != nil {
				close(accepted)
				return
			}
			accepted <- c
		}
	}()
	dial := func(own string) net.Conn { return from(t, own, ln.Addr().String()) }
	cut := func(c net.Conn) bool { // as the caller sees it
		c.SetReadDeadline(time.Now().Add(patience))
		_, err := c.Read(make([]byte, 1))
		return errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)
	}

	dial(kubelet)
	waiting := <-accepted
	var flood []net.Conn
	for range 3 {
		flood = append(flood, dial(stranger))
		defer (<-accepted).Close()
	}
	for range 100 {
		if !cut(dial(stranger)) {
			t.Fatal("a stranger's connection beyond the limit stays")
		}
	}
	second := dial(kubelet)
	coming := <-accepted
	if !cut(flood[2]) {
		t.Error("a stranger's connection stays where the kubelet's needs its place")
	}
	for _, c := range []net.Conn{waiting, coming} {
		if _, err := fmt.Fprint(c, "x"); err != nil {
			t.Errorf("the kubelet's connection: %v", err)
		}
	}
	if _, err := second.Read(make([]byte, 1)); err != nil {
		t.Errorf("the kubelet's connection: %v", err)
	}
	waiting.Close()
	waiting.Close() // the server may
	coming.Close()
	dial(stranger)
	dial(stranger)
	for range 2 {
		defer (<-accepted).Close() // there is room again, and for these two alone
	}
	if !cut(dial(stranger)) {
		t.Error("a connection that was closed twice makes room twice")
	}
}

// While the Pod ends, whoever calls waits for the verdict: harmless, but not for free.
func TestFloodWhileThePodEndsIsFewLogLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		a := newTestAgent(t, zap.New(core))
		a.seen(lifecycle.Pod{Terminating: true, Deadline: time.Now().Add(30 * time.Second)})
		var wg sync.WaitGroup
		for range 2000 {
			wg.Go(func() { call(a, false, http.MethodGet) })
		}
		wg.Wait()
		if n := logs.Len(); n > 50 || a.hook.accepted.Load() != 2000 {
			t.Errorf("%d lines for %d calls", n, a.hook.accepted.Load())
		}
	})
}

func TestSlowCallersAreCutOff(t *testing.T) {
	a, err := listening(t, nil)
	if err != nil {
		t.Fatal(err)
	}
	hook := a.servers[0].listener.Addr().String()
	goroutines := runtime.NumGoroutine()

	half := from(t, stranger, hook)
	fmt.Fprint(half, "GET /prestop HTTP/1.1\r\nHost: pod\r\nX-")
	body := from(t, stranger, hook) // announces a body that doesn't come
	fmt.Fprint(body, "POST /prestop HTTP/1.1\r\nHost: pod\r\nContent-Length: 100\r\n\r\n")
	reader := from(t, stranger, hook) // asks again and again, and never reads
	reader.(*net.TCPConn).SetReadBuffer(4096)
	reader.SetWriteDeadline(time.Now().Add(2 * time.Second))
	for {
		if _, err := fmt.Fprint(reader, "GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n"); err != nil {
			break // the agent has stopped reading, since nobody takes what it writes
		}
	}
	c := from(t, kubelet, hook)
	fmt.Fprint(c, hookCall(api.TokenHeader+": "+token+"\r\n"))
	if code, body := readAnswer(t, c); code != http.StatusOK {
		t.Errorf("the kubelet's call: %d %s", code, body)
	}
	c.Close()
	poll(t, "their goroutines are gone", func() bool { return runtime.NumGoroutine() <= goroutines })
}
