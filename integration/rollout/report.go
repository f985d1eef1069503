package rollout

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"usher.dev/usher/integration/load"
)

// Result is what one way came to.
type Result struct {
	Way   Way
	Turns []Turn
}

// Counts of all turns.
func (r Result) Counts() load.Counts {
	var c load.Counts
	for _, t := range r.Turns {
		c.Sent += t.Load.Sent
		c.Answered += t.Load.Answered
		c.Failed += t.Load.Failed
	}
	return c
}

// Classes is how requests failed.
func (r Result) Classes() map[load.Class]int64 {
	m := map[load.Class]int64{}
	for _, t := range r.Turns {
		for c, n := range t.Load.Classes {
			m[c] += n
		}
	}
	return m
}

// Rate is the requests sent a second.
func (r Result) Rate() float64 {
	var d time.Duration
	for _, t := range r.Turns {
		d += t.Sending
	}
	if d == 0 {
		return 0
	}
	return float64(r.Counts().Sent) / d.Seconds()
}

// Beyond is the time that pods lingered beyond their longest request.
func (r Result) Beyond() (median, worst time.Duration) {
	var all []Stop
	for _, t := range r.Turns {
		all = append(all, t.Stops...)
	}
	return spread(all)
}

// Took is how long rollouts took.
func (r Result) Took() (median, worst time.Duration) {
	var all []time.Duration
	for _, t := range r.Turns {
		all = append(all, t.Took)
	}
	return middle(all)
}

// Report is what Bench saw, in the order of the ways.
type Report struct{ Results []Result }

// leastRate is what makes a load: fewer requests a second than that, and the machine was too slow for the figures to count.
const leastRate = 300

// Missed says what is not as it has to be; nothing for a good run.
func (r Report) Missed() []string {
	var out []string
	for _, res := range r.Results {
		failed := res.Counts().Failed
		if _, worst := res.Beyond(); res.Way.Ours && worst > Most {
			out = append(out, fmt.Sprintf("%s let a pod linger for %s beyond its longest request, at most %s are allowed", res.Way.Name, seconds(worst), seconds(Most)))
		}
		switch {
		case res.Way.Ours && failed > 0:
			out = append(out, fmt.Sprintf("%s lost %d requests", res.Way.Name, failed))
		case res.Way.Blind && failed == 0:
			out = append(out, fmt.Sprintf("%s lost no request: this load would not show a loss", res.Way.Name))
		}
		if rate := res.Rate(); rate < leastRate {
			out = append(out, fmt.Sprintf("%s got %.0f requests/s, want at least %d", res.Way.Name, rate, leastRate))
		}
	}
	return out
}

// Notes say what was compared.
func (r Report) Notes() []string {
	rollouts, least, most := 0, 0., 0.
	for i, res := range r.Results {
		rollouts = max(rollouts, len(res.Turns))
		if rate := res.Rate(); i == 0 || rate < least {
			least = rate
		}
		most = max(most, res.Rate())
	}
	return []string{
		fmt.Sprintf("Each way: %s of %d replicas on a real Kubernetes (one node), one at a time, grace period 30 s; %.0f to %.0f requests/s in an open and a closed loop, over "+
			"HTTP/1.1 keep-alive and gRPC, found through etcd; 95 in 100 take 1 ms, 4 take 2 s, 1 takes 8 s; beside that one idle keep-alive connection to each pod. "+
			"The application dies at once on SIGTERM.", plural(rollouts, "rollout"), replicas, least, most),
		"Beyond: from a pod's last answer, or from the moment when it would have come, to SIGTERM; 0 when SIGTERM came first. Rollout: from the patch until the last old pod " +
			"has ended and the registry names the new ones, and them only.",
		"In all ways with a hook or deregistration, the agent takes the record out as soon as the pod is deleted. Drain until no connection is open: as the shutdown managers of proxies do, " +
			"looked at every 50 ms.",
	}
}

func header() []string {
	return []string{"way", "requests", "failed", "beyond, median", "worst", "rollout, median"}
}

func (r Result) cells() []string {
	c := r.Counts()
	median, worst := r.Beyond()
	took, _ := r.Took()
	return []string{r.Way.Title, fmt.Sprint(c.Sent), how(c.Failed, r.Classes()), seconds(median), seconds(worst), seconds(took)}
}

// Table writes the report for a terminal.
func (r Report) Table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.ToUpper(strings.Join(header(), "\t")))
	for _, res := range r.Results {
		fmt.Fprintln(t, strings.Join(res.cells(), "\t"))
	}
	for _, n := range r.Notes() {
		fmt.Fprintf(t, "\n%s\n", n)
	}
	return t.Flush()
}

// Markdown writes the report for a README.
func (r Report) Markdown(w io.Writer) error {
	var b strings.Builder
	row := func(cells []string) { b.WriteString("| " + strings.Join(cells, " | ") + " |\n") }
	row(header())
	b.WriteString("| --- | ---: | --- | ---: | ---: | ---: |\n")
	for _, res := range r.Results {
		row(res.cells())
	}
	for _, n := range r.Notes() {
		b.WriteString("\n" + n + "\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// how many requests failed, and in which ways.
func how(failed int64, classes map[load.Class]int64) string {
	if failed == 0 {
		return "0"
	}
	var parts []string
	for _, c := range slices.Sorted(maps.Keys(classes)) {
		parts = append(parts, fmt.Sprintf("%s %d", c, classes[c]))
	}
	return fmt.Sprintf("%d (%s)", failed, strings.Join(parts, ", "))
}

func plural(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
