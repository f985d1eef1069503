package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"usher.dev/usher/drain"
)

// What a drain does by default, and what the clients of the cases ask for.
const (
	drainSettle   = time.Second
	drainDeadline = 25 * time.Second
	drainLoad     = 11 * time.Second // the source has learnt by then, and slow answers are under way
	drainClients  = 20
	slowAnswer    = 3 * time.Second // longer than settle time and quiet period: a miss loses it
	largeAnswer   = 100 << 10
	streamPause   = 700 * time.Millisecond // longer than the quiet period
)

// drains measures what a sample costs, and whether drains miss requests in flight.
func drains(ctx context.Context, say func(string, ...any), r *Report) error {
	for _, n := range []int{100, 1000, 10000} {
		say("sampling %d sockets", n)
		if err := sampleCost(ctx, n, r); err != nil {
			return err
		}
	}
	// Three at a time: they wait most of the time.
	cases := drainCases()
	results := make([]drained, len(cases))
	failed := make([]error, len(cases))
	var running sync.WaitGroup
	slots := make(chan struct{}, 3)
	for i, c := range cases {
		slots <- struct{}{}
		say("draining: %s", c.name)
		running.Go(func() {
			defer func() { <-slots }()
			results[i], failed[i] = c.run(ctx)
		})
	}
	running.Wait()
	looks, missed, lost := 0, 0, 0
	for i, c := range cases {
		got := results[i]
		if failed[i] != nil {
			return fmt.Errorf("draining, %s: %w", c.name, failed[i])
		}
		row := Row{
			Figure: fmt.Sprintf("  %s: %d of %d missed; released after", c.name, got.missed, got.looks),
			Unit:   Seconds, Ours: one(got.after.Seconds()),
		}
		lost += got.lost
		if !c.streamed {
			looks, missed, row.Target = looks+got.looks, missed+got.missed, 1.5
		}
		r.Rows = append(r.Rows, row)
	}
	r.Rows = append(r.Rows,
		Row{Figure: fmt.Sprintf("requests in flight that samples missed, of %d looks, without streams", looks), Unit: Count, Ours: one(float64(missed)), Target: 0.5},
		Row{Figure: "requests in flight when a drain ended", Unit: Count, Ours: one(float64(lost)), Target: 0.5},
	)
	r.Notes = append(r.Notes,
		"Samples: sockets of loopback connections, both ends counted; 50 samples each. CPU: that of the whole process, of one core, while a drain waits for 5 s.",
		fmt.Sprintf("Drains: one a case, by sockdiag alone, with %d clients for %s before and the agent's defaults (settle time 1 s, quiet period 500 ms, a sample every 50 ms, "+
			"one every 250 ms before). A third of the requests take %s, the others 1 ms. When the drain starts, clients ask for nothing new. A look is a request that is in the "+
			"application from before a sample until after it; it is missed when the sample counts less than there are. \"Released after\" is from the last answer, or the end of the "+
			"settle time, until the drain ends; the quiet period is in it.", drainClients, drainLoad, slowAnswer),
	)
	return nil
}

