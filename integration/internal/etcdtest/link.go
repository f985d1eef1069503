package etcdtest

import (
	"net"
	"sync"
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

// Link is one TCP way to the member.
type Link struct {
	target   func() string // empty: nobody there
	listener net.Listener

	mu      sync.Mutex
	mode    Mode
	changed chan struct{} // closed and replaced when mode changes
	conns   map[net.Conn]bool
	closed  bool
}

func newLink(target func() string) (*Link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &Link{target: target, listener: ln, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	go l.accept()
	return l, nil
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

func (l *Link) close() {
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
	target := l.target()
	if target == "" {
		return
	}
	member, err := net.Dial("tcp", target)
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

func (l *Link) pump(to, from net.Conn, answers bool) {
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		mode, changed := l.now()
		for mode == Hold {
			<-changed // the mode always leaves Hold: close sets Refuse
			mode, changed = l.now()
		}
		if mode == Refuse {
			return
		}
		if n > 0 && !(answers && mode == DropAnswers) {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
