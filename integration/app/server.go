package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"usher.dev/usher/client"
	"usher.dev/usher/integration/app/wire"
)

const (
	defaultFast   = time.Millisecond
	defaultSlow   = 2 * time.Second
	defaultStream = 5 * time.Second
	minEvery      = time.Millisecond
	// maxKnobBody is more than enough for true or false.
	maxKnobBody = 64
)

// server answers both protocols. Readiness shows in gRPC's health service too; liveness in HTTP alone.
type server struct {
	pod      string
	maxFor   time.Duration
	log      *slog.Logger
	ready    atomic.Bool
	live     atomic.Bool
	inFlight atomic.Int64
	health   *health.Server

	mu      sync.Mutex
	pending chan struct{} // closed and replaced when those who wait are let go
}

func newServer(pod string, maxFor time.Duration, log *slog.Logger) *server {
	s := &server{pod: pod, maxFor: maxFor, log: log, health: health.NewServer(), pending: make(chan struct{})}
	s.live.Store(true)
	s.setReady(false)
	return s
}

func (s *server) setReady(ready bool) {
	if s.ready.Swap(ready) != ready {
		s.log.Info("readiness changed", "ready", ready)
	}
	serving := healthpb.HealthCheckResponse_NOT_SERVING
	if ready {
		serving = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", serving)
	s.health.SetServingStatus(wire.ServiceName, serving)
}

func (s *server) setLive(live bool) {
	if s.live.Swap(live) != live {
		s.log.Info("liveness changed", "live", live)
	}
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	for path, usual := range map[string]time.Duration{wire.FastPath: defaultFast, wire.SlowPath: defaultSlow} {
		mux.Handle("GET "+path, s.counted(s.answer(usual)))
		mux.Handle("POST "+path, s.counted(s.answer(usual)))
	}
	mux.Handle("GET "+wire.StreamPath, s.counted(s.stream))
	mux.Handle("POST "+wire.StreamPath, s.counted(s.stream))
	mux.Handle("POST "+wire.UploadPath, s.counted(s.upload))
	mux.Handle("PUT "+wire.UploadPath, s.counted(s.upload))
	mux.Handle("POST "+wire.PendingPath, s.counted(s.wait))
	mux.HandleFunc("PUT "+wire.PendingPath, func(w http.ResponseWriter, _ *http.Request) {
		s.letGo()
		fmt.Fprintln(w, s.pod)
	})
	for path, knob := range map[string]struct {
		state *atomic.Bool
		set   func(bool)
	}{wire.ReadyPath: {&s.ready, s.setReady}, wire.LivePath: {&s.live, s.setLive}} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			v := knob.state.Load()
			if !v {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			fmt.Fprintln(w, v)
		})
		mux.HandleFunc("PUT "+path, func(w http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxKnobBody))
			text := strings.TrimSpace(string(body))
			if err != nil || (text != "true" && text != "false") {
				http.Error(w, fmt.Sprintf("body %q: give true or false", text), http.StatusBadRequest)
				return
			}
			knob.set(text == "true")
			fmt.Fprintln(w, text)
		})
	}
	mux.HandleFunc("GET "+wire.InFlightPath, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, s.inFlight.Load())
	})
	mux.HandleFunc("POST "+wire.ToldPath, s.told)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(wire.PodHeader, s.pod)
		mux.ServeHTTP(w, r)
	})
}

// counted counts a request as in flight, and reads its body to the end before it is handled.
func (s *server) counted(next func(http.ResponseWriter, *http.Request, int64)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.inFlight.Add(1)
		defer s.inFlight.Add(-1)
		n, err := io.Copy(io.Discard, r.Body)
		if err != nil {
			http.Error(w, "read the body: "+err.Error(), http.StatusBadRequest)
			return
		}
		next(w, r, n)
	})
}

