package drain

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func takeFrom(t *testing.T, s Source) Sample {
	t.Helper()
	got, err := s.Sample(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func TestSockdiagSeesEveryAddressFamily(t *testing.T) {
	for _, tc := range stacks {
		t.Run(tc.name, func(t *testing.T) {
			l, err := net.Listen("tcp", tc.listen)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			port := portOf(l.Addr())
			s := newSockdiag(t, SockdiagConfig{Ports: []Port{{Number: port}}})
			for i, host := range tc.dial {
				c, err := net.Dial("tcp", net.JoinHostPort(host, fmt.Sprint(port)))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				fmt.Fprint(c, "ask")
				server := accept(t, l)
				io.ReadFull(server, make([]byte, 3))
				if got := take(t, s); got.InFlight != 1 || got.Connections != i+1 {
					t.Errorf("%s: %+v, want the request that was read and not answered", host, got)
				}
				fmt.Fprint(server, "answer")
				io.ReadFull(c, make([]byte, 6))
				eventually(t, host+" to be idle", func() bool { return take(t, s).InFlight == 0 })
				own := netip.MustParseAddr(host)
				if err := s.SetAddresses([]netip.Addr{own}); err != nil {
					t.Fatal(err)
				}
				if got := take(t, s); got.Connections != 1 {
					t.Errorf("%+v at %v alone, want its connection", got, own)
				}
				if err := s.SetAddresses(nil); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// In the host's network everybody's sockets are seen.
func TestSockdiagInTheHostsNetworkCountsOnlyThePodsAddresses(t *testing.T) {
	pod, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pod.Close()
	port := int(portOf(pod.Addr()))
	other, err := net.Listen("tcp", fmt.Sprintf("127.0.0.3:%d", port)) // another process, the same port
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	s := newSockdiag(t, SockdiagConfig{
		Ports:     []Port{{Number: 1}, {Number: uint16(port)}, {Number: 65535, Multiplexed: true}},
		Addresses: []netip.Addr{netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:127.0.0.1")},
	})
	// Of clients on this host whose own port happens to be the same.
	for i, to := range []net.Listener{other, pod} {
		client := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, byte(i)), Port: port}}
		if got := take(t, s); got != (Sample{}) {
			t.Errorf("%+v, want nothing of others", got)
		}
		c, err := client.Dial("tcp", to.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprint(c, "ask")
		accept(t, to)
	}
	if got, want := take(t, s), (Sample{InFlight: 1, Connections: 1}); got != want {
		t.Errorf("%+v, want %+v: the application's end, and neither the client's nor the other process's", got, want)
	}
	if err := s.SetAddresses(nil); err != nil {
		t.Fatal(err)
	}
	if got := take(t, s); got.Connections != 4 {
		t.Errorf("%+v without addresses, want all four", got)
	}
}

func TestSockdiagOwnConnectionsDontCount(t *testing.T) {
	var own Own
	a := newApp(t, "127.0.0.1:0", false)
	s := newSockdiag(t, SockdiagConfig{Ports: []Port{{Number: a.port}}, Own: &own})
	tr := &http.Transport{DialContext: own.Dial((&net.Dialer{}).DialContext)}
	c := &http.Client{Transport: tr}
	for range 3 {
		if err := get(c, a.URL+"/fast"); err != nil {
			t.Fatal(err)
		}
		if got := take(t, s); got != (Sample{}) {
			t.Errorf("%+v, want nothing of the agent's own kept connection", got)
		}
	}
	// It gives up on an answer, and closes: what the application still does for it is nobody's request.
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.URL+"/gate", nil)
	if err != nil {
		t.Fatal(err)
	}
	var asking sync.WaitGroup
	asking.Go(func() { c.Do(req) })
	eventually(t, "the request", func() bool { return a.waiting.Load() == 1 })
	take(t, s)
	cancel()
	asking.Wait()
	if got := take(t, s); got != (Sample{}) || len(own.local) != 0 {
		t.Errorf("%+v, %d known, want nothing once it is closed", got, len(own.local))
	}
	if err := get(a.client(t), a.URL+"/fast"); err != nil {
		t.Fatal(err)
	}
	if got := take(t, s); got.Connections != 1 {
		t.Errorf("%+v, want the connection of another client", got)
	}
}

func TestSockdiagProbesAreTheNodesFewNewConnections(t *testing.T) {
	node := netip.MustParseAddr("127.0.0.9")
	l, s := listener(t)
	if err := s.SetNodes([]netip.Addr{node}); err != nil {
		t.Fatal(err)
	}
	ask := func(from string) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err := d.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		fmt.Fprint(c, "ask")
		accept(t, l)
	}
	ask("127.0.0.9")
	if got := take(t, s); got.InFlight != 1 || got.Probes != 0 {
		t.Errorf("%+v, want no probe: it was there at the first sample, and may be of any age", got)
	}
	ask("127.0.0.8")
	if got := take(t, s); got.InFlight != 2 || got.Probes != 0 {
		t.Errorf("%+v, want no probe: its peer is not the node", got)
	}
	ask("127.0.0.9")
	if got := take(t, s); got.InFlight != 3 || got.Probes != 1 {
		t.Errorf("%+v, want one that may be a probe", got)
	}
	ask("127.0.0.9")
	if got := take(t, s); got.InFlight != 4 || got.Probes != 0 {
		t.Errorf("%+v, want no probe: the kubelet has one under way at a time", got)
	}
}

func TestSockdiagRequestFromTheNodeThatTakesLongIsNoProbe(t *testing.T) {
	l, s := listener(t)
	if err := s.SetNodes([]netip.Addr{netip.MustParseAddr("127.0.0.9")}); err != nil {
		t.Fatal(err)
	}
	take(t, s)
	c, err := (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP("127.0.0.9")}}).Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "ask")
	accept(t, l)
	if got := take(t, s); got.InFlight != 1 || got.Probes != 1 {
		t.Errorf("%+v, want one that may be a probe", got)
	}
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		got := take(t, s)
		if got.InFlight == 1 && got.Probes == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, want one in flight that is no probe any more", got)
		}
	}
}

