package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"usher.dev/usher/integration/app/wire"
)

const (
	// requestBody is small enough to share a segment with the headers; it is there so that a request cannot be sent twice.
	requestBody = "usher\n"
	// maxAnswer bounds what is kept of an answer.
	maxAnswer = 1 << 20
	// maxIdle is well above what one instance ever has in flight here, so that connections stay.
	maxIdle = 1024
	// stay is how many requests a closed-loop worker sends on one connection before it moves to another instance, so
	// that new instances get workers too.
	stay = 64
)

var errTruncated = errors.New("the stream ended before its last line")

// statusError is an answer whose status is not 200.
type statusError struct {
	code int
	text string
}

func (e *statusError) Error() string { return fmt.Sprintf("status %d: %s", e.code, e.text) }

// newTransport speaks HTTP/1.1 to one instance, without a proxy, and never closes a connection for being idle.
func newTransport() *http.Transport {
	return &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: maxIdle}
}

// newRequest builds a request that net/http never sends twice: see the package comment.
func newRequest(ctx context.Context, addr string, s Share) (*http.Request, error) {
	path := wire.SlowPath
	switch s.Kind {
	case Fast:
		path = wire.FastPath
	case Stream:
		path = wire.StreamPath
	}
	// A reader whose type net/http doesn't know gets no GetBody.
	body := struct{ io.Reader }{strings.NewReader(requestBody)}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("http://%s%s?for=%s", addr, path, s.For), body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = int64(len(requestBody))
	return req, nil
}

// post sends one request through tr and reads the whole answer.
func post(ctx context.Context, tr *http.Transport, addr string, s Share) outcome {
	o := outcome{instance: addr}
	req, err := newRequest(ctx, addr, s)
	if err != nil {
		o.err = err
		return o
	}
	// Not http.Client, which would follow redirects.
	resp, err := tr.RoundTrip(req)
	if err != nil {
		o.err = err
		return o
	}
	defer resp.Body.Close()
	o.pod = resp.Header.Get(wire.PodHeader)
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	switch {
	case err != nil:
		o.err = fmt.Errorf("read the answer: %w", err)
	case resp.StatusCode != http.StatusOK:
		o.err = &statusError{resp.StatusCode, strings.TrimSpace(string(body))}
	case s.Kind == Stream && !bytes.HasSuffix(body, []byte(wire.StreamEnd)):
		o.err = errTruncated
	}
	return o
}

func httpRoute(f *follower) route {
	return route{
		protocol: HTTP,
		shared:   httpShared{f},
		worker: func() (sender, func()) {
			w := &httpWorker{follower: f}
			return w, w.move
		},
	}
}

// httpShared sends to the instances in turn, over each one's pool of connections.
type httpShared struct{ follower *follower }

func (h httpShared) send(ctx context.Context, s Share) outcome {
	i := h.follower.acquire()
	if i == nil {
		return outcome{err: errNoInstance}
	}
	defer i.release()
	return post(ctx, i.tr, i.addr, s)
}

// httpWorker is one closed-loop client: one connection, used again at once.
type httpWorker struct {
	follower *follower
	at       *instance
	tr       *http.Transport
	left     int
}

func (w *httpWorker) send(ctx context.Context, s Share) outcome {
	if w.at != nil && (w.left == 0 || w.at.gone.Load()) {
		w.move()
	}
	if w.at == nil {
		i := w.follower.acquire()
		if i == nil {
			return outcome{err: errNoInstance}
		}
		// Only the address is used, not the instance's pool.
		i.release()
		w.at, w.tr, w.left = i, newTransport(), stay
	}
	w.left--
	o := post(ctx, w.tr, w.at.addr, s)
	if o.err != nil {
		w.move()
	}
	return o
}

// move closes the connection; the next request takes another instance.
func (w *httpWorker) move() {
	if w.tr != nil {
		w.tr.CloseIdleConnections()
	}
	w.at, w.tr = nil, nil
}
