package notify

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"usher.dev/usher/internal/api"
)

const (
	// ringSize bounds the events that are kept for readers that lag or come back: hours of a flapping instance, and some
	// 50 KB at most.
	ringSize = 256
	// maxStreams bounds the streams at one time. The application's processes have one each; more is a leak in one of them.
	maxStreams = 64
	// keepAlive is how long a stream is silent at most, so that either end notices when the other has gone. The HTML
	// standard, which defines server-sent events, recommends 15 s.
	keepAlive = 15 * time.Second
	// writeTimeout is for a client that doesn't read: it is let go, and may come back for what it missed.
	writeTimeout = 5 * time.Second
	// reconnectAfter is what clients are asked to wait before they come back.
	reconnectAfter = time.Second
	// maxRun bounds the run in a Last-Event-ID.
	maxRun = 64
)

// Hub keeps the newest events, and streams them as server-sent events.
type Hub struct {
	run string

	mu      sync.Mutex
	ring    []api.Event   // oldest first, IDs without a gap
	last    uint64        // ID of the newest event; 0: none yet
	changed chan struct{} // closed and replaced with every event, closed with the hub
	closed  bool
	streams int
}

// NewHub makes a hub with no event yet.
func NewHub() *Hub { return &Hub{run: rand.Text()[:12], changed: make(chan struct{})} }

// Publish tells everyone. It fills in ID and Run, and Time when it is zero. An event of the same type and state as the one
// before it is news to nobody, and left out, as is one after Close. It never blocks. What e points to must not be changed
// any more.
func (h *Hub) Publish(e api.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.ring); h.closed || n > 0 && h.ring[n-1].Type == e.Type && h.ring[n-1].State == e.State {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	h.last++
	e.ID, e.Run, e.Missed = h.last, h.run, false
	if len(h.ring) == ringSize {
		copy(h.ring, h.ring[1:])
		h.ring = h.ring[:ringSize-1]
	}
	h.ring = append(h.ring, e)
	close(h.changed)
	h.changed = make(chan struct{})
}

// Close ends the streams and the receivers, each once it has the events published so far.
func (h *Hub) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.closed {
		h.closed = true
		close(h.changed)
	}
}

// Streams is how many clients follow now.
func (h *Hub) Streams() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.streams
}

// after gives the event that follows the one with the ID pos. When that has left the ring already, it is the newest,
// marked. When there is none yet, more is closed as soon as there is; nil when there will be none.
func (h *Hub) after(pos uint64) (e api.Event, ok bool, more <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	before := h.last - uint64(len(h.ring)) // ID of the newest event that left the ring
	switch {
	case pos == h.last && h.closed:
		return e, false, nil
	case pos == h.last:
		return e, false, h.changed
	case pos < before:
		e = h.ring[len(h.ring)-1]
		e.Missed = true
		return e, true, nil
	}
	return h.ring[pos-before], true, nil
}

// newest is the newest event, the zero Event before the first.
func (h *Hub) newest() api.Event {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.ring) == 0 {
		return api.Event{}
	}
	return h.ring[len(h.ring)-1]
}

// resume is the position after which a client goes on that has seen the event with that id last, "" for none.
func (h *Hub) resume(id string) (pos uint64, missed bool, err error) {
	run, n, err := parseID(id)
	if err != nil {
		return 0, false, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if id != "" && run == h.run && n <= h.last {
		return n, false, nil
	}
	return max(h.last, 1) - 1, id != "", nil
}

// wireID is an event's id in a stream.
func wireID(e api.Event) string { return e.Run + "-" + strconv.FormatUint(e.ID, 10) }

func parseID(id string) (run string, n uint64, err error) {
	if id == "" {
		return "", 0, nil
	}
	run, number, ok := strings.Cut(id, "-")
	if ok {
		n, err = strconv.ParseUint(number, 10, 64)
	}
	odd := func(r rune) bool { return (r < '0' || r > '9') && (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') }
	if !ok || err != nil || run == "" || len(run) > maxRun || strings.ContainsFunc(run, odd) {
		return "", 0, fmt.Errorf("Last-Event-ID %s: want an id as an event of this stream carries it, RUN-NUMBER, or none", quote(id))
	}
	return run, n, nil
}

// quote is for texts that come from elsewhere and end up in a message.
func quote(s string) string {
	const most = 80
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strconv.Quote(s)
}

// ServeHTTP streams the events. The stream ends with the client, with the hub, and when the client doesn't read.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet {
		w.Header().Set("Allow", http.MethodGet)
		refuse(w, http.StatusMethodNotAllowed, fmt.Sprintf("method %s: want GET", r.Method))
		return
	}
	// The header is the newer one: clients that begin with the parameter come back with the header and the same address.
	id := r.Header.Get("Last-Event-ID")
	if id == "" {
		id = r.URL.Query().Get("lastEventId")
	}
	pos, missed, err := h.resume(id)
	if err != nil {
		refuse(w, http.StatusBadRequest, err.Error())
		return
	}
	if !h.enter() {
		w.Header().Set("Retry-After", "1")
		refuse(w, http.StatusServiceUnavailable, fmt.Sprintf("%d clients follow the events already, which is the most at one time", maxStreams))
		return
	}
	defer h.leave()

	control := http.NewResponseController(w)
	extend := func() { control.SetWriteDeadline(time.Now().Add(writeTimeout)) } // what can't do it has no socket
	defer extend()                                                              // for the end of the body
	write := func(text string) bool {
		extend()
		_, err := w.Write([]byte(text))
		return err == nil && control.Flush() == nil
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Accel-Buffering", "no") // nginx would hold events back
	w.Header().Set("Connection", "close")     // the deadline is the connection's
	w.WriteHeader(http.StatusOK)
	if !write(fmt.Sprintf("retry: %d\n\n", reconnectAfter.Milliseconds())) {
		return
	}
	idle := time.NewTimer(keepAlive)
	defer idle.Stop()
	for {
		e, ok, more := h.after(pos)
		switch {
		case ok:
			e.Missed = e.Missed || missed
			missed = false
			data, err := json.Marshal(e)
			if err != nil || !write("id: "+wireID(e)+"\nevent: "+string(e.Type)+"\ndata: "+string(data)+"\n\n") {
				return
			}
			pos = e.ID
			continue
		case more == nil:
			return
		}
		idle.Reset(keepAlive)
		select {
		case <-more:
		case <-idle.C:
			if !write(": \n\n") {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

func (h *Hub) enter() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.streams == maxStreams {
		return false
	}
	h.streams++
	return true
}

func (h *Hub) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.streams--
}

func refuse(w http.ResponseWriter, code int, why string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(api.Error{Error: why}) // a caller that is gone is no error
}
