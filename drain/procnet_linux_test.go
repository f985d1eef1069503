package drain

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func newProcNet(t *testing.T, cfg ProcNetConfig) *ProcNet {
	t.Helper()
	p, err := NewProcNet(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// stacks are the ways to listen, and the addresses to reach each by.
var stacks = []struct {
	name, listen string
	dial         []string
}{
	{"IPv4", "127.0.0.1:0", []string{"127.0.0.1"}},
	{"IPv6", "[::1]:0", []string{"::1"}},
	{"dual stack", "[::]:0", []string{"127.0.0.1", "::1"}},
}

func TestProcNetCountsConnectionsUntilTheyClose(t *testing.T) {
	for _, tc := range stacks {
		t.Run(tc.name, func(t *testing.T) {
			l, err := net.Listen("tcp", tc.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			port := portOf(l.Addr())
			p := newProcNet(t, ProcNetConfig{Ports: []Port{{Number: port}}})
			for _, host := range tc.dial {
				see := func(what string, want Sample) {
					t.Helper()
					eventually(t, fmt.Sprintf("%s: %+v", what, want), func() bool { return takeFrom(t, p) == want })
				}
				c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				s := accept(t, l)
				see("an idle connection", Sample{InFlight: 1, Unsure: 1, Connections: 1})
				fmt.Fprint(c, "ask")
				see("an unread request", Sample{InFlight: 1, Connections: 1})
				io.ReadFull(s, make([]byte, 3))
				see("a request that was read", Sample{InFlight: 1, Unsure: 1, Connections: 1})
				c.(*net.TCPConn).CloseWrite()
				see("a half-closed client", Sample{InFlight: 1, Unsure: 1, Connections: 1})
				// More than the client's buffers take, which are small to start with.
				sent := make(chan error, 1)
				go func() {
					_, err := s.Write(make([]byte, 16<<20))
					sent <- err
				}()
				see("an answer that was not delivered", Sample{InFlight: 1, Connections: 1})
				if _, err := io.CopyN(io.Discard, c, 16<<20); err != nil {
					t.Fatal(err)
				}
				if err := <-sent; err != nil {
					t.Fatal(err)
				}
				see("a delivered answer", Sample{InFlight: 1, Unsure: 1, Connections: 1})
				s.Close()
				see("a closed connection", Sample{})
			}
		})
	}
}

func TestProcNetCountsOnlyItsAddressesAndNotItsOwn(t *testing.T) {
	var own Own
	l, err := net.Listen("tcp", "[::]:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := portOf(l.Addr())
	p := newProcNet(t, ProcNetConfig{Ports: []Port{{Number: port}}, Own: &own})
	for _, host := range []string{"127.0.0.1", "127.0.0.2", "::1"} {
		c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		accept(t, l)
	}
	var d net.Dialer
	c, err := own.Dial(d.DialContext)(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, tc := range []struct {
		addrs []netip.Addr
		want  int
	}{
		{nil, 3},
		{[]netip.Addr{netip.MustParseAddr("127.0.0.1")}, 1},
		{[]netip.Addr{netip.MustParseAddr("::ffff:127.0.0.1"), netip.MustParseAddr("::1")}, 2},
		{[]netip.Addr{netip.MustParseAddr("::2")}, 0},
	} {
		if err := p.SetAddresses(tc.addrs); err != nil {
			t.Fatal(err)
		}
		if got := takeFrom(t, p); got.Connections != tc.want {
			t.Errorf("at %v: %+v, want %d", tc.addrs, got, tc.want)
		}
	}
}

func TestProcNetWithoutPortsOrTablesIsUnknown(t *testing.T) {
	if _, err := newProcNet(t, ProcNetConfig{}).Sample(t.Context()); !errors.Is(err, ErrNoPorts) {
		t.Errorf("without ports: %v, want ErrNoPorts", err)
	}
	dir := t.TempDir()
	if _, err := NewProcNet(ProcNetConfig{Dir: dir}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a table: %v, want that it is missing", err)
	}
	const header = "  sl  local_address rem_address   st tx_queue rx_queue\n"
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "tcp"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(header)
	if _, err := NewProcNet(ProcNetConfig{Dir: dir}); err != nil {
		t.Errorf("without IPv6: %v, want no error", err)
	}
	for _, line := range []string{
		"0: 0100007F:1F90 0100007F:D431 01", "0: 0100007F 0100007F:D431 01 00000000:00000000", "junk", "0: 01007F:1F90 0100007F:D431 01 00000000:00000000",
		"0: 0100007F:1F90 0100007F:D431 XX 00000000:00000000",
	} {
		write(header + line + "\n")
		if _, err := NewProcNet(ProcNetConfig{Dir: dir}); err == nil || !strings.Contains(err.Error(), "is not of a socket") {
			t.Errorf("line %q: %v, want that it is not of a socket", line, err)
		}
	}
	if _, err := NewProcNet(ProcNetConfig{Addresses: []netip.Addr{{}}}); err == nil || !strings.Contains(err.Error(), "address is invalid IP, must be") {
		t.Errorf("no address: %v", err)
	}
}
