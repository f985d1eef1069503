package main

import (
	"testing"

	"k8s.io/client-go/rest"

	"usher.dev/usher/watcher"
)

// newRecorder is a Recorder that isn't run: Events stay in its queue.
func newRecorder(t *testing.T) *watcher.Recorder {
	t.Helper()
	client, err := watcher.NewClient(&rest.Config{Host: "http://127.0.0.1:1"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := watcher.NewRecorder(watcher.RecorderConfig{Namespace: "ns", Pod: "p", PodUID: "u", Client: client})
	if err != nil {
		t.Fatal(err)
	}
	return r
}
