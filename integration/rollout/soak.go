package rollout

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"usher.dev/usher/integration/load"
)

// steady is a pod of the same Service that no rollout replaces: what its agent leaks, it leaks for the whole soak.
const steady = "steady"

// What an agent may have more of at the end. Goroutines and files come and go with requests and probes; memory with the
// garbage collector's cycle.
const (
	moreGoroutines = 5
	moreFiles      = 5
	moreMemory     = 8e6
)

// Vitals of an agent, by its own metrics.
type Vitals struct{ Goroutines, Files, Memory float64 }

func (v Vitals) String() string {
	return fmt.Sprintf("%.0f goroutines, %.0f files, %.1f MB", v.Goroutines, v.Files, v.Memory/1e6)
}

// Leaked says whether v is what grew out of before by more than chance.
func (v Vitals) Leaked(before Vitals) bool {
	return v.Goroutines > before.Goroutines+moreGoroutines || v.Files > before.Files+moreFiles || v.Memory > before.Memory+moreMemory
}

// Endurance is what Soak saw.
type Endurance struct {
	Rollouts      int
	Took          time.Duration
	Load          load.Report
	Stops         []Stop
	Before, After Vitals // of the agent that stayed
}

func (e Endurance) String() string {
	median, worst := spread(e.Stops)
	return fmt.Sprintf("%s in %s, %d requests, %s failed; SIGTERM came %s after the last answer of %d pods, at worst %s; the agent that stayed: %s, then %s",
		plural(e.Rollouts, "rollout"), e.Took.Round(time.Second), e.Load.Sent, how(e.Load.Failed, e.Load.Classes), seconds(median), len(e.Stops), seconds(worst), e.Before, e.After)
}

// Missed says what is not as it has to be; nothing for a good run.
func (e Endurance) Missed() []string {
	var out []string
	if e.Load.Failed > 0 || e.Load.Answered != e.Load.Sent {
		out = append(out, fmt.Sprintf("%d requests were sent, %d answered", e.Load.Sent, e.Load.Answered))
	}
	if _, worst := spread(e.Stops); worst > Most {
		out = append(out, fmt.Sprintf("a pod lingered for %s beyond its longest request, at most %s are allowed", seconds(worst), seconds(Most)))
	}
	if e.After.Leaked(e.Before) {
		out = append(out, fmt.Sprintf("the agent that stayed had %s, now it has %s", e.Before, e.After))
	}
	return out
}

// Soak replaces Usher's pods again and again under a load that never stops.
func Soak(ctx context.Context, cfg Config) (_ Endurance, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	s, err := deploy(ctx, cfg.Stack, usher())
	defer func() { err = errors.Join(err, removeAll(context.WithoutCancel(ctx), []*site{s})) }()
	if err == nil {
		err = s.addSteady(ctx)
	}
	if err == nil {
		cfg.say("waiting for %d pods", replicas+s.extra)
		err = s.until(ctx, turnWithin, s.settled)
	}
	if err != nil {
		return Endurance{}, err
	}
	tr, err := s.send(ctx, stop)
	if err != nil {
		return Endurance{}, err
	}
	var e Endurance
	var last Turn
	begun := time.Now()
	for e.Rollouts < cfg.Rollouts {
		turn, err := s.rollOut(ctx, lead)
		if err != nil {
			return e, err
		}
		if e.Rollouts == 0 {
			// Not before: by then the agent has seen all that it ever sees.
			if e.Before, err = s.vitals(ctx); err != nil {
				return e, err
			}
		}
		e.Rollouts++
		turn.Load = tr.generator.Snapshot()
		turn.Stops = s.stops(turn.old)
		e.Stops = append(e.Stops, turn.Stops...)
		cfg.say("rollout %d of %d in %s: %s", e.Rollouts, cfg.Rollouts, seconds(turn.Took), turn)
		last = turn
		cfg.tell(s, turn)
		s.forget(turn.old)
	}
	e.After, err = s.vitals(ctx)
	tr.stop()
	<-tr.ended
	cfg.tell(s, last)
	e.Took, e.Load = time.Since(begun), tr.report
	return e, err
}

// addSteady makes one more pod, like the Deployment's, but its own master.
func (s *site) addSteady(ctx context.Context) error {
	dep, err := s.stack.Client.AppsV1().Deployments(s.namespace).Get(ctx, service, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("reading the Deployment: %w", err)
	}
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: steady, Labels: dep.Spec.Template.Labels}, Spec: dep.Spec.Template.Spec}
	if _, err := s.stack.Client.CoreV1().Pods(s.namespace).Create(ctx, p, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("making the pod that stays: %w", err)
	}
	s.extra = 1
	return nil
}

// forget drops what is known of pods that are gone.
func (s *site) forget(pods []*pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range pods {
		if p.gone {
			delete(s.pods, p.name)
			if s.byIP[p.ip] == p {
				delete(s.byIP, p.ip)
			}
		}
	}
}

// vitals asks the agent of the pod that stays.
func (s *site) vitals(ctx context.Context) (Vitals, error) {
	s.mu.Lock()
	ip := s.pods[steady].ip
	s.mu.Unlock()
	v, err := readVitals(ctx, "http://"+net.JoinHostPort(ip, "7400")+"/metrics")
	if err != nil {
		return v, fmt.Errorf("asking the agent that stays: %w", err)
	}
	return v, nil
}

func readVitals(ctx context.Context, url string) (Vitals, error) {
	var v Vitals
	wanted := map[string]*float64{"go_goroutines": &v.Goroutines, "process_open_fds": &v.Files, "process_resident_memory_bytes": &v.Memory}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return v, err
	}
	resp, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(req)
	if err != nil {
		return v, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		if to := wanted[name]; to != nil {
			if *to, err = strconv.ParseFloat(value, 64); err != nil {
				return v, fmt.Errorf("metric %s: %w", name, err)
			}
			delete(wanted, name)
		}
	}
	if err := lines.Err(); err != nil {
		return v, err
	}
	if len(wanted) > 0 {
		return v, fmt.Errorf("status %d, without the metrics of the process: %v", resp.StatusCode, slices.Sorted(maps.Keys(wanted)))
	}
	return v, nil
}
