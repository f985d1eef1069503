package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestConnectionTroubleIsToldOnceAMinute(t *testing.T) {
	for level, want := range map[string]int{"info": 2, "debug": 4} {
		var out strings.Builder
		log, err := newLogger(level, "json", &out)
		if err != nil {
			t.Fatal(err)
		}
		clients := sparing(log)
		for range 3 {
			clients.Named("grpc").Warn("failed to connect")
		}
		clients.Named("etcd").Warn("retrying")
		if got := strings.Count(out.String(), "\n"); got != want {
			t.Errorf("level %s: %d lines, want %d:\n%s", level, got, want, out.String())
		}
	}
}

func TestEveryErrorHasALineOfItsOwn(t *testing.T) {
	a, b, c := errors.New("a"), errors.New("b"), errors.New("c")
	sentence := fmt.Errorf("%w, because of %w", a, b)
	got := flatten(errors.Join(a, errors.Join(b, sentence), c))
	if want := []error{a, b, sentence, c}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
