// Package faults_test breaks things between the registrar and a real etcd, all of them processes of their own, and holds what
// follows against stated limits: how long until the instance is back, whether a record is left that nobody keeps, and how
// long consumers found nothing.
//
//	registrant (SIGKILL, SIGSTOP) --> Link (cut, hold, slow) --> etcd m1 <-- Link, one each way --> m2, m3
//	observer: a watch on everything, by ways of its own
//
// The run ends with a table of all faults. `go test ./faults -table ../docs/reliability.md` writes it into that page.
package faults_test

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"usher.dev/usher/integration/cluster"
)

const (
	ttl = 3 * time.Second
	// ghostAfter is how long a record may outlive its agent: its TTL, and a second for etcd, which looks for expired
	// leases twice a second.
	ghostAfter = ttl + time.Second
	// patience is for what has no limit of its own.
	patience = 30 * time.Second
)

var (
	etcdBinary, registrantBinary string

	table results
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	page := flag.String("table", "", "file whose table of faults is replaced by this run's")
	flag.Parse()
	if !isSet("test.parallel") {
		flag.Set("test.parallel", "6") // these tests wait; they don't compute
	}
	binaries, err := cluster.Build(context.Background(), os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	etcdBinary = filepath.Join(binaries.Dir, "etcd")
	dir, err := os.MkdirTemp("", "faults")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	registrantBinary = filepath.Join(dir, "registrant")
	if out, err := exec.Command("go", "build", "-tags", "clockstep", "-ldflags", "-checklinkname=0", "-o", registrantBinary, "./registrant").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build the registrant: %v\n%s", err, out)
		return 1
	}
	code := m.Run()
	fmt.Print(table.text())
	if *page != "" && code == 0 {
		if err := table.writeTo(*page); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

func isSet(name string) (set bool) {
	flag.Visit(func(f *flag.Flag) { set = set || f.Name == name })
	return set
}

// row is what became of one fault.
type row struct {
	number      int // of its test, in the order of the table
	fault       string
	heal, limit time.Duration // from the fault's end, or from its begin if it has none, until registered
	ghosts      int           // records that nobody kept, ghostAfter later
	gap, gapMax time.Duration // how long consumers found nothing; gapMax is 0 where they must find the instance throughout
	note        string
}

type results struct {
	mu   sync.Mutex
	rows []row
}

func (r *results) add(one row) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rows = append(r.rows, one)
	slices.SortFunc(r.rows, func(a, b row) int { return a.number - b.number })
}

// cells is the table with its head, as text.
func (r *results) cells() [][]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	cells := [][]string{{"fault", "time to heal", "limit", "ghosts", "gap", "gap allowed"}}
	for _, o := range r.rows {
		allowed := "none"
		if o.gapMax > 0 {
			allowed = seconds(o.gapMax)
		}
		if o.note != "" {
			allowed += ", " + o.note
		}
		cells = append(cells, []string{o.fault, seconds(o.heal), seconds(o.limit), fmt.Sprint(o.ghosts), seconds(o.gap), allowed})
	}
	return cells
}

func seconds(d time.Duration) string {
	switch {
	case d == 0:
		return "none"
	case d < 10*time.Second:
		return fmt.Sprintf("%.2f s", d.Seconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func (r *results) text() string {
	cells := r.cells()
	if len(cells) == 1 {
		return ""
	}
	width := make([]int, len(cells[0]))
	for _, line := range cells {
		for i, c := range line {
			width[i] = max(width[i], len(c))
		}
	}
	var b strings.Builder
	for _, line := range cells {
		for i, c := range line {
			fmt.Fprintf(&b, "%-*s  ", width[i], c)
		}
		b.WriteString("\n")
	}
	return b.String()
}

const tableBegin, tableEnd = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"

// writeTo puts the table between the marks in a page.
func (r *results) writeTo(page string) error {
	text, err := os.ReadFile(page)
	if err != nil {
		return fmt.Errorf("write the table of faults: %w", err)
	}
	before, rest, ok := strings.Cut(string(text), tableBegin)
	_, after, ok2 := strings.Cut(rest, tableEnd)
	if !ok || !ok2 {
		return fmt.Errorf("write the table of faults: %s has no lines %q and %q", page, tableBegin, tableEnd)
	}
	var b strings.Builder
	for i, line := range r.cells() {
		b.WriteString("| " + strings.Join(line, " | ") + " |\n")
		if i == 0 {
			b.WriteString(strings.Repeat("| --- ", len(line)) + "|\n")
		}
	}
	return os.WriteFile(page, []byte(before+tableBegin+b.String()+tableEnd+after), 0o644)
}

func eventually(t testing.TB, within time.Duration, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}
