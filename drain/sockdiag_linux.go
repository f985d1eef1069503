package drain

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Defaults of SockdiagConfig.
const (
	DefaultLearnInterval = 2 * time.Second
	DefaultMinPatience   = time.Second
	DefaultMaxPatience   = time.Minute
)

// ErrNoPorts is what Sample returns while no port is known: nothing can be measured.
var ErrNoPorts = errors.New("no application port is known yet")

// Port is one port that the application serves.
type Port struct {
	Number uint16
	// Multiplexed: one connection carries many requests at once (gRPC, h2c). A silent stream can't be seen from outside,
	// so every open connection counts until its client closes it.
	Multiplexed bool
}

// SockdiagConfig configures a Sockdiag. The zero value of a duration means its default.
type SockdiagConfig struct {
	// Ports to start with; SetPorts changes them.
	Ports []Port
	// LearnInterval is how often Run samples while the instance is online; default 2 s.
	LearnInterval time.Duration
	// MinPatience is the least time, from when data was last received, that a connection which can't be told from an
	// idle one is waited for; default 1 s. The settle time is a good value.
	MinPatience time.Duration
	// MaxPatience bounds what the patience may grow to by what Run learns; default 1 min. The longest drain is a good
	// value.
	MaxPatience time.Duration
	// Logger; default none.
	Logger *zap.Logger
}

// Sockdiag tells from the kernel's socket tables how many answers the application owes, without its help. It sees the
// network namespace that it runs in and needs no privilege. It is a heuristic; classify has its rules, and these are its
// limits: an answer that pauses after its first bytes looks complete until it goes on for the first time, pipelined
// requests count as one, and a client that sends last and expects nothing (a message on an upgraded connection) is taken for
// one that waits.
//
// It is safe for concurrent use.
type Sockdiag struct {
	cfg SockdiagConfig
	log *zap.Logger

	mu       sync.Mutex
	ports    map[uint16]bool // number -> multiplexed
	conns    map[uint64]*connection
	round    uint64
	activity uint64
	longest  time.Duration
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
	s := &Sockdiag{cfg: cfg, log: cfg.Logger, conns: map[uint64]*connection{}}
	if err := s.SetPorts(cfg.Ports); err != nil {
		return nil, err
	}
	probe := diagRequest{lowest: 1, highest: 1}
	if err := probe.dump(context.Background(), DefaultSampleTimeout, func(*socket) {}); err != nil {
		return nil, fmt.Errorf("sockdiag: %w", err)
	}
	return s, nil
}

// Name is "sockdiag".
func (s *Sockdiag) Name() string { return "sockdiag" }

// SetPorts replaces the ports that are watched.
func (s *Sockdiag) SetPorts(ports []Port) error {
	byNumber := make(map[uint16]bool, len(ports))
	for _, p := range ports {
		if p.Number == 0 {
			return errors.New("sockdiag: port is 0, must be 1 to 65535")
		}
		if multiplexed, ok := byNumber[p.Number]; ok && multiplexed != p.Multiplexed {
			return fmt.Errorf("sockdiag: port %d is given as multiplexed and as not, must be one of them", p.Number)
		}
		byNumber[p.Number] = p.Multiplexed
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ports = byNumber
	return nil
}

// Patience is how long a connection that can't be told from an idle one is waited for: as long as the longest answer that
// was seen, within MinPatience and MaxPatience.
func (s *Sockdiag) Patience() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.patience()
}

func (s *Sockdiag) patience() time.Duration {
	return min(max(s.longest, s.cfg.MinPatience), s.cfg.MaxPatience)
}

// Run samples every LearnInterval until ctx ends, to learn how long answers take and what each connection was last known
// to do. It returns nil.
func (s *Sockdiag) Run(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.LearnInterval)
	defer tick.Stop()
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
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Sample lists the sockets of the application's ports and counts the answers owed.
func (s *Sockdiag) Sample(ctx context.Context) (Sample, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.ports) == 0 {
		return Sample{}, ErrNoPorts
	}
	req := diagRequest{lowest: 65535}
	for number := range s.ports {
		req.lowest, req.highest = min(req.lowest, number), max(req.highest, number)
	}
	var result Sample
	now := time.Now()
	s.round++
	longest := s.longest
	err := req.dump(ctx, DefaultSampleTimeout, func(sock *socket) {
		if multiplexed, ok := s.ports[sock.port]; ok {
			s.count(&result, sock, multiplexed, now)
		}
	})
	if err != nil {
		return Sample{}, err
	}
	// A dump may miss a socket while its neighbours come and go, so what is known is kept for one sample more.
	for cookie, c := range s.conns {
		if c.round+1 < s.round {
			delete(s.conns, cookie)
		}
	}
	if s.patience() > min(max(longest, s.cfg.MinPatience), s.cfg.MaxPatience) {
		s.log.Debug("longest answer seen", zap.Duration("took", s.longest))
	}
	result.Activity = s.activity
	return result, nil
}

// count adds one socket to result.
func (s *Sockdiag) count(result *Sample, sock *socket, multiplexed bool, now time.Time) {
	c := s.conns[sock.cookie]
	if c == nil {
		c = &connection{}
		s.conns[sock.cookie] = c
	} else if sock.info && c.received < sock.received && sock.state == stateEstablished {
		s.activity++
	}
	var known *connection
	if !c.firstSeen.IsZero() {
		known = c
	}
	cl := classify(sock, known)
	took := c.update(sock, cl, now)
	// What came before the first sample may be a stream of any age.
	if !multiplexed && s.round > 1 {
		s.longest = max(s.longest, took)
	}
	c.round = s.round

	switch sock.state {
	case stateEstablished, stateCloseWait, stateSynRecv:
		result.Connections++
	}
	if multiplexed && sock.state == stateEstablished {
		result.InFlight++
		return
	}
	patience := s.patience()
	switch {
	case cl == owed:
		result.InFlight++
	case cl == unsure && sock.info && sock.receivedAge <= patience,
		cl == unsure && !sock.info && now.Sub(c.firstSeen) <= patience,
		// A stream goes on for as long as its silences have been, and as much again.
		cl == idle && c.pause > 0 && sock.sentAge <= max(2*c.pause, s.cfg.MinPatience):
		result.InFlight++
		result.Unsure++
	}
}
