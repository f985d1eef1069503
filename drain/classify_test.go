package drain

import (
	"testing"
	"time"
)

const ms = time.Millisecond

func TestClassify(t *testing.T) {
	// An accepted connection on which one exchange of one segment each way is over, answered within a tick, 300 ms ago.
	tie := func(change func(*socket)) socket {
		s := socket{
			state: stateEstablished, accepted: true, info: true, received: 100, segsIn: 1, segsOut: 1, acksOut: 1,
			sentAge: 300 * ms, receivedAge: 300 * ms, ackAge: 300 * ms,
		}
		change(&s)
		return s
	}
	// long after, without a later acknowledgement.
	long := func(s *socket) { s.receivedAge, s.sentAge, s.ackAge = 2*time.Second, 2*time.Second, 2*time.Second }
	paired := &connection{class: owed, segsIn: 9, segsOut: 8, surplus: 0, based: true, paired: true}
	for _, tc := range []struct {
		name  string
		s     socket
		known *connection
		want  class
	}{
		{"connected, nothing said", socket{state: stateEstablished, accepted: true, info: true}, nil, idle},
		{"connected, not yet accepted", socket{state: stateEstablished, info: true}, nil, owed},
		{"closed by the client before it was accepted", socket{state: stateCloseWait, info: true, received: 1, unread: 1}, nil, idle},
		{"asked and half-closed before it was accepted", socket{state: stateCloseWait, info: true, received: 11, unread: 11}, nil, owed},
		{"handshake not finished", socket{state: stateSynRecv}, nil, unsure},
		{"first request, nothing ever sent, in the tick of the handshake", tie(func(s *socket) { s.segsOut = 0 }), nil, owed},
		{"received after sending", tie(func(s *socket) { s.receivedAge = 296 * ms }), nil, owed},
		{"sent after receiving", tie(func(s *socket) { s.sentAge = 296 * ms }), nil, idle},
		{"tie and nothing else", tie(func(s *socket) {}), nil, unsure},
		{"unread", tie(func(s *socket) { s.sentAge = 0; s.unread = 1 }), nil, owed},
		{"unsent", tie(func(s *socket) { s.sentAge = 0; s.unsent = 1 }), nil, owed},
		{"unacknowledged", tie(func(s *socket) { s.sentAge = 0; s.inNetwork = 1 }), nil, owed},
		{"tie, acknowledged later", tie(func(s *socket) { s.ackAge = 260 * ms }), nil, idle},
		{"tie, acknowledged a tick later: may be the request's own", tie(func(s *socket) { s.ackAge = 290 * ms }), nil, unsure},
		{"tie, acknowledged long after: may answer a keep-alive probe", tie(func(s *socket) { s.receivedAge, s.sentAge = 16*time.Second, 16*time.Second; s.ackAge = time.Second }), nil, unsure},
		{"tie, acknowledged later, but something was sent twice", tie(func(s *socket) { s.ackAge = 260 * ms; s.retransmits = 1 }), nil, unsure},
		{"tie, half-closed later, which acknowledges too", tie(func(s *socket) { s.state = stateCloseWait; s.ackAge = 260 * ms; s.received++ }), nil, unsure},
		{"tie, nothing moved since it was idle", tie(func(s *socket) {}), &connection{class: idle, segsIn: 1, segsOut: 1, received: 100}, idle},
		{"tie, nothing moved since it was owed: its answer may have left since", tie(func(s *socket) {}), &connection{class: owed, segsIn: 1, segsOut: 1, received: 100}, unsure},
		{"tie, received since it was idle", tie(func(s *socket) { s.received = 200; s.segsIn = 2; s.segsOut = 2 }), &connection{class: idle, segsIn: 1, segsOut: 1, received: 100}, unsure},
		{"tie, one segment for one, one more in", tie(func(s *socket) { s.segsIn = 12; s.segsOut = 11 }), paired, owed},
		{"tie, one segment for one, even: an answer of two may have evened it", tie(func(s *socket) { s.segsIn = 11; s.segsOut = 11 }), paired, unsure},
		{"tie, one segment for one, one more in, but something was sent twice", tie(func(s *socket) { s.segsIn = 12; s.segsOut = 11; s.retransmits = 1 }), paired, unsure},
		{"tie, more out than in by the handshake", tie(func(s *socket) { s.segsIn = 12; s.segsOut = 14 }), &connection{based: true, paired: true, surplus: ^uint32(2)}, owed},
		{"tie, counts not yet proven", tie(func(s *socket) { s.segsIn = 12; s.segsOut = 11 }), &connection{class: owed, based: true}, unsure},
		{"tie, one acknowledgement without data in all, which may be this request's", tie(long), nil, unsure},
		{"tie, never an acknowledgement without data: one with data was sent after the request", tie(func(s *socket) { long(s); s.acksOut = 0 }), nil, idle},
		{"the same, but the request's own may still come", tie(func(s *socket) { s.acksOut = 0 }), nil, unsure},
		{"tie, none since before the request", tie(func(s *socket) { long(s); s.segsIn, s.acksOut = 2, 3 }),
			&connection{class: owed, segsIn: 1, acksOut: 3}, idle},
		{"tie, one since before the request", tie(func(s *socket) { long(s); s.segsIn, s.acksOut = 2, 4 }),
			&connection{class: owed, segsIn: 1, acksOut: 3}, unsure},
		{"tie, none since before the request, which came before the last look", tie(func(s *socket) { long(s); s.segsIn, s.acksOut = 2, 3 }),
			&connection{class: owed, segsIn: 2, acksOut: 3, baseAcks: 3}, idle},
		{"tie, one since before the request, which came before the last look", tie(func(s *socket) { long(s); s.segsIn, s.acksOut = 2, 3 }),
			&connection{class: owed, segsIn: 2, acksOut: 3, baseAcks: 2}, unsure},
		{"tie, none since before the request, but something was sent twice", tie(func(s *socket) { long(s); s.acksOut, s.retransmits = 0, 1 }), nil, unsure},
		{"half-closed after its answer", tie(func(s *socket) { s.state = stateCloseWait; s.sentAge = 200 * ms; s.unread = 1 }), nil, idle},
		{"half-closed and waiting", tie(func(s *socket) { s.state = stateCloseWait; s.receivedAge = 200 * ms; s.unread = 1 }), nil, owed},
		{"closed by the application, answer on its way", socket{state: stateFinWait1, unsent: 500}, nil, owed},
		{"closed by the application, its FIN on its way", socket{state: stateFinWait1, unsent: 1}, nil, idle},
		{"closed by both, answer on its way", socket{state: stateLastAck, unsent: 500}, nil, owed},
		{"closed by the application, client still open", socket{state: stateFinWait2}, nil, idle},
		{"established, of which the kernel tells nothing more", socket{state: stateEstablished, accepted: true}, nil, unsure},
	} {
		if got := classify(&tc.s, tc.known); got != tc.want {
			t.Errorf("%s: class %d, want %d", tc.name, got, tc.want)
		}
	}
}

