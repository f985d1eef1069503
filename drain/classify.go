package drain

import (
	"net/netip"
	"time"
)

// TCP states as the kernel numbers them (net/tcp_states.h).
const (
	stateEstablished = 1
	stateSynRecv     = 3
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateCloseWait   = 8
	stateLastAck     = 9
	stateClosing     = 11
)

// socket is what the kernel tells about one server-side TCP socket.
type socket struct {
	cookie   uint64 // the kernel's identity of a socket, never used twice
	port     uint16
	peer     netip.AddrPort // never an IPv4-mapped address
	state    uint8
	accepted bool   // the application has taken it from the accept queue
	unread   uint32 // idiag_rqueue: bytes received that the application has not read, a FIN counting as one
	unsent   uint32 // idiag_wqueue: bytes written that the peer has not acknowledged, a FIN counting as one
	info     bool   // the fields below are known; they are not for SYN_RECV and orphans

	inNetwork   uint32 // tcpi_unacked: segments sent and not acknowledged
	sentAge     time.Duration
	receivedAge time.Duration
	ackAge      time.Duration
	retransmits uint32
	received    uint64 // bytes, a FIN counting as one
	segsIn      uint32 // segments with data
	segsOut     uint32
	acksOut     uint32 // segments without data, which do nothing but acknowledge
}

type class uint8

const (
	idle class = iota
	unsure
	owed
)

// ackAfter bounds what an acknowledgement that came after a tie can prove; see classify. At least: the kernel notes the
// arrival of a segment's data and of its acknowledgement one after the other, and a tick of its clock (10 ms at the
// slowest HZ=100) may fall between; a Linux client's delayed acknowledgement takes 40 ms (TCP_DELACK_MIN). At most: an
// answer to a keep-alive probe of the server is an acknowledgement too, and probes come 1 s after silence at the
// earliest (TCP_KEEPIDLE is in seconds).
const (
	ackAfterMin = 20 * time.Millisecond
	ackAfterMax = 900 * time.Millisecond
)

// pureAckAfter is when the kernel has acknowledged for certain what it received: twice TCP_DELACK_MAX.
const pureAckAfter = 400 * time.Millisecond

// What makes an opening; see connection.opening. All of it errs to the long side, since a server that lacks CPU time may
// be that slow.
const (
	// openingTime is how long after the client's part has been read the server's may be sent: a second ticket waits for the
	// acknowledgement of the first, which the client may delay by 200 ms (TCP_DELACK_MAX).
	openingTime = 2 * time.Second
	// openingOut is the most segments that a handshake and its tickets take: 20 kB of certificates.
	openingOut = 16
	// openingIn: a connection that was there before the first sample, with more segments in than two for a hello with a
	// post-quantum key, one that finishes the handshake and a request, has its opening behind it.
	openingIn = 4
)

