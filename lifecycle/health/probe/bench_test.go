package probe

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// targetEnv makes this program the application that the benchmark probes, so that only the prober's cost is measured.
const targetEnv = "USHER_PROBE_TARGET"

func TestMain(m *testing.M) {
	if os.Getenv(targetEnv) == "" {
		os.Exit(m.Run())
	}
	if err := beTarget(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// ports of the target.
type ports struct{ HTTP, HTTPS, HTTP2, GRPC int }

// beTarget serves until standard input ends, and says first where.
func beTarget() error {
	hello := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"status":"UP"}`) })
	plain, secure := httptest.NewServer(hello), httptest.NewTLSServer(hello)
	both := httptest.NewUnstartedServer(hello)
	both.EnableHTTP2 = true
	both.StartTLS()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s := grpc.NewServer()
	healthpb.RegisterHealthServer(s, health.NewServer())
	go s.Serve(l)
	port := func(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }
	if err := json.NewEncoder(os.Stdout).Encode(ports{port(plain.Listener), port(secure.Listener), port(both.Listener), port(l)}); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

func startTarget(b *testing.B) ports {
	b.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), targetEnv+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		b.Fatal(err)
	}
	var p ports
	if err := json.Unmarshal(line, &p); err != nil {
		b.Fatal(err)
	}
	return p
}

// BenchmarkTwentyProbesASecond has twenty components with a probe each, every second, for as many seconds as there are
// iterations: -benchtime=30x gives half a minute of each kind. Reported are the share of a core that this process used, user
// and system, and apart from it that of the commands which exec started, from their fork to their end; what the probers keep
// (heap after a collection, and stacks); and what they leave to the collector, a second. The target, for the whole agent: 1 %
// of a core, 2 MB.
func BenchmarkTwentyProbesASecond(b *testing.B) {
	const n = 20
	target := startTarget(b)
	specs := map[string]Spec{
		"tcp":      {TCPSocket: &TCPSocket{Port: Port{Number: target.HTTP}}},
		"http":     {HTTPGet: &HTTPGet{Port: Port{Number: target.HTTP}}},
		"https":    {HTTPGet: &HTTPGet{Port: Port{Number: target.HTTPS}, Scheme: "HTTPS"}},
		"https-h2": {HTTPGet: &HTTPGet{Port: Port{Number: target.HTTP2}, Scheme: "HTTPS"}},
		"grpc":     {GRPC: &GRPC{Port: int32(target.GRPC)}},
		"exec":     {Exec: &Exec{Command: []string{"/bin/true"}}},
	}
	for _, name := range []string{"nothing", "tcp", "http", "https", "https-h2", "grpc", "exec", "mixed"} {
		b.Run(name, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // as usher-agent does
			var runs, failed atomic.Int64
			before := memory()
			ctx, cancel := context.WithCancel(b.Context())
			ended := make(chan error, n)
			probers := []*Prober{}
			for i := range n {
				of := name
				if name == "mixed" { // what an application has: mostly http
					of = []string{"http", "http", "tcp", "grpc"}[i%4]
				}
				spec, probes := specs[of]
				if !probes { // what twenty timers cost, and the scheduling
					spec = specs["tcp"]
				}
				spec.PeriodSeconds = 1
				p, err := New(Config{Name: fmt.Sprint(name, i), Readiness: &spec})
				if err != nil {
					b.Fatal(err)
				}
				h := p.probes[Readiness].handler
				if !probes {
					h = &nothing{}
				}
				p.probes[Readiness].handler = &counted{h, &runs, &failed}
				probers = append(probers, p)
				go func() { ended <- p.Run(ctx) }()
			}
			time.Sleep(2 * time.Second) // the jittered starts, and the first runs
			runs.Store(0)
			var m0, m1 runtime.MemStats
			runtime.ReadMemStats(&m0)
			own, children, began := cpuTime(b, syscall.RUSAGE_SELF), cpuTime(b, syscall.RUSAGE_CHILDREN), time.Now()
			for b.Loop() {
				time.Sleep(time.Second)
			}
			own, children = cpuTime(b, syscall.RUSAGE_SELF)-own, cpuTime(b, syscall.RUSAGE_CHILDREN)-children
			took := time.Since(began)
			runtime.ReadMemStats(&m1)
			rate := float64(runs.Load()) / took.Seconds()
			b.ReportMetric(100*own.Seconds()/took.Seconds(), "%core")
			if children > 0 {
				b.ReportMetric(100*children.Seconds()/took.Seconds(), "%core-of-commands")
			}
			b.ReportMetric(float64(m1.TotalAlloc-m0.TotalAlloc)/took.Seconds()/1024, "garbage-KiB/s")
			b.ReportMetric(float64(memory()-before)/1024, "kept-KiB")
			b.ReportMetric(rate, "probes/s")
			b.ReportMetric(0, "ns/op") // it is a second
			cancel()
			for range probers {
				if err := <-ended; err != nil {
					b.Error(err)
				}
			}
			if failed.Load() > 0 {
				b.Errorf("%d runs failed: %s", failed.Load(), probers[0].State().Results[Readiness].Output)
			}
		})
	}
}

type nothing struct{}

func (nothing) probe(context.Context) (verdict, string, error) { return success, "", nil }

// counted counts a handler's runs.
type counted struct {
	handler
	runs, failed *atomic.Int64
}

func (c *counted) probe(ctx context.Context) (verdict, string, error) {
	v, output, err := c.handler.probe(ctx)
	c.runs.Add(1)
	if v != success && ctx.Err() == nil {
		c.failed.Add(1)
	}
	return v, output, err
}

// memory that is in use after a collection, in bytes.
func memory() int64 {
	runtime.GC()
	debug.FreeOSMemory()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// cpuTime of this process, or of its children that have ended.
func cpuTime(b *testing.B, who int) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(who, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRun is one run of a probe after the other, without a prober around it.
func BenchmarkRun(b *testing.B) {
	target := startTarget(b)
	for name, h := range map[string]handler{
		"tcp":      &tcpHandler{host: "127.0.0.1", port: at(target.HTTP), timeout: patience, dial: dialer().DialContext},
		"http":     newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTP"}, "127.0.0.1", "", at(target.HTTP), patience, dialer().DialContext),
		"https":    newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(target.HTTPS), patience, dialer().DialContext),
		"https-h2": newHTTPHandler(HTTPGet{Path: "/", Scheme: "HTTPS"}, "127.0.0.1", "", at(target.HTTP2), patience, dialer().DialContext),
		"grpc":     newGRPCHandler("127.0.0.1", target.GRPC, "", "", patience, dialer().DialContext),
		"exec":     &execHandler{command: []string{"/bin/true"}, timeout: patience},
	} {
		b.Run(name, func(b *testing.B) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // as usher-agent does
			b.ReportAllocs()
			own, children := cpuTime(b, syscall.RUSAGE_SELF), cpuTime(b, syscall.RUSAGE_CHILDREN)
			for b.Loop() {
				if v, output, err := h.probe(b.Context()); v != success {
					b.Fatal(v, strings.TrimSpace(output), err)
				}
			}
			b.ReportMetric(float64((cpuTime(b, syscall.RUSAGE_SELF)-own).Microseconds())/float64(b.N), "cpu-µs/op")
			if children = cpuTime(b, syscall.RUSAGE_CHILDREN) - children; children > 0 {
				b.ReportMetric(float64(children.Microseconds())/float64(b.N), "commands-cpu-µs/op")
			}
		})
	}
}