func TestOpeningIsWhatTheHandshakeMayStillSend(t *testing.T) {
	const sec = time.Second
	type look struct {
		at                   time.Duration
		segsIn, segsOut      uint32
		receivedAge, sentAge time.Duration
		unread               uint32
		want                 bool
	}
	for _, tc := range []struct {
		name  string
		old   bool // the connection was there at the first sample
		looks []look
	}{
		{"one segment in: a hello, or a request without TLS", false, []look{{0, 1, 3, 9 * ms, 5 * ms, 0, false}}},
		{"tickets after the end of the handshake", false, []look{
			{0, 1, 3, 4 * ms, 4 * ms, 0, false}, {sec, 3, 4, 980 * ms, 980 * ms, 0, true}, {9 * sec, 3, 5, 8980 * ms, 8936 * ms, 0, true},
		}},
		{"an answer long after the request is none of them", false, []look{
			{0, 3, 4, 4 * ms, 0, 0, true}, {3 * sec, 3, 5, 3004 * ms, 900 * ms, 0, false}, {4 * sec, 4, 6, 8 * ms, 8 * ms, 0, false},
		}},
		{"as long after the request, but not after it was read", false, []look{
			{0, 3, 1, 3 * sec, 3 * sec, 300, true}, {sec, 3, 1, 4 * sec, 4 * sec, 300, true}, {3 * sec, 3, 2, 6 * sec, sec, 0, true},
		}},
		{"a second request right after the first", false, []look{{0, 3, 4, 4 * ms, 0, 0, true}, {sec, 4, 5, 20 * ms, 8 * ms, 0, true}}},
		{"a request long after the first", false, []look{{0, 3, 4, 4 * ms, 0, 0, true}, {3 * sec, 4, 5, 20 * ms, 8 * ms, 0, false}}},
		{"a request long after the first, before the next look", false, []look{{0, 3, 4, 4 * ms, 0, 0, true}, {9 * sec, 4, 5, 6 * sec, 6 * sec, 0, false}}},
		{"a request long after the rest, which the application had not read", false, []look{
			{0, 2, 1, 4 * ms, 8 * ms, 80, true}, {3 * sec, 3, 1, 900 * ms, 3008 * ms, 380, true}, {4 * sec, 3, 2, 1900 * ms, 500 * ms, 0, true},
		}},
		{"connected long before the handshake", false, []look{
			{0, 0, 0, 0, 0, 0, false}, {60 * sec, 3, 4, 100 * ms, 96 * ms, 0, true},
		}},
		{"more sent than handshakes need", false, []look{{0, 3, 17, 4 * ms, 0, 0, false}}},
		{"an upload that the application does not keep up with", false, []look{
			{0, 3, 1, 4 * ms, 8 * ms, 0, true}, {sec, 30, 1, 4 * ms, 1008 * ms, 300, true}, {3 * sec, 90, 1, 4 * ms, 3008 * ms, 300, false},
		}},
		{"an answer long after the request, of a connection that is seen late", true, []look{{0, 3, 4, 3 * sec, 50 * ms, 0, false}}},
		{"there before the first look, as short as an opening", true, []look{{0, 4, 5, 4 * ms, 0, 0, true}}},
		{"there before the first look, with a longer history", true, []look{{0, 5, 5, 4 * ms, 0, 0, false}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := connection{fresh: !tc.old}
			start := time.Now()
			for i, l := range tc.looks {
				s := socket{
					state: stateEstablished, info: true, unread: l.unread, segsIn: l.segsIn, segsOut: l.segsOut,
					receivedAge: l.receivedAge, sentAge: l.sentAge,
				}
				if got := c.opening(&s, start.Add(l.at)); got != l.want {
					t.Errorf("look %d: %v, want %v", i, got, l.want)
				}
				s.state = stateFinWait2
				if c.opening(&s, start.Add(l.at)) {
					t.Errorf("look %d: true after the application has closed", i)
				}
			}
		})
	}
}

