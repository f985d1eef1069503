package load

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestEveryFailureHasItsClass(t *testing.T) {
	dial := func(errno syscall.Errno) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", errno)}
	}
	unavailable := func(text string) error { return status.Error(codes.Unavailable, text) }
	for _, c := range []struct {
		err  error
		want Class
	}{
		{errNoInstance, NoInstance},
		{&statusError{code: 503}, Status},
		{dial(syscall.ECONNREFUSED), Refused},
		{dial(syscall.EHOSTUNREACH), Unreachable},
		{dial(syscall.ENETUNREACH), Unreachable},
		{dial(syscall.ETIMEDOUT), Timeout},
		{fmt.Errorf("read the answer: %w", syscall.ECONNRESET), Reset},
		{syscall.EPIPE, Reset},
		{io.ErrUnexpectedEOF, EOF},
		{errors.New("http: server closed idle connection"), EOF},
		{errors.New("a surprise"), Other},
		{status.Error(codes.DeadlineExceeded, "context deadline exceeded"), Timeout},
		{status.Error(codes.InvalidArgument, "duration"), Status},
		{unavailable("no children to pick from"), NoInstance},
		{unavailable(`connection error: desc = "transport: Error while dialing: dial tcp 10.0.0.1:80: connect: connection refused"`), Refused},
		{unavailable("dial tcp 10.0.0.1:80: connect: no route to host"), Unreachable},
		{unavailable("error reading from server: read tcp: connection reset by peer"), Reset},
		{unavailable("error reading from server: EOF"), EOF},
		{unavailable("the server is shutting down"), Unavailable},
	} {
		if got := classify(c.err); got != c.want {
			t.Errorf("%v is %q, want %q", c.err, got, c.want)
		}
	}
}

func exampleReport() Report {
	y := newTally(30 * time.Second)
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	y.begin(start)
	for i := range 100 {
		y.sent(HTTP, Fast)
		y.add(Result{Protocol: HTTP, Kind: Fast, Instance: "10.0.0.1:80", Pod: "shop-1", Scheduled: start, Latency: time.Duration(i+1) * time.Millisecond})
	}
	for range 23 {
		y.sent(GRPC, Slow)
		y.add(Result{Protocol: GRPC, Kind: Slow, Scheduled: start.Add(1500 * time.Millisecond), Latency: time.Second, Class: Refused, Err: "connection refused"})
	}
	y.end(start.Add(time.Minute))
	return y.report()
}

func TestReportCountsAndMeasures(t *testing.T) {
	r := exampleReport()
	checkSums(t, r)
	if want := (Counts{123, 100, 23}); r.Counts != want {
		t.Errorf("%+v, want %+v", r.Counts, want)
	}
	l := kindOf(r, HTTP, Fast).Latency
	for _, q := range []struct {
		name      string
		got, want time.Duration
	}{{"p50", l.P50, 50 * time.Millisecond}, {"p90", l.P90, 90 * time.Millisecond}, {"p99", l.P99, 99 * time.Millisecond}} {
		if d := (q.got - q.want).Abs(); d > q.want/500 {
			t.Errorf("%s is %v, want %v to three digits", q.name, q.got, q.want)
		}
	}
	if l.Max != 100*time.Millisecond || r.Longest.Latency != l.Max || r.Longest.Pod != "shop-1" {
		t.Errorf("max %v, longest %+v; want 100 ms by shop-1", l.Max, r.Longest)
	}
}

func TestReportReadsWell(t *testing.T) {
	text := exampleReport().String()
	for _, want := range []string{
		"123 requests in 1m0s: 100 answered, 23 failed; longest answered 100ms (http fast, shop-1)\n",
		"protocol  kind  sent  answered  failed",
		"http  fast   100       100       0",
		"grpc  slow    23         0      23",
		"http  10.0.0.1:80  shop-1       100       0",
		"grpc         none       -         0      23",
		"\nfailed: refused 23\n",
		"  +1.5s after 1s  grpc slow  no instance  refused: connection refused\n",
		"  and 3 more\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
}

func TestReportSurvivesJSON(t *testing.T) {
	want := exampleReport()
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Report
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got\n%+v\nwant\n%+v", got, want)
	}
}
