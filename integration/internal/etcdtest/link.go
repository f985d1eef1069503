package etcdtest

import (
	"net"
	"sync"
	"time"
)

// Mode is what a Link does with bytes.
type Mode int

const (
	// Pass lets everything through.
	Pass Mode = iota
	// Hold keeps connections open and moves nothing, as a stopped process or a dead network does; Pass delivers what was
	// held.
	Hold
	// DropAnswers carries requests to the member and throws its answers away. Leaving it ends the connections.
	DropAnswers
	// Refuse ends connections, old and new.
	Refuse
)

// Link is one way to a member.
type Link struct {
	dial     func() (net.Conn, error)
	listener net.Listener

	mu      sync.Mutex
	mode    Mode
	delay   time.Duration
	changed chan struct{} // closed and replaced when mode changes
	conns   map[net.Conn]bool
	closed  bool
}

// NewLink carries what comes to ln to where dial connects to, which may fail as long as nobody is there. It owns ln.
func NewLink(ln net.Listener, dial func() (net.Conn, error)) *Link {
	l := &Link{dial: dial, listener: ln, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	go l.accept()
	return l
}

// Endpoint is the link's address, host:port.
func (l *Link) Endpoint() string { return l.listener.Addr().String() }

// Set changes the mode, for bytes that have not been moved yet.
func (l *Link) Set(m Mode) {
	l.mu.Lock()
	before := l.mode
	l.mode = m
	close(l.changed)
	l.changed = make(chan struct{})
	l.mu.Unlock()
	if m == Refuse || before == DropAnswers && m != DropAnswers {
		l.cut()
	}
}

// SetDelay makes bytes that arrive from now on take d, each way.
func (l *Link) SetDelay(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

func (l *Link) now() (Mode, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode, l.changed
}

// cut ends all connections.
func (l *Link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		c.Close()
	}
}

// Close ends the link and all its connections.
func (l *Link) Close() {
	l.listener.Close()
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.Set(Refuse)
}

func (l *Link) keep(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.mode == Refuse || l.closed {
		c.Close()
		return false
	}
	l.conns[c] = true
	return true
}

func (l *Link) drop(c net.Conn) {
	c.Close()
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
}

func (l *Link) accept() {
	for {
		c, err := l.listener.Accept()
		if err != nil {
			return
		}
		if l.keep(c) {
			go l.serve(c)
		}
	}
}

func (l *Link) serve(client net.Conn) {
	defer l.drop(client)
	member, err := l.dial()
	if err != nil || !l.keep(member) {
		return
	}
	defer l.drop(member)
	done := make(chan struct{}, 2)
	pump := func(to, from net.Conn, answers bool) {
		l.pump(to, from, answers)
		// Either side's end is the connection's.
		client.Close()
		member.Close()
		done <- struct{}{}
	}
	go pump(member, client, false)
	go pump(client, member, true)
	<-done
	<-done
}

// pump reads ahead, so that a delay is latency and not a bottleneck.
func (l *Link) pump(to, from net.Conn, answers bool) {
	type chunk struct {
		due  time.Time
		data []byte
	}
	ahead, done := make(chan chunk, 64), make(chan struct{})
	defer close(done)
	go func() {
		defer close(ahead)
		for {
			buf := make([]byte, 32<<10)
			n, err := from.Read(buf)
			l.mu.Lock()
			due := time.Now().Add(l.delay)
			l.mu.Unlock()
			select {
			case ahead <- chunk{due, buf[:n]}:
			case <-done:
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for c := range ahead {
		time.Sleep(time.Until(c.due))
		mode, changed := l.now()
		for mode == Hold {
			<-changed // the mode always leaves Hold: Close sets Refuse
			mode, changed = l.now()
		}
		if mode == Refuse {
			return
		}
		if len(c.data) > 0 && !(answers && mode == DropAnswers) {
			if _, err := to.Write(c.data); err != nil {
				return
			}
		}
	}
}
