package main

import (
	"errors"
	"flag"
	"strings"
	"testing"
)

func TestThirtyRolloutsUnlessSaidOtherwise(t *testing.T) {
	if n, err := parse(nil); err != nil || n != 30 {
		t.Errorf("%d, %v", n, err)
	}
	if n, err := parse([]string{"--rollouts", "2"}); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

func TestBadFlagIsNamedWithWhatWouldBeRight(t *testing.T) {
	for args, want := range map[string]string{
		"--rollouts 0": "--rollouts is 0: want 1 to 10000",
		"now":          `argument "now": want flags only`,
		"--nonsense":   "-nonsense",
	} {
		if _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("soak %s: %v, want %q in it", args, err, want)
		}
	}
}
