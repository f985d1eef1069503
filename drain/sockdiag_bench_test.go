package drain

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkSockdiagSample: the kernel walks its whole table of connections, so there is a fixed cost, and one for each
// socket. "kernel" is the same without Usher's part: the messages are read and thrown away.
func BenchmarkSockdiagSample(b *testing.B) {
	for _, n := range []int{2, 100, 1000, 10000} {
		ports := openSockets(b, n)
		b.Run(fmt.Sprintf("kernel/sockets=%d", n), func(b *testing.B) {
			req, err := newDiagRequest([]uint16{ports[0].Number, ports[1].Number}, nil)
			if err != nil {
				b.Fatal(err)
			}
			buf := make([]byte, diagBufferSize)
			b.ReportAllocs()
			for b.Loop() {
				got := 0
				if err := req.dump(context.Background(), buf, DefaultSampleTimeout, func(*socket) { got++ }); err != nil || got != n {
					b.Fatalf("%d sockets, %v; want %d", got, err, n)
				}
			}
		})
		b.Run(fmt.Sprintf("sample/sockets=%d", n), func(b *testing.B) {
			src, err := NewSockdiag(SockdiagConfig{Ports: ports})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				got, err := src.Sample(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				if got.Connections != n {
					b.Fatalf("%d connections, want %d", got.Connections, n)
				}
			}
		})
	}
}

// openSockets opens n sockets and returns the ports that they have. Both ends count, which spares half of the file
// descriptors: the clients share one port, each at a loopback address of its own.
func openSockets(b *testing.B, n int) []Port {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	free.Close()
	clients := portOf(free.Addr())
	for i := range n / 2 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(i>>8), byte(i)), Port: int(clients)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			// Reset, not closed: a TIME_WAIT would stay in the kernel's table and cost the next benchmark's walk.
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
			s.Close()
		})
		if _, err := c.Write([]byte("ping")); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(s, make([]byte, 4)); err != nil {
			b.Fatal(err)
		}
	}
	return []Port{{Number: portOf(l.Addr())}, {Number: clients}}
}

func portOf(a net.Addr) uint16 { return uint16(a.(*net.TCPAddr).Port) }