// classify tells whether the application owes an answer on s. known is what earlier samples found, nil when there were none.
//
// The rule for HTTP/1.1 and all that takes turns like it: who received last owes an answer, who sent last does not. The
// kernel stamps both in ticks (4 ms at HZ=250). A client that asks again as soon as it has its answer makes both stamps
// equal, and so does an answer given within a tick: a tie. What settles ties, in this order:
//   - nothing moved since the connection was known to be idle;
//   - an acknowledgement that arrived well after the tie: the peer acknowledges data only, and it had acknowledged all
//     that came before its last request with that request, so this one is for an answer. A client that waits for an
//     answer sends nothing. Delayed acknowledgements make this the usual sight on idle connections;
//   - no acknowledgement without data since before the last request: the kernel acknowledges what it received after 200 ms at
//     the latest (TCP_DELACK_MAX), and if nothing but data did that, then an answer was sent after the request;
//   - segment counts, where earlier samples found this connection to exchange one data segment for one: one in more than
//     out is a request without its answer. The reverse proves nothing: one answer of two segments evens it out;
//   - nothing: unsure, and for the caller's patience to decide.
//
// A retransmission counts as a segment and is acknowledged anew, so one makes counts and acknowledgements void.
func classify(s *socket, known *connection) class {
	unread, unsent := s.unread, s.unsent
	switch s.state {
	case stateSynRecv:
		return unsure
	case stateFinWait1, stateClosing, stateLastAck:
		// The application has closed: what is left is the kernel's delivery, and then its FIN.
		if unsent > 1 {
			return owed
		}
		return idle
	case stateFinWait2:
		return idle
	case stateCloseWait:
		if unread > 0 {
			unread--
		}
	}
	if unread > 0 || unsent > 0 {
		return owed
	}
	if !s.info {
		return unsure
	}
	received := s.received
	if s.state == stateCloseWait && received > 0 {
		received--
	}
	switch {
	case s.inNetwork > 0:
		return owed
	case received == 0:
		// A client that has connected and waits for the application to take it is about to ask.
		if !s.accepted && s.state == stateEstablished {
			return owed
		}
		return idle
	case s.segsOut == 0 || s.receivedAge < s.sentAge:
		return owed
	case s.receivedAge > s.sentAge:
		return idle
	}
	if known != nil && known.class == idle && !known.moved(s) {
		return idle
	}
	if s.retransmits == 0 {
		if after := s.receivedAge - s.ackAge; s.state == stateEstablished && after >= ackAfterMin && after <= ackAfterMax {
			return idle
		}
		if s.state == stateEstablished && s.receivedAge >= pureAckAfter && s.acksOut == known.acksBefore(s) {
			return idle
		}
		if known != nil && known.paired && s.segsIn-s.segsOut == known.surplus+1 {
			return owed
		}
	}
	return unsure
}

// connection is what is remembered about a socket from one sample to the next.
type connection struct {
	class               class
	quiet               bool // nothing unread, unsent or unacknowledged
	firstSeen, lastSeen time.Time
	round               uint64 // the sample that saw it last
	fresh               bool   // it was not there at the first sample
	own                 bool   // this process's, never counted

	segsIn, segsOut      uint32
	received             uint64
	sentAge, receivedAge time.Duration

	// acksOut at the last sample, and baseAcks that of the last sample before the latest request came; 0 when it was there
	// from the start, since the kernel counts from 0.
	acksOut, baseAcks uint32
	// late: after a tie an acknowledgement without data was sent, as for a request that waits. It is no proof, since
	// a segment that arrives twice is acknowledged twice.
	late bool

	// surplus is segsIn minus segsOut with nothing owed (a handshake may leave some) and base segsIn when that was learnt. paired:
	// a later sample found one segment out for every one in since.
	surplus, base uint32
	based, paired bool

	// opened is the first sample with more than one segment in, or the last one before the application had read (read) what
	// was there, which it takes its time for (busy); zero before. past: the opening is over; see opening. doubted: but for it
	// the connection would have been idle.
	opened                    time.Time
	read, busy, past, doubted bool

	// pause is the longest silence after which the current answer went on: it is a stream. 0: none was seen.
	pause time.Duration
}

// opening tells whether what was sent last may be no answer, though it was sent after the last request. A TLS 1.3 server
// sends session tickets after the client has finished the handshake (RFC 8446, 4.6.1), and the client sends its first
// request without waiting for them; one of TLS 1.2 with a false start (RFC 7918) does the same. The kernel doesn't see what
// the bytes are, so this goes for all connections but those to a port that is known to be cleartext. It ends when data
// comes, or an answer, some time after the application has read the client's part of the handshake, which ends in the
// second segment at the earliest; a first one alone is a hello, or no TLS.
func (c *connection) opening(s *socket, now time.Time) bool {
	if s.info && s.segsIn > 1 && !c.past {
		readAge := s.receivedAge
		switch {
		case s.unread > 0 && !c.read:
			c.opened, c.busy = now, true
		case c.opened.IsZero():
			c.opened = now
		}
		c.read = c.read || s.unread == 0
		since := now.Sub(c.opened)
		if c.busy {
			readAge = min(readAge, since)
		}
		c.past = s.segsOut > openingOut || !c.fresh && s.segsIn > openingIn ||
			since-s.receivedAge > openingTime || readAge-s.sentAge > openingTime
	}
	return c.inOpening() && (s.state == stateEstablished || s.state == stateCloseWait)
}

func (c *connection) inOpening() bool { return !c.opened.IsZero() && !c.past }

