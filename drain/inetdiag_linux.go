package drain

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Offsets and sizes of the kernel's uapi: linux/inet_diag.h (TCPDIAG_GETSOCK, struct inet_diag_req, inet_diag_msg,
// inet_diag_bc_op, inet_diag_hostcond) and linux/tcp.h (struct tcp_info).
const (
	// The kernel walks its whole table of connections for each request, which is nearly all that a sample of few sockets
	// costs. Requests of this older type get the sockets of both families in one walk; SOCK_DIAG_BY_FAMILY needs two.
	diagGetTCP = 18

	diagRequestSize = 60
	diagMessageSize = 72

	diagAttrInfo    = 2 // INET_DIAG_INFO: struct tcp_info
	diagReqBytecode = 1 // INET_DIAG_REQ_BYTECODE

	diagOpJump   = 1 // INET_DIAG_BC_JMP
	diagOpSource = 7 // INET_DIAG_BC_S_COND, followed by a struct inet_diag_hostcond
	diagOpSize   = 4
	diagCondSize = 8 // without the address

	// tcp_info up to and with tcpi_data_segs_out, which Linux 4.6 added last.
	tcpInfoSize = 160

	// The kernel gives at most that much with one read, less the overhead of a buffer (netlink_recvmsg).
	diagBufferSize = 32 << 10
)

// diagStates is what is asked for. Not LISTEN: a connection in the accept queue is listed as itself, with no inode. Not
// TIME_WAIT: both sides are done.
const diagStates = 1<<stateEstablished | 1<<stateSynRecv | 1<<stateFinWait1 | 1<<stateFinWait2 |
	1<<stateCloseWait | 1<<stateLastAck | 1<<stateClosing

// diagRequest is a request for the TCP sockets, IPv4 and IPv6, that have certain local ports and addresses, in the
// kernel's form.
type diagRequest []byte

// newDiagRequest asks for the sockets whose local port is one of ports and whose local address is one of addrs, or any
// when there are none. An IPv4 address stands for its IPv4-mapped form too.
//
// The kernel runs a program on each socket: here a list of alternatives, "if the local end is this, go to the end; if it
// isn't, to the next". The end accepts; past the end, as in the last alternative's else, rejects.
func newDiagRequest(ports []uint16, addrs []netip.Addr) (diagRequest, error) {
	if len(addrs) == 0 {
		addrs = []netip.Addr{{}}
	}
	var program []byte
	var ends []int // positions after each jump to the end
	for _, port := range ports {
		for _, a := range addrs {
			family, ip := byte(unix.AF_UNSPEC), a.Unmap().AsSlice()
			switch len(ip) {
			case 4:
				family = unix.AF_INET
			case 16:
				family = unix.AF_INET6
			}
			size := diagOpSize + diagCondSize + len(ip)
			op := binary.NativeEndian.AppendUint16([]byte{diagOpSource, byte(size)}, uint16(size+diagOpSize))
			op = append(op, family, byte(8*len(ip)), 0, 0)
			op = binary.NativeEndian.AppendUint32(op, uint32(port))
			program = append(append(program, op...), ip...)
			ends = append(ends, len(program)+diagOpSize)
			program = append(program, diagOpJump, diagOpSize, 0, 0)
		}
	}
	// The attribute's length and the jumps have 16 bits. A jump to the end is still to be filled in: the last one is of no
	// use, since the end is next, and without it the "else" of the last alternative goes past the end, as it should.
	program = program[:len(program)-diagOpSize]
	if len(program) > 1<<16-1-2*diagOpSize {
		return nil, fmt.Errorf("%d ports at %d addresses are more than the kernel's filter can hold", len(ports), len(addrs))
	}
	for _, end := range ends[:len(ends)-1] {
		binary.NativeEndian.PutUint16(program[end-2:], uint16(len(program)-(end-diagOpSize)))
	}

	size := unix.SizeofNlMsghdr + diagRequestSize + unix.SizeofRtAttr + len(program)
	b := make([]byte, 0, size)
	b = binary.NativeEndian.AppendUint32(b, uint32(size))
	b = binary.NativeEndian.AppendUint16(b, diagGetTCP)
	b = binary.NativeEndian.AppendUint16(b, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	b = b[:unix.SizeofNlMsghdr+diagRequestSize]
	req := b[unix.SizeofNlMsghdr:]
	req[3] = 1 << (diagAttrInfo - 1)
	binary.NativeEndian.PutUint32(req[52:], diagStates)
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(program)))
	b = binary.NativeEndian.AppendUint16(b, diagReqBytecode)
	return append(b, program...), nil
}

