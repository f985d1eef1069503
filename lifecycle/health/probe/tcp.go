package probe

import (
	"context"
	"net"
	"strconv"
	"syscall"
	"time"
)

// dialer lets a closed connection linger for 1 s instead of the 60 s of TIME-WAIT, so that frequent probes use up no ports
// (probe/dialer_others.go: ProbeDialer, kubernetes#89898).
func dialer() *net.Dialer {
	// A connection this short needs no keep-alive, which would cost four system calls.
	return &net.Dialer{KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			// A socket that can't is closed the usual way.
			_ = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1, Linger: 1})
		})
	}}
}

// tcpHandler is probe/tcp/tcp.go.
type tcpHandler struct {
	host    string
	port    func() (int, error)
	timeout time.Duration
	dial    Dial
}

func (h *tcpHandler) probe(ctx context.Context) (verdict, string, error) {
	port, err := h.port()
	if err != nil {
		return unknown, "", err
	}
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	conn, err := h.dial(ctx, "tcp", net.JoinHostPort(h.host, strconv.Itoa(port)))
	if err != nil {
		return failure, err.Error(), nil
	}
	_ = conn.Close() // it was opened: that is the answer
	return success, "", nil
}
