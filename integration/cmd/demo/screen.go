package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// screen prints lines and, on a terminal, keeps a status below them that is overwritten in place.
type screen struct {
	w     io.Writer
	tty   bool
	paint paint
	// columns is asked for each status, since a window changes its size.
	columns func() int

	mu     sync.Mutex
	status string // without colours
	step   string // what goes on before the timeline begins
	since  time.Time
	begun  time.Time
}

func newScreen(f *os.File) *screen {
	s := &screen{w: f, columns: func() int { return columns(f) }, begun: time.Now()}
	s.tty = s.columns() > 0 && os.Getenv("TERM") != "dumb"
	// The convention of no-color.org: set and not empty.
	s.paint = paint(s.tty && os.Getenv("NO_COLOR") == "")
	return s
}

// columns is the terminal's width: 0 if f is none, 80 if it doesn't say.
func columns(f *os.File) int {
	var size struct{ rows, columns, x, y uint16 }
	if _, _, err := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), syscall.TIOCGWINSZ, uintptr(unsafe.Pointer(&size))); err != 0 {
		return 0
	}
	if size.columns == 0 {
		return 80
	}
	return int(size.columns)
}

// println prints a line above the status.
func (s *screen) println(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.print(text)
}

func (s *screen) print(text string) {
	s.clear()
	fmt.Fprintln(s.w, text)
	s.draw()
}

func (s *screen) clear() {
	if s.status != "" {
		fmt.Fprint(s.w, "\r\x1b[K")
	}
}

func (s *screen) draw() {
	if s.status != "" {
		// A status of more than one row could not be overwritten.
		fmt.Fprint(s.w, s.paint.with(dim, cut(s.status, s.columns()-1)))
	}
}

// show replaces the status; "" takes it away. Without a terminal there is none.
func (s *screen) show(status string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.set(status)
}

func (s *screen) set(status string) {
	if !s.tty || status == s.status {
		return
	}
	s.clear()
	s.status = status
	s.draw()
}

// Write makes each line of a progress report a step: on a terminal with the time that it has taken so far, elsewhere as it
// begins, with the time since the start.
func (s *screen) Write(b []byte) (int, error) {
	for text := range strings.Lines(string(b)) {
		s.begin(strings.TrimSpace(text))
	}
	return len(b), nil
}

func (s *screen) begin(step string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.tty {
		s.print(fmt.Sprintf("%8s  %s", "+"+clock(time.Since(s.begun)), step))
		return
	}
	// The builds repeat themselves with the time that is shown anyway.
	if s.step != "" && (strings.HasPrefix(step, s.step+": ") || strings.HasPrefix(step, "built ")) {
		return
	}
	s.finish()
	s.step, s.since = step, time.Now()
	s.tick()
}

// end ends the last step.
func (s *screen) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.finish()
	s.set("")
}

// finish leaves the step under way on the screen for good, with the time that it took if that is worth a mention.
func (s *screen) finish() {
	if s.step == "" {
		return
	}
	took := ""
	if d := time.Since(s.since); d >= 50*time.Millisecond {
		took = clock(d)
	}
	s.print(s.paint.with(dim, fmt.Sprintf("%8s", took)) + "  " + s.step)
	s.step = ""
}

func (s *screen) tick() {
	if s.step != "" {
		s.set(fmt.Sprintf("%8s  %s", clock(time.Since(s.since)), s.step))
	}
}

// run keeps the time of the step under way until done is closed.
func (s *screen) run(done <-chan struct{}) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
			s.mu.Lock()
			s.tick()
			s.mu.Unlock()
		}
	}
}

// clock is a duration for somebody who waits.
func clock(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%d:%02d min", int(d.Minutes()), int(d.Seconds())%60)
}
