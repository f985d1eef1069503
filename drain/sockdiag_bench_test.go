package drain

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
)

// BenchmarkSockdiagSample: the kernel walks its whole table of connections, so there is a fixed cost,
// and one for each socket.
func BenchmarkSockdiagSample(b *testing.B) {
	for _, n := range []int{1, 100, 1000, 9000} {
		b.Run(fmt.Sprintf("sockets=%d", n), func(b *testing.B) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				b.Fatal(err)
			}
			defer l.Close()
			for range n {
				c, err := net.Dial("tcp", l.Addr().String())
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				s, err := l.Accept()
				if err != nil {
					b.Fatal(err)
				}
				defer s.Close()
				if _, err := c.Write([]byte("ping")); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(s, make([]byte, 4)); err != nil {
					b.Fatal(err)
				}
			}
			src, err := NewSockdiag(SockdiagConfig{Ports: []Port{{Number: portOf(l.Addr())}}})
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				got, err := src.Sample(context.Background())
				if err != nil {
					b.Fatal(err)
				}
				if got.InFlight != n || got.Connections != n {
					b.Fatalf("%d in flight on %d connections, want %d on %d", got.InFlight, got.Connections, n, n)
				}
			}
		})
	}
}

func portOf(a net.Addr) uint16 { return uint16(a.(*net.TCPAddr).Port) }