// sampleCost opens n sockets and samples them.
func sampleCost(ctx context.Context, n int, r *Report) error {
	sockets, ports, err := openSockets(ctx, n)
	if err != nil {
		return err
	}
	defer sockets.close()
	before := heap()
	s, err := drain.NewSockdiag(drain.SockdiagConfig{Ports: ports})
	if err != nil {
		return err
	}
	var took []time.Duration
	cpu := processTime()
	for range 50 {
		start := time.Now()
		got, err := s.Sample(ctx)
		if err != nil {
			return err
		}
		if took = append(took, time.Since(start)); got.Connections != n {
			return fmt.Errorf("sample has %d connections, want %d", got.Connections, n)
		}
	}
	cpu = (processTime() - cpu) / 50
	memory := heap() - before

	d, err := drain.New(drain.Config{Sources: []drain.Source{s}})
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	inDrain := processTime()
	result := d.Wait(wait, time.Now())
	inDrain = processTime() - inDrain
	if result.Outcome != drain.Deadline {
		return fmt.Errorf("drain of %d sockets with a request in flight ended by itself: %s", n, result.Outcome)
	}
	runtime.KeepAlive(s)

	sample := Row{Figure: fmt.Sprintf("sample of %d sockets", n), Unit: Seconds, Ours: durations(took)}
	if n == 10000 {
		sample.Target = 0.020
	}
	r.Rows = append(r.Rows, sample,
		Row{Figure: "  CPU time of it", Unit: Seconds, Ours: one(cpu.Seconds())},
		Row{Figure: "  CPU of one core during a drain", Unit: Share, Ours: one(inDrain.Seconds() / result.Took.Seconds()), Target: 0.05},
		Row{Figure: "  memory", Unit: Bytes, Ours: one(max(float64(memory), 0))},
	)
	return nil
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func processTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

type sockets []net.Conn

func (s sockets) close() {
	for _, c := range s {
		// Reset: a TIME_WAIT would stay in the table that the next sample walks.
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
}

// openSockets opens n sockets, half of which wait for an answer. Both ends count, which spares half of the file
// descriptors: the clients share one port, each at a loopback address of its own.
func openSockets(ctx context.Context, n int) (all sockets, ports []drain.Port, err error) {
	defer func() {
		if err != nil {
			all.close()
		}
	}()
	port := func(l net.Listener) drain.Port { return drain.Port{Number: uint16(l.Addr().(*net.TCPAddr).Port)} }
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, fmt.Errorf("opening sockets: %w", err)
	}
	defer l.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, fmt.Errorf("opening sockets: %w", err)
	}
	free.Close()
	ports = []drain.Port{port(l), port(free)}
	for i := range n / 2 {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 1, byte(i>>8), byte(i)), Port: int(ports[1].Number)}}
		c, err := d.DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			return all, nil, fmt.Errorf("opening socket %d of %d (ulimit -n must be above it): %w", len(all)+1, n, err)
		}
		all = append(all, c)
		s, err := l.Accept()
		if err != nil {
			return all, nil, fmt.Errorf("opening socket %d of %d (ulimit -n must be above it): %w", len(all)+1, n, err)
		}
		all = append(all, s)
		if _, err := io.WriteString(c, "ask"); err != nil {
			return all, nil, fmt.Errorf("asking: %w", err)
		}
		if _, err := io.ReadFull(s, make([]byte, 3)); err != nil {
			return all, nil, fmt.Errorf("being asked: %w", err)
		}
	}
	return all, ports, nil
}

// drainCase is one kind of traffic.
type drainCase struct {
	name string
	tls  bool
	// http2 without TLS; its port is given to the source as multiplexed, as those without TLS are given as cleartext.
	http2 bool
	// restarted: the source starts with the drain, and has learnt nothing.
	restarted bool
	// streamed: until an answer has paused for the first time, nothing tells that it will go on, so its misses are no
	// surprise; and then it is waited for twice as long as it has paused.
	streamed bool
	// client asks until the drain starts, and returns when it has all its answers.
	client func(a *drainApp, seed uint64) error
}

func drainCases() []drainCase {
	var cases []drainCase
	for _, size := range []struct {
		name  string
		bytes int
	}{{"small", 0}, {"large", largeAnswer}} {
		for _, secure := range []bool{false, true} {
			for _, kept := range []bool{true, false} {
				for _, open := range []bool{false, true} {
					c := drainCase{tls: secure, name: "closed loop, " + size.name}
					c.client = func(a *drainApp, seed uint64) error { return a.closedLoop(seed, size.bytes, kept) }
					if open {
						c.name = "open loop, " + size.name
						c.client = func(a *drainApp, seed uint64) error { return a.openLoop(seed, size.bytes, kept) }
					}
					c.name += map[bool]string{true: ", TLS", false: ", plain"}[secure]
					c.name += map[bool]string{true: ", keep-alive", false: ", a connection each"}[kept]
					cases = append(cases, c)
				}
			}
		}
	}
	closed := func(a *drainApp, seed uint64) error { return a.closedLoop(seed, 0, true) }
	return append(cases,
		drainCase{name: "closed loop, small, plain, agent restarted", restarted: true, client: closed},
		drainCase{name: "uploads of 3 s", client: (*drainApp).upload},
		drainCase{name: fmt.Sprintf("streamed answers, a piece every %s", streamPause), streamed: true, client: (*drainApp).stream},
		drainCase{name: "upgraded connections, one message at a time", client: (*drainApp).upgraded},
		drainCase{name: "h2c, by connection", http2: true, client: closed},
	)
}

// drained is what came of a case.
type drained struct {
	looks, missed, lost int
	after               time.Duration
}