// told logs what the agent says at the moment it is heard.
func (s *server) told(w http.ResponseWriter, r *http.Request) {
	d, err := duration(r.URL.Query(), "for", 0, 0, s.maxFor)
	var e client.Event
	if err == nil {
		err = json.NewDecoder(r.Body).Decode(&e)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.log.Info("told", "event", e.Type, "id", e.ID, "state", e.State, "cause", e.Cause)
	pause(r.Context(), d) // a caller that is gone is no error
}

func (s *server) answer(usual time.Duration) func(http.ResponseWriter, *http.Request, int64) {
	return func(w http.ResponseWriter, r *http.Request, _ int64) {
		d, err := duration(r.URL.Query(), "for", usual, 0, s.maxFor)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if pause(r.Context(), d) == nil {
			fmt.Fprintln(w, s.pod)
		}
	}
}

func (s *server) wait(w http.ResponseWriter, r *http.Request, _ int64) {
	s.mu.Lock()
	pending := s.pending
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(r.Context(), s.maxFor)
	defer cancel()
	select {
	case <-pending:
	case <-ctx.Done():
	}
	fmt.Fprintln(w, s.pod)
}

func (s *server) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.pending)
	s.pending = make(chan struct{})
}

func (s *server) stream(w http.ResponseWriter, r *http.Request, _ int64) {
	q := r.URL.Query()
	d, err1 := duration(q, "for", defaultStream, 0, s.maxFor)
	every, err2 := duration(q, "every", wire.StreamEvery, minEvery, s.maxFor)
	if err := errors.Join(err1, err2); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	rc := http.NewResponseController(w)
	err := paced(r.Context(), d, every, func() error {
		if _, err := fmt.Fprintln(w, s.pod); err != nil {
			return err
		}
		return rc.Flush()
	})
	if err == nil {
		fmt.Fprint(w, wire.StreamEnd)
	}
}

func (s *server) upload(w http.ResponseWriter, _ *http.Request, n int64) {
	fmt.Fprintf(w, "%s %d\n", s.pod, n)
}

func (s *server) grpcServer() *grpc.Server {
	gs := grpc.NewServer()
	gs.RegisterService(wire.ServiceDesc(), s)
	healthpb.RegisterHealthServer(gs, s.health)
	return gs
}

// Wait implements wire.Server.
func (s *server) Wait(ctx context.Context, in *durationpb.Duration) (*wrapperspb.StringValue, error) {
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	d, err := s.asked(in)
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, d); err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return wrapperspb.String(s.pod), nil
}

// Stream implements wire.Server.
func (s *server) Stream(in *durationpb.Duration, ss grpc.ServerStream) error {
	s.inFlight.Add(1)
	defer s.inFlight.Add(-1)
	d, err := s.asked(in)
	if err != nil {
		return err
	}
	return paced(ss.Context(), d, wire.StreamEvery, func() error { return ss.SendMsg(wrapperspb.String(s.pod)) })
}

func (s *server) asked(in *durationpb.Duration) (time.Duration, error) {
	if d := in.AsDuration(); in.IsValid() && d >= 0 && d <= s.maxFor {
		return d, nil
	}
	return 0, status.Errorf(codes.InvalidArgument, "duration %v: give 0s to %v", in.AsDuration(), s.maxFor)
}

// duration reads a duration from the query; when it is absent, the usual one as far as the bound allows.
func duration(q url.Values, name string, usual, least, most time.Duration) (time.Duration, error) {
	text := q.Get(name)
	if text == "" {
		return min(usual, most), nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < least || d > most {
		return 0, fmt.Errorf("%s=%s: give a duration from %v to %v, such as %s", name, strconv.Quote(text), least, most, usual)
	}
	return d, nil
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// paced calls send at once and then once per interval until d is over.
func paced(ctx context.Context, d, every time.Duration, send func() error) error {
	end := time.Now().Add(d)
	for {
		if err := send(); err != nil {
			return err
		}
		left := time.Until(end)
		if left <= 0 {
			return nil
		}
		if err := pause(ctx, min(every, left)); err != nil {
			return err
		}
	}
}