func TestSockdiagIsPatientUntilItHasLearnt(t *testing.T) {
	now := time.Now()
	s := &Sockdiag{cfg: SockdiagConfig{MinPatience: time.Second, MaxPatience: time.Minute}, began: now, longest: 3 * time.Second}
	reused, first, late := &socket{segsIn: 2}, &socket{segsIn: 1}, &connection{late: true}
	see := func(what string, c *connection, sock *socket, at, want time.Duration) {
		t.Helper()
		if got := s.patienceWith(c, sock, now.Add(at)); got != want {
			t.Errorf("%s: patience %v, want %v", what, got, want)
		}
	}
	see("just started", &connection{}, reused, 0, time.Minute)
	see("just started, one request", &connection{}, first, 0, 3*time.Second)
	see("watched for as long as an answer may take", &connection{}, reused, time.Minute, 3*time.Second)
	s.answers = enoughAnswers
	see("enough answers in too short a time", &connection{}, reused, enoughTime-1, time.Minute)
	see("enough answers", &connection{}, reused, enoughTime, 3*time.Second)
	see("signs of a request that waits", late, reused, time.Hour, time.Minute)
}

// A request that follows a fast one in the same tick of the kernel's clock is told by the acknowledgement that comes late.
func TestSockdiagLateAcknowledgementIsASignOfARequest(t *testing.T) {
	a := newApp(t, "127.0.0.1:0", false)
	s := newSockdiag(t, SockdiagConfig{Ports: []Port{{Number: a.port}}, MinPatience: 10 * time.Millisecond})
	take(t, s)
	s.answers, s.began = enoughAnswers, time.Now().Add(-enoughTime)
	const conns = 40
	var clients sync.WaitGroup
	for range conns {
		c := a.client(t)
		clients.Go(func() {
			// Two, so that the kernel delays acknowledgements.
			for _, path := range []string{"/fast", "/fast", "/gate"} {
				if err := get(c, a.URL+path); err != nil {
					t.Error(err)
				}
			}
		})
	}
	eventually(t, "the requests", func() bool { take(t, s); return a.waiting.Load() == conns })
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		take(t, s)
	}
	// Far beyond MinPatience. Some may have been sampled too late to see their acknowledgement.
	if got := take(t, s); got.InFlight < conns*3/4 {
		t.Errorf("%+v with %d requests in flight for a second", got, conns)
	}
	a.open()
	clients.Wait()
}

