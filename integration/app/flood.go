package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"usher.dev/usher/integration/app/wire"
	"usher.dev/usher/internal/api"
)

const (
	floodCallers = 200
	// floodPace is the shortest time from one call of a caller to its next: 2,000 calls a second leave a machine of two
	// cores some of its time.
	floodPace = 100 * time.Millisecond
	floodSlow = 12 // connections of each slow kind
	// floodAtMost ends a flood that nobody ends.
	floodAtMost = time.Minute
)

// flood calls a hook from many connections until ctx ends, while others are slow in all ways that HTTP knows. It writes what
// became of the first cfg.floodCalls calls, and in the end of the rest: a line of JSON each.
func flood(ctx context.Context, cfg config, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, floodAtMost)
	defer cancel()
	var mu sync.Mutex
	var first, rest wire.Flooded
	var begun, slow int64
	call := func() error {
		mu.Lock()
		begun++
		n := begun
		mu.Unlock()
		token := ""
		if n%2 == 0 {
			token = api.TokenHeader + ": a-guess\r\n"
		}
		code := callHook(ctx, cfg.flood, token)
		if code == 0 && ctx.Err() != nil {
			return nil // cut by this end
		}
		mu.Lock()
		defer mu.Unlock()
		of := &rest
		if n <= int64(cfg.floodCalls) {
			of = &first
		}
		of.Calls++
		switch code {
		case http.StatusForbidden:
			of.Refused++
		case 0:
			of.Cut++
		default:
			of.Taken++
		}
		if of == &first && of.Calls == int64(cfg.floodCalls) {
			of.Slow = slow
			return json.NewEncoder(out).Encode(of)
		}
		return nil
	}
	failed := make(chan error, floodCallers)
	var wg sync.WaitGroup
	for range floodCallers {
		wg.Go(func() {
			for ctx.Err() == nil {
				next := time.Now().Add(floodPace)
				if err := call(); err != nil {
					failed <- err
					cancel()
				}
				_ = pause(ctx, time.Until(next)) // if it is cut short, so is the loop
			}
		})
	}
	for _, say := range []func(context.Context, net.Conn){halfHeader, halfBody, neverRead} {
		for range floodSlow {
			wg.Go(func() {
				for ctx.Err() == nil {
					converse(ctx, cfg.flood, func(c net.Conn) {
						mu.Lock()
						slow++
						mu.Unlock()
						say(ctx, c)
					})
					_ = pause(ctx, floodPace)
				}
			})
		}
	}
	wg.Wait()
	rest.Slow = slow
	select {
	case err := <-failed:
		return err
	default:
		return json.NewEncoder(out).Encode(rest)
	}
}

// converse is one connection, which ends with ctx.
func converse(ctx context.Context, addr string, say func(net.Conn)) {
	c, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	say(c)
}

// callHook returns the status of the answer, 0 for none.
func callHook(ctx context.Context, addr, header string) (code int) {
	converse(ctx, addr, func(c net.Conn) {
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n%s\r\n", api.PrestopPath, header)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			return
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err == nil {
			code = resp.StatusCode
		}
	})
	return code
}

// halfHeader never comes to the end of its header.
func halfHeader(ctx context.Context, c net.Conn) {
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: pod\r\nX-Slow: ", api.PrestopPath)
	drip(ctx, c)
}

// halfBody announces a body that takes hours.
func halfBody(ctx context.Context, c net.Conn) {
	fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: pod\r\nContent-Length: 10000\r\n\r\n", api.PrestopPath)
	drip(ctx, c)
}

// drip sends a byte a second until the other side has enough of it.
func drip(ctx context.Context, c net.Conn) {
	for pause(ctx, time.Second) == nil {
		if _, err := c.Write([]byte("x")); err != nil {
			return
		}
	}
}

// neverRead asks for much, and takes none of it.
func neverRead(_ context.Context, c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetReadBuffer(4096) // else the kernel takes more of it
	}
	for {
		if _, err := fmt.Fprint(c, "GET /metrics HTTP/1.1\r\nHost: pod\r\n\r\n"); err != nil {
			return
		}
	}
}