func TestOpeningTeachesNoIdleTimeAsAnAnswer(t *testing.T) {
	start := time.Now()
	c := connection{fresh: true}
	first := socket{state: stateEstablished, info: true, received: 900, segsIn: 3, segsOut: 4, receivedAge: 4 * ms}
	next := socket{state: stateEstablished, info: true, received: 1200, segsIn: 4, segsOut: 5, receivedAge: 100 * ms, sentAge: 100 * ms}
	if !c.opening(&first, start) {
		t.Fatal("not in its opening")
	}
	c.update(&first, unsure, start)
	c.doubted = true
	if took := c.update(&next, unsure, start.Add(5*time.Second)); took != 0 {
		t.Errorf("a client that asked again after 5s taught that an answer takes %v", took)
	}
}

func TestOpeningThatEndsUnseenTeachesHowLongItMayHaveTaken(t *testing.T) {
	seen := time.Now()
	for _, tc := range []struct {
		name string
		c    connection
		gone time.Duration
		want time.Duration
	}{
		{"long awaited", connection{class: unsure, opened: seen, receivedAge: 2 * time.Second}, 300 * ms, longer(2150 * ms)},
		{"seen once, soon after the request", connection{class: unsure, opened: seen, receivedAge: 100 * ms}, time.Second, longer(200 * ms)},
		{"known to be idle", connection{class: idle, opened: seen, receivedAge: 2 * time.Second}, 300 * ms, 0},
		{"later than its opening", connection{class: unsure, opened: seen, past: true, receivedAge: 2 * time.Second}, 300 * ms, 0},
		{"one segment in", connection{class: unsure, receivedAge: 2 * time.Second}, 300 * ms, 0},
	} {
		tc.c.lastSeen = seen
		if got := tc.c.gone(seen.Add(tc.gone)); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// step is one look at a connection: what the kernel says, and when.
type step struct {
	at                   time.Duration
	segsIn, segsOut      uint32
	receivedAge, sentAge time.Duration
	class                class
	took                 time.Duration
	paired               bool
	pause                time.Duration
}

func TestConnectionUpdate(t *testing.T) {
	for _, tc := range []struct {
		name  string
		steps []step
	}{
		{"an answer given between two looks is as long as the stamps say", []step{
			{at: 0, segsIn: 1, segsOut: 1, receivedAge: 200 * ms, sentAge: 100 * ms, class: idle},
			{at: 2000 * ms, segsIn: 2, segsOut: 2, receivedAge: 900 * ms, sentAge: 100 * ms, class: idle, took: longer(800 * ms), paired: true},
			{at: 4000 * ms, segsIn: 2, segsOut: 2, receivedAge: 2900 * ms, sentAge: 2100 * ms, class: idle, paired: true},
		}},
		{"an answer that is owed is at least as long as it is owed", []step{
			{at: 0, segsIn: 1, segsOut: 0, receivedAge: 700 * ms, sentAge: 900 * ms, class: owed, took: longer(700 * ms)},
			{at: 2000 * ms, segsIn: 1, segsOut: 0, receivedAge: 2700 * ms, sentAge: 2900 * ms, class: owed, took: longer(2700 * ms)},
			{at: 4000 * ms, segsIn: 1, segsOut: 1, receivedAge: 4700 * ms, sentAge: 200 * ms, class: idle, took: longer(4500 * ms)},
		}},
		{"a closed loop whose every answer ties teaches by segment for segment", []step{
			{at: 0, segsIn: 5, segsOut: 4, receivedAge: 700 * ms, sentAge: 700 * ms, class: unsure},
			{at: 2000 * ms, segsIn: 6, segsOut: 5, receivedAge: 300 * ms, sentAge: 300 * ms, class: unsure, took: longer(1400 * ms)},
			{at: 2100 * ms, segsIn: 7, segsOut: 6, receivedAge: 50 * ms, sentAge: 50 * ms, class: unsure, took: longer(350 * ms)},
		}},
		{"large answers that tie teach nothing: the silence may have been the client's", []step{
			{at: 0, segsIn: 5, segsOut: 40, receivedAge: 700 * ms, sentAge: 700 * ms, class: unsure},
			{at: 2000 * ms, segsIn: 6, segsOut: 50, receivedAge: 300 * ms, sentAge: 300 * ms, class: unsure},
		}},
		{"a tie that turns out to have been idle teaches no silence of the client's", []step{
			{at: 0, segsIn: 5, segsOut: 4, receivedAge: 4000 * ms, sentAge: 4000 * ms, class: unsure},
			{at: 200 * ms, segsIn: 6, segsOut: 5, receivedAge: 16 * ms, sentAge: 12 * ms, class: idle, took: longer(4 * ms)},
		}},
		{"an answer that goes on unasked is a stream, whose length is no measure", []step{
			{at: 0, segsIn: 1, segsOut: 1, receivedAge: 1000 * ms, sentAge: 900 * ms, class: idle},
			{at: 2000 * ms, segsIn: 1, segsOut: 2, receivedAge: 3000 * ms, sentAge: 400 * ms, class: idle, pause: 2500 * ms},
			{at: 4000 * ms, segsIn: 1, segsOut: 3, receivedAge: 5000 * ms, sentAge: 1400 * ms, class: idle, pause: 2500 * ms},
			{at: 6000 * ms, segsIn: 2, segsOut: 5, receivedAge: 1000 * ms, sentAge: 500 * ms, class: idle, took: longer(500 * ms)},
		}},
		{"segment for segment holds until an answer breaks it", []step{
			{at: 0, segsIn: 3, segsOut: 5, receivedAge: 200 * ms, sentAge: 100 * ms, class: idle},
			{at: 2000 * ms, segsIn: 5, segsOut: 6, receivedAge: 100 * ms, sentAge: 200 * ms, class: owed, took: longer(100 * ms), paired: true},
			{at: 2100 * ms, segsIn: 5, segsOut: 9, receivedAge: 200 * ms, sentAge: 50 * ms, class: idle, took: longer(150 * ms)},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var c connection
			start := time.Now()
			for i, st := range tc.steps {
				s := socket{
					state: stateEstablished, accepted: true, info: true, received: uint64(st.segsIn) * 100,
					segsIn: st.segsIn, segsOut: st.segsOut, receivedAge: st.receivedAge, sentAge: st.sentAge, ackAge: st.receivedAge,
					acksOut: uint32(i + 1), // as if every request had waited a while
				}
				var known *connection
				if i > 0 {
					known = &c
				}
				cl := classify(&s, known)
				took := c.update(&s, cl, start.Add(st.at))
				if cl != st.class || took != st.took || c.paired != st.paired || c.pause != st.pause {
					t.Errorf("step %d: class %d, took %v, paired %v, pause %v; want %+v", i, cl, took, c.paired, c.pause, st)
				}
			}
		})
	}
}