func TestNewSockdiagNamesTheBadAddress(t *testing.T) {
	unspecified := []netip.Addr{netip.IPv6Unspecified()}
	for want, cfg := range map[string]SockdiagConfig{
		"sockdiag: address is ::, must be an IP address of its own":      {Addresses: unspecified},
		"sockdiag: node is invalid IP, must be an IP address of its own": {Nodes: []netip.Addr{{}}},
	} {
		if _, err := NewSockdiag(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	var many SockdiagConfig
	for i := range 60 {
		many.Ports = append(many.Ports, Port{Number: uint16(i + 1)})
		many.Addresses = append(many.Addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
	}
	if _, err := NewSockdiag(many); err == nil || !strings.Contains(err.Error(), "60 ports at 60 addresses are more") {
		t.Errorf("%v, want that the filter is too large", err)
	}
}

// paced is a source whose samples cost something.
type paced struct {
	pause   time.Duration
	answers func(n int) Sample
	at      []time.Duration
	start   time.Time
}

func (p *paced) Name() string         { return "paced" }
func (p *paced) Pause() time.Duration { return p.pause }
func (p *paced) Sample(context.Context) (Sample, error) {
	p.at = append(p.at, time.Since(p.start))
	return p.answers(len(p.at)), nil
}

func TestDearSourceIsAskedSeldomAndStillOnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &paced{pause: 300 * time.Millisecond, start: time.Now(), answers: func(n int) Sample {
			if n <= 2 {
				return Sample{InFlight: 1}
			}
			return Sample{}
		}}
		d, err := New(Config{Sources: []Source{p}})
		if err != nil {
			t.Fatal(err)
		}
		r := d.Wait(t.Context(), time.Now())
		// In flight at 0 and 300 ms, quiet from 600 ms on: the end of the quiet period has a sample, and none is closer to
		// another than the source wants.
		if want := 1100 * time.Millisecond; r.Outcome != Quiet || r.Took != want || len(p.at) != 4 {
			t.Errorf("%s after %v, sampled at %v; want quiet after %v, 4 samples", r.Outcome, r.Took, p.at, want)
		}
	})
}

func TestProbesAreWaitedForButDontRestartTheQuietPeriod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &paced{start: time.Now()}
		// A probe every second, which takes 700 ms: there is never quiet for 500 ms.
		p.answers = func(int) Sample {
			if time.Since(p.start)%time.Second < 700*time.Millisecond {
				return Sample{InFlight: 1, Probes: 1}
			}
			return Sample{}
		}
		d, err := New(Config{Sources: []Source{p}})
		if err != nil {
			t.Fatal(err)
		}
		if r := d.Wait(t.Context(), time.Now()); r.Outcome != Quiet || r.InFlight != 0 || r.Took != 700*time.Millisecond {
			t.Errorf("%s after %v with %d in flight, want quiet when the probe is over, at 700ms", r.Outcome, r.Took, r.InFlight)
		}
		// One request beside it makes the quiet period start anew.
		p.start = time.Now()
		p.answers = func(int) Sample {
			if at := time.Since(p.start); at >= 400*time.Millisecond && at < 450*time.Millisecond {
				return Sample{InFlight: 2, Probes: 1}
			}
			return Sample{}
		}
		if r := d.Wait(t.Context(), time.Now()); r.Outcome != Quiet || r.Took != 950*time.Millisecond {
			t.Errorf("%s after %v, want quiet 500ms after the request, at 950ms", r.Outcome, r.Took)
		}
	})
}
