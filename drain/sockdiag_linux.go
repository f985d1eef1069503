package drain

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Defaults of SockdiagConfig.
const (
	DefaultLearnInterval = 2 * time.Second
	DefaultMinPatience   = time.Second
	DefaultMaxPatience   = time.Minute
)

// A sample costs what the kernel needs to walk all the node's connections and to describe the application's, so sampling
// is spaced by what it costs.
const (
	// drainShare: a drain spends at most one part in so many of a core on samples: 3.3 %, which leaves some for the rest.
	drainShare = 30
	// learnShare: and Run one in so many (0.1 %), or, while there is traffic, in busyShare (0.5 %), unless maxLearnInterval
	// is shorter.
	learnShare       = 1000
	busyShare        = 200
	maxLearnInterval = 30 * time.Second
	// While there is traffic, or was that lately, Run samples so many times as often: what it knows of an exchange is as
	// exact as that.
	busyFactor = 8
	busyTime   = 5 * time.Second
)

// probeAge is how old a connection may be to be taken for a probe of the kubelet, which opens one for each probe and
// closes it after timeoutSeconds at the latest. That is the default; a probe that is given more time and takes it restarts
// the quiet period, as a client behind the node does: better a drain that is too long than one that is no proof.
const probeAge = time.Second

// The longest answer that was seen is trusted after so many of them, in so long a time.
const (
	enoughAnswers = 10
	enoughTime    = 10 * time.Second
)

// ErrNoPorts is what Sample returns while no port is known: nothing can be measured.
var ErrNoPorts = errors.New("no application port is known yet")

// Port is one port that the application serves.
type Port struct {
	Number uint16
	// Multiplexed: one connection carries many requests at once (gRPC, h2c). A silent stream can't be seen from outside,
	// so every open connection counts until its client closes it.
	Multiplexed bool
	// Cleartext: connections begin without TLS, which is certain. Otherwise they may begin with a handshake, after which what
	// the server sends last may be no answer: such a connection is waited for though it may be idle.
	Cleartext bool
}

// SockdiagConfig configures a Sockdiag. The zero value of a duration means its default.
type SockdiagConfig struct {
	// Ports to start with; SetPorts changes them.
	Ports []Port
	// LearnInterval is how often Run samples while the instance is online, an eighth of it while there is traffic;
	// default 2 s.
	LearnInterval time.Duration
	// MinPatience is the least time, from when data was last received, that a connection which can't be told from an
	// idle one is waited for; default 1 s. The settle time is a good value.
	MinPatience time.Duration
	// MaxPatience bounds what the patience may grow to by what Run learns; default 1 min. The longest drain is a good
	// value.
	MaxPatience time.Duration
	// Addresses of the pod, IPv4 or IPv6, to start with; SetAddresses changes them. With some, only sockets at one of them
	// count: for a pod in the host's network, where the sockets of others are seen too. Empty: all count.
	Addresses []netip.Addr
	// Nodes are the addresses from which the kubelet probes, to start with; SetNodes changes them.
	Nodes []netip.Addr
	// Own are this process's connections to the application, which don't count; nil: there are none.
	Own *Own
	// Logger; default none.
	Logger *zap.Logger
}

// Sockdiag tells from the kernel's socket tables how many answers the application owes, without its help. It sees the
// network namespace that it runs in and needs no privilege. It is a heuristic; classify has its rules, and these are its
// limits: an answer that pauses after its first bytes looks complete until it goes on for the first time, pipelined
// requests count as one, and a client that sends last and expects nothing (a message on an upgraded connection) is taken for
// one that waits.
//
// Where the kernel denies it, ProcNet is what is left.
//
// It is safe for concurrent use.
type Sockdiag struct {
	cfg SockdiagConfig
	log *zap.Logger

	mu        sync.Mutex
	ports     map[uint16]Port // by number
	addresses []netip.Addr
	nodes     []netip.Addr
	request   diagRequest // nil when there are no ports
	buf       []byte
	conns     map[uint64]*connection
	round     uint64
	sampled   time.Time // the last sample
	activity  uint64
	longest   time.Duration
	// longestFirst is the same of first answers that were not seen to be given: it may be their clients' idle time, so it
	// goes for connections in their opening only.
	longestFirst time.Duration
	began        time.Time     // the first sample; zero before
	answers      int           // seen to be given
	moved        time.Time     // when a sample last found something new on a connection
	cost         time.Duration // CPU time of the last sample
}

