package main

import (
	"errors"
	"flag"
	"strings"
	"testing"

	"usher.dev/usher/integration/rollout"
)

func TestDefaultsCompareEverything(t *testing.T) {
	o, err := parse(nil)
	if err != nil || o.Rollouts != 5 || len(o.Ways) != len(rollout.Ways()) || o.format != "table" || o.svg != "" {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestHelpNamesEveryWay(t *testing.T) {
	for _, w := range rollout.Ways() {
		if !strings.Contains(usage, w.Name) {
			t.Errorf("--help doesn't name %s", w.Name)
		}
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}

func TestBadFlagIsNamedWithWhatWouldBeRight(t *testing.T) {
	for args, want := range map[string]string{
		"-o json":             `-o is "json": want table or markdown`,
		"--only usher,prayer": `--only: way "prayer" is unknown: want some of ttl,`,
		"--rollouts 0":        "--rollouts is 0: want 1 to 100",
		"now":                 `argument "now": want flags only`,
		"--nonsense":          "-nonsense",
	} {
		if _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench-rollout %s: %v, want %q in it", args, err, want)
		}
	}
}