// dump calls f for every socket that is asked for, reading into buf, which should have diagBufferSize. The socket that f
// is given is valid during the call only. The kernel does the work inside of the calls that send and read, so there is
// never anything to wait for; timeout is for a kernel that doesn't answer.
func (r diagRequest) dump(ctx context.Context, buf []byte, timeout time.Duration, f func(*socket)) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("opening an inet_diag socket: %w", os.NewSyscallError("socket", err))
	}
	defer unix.Close(fd)
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("setting the time limit of an inet_diag socket: %w", os.NewSyscallError("setsockopt", err))
	}
	// Connected to the kernel, it takes messages from nobody else.
	if err := unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("connecting an inet_diag socket: %w", os.NewSyscallError("connect", err))
	}
	if _, err := unix.Write(fd, r); err != nil {
		return fmt.Errorf("asking inet_diag for TCP sockets: %w", os.NewSyscallError("write", err))
	}
	var s socket
	for {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("listing TCP sockets through inet_diag: %w", context.Cause(ctx))
		}
		n, err := unix.Read(fd, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("listing TCP sockets through inet_diag: %w", os.NewSyscallError("read", err))
		}
		if done, err := parseDump(buf[:n], &s, f); err != nil || done {
			return err
		}
	}
}

// parseDump takes what one read gave. An interrupted dump (NLM_F_DUMP_INTR) may have missed a socket that opened or
// closed meanwhile; the next sample sees it.
func parseDump(b []byte, s *socket, f func(*socket)) (done bool, err error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return true, fmt.Errorf("netlink message has %d bytes, needs %d", len(b), unix.SizeofNlMsghdr)
		}
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return true, fmt.Errorf("netlink message has length %d in %d bytes", size, len(b))
		}
		msg := b[unix.SizeofNlMsghdr:size]
		switch kind := binary.NativeEndian.Uint16(b[4:]); kind {
		case unix.NLMSG_DONE, unix.NLMSG_ERROR:
			if len(msg) >= 4 {
				if errno := int32(binary.NativeEndian.Uint32(msg)); errno < 0 {
					return true, fmt.Errorf("listing TCP sockets through inet_diag: %w", unix.Errno(-errno))
				}
			}
			return true, nil
		case diagGetTCP:
			if err := s.parse(msg); err != nil {
				return true, err
			}
			f(s)
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false, nil
}

func (s *socket) parse(msg []byte) error {
	if len(msg) < diagMessageSize {
		return fmt.Errorf("inet_diag message has %d bytes, needs %d", len(msg), diagMessageSize)
	}
	u32, u64 := binary.NativeEndian.Uint32, binary.NativeEndian.Uint64
	*s = socket{
		state:    msg[1],
		port:     binary.BigEndian.Uint16(msg[4:]),
		cookie:   u64(msg[44:]),
		unread:   u32(msg[56:]),
		unsent:   u32(msg[60:]),
		accepted: u32(msg[68:]) != 0,
	}
	peer := netip.AddrFrom16([16]byte(msg[24:40])).Unmap()
	if msg[0] == unix.AF_INET {
		peer = netip.AddrFrom4([4]byte(msg[24:28]))
	}
	s.peer = netip.AddrPortFrom(peer, binary.BigEndian.Uint16(msg[6:]))
	for attrs := msg[diagMessageSize:]; len(attrs) >= 4; {
		size := int(binary.NativeEndian.Uint16(attrs))
		if size < 4 || size > len(attrs) {
			return fmt.Errorf("inet_diag attribute has length %d in %d bytes", size, len(attrs))
		}
		if kind := binary.NativeEndian.Uint16(attrs[2:]); kind == diagAttrInfo {
			b := attrs[4:size]
			if len(b) < tcpInfoSize {
				return fmt.Errorf("the kernel's tcp_info has %d bytes, needs %d (Linux 4.6 or newer)", len(b), tcpInfoSize)
			}
			s.info = true
			s.inNetwork = u32(b[24:]) // tcpi_unacked
			s.sentAge = age(u32(b[44:]))
			s.receivedAge = age(u32(b[52:]))
			s.ackAge = age(u32(b[56:]))
			s.retransmits = u32(b[100:])
			s.received = u64(b[128:])
			s.segsIn = u32(b[152:])
			s.segsOut = u32(b[156:])
			s.acksOut = u32(b[136:]) - s.segsOut // tcpi_segs_out counts all
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return nil
}

func age(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }

// plain are addrs without zone and not IPv4-mapped, each once, as the sockets' are compared with.
func plain(addrs []netip.Addr) []netip.Addr {
	out := make([]netip.Addr, 0, len(addrs))
	for _, a := range addrs {
		if a = a.Unmap().WithZone(""); !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	return out
}