// NewSockdiag checks cfg and that the kernel lets this process list sockets.
func NewSockdiag(cfg SockdiagConfig) (*Sockdiag, error) {
	for _, f := range []struct {
		name  string
		value *time.Duration
		def   time.Duration
	}{
		{"LearnInterval", &cfg.LearnInterval, DefaultLearnInterval},
		{"MinPatience", &cfg.MinPatience, DefaultMinPatience},
		{"MaxPatience", &cfg.MaxPatience, max(DefaultMaxPatience, cfg.MinPatience)},
	} {
		if *f.value < 0 {
			return nil, fmt.Errorf("sockdiag: %s is %v, must be positive (0 means the default, %v)", f.name, *f.value, f.def)
		}
		if *f.value == 0 {
			*f.value = f.def
		}
	}
	if cfg.MaxPatience < cfg.MinPatience {
		return nil, fmt.Errorf("sockdiag: MaxPatience is %v, must be at least MinPatience (%v)", cfg.MaxPatience, cfg.MinPatience)
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	s := &Sockdiag{cfg: cfg, log: cfg.Logger, conns: map[uint64]*connection{}, buf: make([]byte, diagBufferSize)}
	if err := errors.Join(s.SetAddresses(cfg.Addresses), s.SetNodes(cfg.Nodes), s.SetPorts(cfg.Ports)); err != nil {
		return nil, err
	}
	probe, err := newDiagRequest([]uint16{1}, nil)
	if err == nil {
		err = probe.dump(context.Background(), s.buf, DefaultSampleTimeout, func(*socket) {})
	}
	if err != nil {
		return nil, fmt.Errorf("sockdiag: %w", err)
	}
	return s, nil
}

// Name is "sockdiag".
func (s *Sockdiag) Name() string { return "sockdiag" }

// SetPorts replaces the ports that are watched.
func (s *Sockdiag) SetPorts(ports []Port) error {
	byNumber, err := portsByNumber(ports)
	if err != nil {
		return fmt.Errorf("sockdiag: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.set(byNumber, s.addresses)
}

// SetAddresses replaces the pod's addresses; see SockdiagConfig.Addresses.
func (s *Sockdiag) SetAddresses(addrs []netip.Addr) error {
	if err := checkAddresses("address", addrs); err != nil {
		return fmt.Errorf("sockdiag: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.set(s.ports, plain(addrs))
}

func (s *Sockdiag) set(ports map[uint16]Port, addrs []netip.Addr) error {
	var request diagRequest
	if len(ports) > 0 {
		var err error
		if request, err = newDiagRequest(slices.Sorted(maps.Keys(ports)), addrs); err != nil {
			return fmt.Errorf("sockdiag: %w", err)
		}
	}
	s.ports, s.addresses, s.request = ports, addrs, request
	return nil
}

// SetNodes replaces the addresses from which the kubelet probes: the node's own, and what the pod sees in their place,
// which with many network plugins is its default gateway. What comes from there may be a client behind the node as well,
// so it is waited for in any case; see Sample.Probes.
func (s *Sockdiag) SetNodes(addrs []netip.Addr) error {
	if err := checkAddresses("node", addrs); err != nil {
		return fmt.Errorf("sockdiag: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes = plain(addrs)
	return nil
}

func portsByNumber(ports []Port) (map[uint16]Port, error) {
	byNumber := make(map[uint16]Port, len(ports))
	for _, p := range ports {
		if p.Number == 0 {
			return nil, errors.New("port is 0, must be 1 to 65535")
		}
		if other, ok := byNumber[p.Number]; ok && other != p {
			return nil, fmt.Errorf("port %d is given as %+v and as %+v, must be one of them", p.Number, other, p)
		}
		byNumber[p.Number] = p
	}
	return byNumber, nil
}

func checkAddresses(what string, addrs []netip.Addr) error {
	for _, a := range addrs {
		if !a.IsValid() || a.IsUnspecified() {
			return fmt.Errorf("%s is %v, must be an IP address of its own", what, a)
		}
	}
	return nil
}

// Patience is how long a connection that can't be told from an idle one is waited for: as long as the longest answer that
// was seen and an eighth more, within MinPatience and MaxPatience. Until ten answers in ten seconds were seen, or
// MaxPatience has passed since the first sample, it is MaxPatience for connections that had more than one request.
func (s *Sockdiag) Patience() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.patience()
}

func (s *Sockdiag) patience() time.Duration {
	return min(max(s.longest, s.cfg.MinPatience), s.cfg.MaxPatience)
}

// patienceWith a connection is the greatest where there is reason to think that it waits, and where too little is
// known of this application to think otherwise: after a start of the agent. A connection on which there was one request is
// no such case, since something was sent after it. In its opening it waits also as long as others that closed there; and
// with too little known as long as for a source that tells nothing, since most are idle, and few speak TLS.
func (s *Sockdiag) patienceWith(c *connection, sock *socket, now time.Time) time.Duration {
	watched := now.Sub(s.began)
	learnt := s.answers >= enoughAnswers && watched >= enoughTime || watched >= s.cfg.MaxPatience
	patience := s.patience()
	if c.inOpening() {
		patience = max(patience, s.longestFirst)
	}
	switch {
	case c.late, !learnt && sock.segsIn > 1 && !c.doubted:
		return s.cfg.MaxPatience
	case !learnt && c.doubted:
		return min(max(patience, DefaultFloor), s.cfg.MaxPatience)
	}
	return patience
}

// Run samples every LearnInterval, give or take a half, and eight times as often while there is traffic, until ctx ends,
// to learn how long answers take and what each connection was last known to do. It takes longer pauses where a sample is
// dear, up to 30 s, so that no more than 0.1 % of a core goes into it, with traffic 0.5 %. It returns nil.
func (s *Sockdiag) Run(ctx context.Context) error {
	failing := false
	for {
		_, err := s.Sample(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !errors.Is(err, ErrNoPorts):
			if !failing {
				s.log.Warn("reading the sockets failed", zap.Error(err))
			}
			failing = true
		default:
			failing = false
		}
		every := s.learnInterval()
		// Spread, or it would always meet regular traffic at the same point.
		pause := time.NewTimer(every/2 + rand.N(every))
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return nil
		}
	}
}

// learnInterval is how long Run waits after the last sample.
func (s *Sockdiag) learnInterval() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	every, share := s.cfg.LearnInterval, time.Duration(learnShare)
	if time.Since(s.moved) < busyTime {
		every, share = every/busyFactor, busyShare
	}
	return max(every, min(s.cost*(share-1), maxLearnInterval), time.Millisecond)
}

// Pause is how long to leave the kernel alone after the last sample, for samples to take at most 3.3 % of a core.
func (s *Sockdiag) Pause() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cost * (drainShare - 1)
}

// Sample lists the sockets of the application's ports and counts the answers owed.
func (s *Sockdiag) Sample(ctx context.Context) (Sample, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.request == nil {
		return Sample{}, ErrNoPorts
	}
	// The kernel lists sockets on the caller's time.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	began := threadTime()
	defer func() { s.cost = threadTime() - began }()

	var result Sample
	now := time.Now()
	if s.round++; s.began.IsZero() {
		s.began = now
	}
	longest := s.longest
	seen := 0
	err := s.request.dump(ctx, s.buf, DefaultSampleTimeout, func(sock *socket) {
		seen++
		s.count(&result, sock, now)
	})
	if err != nil {
		return Sample{}, err
	}
	// A dump may miss a socket while its neighbours come and go, so what is known is kept for one sample more.
	if seen < len(s.conns) {
		for cookie, c := range s.conns {
			if c.round+1 < s.round {
				if took := c.gone(s.sampled); took > 0 && took <= s.cfg.MaxPatience {
					s.longestFirst = max(s.longestFirst, took)
					s.answers++
				}
				delete(s.conns, cookie)
			}
		}
	}
	if s.patience() > min(max(longest, s.cfg.MinPatience), s.cfg.MaxPatience) {
		s.log.Debug("longest answer seen", zap.Duration("took", s.longest))
	}
	if result.Probes > len(s.ports) {
		result.Probes = 0 // the kubelet has one under way at a time
	}
	s.sampled = now
	result.Activity = s.activity
	return result, nil
}

// threadTime is the CPU time that this thread has had.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// count adds one socket to result.
func (s *Sockdiag) count(result *Sample, sock *socket, now time.Time) {
	port := s.ports[sock.port]
	c := s.conns[sock.cookie]
	var known *connection
	if c == nil {
		// What is there at the first sample may be of any age.
		c = &connection{fresh: s.round > 1}
		s.conns[sock.cookie] = c
	} else {
		known = c
	}
	c.round = s.round
	if c.own = c.own || s.cfg.Own.has(sock.peer); c.own {
		return
	}
	if known != nil && sock.info && c.received < sock.received && sock.state == stateEstablished {
		s.activity++
	}
	if c.moved(sock) {
		s.moved = now
	}
	cl := classify(sock, known)
	doubted := !port.Multiplexed && !port.Cleartext && c.opening(sock, now) && cl == idle
	if doubted {
		cl = unsure
	}
	if answered := sock.info && c.segsOut != sock.segsOut; answered && (cl == idle || known != nil && c.segsIn != sock.segsIn) {
		s.answers++
	}
	took := c.update(sock, cl, now)
	c.doubted = doubted
	if !port.Multiplexed && s.round > 1 {
		s.longest = max(s.longest, took)
	}

	switch sock.state {
	case stateEstablished, stateCloseWait, stateSynRecv:
		result.Connections++
	}
	switch {
	case port.Multiplexed && sock.state == stateEstablished:
		result.InFlight++
	case cl == owed:
		result.InFlight++
	case cl == unsure && sock.info && sock.receivedAge <= s.patienceWith(c, sock, now),
		cl == unsure && !sock.info && now.Sub(c.firstSeen) <= s.patience(),
		// A stream goes on for as long as its silences have been, and as much again.
		cl == idle && c.pause > 0 && sock.sentAge <= max(2*c.pause, s.cfg.MinPatience):
		result.InFlight++
		result.Unsure++
	default:
		return
	}
	if c.fresh && now.Sub(c.firstSeen) < probeAge && slices.Contains(s.nodes, sock.peer.Addr()) {
		result.Probes++
	}
}