func (c drainCase) run(ctx context.Context) (drained, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a := newDrainApp(ctx, c)
	defer a.server.Close()
	port := drain.Port{Number: uint16(a.server.Listener.Addr().(*net.TCPAddr).Port), Multiplexed: c.http2, Cleartext: !c.tls}
	sockdiag, err := drain.NewSockdiag(drain.SockdiagConfig{Ports: []drain.Port{port}, MinPatience: drainSettle, MaxPatience: drainDeadline})
	if err != nil {
		return drained{}, err
	}
	watched := &watchedSource{Sockdiag: sockdiag, app: a}
	d, err := drain.New(drain.Config{Sources: []drain.Source{watched}})
	if err != nil {
		return drained{}, err
	}

	failed := make(chan error, drainClients)
	var clients, learning sync.WaitGroup
	for i := range drainClients {
		clients.Go(func() { failed <- c.client(a, uint64(i)) })
	}
	if !c.restarted {
		learning.Go(func() { sockdiag.Run(ctx) })
	}
	select {
	case <-time.After(drainLoad):
	case <-ctx.Done():
		return drained{}, context.Cause(ctx)
	}

	close(a.withdrawn)
	settled := time.Now().Add(drainSettle)
	wait, done := context.WithTimeout(ctx, drainDeadline)
	defer done()
	result := d.Wait(wait, settled)
	ended := time.Now()
	got := drained{looks: watched.looks, missed: watched.missed, lost: len(a.inside())}
	clients.Wait()
	cancel()
	learning.Wait()
	for range drainClients {
		if err := <-failed; err != nil {
			return drained{}, err
		}
	}
	if result.Outcome != drain.Quiet && result.Outcome != drain.Deadline {
		return drained{}, fmt.Errorf("the drain ended as %s: %v", result.Outcome, result.Cause)
	}
	last := settled
	if end := time.UnixMicro(a.lastEnd.Load()); end.After(last) {
		last = end
	}
	got.after = max(ended.Sub(last), 0)
	return got, nil
}

// watchedSource compares what the source says with what the application knows.
type watchedSource struct {
	*drain.Sockdiag
	app           *drainApp
	looks, missed int
}

func (w *watchedSource) Sample(ctx context.Context) (drain.Sample, error) {
	before := w.app.inside()
	s, err := w.Sockdiag.Sample(ctx)
	if err != nil {
		return s, err
	}
	after, there := w.app.inside(), 0
	for id := range before {
		if after[id] {
			there++
		}
	}
	w.looks += there
	w.missed += max(there-s.InFlight, 0)
	return s, nil
}

// drainApp is the application: it knows which requests it has.
type drainApp struct {
	server    *httptest.Server
	http2     bool
	withdrawn chan struct{}
	over      context.Context // ends with the case
	lastEnd   atomic.Int64    // of an answer, in microseconds

	mu   sync.Mutex
	next int
	in   map[int]bool
}

func newDrainApp(ctx context.Context, c drainCase) *drainApp {
	a := &drainApp{http2: c.http2, withdrawn: make(chan struct{}), over: ctx, in: map[int]bool{}}
	mux := http.NewServeMux()
	mux.HandleFunc("/answer", func(w http.ResponseWriter, r *http.Request) {
		leave := a.enter()
		if r.FormValue("slow") != "" {
			time.Sleep(slowAnswer)
		} else {
			time.Sleep(time.Millisecond)
		}
		leave() // before the answer is written: once it is delivered, nothing is owed
		if r.FormValue("large") != "" {
			w.Write(make([]byte, largeAnswer))
		}
	})
	mux.HandleFunc("/upload", func(_ http.ResponseWriter, r *http.Request) {
		defer a.enter()()
		io.Copy(io.Discard, r.Body)
	})
	mux.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		defer a.enter()()
		for range 6 {
			io.WriteString(w, "data: piece\n\n")
			http.NewResponseController(w).Flush()
			time.Sleep(streamPause)
		}
	})
	mux.HandleFunc("/upgrade", func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n")
		for {
			message, err := rw.ReadString('\n')
			if err != nil {
				return
			}
			leave := a.enter()
			if message == "slow\n" {
				time.Sleep(slowAnswer)
			}
			leave()
			io.WriteString(conn, message)
		}
	})
	a.server = httptest.NewUnstartedServer(mux)
	if c.http2 {
		a.server.Config.Protocols = new(http.Protocols)
		a.server.Config.Protocols.SetUnencryptedHTTP2(true)
	}
	if c.tls {
		// Asked for a certificate, clients are sent their session tickets after their part of the handshake, which is where
		// OpenSSL and others send them always: data that looks like the answer to a first request.
		a.server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
		a.server.StartTLS()
	} else {
		a.server.Start()
	}
	return a
}

// enter notes a request until the function that it returns is called.
func (a *drainApp) enter() (leave func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	id := a.next
	a.next++
	a.in[id] = true
	return func() {
		a.lastEnd.Store(time.Now().UnixMicro())
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.in, id)
	}
}

func (a *drainApp) inside() map[int]bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	in := make(map[int]bool, len(a.in))
	for id := range a.in {
		in[id] = true
	}
	return in
}

