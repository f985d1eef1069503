package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"time"

	"usher.dev/usher/internal/api"
)

// prestopStart measures from just before the fork to the request's arrival at an agent, whose part is played here.
func prestopStart(ctx context.Context, program string, rounds int) ([]time.Duration, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listening for usher-prestop: %w", err)
	}
	arrived := make(chan time.Time, 1)
	mux := http.NewServeMux()
	mux.HandleFunc(api.PrestopPath, func(w http.ResponseWriter, _ *http.Request) {
		arrived <- time.Now()
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(api.Verdict{Outcome: api.Drained, Message: "drained", Withdrawn: true})
	})
	server := &http.Server{Handler: mux}
	go server.Serve(ln)
	defer server.Close()

	var took []time.Duration
	for i := range warmup + rounds {
		cmd := exec.CommandContext(ctx, program, "--agent", "http://"+ln.Addr().String())
		begun := time.Now()
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("running usher-prestop: %w\n%s", err, out)
		}
		select {
		case at := <-arrived:
			if i >= warmup {
				took = append(took, at.Sub(begun))
			}
		default:
			return nil, fmt.Errorf("usher-prestop ended well without having called the agent")
		}
	}
	return took, nil
}
