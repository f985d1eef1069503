package watcher

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// reportingController is the name under which Events are written.
	reportingController = "usher.dev/usher-agent"
	// recorderQueue is how many Events wait at most.
	recorderQueue = 32
	// recorderTimeout is for one Event; recorderFlush is for all that are left when the Recorder ends.
	recorderTimeout = 5 * time.Second
	recorderFlush   = time.Second
	// maxMessage is the limit that the API sets for an Event's note, and maxName for an object's name.
	maxMessage = 1024
	maxName    = 253
)

// RecorderConfig is what a Recorder needs. Pod and its identity are those of the own Pod.
type RecorderConfig struct {
	Namespace, Pod, PodUID string
	Node                   string // optional: the Event's source host
	Client                 *Client
	Logger                 *zap.Logger // optional
}

// Recorder writes Events on the own Pod, best effort: it never blocks, and an Event that can't be written is dropped
// and counted. Unlike client-go's recorder it doesn't fold repeated ones into a series: an instance changes state a few
// times in its life.
type Recorder struct {
	cfg     RecorderConfig
	queue   chan *corev1.Event
	nano    atomic.Int64
	dropped atomic.Uint64
}

// NewRecorder makes a Recorder.
func NewRecorder(cfg RecorderConfig) (*Recorder, error) {
	switch {
	case cfg.Namespace == "" || cfg.Pod == "":
		return nil, fmt.Errorf("watcher: a Recorder needs Namespace and Pod, they are %q and %q", cfg.Namespace, cfg.Pod)
	case cfg.Client == nil:
		return nil, errors.New("watcher: a Recorder needs a Client")
	}
	if cfg.Logger == nil {
		cfg.Logger = zap.NewNop()
	}
	return &Recorder{cfg: cfg, queue: make(chan *corev1.Event, recorderQueue)}, nil
}

// Event queues an Event. eventType is "Normal" or "Warning"; reason is one CamelCase word; a message longer than 1024
// bytes is cut. It may be called from any goroutine, before, while and after Run.
func (r *Recorder) Event(eventType, reason, message string) {
	now := time.Now()
	if len(message) > maxMessage {
		message = message[:maxMessage]
	}
	name := fmt.Sprintf(".%x", r.unique(now))
	name = r.cfg.Pod[:min(len(r.cfg.Pod), maxName-len(name))] + name
	e := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: r.cfg.Namespace, Name: name},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: r.cfg.Namespace, Name: r.cfg.Pod, UID: types.UID(r.cfg.PodUID),
		},
		Type:                eventType,
		Reason:              reason,
		Message:             message,
		FirstTimestamp:      metav1.NewTime(now),
		LastTimestamp:       metav1.NewTime(now),
		Count:               1,
		Source:              corev1.EventSource{Component: "usher-agent", Host: r.cfg.Node},
		ReportingController: reportingController,
		ReportingInstance:   r.cfg.Pod,
	}
	select {
	case r.queue <- e:
	default:
		r.drop(e, errors.New("too many Events wait"))
	}
}

// unique is the time in nanoseconds, moved on if two Events fall on the same one: names must differ.
func (r *Recorder) unique(now time.Time) int64 {
	for {
		last := r.nano.Load()
		n := max(now.UnixNano(), last+1)
		if r.nano.CompareAndSwap(last, n) {
			return n
		}
	}
}

// Dropped counts the Events that were not written.
func (r *Recorder) Dropped() uint64 { return r.dropped.Load() }

// Run writes Events until ctx ends, and then what is left, for at most a second. It returns nil.
func (r *Recorder) Run(ctx context.Context) error {
	// A request under way when ctx ends has the same last second.
	reqCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(recorderFlush):
			cancel()
		case <-reqCtx.Done():
		}
	})
	defer stop()
	for {
		select {
		case e := <-r.queue:
			r.write(reqCtx, e)
		case <-ctx.Done():
			for len(r.queue) > 0 { // nobody else takes from it
				r.write(reqCtx, <-r.queue)
			}
			return nil
		}
	}
}

func (r *Recorder) write(ctx context.Context, e *corev1.Event) {
	ctx, cancel := context.WithTimeout(ctx, recorderTimeout)
	defer cancel()
	err := r.cfg.Client.core.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
	if err != nil {
		r.drop(e, err)
	}
}

func (r *Recorder) drop(e *corev1.Event, err error) {
	r.dropped.Add(1)
	r.cfg.Logger.Warn("Event not written", zap.String("reason", e.Reason), zap.String("message", e.Message), zap.Error(err))
}
