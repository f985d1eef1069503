package drain

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Offsets and sizes of the kernel's uapi: linux/inet_diag.h (TCPDIAG_GETSOCK, struct inet_diag_req, inet_diag_msg, inet_diag_bc_op) and
// linux/tcp.h (struct tcp_info).
const (
	// The kernel walks its whole table of connections for each request, which is nearly all that a sample costs. Requests
	// of this older type get the sockets of both families in one walk; SOCK_DIAG_BY_FAMILY needs two.
	diagGetTCP = 18

	diagRequestSize = 60
	diagMessageSize = 72

	diagAttrInfo     = 2 // INET_DIAG_INFO: struct tcp_info
	diagReqBytecode  = 1 // INET_DIAG_REQ_BYTECODE
	diagOpSourceGE   = 2 // INET_DIAG_BC_S_GE
	diagOpSourceLE   = 3 // INET_DIAG_BC_S_LE
	diagOpPairLength = 16

	// tcp_info up to and with tcpi_data_segs_out, which Linux 4.6 added last.
	tcpInfoSize = 160
)

// diagStates is what is asked for. Not LISTEN: a connection in the accept queue is listed as itself, with no inode. Not
// TIME_WAIT: both sides are done.
const diagStates = 1<<stateEstablished | 1<<stateSynRecv | 1<<stateFinWait1 | 1<<stateFinWait2 |
	1<<stateCloseWait | 1<<stateLastAck | 1<<stateClosing

// diagRequest is one inet_diag dump of the TCP sockets, IPv4 and IPv6, whose local port is in a range.
type diagRequest struct {
	lowest  uint16
	highest uint16
}

func (r diagRequest) Len() int { return diagRequestSize + 4 + diagOpPairLength }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[3] = 1 << (diagAttrInfo - 1)
	binary.NativeEndian.PutUint32(b[52:], diagStates)
	// The kernel compares ports with two conditional jumps, "source >= lowest" and "source <= highest". Each takes two
	// operations, the second of which holds the port in host order; "no" jumps four bytes past the end, which rejects. A
	// range, since a test for equality came with later kernels; the rest is sorted out here.
	a := b[diagRequestSize:]
	binary.NativeEndian.PutUint16(a, 4+diagOpPairLength)
	binary.NativeEndian.PutUint16(a[2:], diagReqBytecode)
	op := func(at int, code byte, port uint16) {
		a[at], a[at+1] = code, 8
		binary.NativeEndian.PutUint16(a[at+2:], uint16(len(a)-at+4))
		binary.NativeEndian.PutUint16(a[at+6:], port)
	}
	op(4, diagOpSourceGE, r.lowest)
	op(12, diagOpSourceLE, r.highest)
	return b
}

// dump calls f for every TCP socket whose local port is within the range. The socket it is given is valid
// during the call only.
func (r diagRequest) dump(ctx context.Context, timeout time.Duration, f func(*socket)) error {
	conn, err := nl.Subscribe(unix.NETLINK_INET_DIAG)
	if err != nil {
		return fmt.Errorf("opening an inet_diag socket: %w", err)
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		timeout = min(timeout, max(time.Until(deadline), time.Millisecond))
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	if err := errors.Join(conn.SetSendTimeout(&tv), conn.SetReceiveTimeout(&tv)); err != nil {
		return fmt.Errorf("setting the time limits of an inet_diag socket: %w", err)
	}

	req := nl.NewNetlinkRequest(diagGetTCP, unix.NLM_F_DUMP)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_INET_DIAG: {Seq: 1, Socket: conn}}
	req.AddData(r)
	var parseErr error
	var s socket
	err = req.ExecuteIter(unix.NETLINK_INET_DIAG, diagGetTCP, func(msg []byte) bool {
		if parseErr = s.parse(msg); parseErr != nil {
			return false
		}
		f(&s)
		return true
	})
	// An interrupted dump may have missed a socket that opened or closed meanwhile; the next sample sees it.
	if err != nil && !errors.Is(err, nl.ErrDumpInterrupted) {
		return fmt.Errorf("listing TCP sockets through inet_diag: %w", os.NewSyscallError("netlink", err))
	}
	return parseErr
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
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return nil
}

func age(ms uint32) time.Duration { return time.Duration(ms) * time.Millisecond }
