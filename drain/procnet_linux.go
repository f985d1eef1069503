package drain

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"time"
)

// DefaultProcNetDir has the kernel's tables of this process's network namespace.
const DefaultProcNetDir = "/proc/net"

// ProcNetConfig configures a ProcNet. Ports, Addresses and Own mean the same as in SockdiagConfig.
type ProcNetConfig struct {
	Ports     []Port
	Addresses []netip.Addr
	Own       *Own
	// Dir has the files tcp and tcp6; default /proc/net.
	Dir string
}

// ProcNet counts the open connections to the application's ports, for where the kernel refuses netlink to Sockdiag. It
// reads /proc/net/tcp and tcp6, which don't tell who sent last. So every connection counts until it is closed: as owed
// while there are unread bytes, or an answer that has not been delivered, and as unsure else. A client that keeps its idle
// connections open holds a drain to its deadline: nothing is lost, but time is.
//
// It is safe for concurrent use.
type ProcNet struct {
	dir string
	own *Own

	mu        sync.Mutex
	ports     map[uint16]Port
	addresses []netip.Addr
	cost      time.Duration
}

// NewProcNet checks cfg and that the tables can be read.
func NewProcNet(cfg ProcNetConfig) (*ProcNet, error) {
	if cfg.Dir == "" {
		cfg.Dir = DefaultProcNetDir
	}
	p := &ProcNet{dir: cfg.Dir, own: cfg.Own}
	if err := errors.Join(p.SetPorts(cfg.Ports), p.SetAddresses(cfg.Addresses)); err != nil {
		return nil, err
	}
	if err := p.walk(func(*procSocket) {}); err != nil {
		return nil, err
	}
	return p, nil
}

// Name is "connections", for that is what it counts.
func (p *ProcNet) Name() string { return "connections" }

// SetPorts replaces the ports that are watched. What they speak makes no difference.
func (p *ProcNet) SetPorts(ports []Port) error {
	byNumber, err := portsByNumber(ports)
	if err != nil {
		return fmt.Errorf("connections: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ports = byNumber
	return nil
}

// SetAddresses replaces the pod's addresses; see SockdiagConfig.Addresses.
func (p *ProcNet) SetAddresses(addrs []netip.Addr) error {
	if err := checkAddresses("address", addrs); err != nil {
		return fmt.Errorf("connections: %w", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.addresses = plain(addrs)
	return nil
}

// Pause is how long to leave the kernel alone after the last sample, for samples to take at most 3.3 % of a core.
func (p *ProcNet) Pause() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.cost * (drainShare - 1)
}

// Sample counts the connections.
func (p *ProcNet) Sample(context.Context) (Sample, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ports) == 0 {
		return Sample{}, ErrNoPorts
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadTime()
	defer func() { p.cost = threadTime() - began }()
	var result Sample
	err := p.walk(func(s *procSocket) {
		if _, ok := p.ports[s.local.Port()]; !ok ||
			len(p.addresses) > 0 && !slices.Contains(p.addresses, s.local.Addr()) || p.own.has(s.peer) {
			return
		}
		switch s.state {
		case stateEstablished, stateCloseWait, stateSynRecv:
			result.Connections++
			result.InFlight++
			// A FIN counts as one unread byte.
			if unread := s.unread; s.unsent == 0 && (unread == 0 || s.state == stateCloseWait && unread == 1) {
				result.Unsure++
			}
		case stateFinWait1, stateClosing, stateLastAck:
			// Closed by the application: what is left is to deliver the answer, and then its FIN.
			if s.unsent > 1 {
				result.InFlight++
			}
		}
	})
	if err != nil {
		return Sample{}, err
	}
	return result, nil
}

// procSocket is one line of a table. The addresses are never IPv4-mapped.
type procSocket struct {
	local, peer    netip.AddrPort
	state          uint8
	unsent, unread uint32
}

// walk calls f for every socket of both tables. There is no tcp6 where IPv6 is off.
func (p *ProcNet) walk(f func(*procSocket)) error {
	for _, name := range []string{"tcp", "tcp6"} {
		err := walkTable(filepath.Join(p.dir, name), f)
		if err != nil && (name == "tcp" || !errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("connections: %w", err)
		}
	}
	return nil
}

func walkTable(path string, f func(*procSocket)) error {
	file, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("reading the kernel's connections: %w", err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan() // the header
	var s procSocket
	for lines.Scan() {
		if err := s.parse(lines.Bytes()); err != nil {
			return fmt.Errorf("reading %s: %w", path, err)
		}
		f(&s)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading the kernel's connections: %w", err)
	}
	return nil
}

// parse takes a line as proc(5) describes it: "0: LOCAL PEER STATE UNSENT:UNREAD ...", all hexadecimal.
func (s *procSocket) parse(line []byte) error {
	var field [5][]byte
	i := 0
	for f := range bytes.FieldsSeq(line) {
		if field[i] = f; i == len(field)-1 {
			break
		}
		i++
	}
	var err [4]error
	s.local, err[0] = parseProcAddr(field[1])
	s.peer, err[1] = parseProcAddr(field[2])
	state, serr := strconv.ParseUint(string(field[3]), 16, 8)
	s.state, err[2] = uint8(state), serr
	unsent, unread, _ := bytes.Cut(field[4], []byte(":"))
	for _, q := range []struct {
		to   *uint32
		from []byte
	}{{&s.unsent, unsent}, {&s.unread, unread}} {
		n, perr := strconv.ParseUint(string(q.from), 16, 32)
		*q.to, err[3] = uint32(n), errors.Join(err[3], perr)
	}
	if e := errors.Join(err[:]...); e != nil {
		return fmt.Errorf("line %q is not of a socket: %w", line, e)
	}
	return nil
}

// parseProcAddr takes an address, words of 32 bits in the machine's byte order, and a port: "0100007F:1F90".
func parseProcAddr(text []byte) (netip.AddrPort, error) {
	addr, port, _ := bytes.Cut(text, []byte(":"))
	n, err := strconv.ParseUint(string(port), 16, 16)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var b [16]byte
	if len(addr) != 8 && len(addr) != 32 {
		return netip.AddrPort{}, fmt.Errorf("address %q has %d digits, must have 8 or 32", addr, len(addr))
	}
	if _, err := hex.Decode(b[:], addr); err != nil {
		return netip.AddrPort{}, err
	}
	ip := b[:len(addr)/2]
	for word := range slices.Chunk(ip, 4) {
		binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
	}
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), uint16(n)), nil
}