func (a *drainApp) draining() bool {
	select {
	case <-a.withdrawn:
		return true
	default:
		return false
	}
}

func (a *drainApp) httpClient(kept bool, conns int) *http.Client {
	t := &http.Transport{
		TLSClientConfig: &tls.Config{
			InsecureSkipVerify: true,        // the server's certificate is the test package's
			ClientSessionCache: forgetful{}, // for tickets
		},
		MaxConnsPerHost: conns, DisableKeepAlives: !kept,
	}
	if a.http2 {
		t.Protocols = new(http.Protocols)
		t.Protocols.SetUnencryptedHTTP2(true)
	}
	return &http.Client{Transport: t}
}

// forgetful makes a client take session tickets, and never use one: resumed sessions have theirs before.
type forgetful struct{}

func (forgetful) Get(string) (*tls.ClientSessionState, bool) { return nil, false }
func (forgetful) Put(string, *tls.ClientSessionState)        {}

func (a *drainApp) get(c *http.Client, path string) error {
	resp, err := c.Get(a.server.URL + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}

// path of an answer, one in three a slow one.
func path(random *rand.Rand, size int) string {
	p := "/answer?"
	if random.IntN(3) == 0 {
		p += "slow=1&"
	}
	if size > 0 {
		p += "large=1"
	}
	return p
}

// closedLoop asks as soon as it has its answer, with a few fast ones before most slow ones, on one connection. Kept
// connections stay open at the end, as a pool's do; those of HTTP/2 are closed, since they count until then.
func (a *drainApp) closedLoop(seed uint64, size int, kept bool) error {
	c := a.httpClient(kept, 1)
	random := rand.New(rand.NewPCG(seed, 1))
	time.Sleep(time.Duration(random.Int64N(int64(slowAnswer)))) // not all in step
	for !a.draining() {
		if err := a.get(c, path(random, size)); err != nil {
			return err
		}
	}
	if a.http2 {
		c.CloseIdleConnections()
	}
	return nil
}

// openLoop asks on its own schedule, whether there was an answer or not.
func (a *drainApp) openLoop(seed uint64, size int, kept bool) error {
	c := a.httpClient(kept, 0)
	random := rand.New(rand.NewPCG(seed, 2))
	var requests sync.WaitGroup
	failed := make(chan error, 1)
	for !a.draining() {
		p := path(random, size)
		requests.Go(func() {
			if err := a.get(c, p); err != nil {
				select {
				case failed <- err:
				default:
				}
			}
		})
		time.Sleep(time.Duration(random.ExpFloat64() * float64(300*time.Millisecond)))
	}
	requests.Wait()
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

// upload sends its bodies in thirty pieces.
func (a *drainApp) upload(uint64) error {
	c := a.httpClient(true, 1)
	for !a.draining() {
		body, feed := io.Pipe()
		go func() {
			for range 30 {
				time.Sleep(100 * time.Millisecond)
				if _, err := feed.Write(make([]byte, 4<<10)); err != nil {
					return
				}
			}
			feed.Close()
		}()
		resp, err := c.Post(a.server.URL+"/upload", "application/octet-stream", body)
		if err != nil {
			return err
		}
		resp.Body.Close()
	}
	return nil
}

func (a *drainApp) stream(seed uint64) error {
	time.Sleep(time.Duration(seed) * 100 * time.Millisecond) // not all in step
	c := a.httpClient(true, 1)
	for !a.draining() {
		if err := a.get(c, "/stream"); err != nil {
			return err
		}
	}
	return nil
}

// upgraded speaks a protocol of lines, each of which has an answer.
func (a *drainApp) upgraded(seed uint64) error {
	conn, err := net.Dial("tcp", a.server.Listener.Addr().String())
	if err != nil {
		return err
	}
	context.AfterFunc(a.over, func() { conn.Close() })
	in := bufio.NewReader(conn)
	if _, err := fmt.Fprintf(conn, "GET /upgrade HTTP/1.1\r\nHost: app\r\nConnection: Upgrade\r\nUpgrade: lines\r\n\r\n"); err != nil {
		return err
	}
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return err
		}
		if strings.TrimSpace(line) == "" {
			break
		}
	}
	random := rand.New(rand.NewPCG(seed, 3))
	for !a.draining() {
		message := "fast\n"
		if random.IntN(3) == 0 {
			message = "slow\n"
		}
		if _, err := io.WriteString(conn, message); err != nil {
			return err
		}
		if _, err := in.ReadString('\n'); err != nil {
			return err
		}
	}
	runtime.SetFinalizer(conn, nil)
	return nil
}