// gone returns how long answers are to be expected to take, by a connection that was not there any more at a sample: one
// that was in its opening may have closed with its answer, which no sample saw then, and for all that is known in the
// middle between two. 0 when it teaches nothing.
func (c *connection) gone(at time.Time) time.Duration {
	if c.class != unsure || !c.inOpening() {
		return 0
	}
	return longer(min(2*c.receivedAge, c.receivedAge+at.Sub(c.lastSeen)/2))
}

// moved tells whether data came or went since the last sample.
func (c *connection) moved(s *socket) bool {
	return c.segsIn != s.segsIn || c.segsOut != s.segsOut || c.received != s.received
}

// acksBefore is how many acknowledgements without data had been sent before the latest request came, or fewer.
func (c *connection) acksBefore(s *socket) uint32 {
	switch {
	case c == nil:
		return 0
	case c.segsIn != s.segsIn:
		return c.acksOut
	default:
		return c.baseAcks
	}
}

// update takes in what a sample found, cl being its class. It returns how long answers are to be expected to take, by one
// that has been given since the last sample, or is owed yet; 0 when there is none or its length can't be known.
func (c *connection) update(s *socket, cl class, now time.Time) (took time.Duration) {
	known := !c.firstSeen.IsZero()
	if !known {
		c.firstSeen = now
	}
	quiet := s.unread == 0 && s.unsent == 0 && s.inNetwork == 0
	if s.info && s.state == stateEstablished {
		elapsed := now.Sub(c.lastSeen)
		tie := s.receivedAge == s.sentAge
		asked, answered := c.segsIn != s.segsIn, c.segsOut != s.segsOut
		switch {
		case !known:
		case asked:
			c.pause = 0
		case answered && c.class == idle:
			// Nobody asked, and yet it sends: its answer had not been complete.
			c.pause = max(c.pause, c.sentAge+elapsed-s.sentAge)
		}
		switch {
		case cl == owed && quiet && !tie:
			// It takes this long already, and is certain.
			took = longer(s.receivedAge)
		case !known || !answered || c.pause > 0:
		case asked && c.quiet && (c.class == owed ||
			c.class == unsure && !c.doubted && cl != idle && s.segsIn-c.segsIn == s.segsOut-c.segsOut):
			// An exchange since hides when it was answered, which was not after what was sent last. It was seen at a random
			// moment, so half of it was over. The unsure ones count where they exchange segment for segment: a small answer
			// that is not followed by a delayed acknowledgement was hardly the last thing that happened. Without them, an
			// app whose clients all ask again at once would teach nothing. One that is idle now was idle before: it would
			// have sent one more, and the silence was the client's.
			took = longer(min(2*c.receivedAge, c.receivedAge+elapsed-s.sentAge))
		case cl == idle && !tie:
			took = longer(s.receivedAge - s.sentAge)
		}
		if cl != unsure && quiet && s.received > 0 && (cl == idle || !tie) {
			c.learnPairs(s, cl)
		}
	}
	moved := c.moved(s)
	c.late = known && cl == unsure && !moved && (c.late || s.acksOut != c.acksOut && s.receivedAge <= ackAfterMax)
	c.baseAcks = c.acksBefore(s)
	c.acksOut = s.acksOut
	c.class, c.quiet, c.lastSeen = cl, quiet, now
	c.segsIn, c.segsOut, c.received = s.segsIn, s.segsOut, s.received
	c.sentAge, c.receivedAge = s.sentAge, s.receivedAge
	return took
}

// longer is what to expect after an answer that took d: an eighth more, since the longest is hardly among those that were
// looked at, and a busy machine makes it longer yet.
func longer(d time.Duration) time.Duration { return d + d/8 }

// learnPairs compares the segment counts of a connection of which it is certain whether it owes an answer.
func (c *connection) learnPairs(s *socket, cl class) {
	surplus := s.segsIn - s.segsOut
	if cl == owed {
		surplus--
	}
	switch {
	case c.based && surplus == c.surplus:
		c.paired = c.paired || s.segsIn != c.base
	default:
		c.surplus, c.base, c.based, c.paired = surplus, s.segsIn, true, false
	}
}
