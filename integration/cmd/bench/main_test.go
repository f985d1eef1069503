package main

import (
	"errors"
	"flag"
	"strings"
	"testing"
	"time"
)

func TestDefaultsMeasureWhatTheTableNeeds(t *testing.T) {
	o, err := parse(nil)
	if err != nil || o.Rounds < 200 || o.Agents < 2 || o.Idle < time.Minute || o.Only != "" || o.format != "table" || o.strict {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestBadFlagIsNamedWithWhatWouldBeRight(t *testing.T) {
	for args, want := range map[string]string{
		"-o json":     `-o is "json": want table or markdown`,
		"--only etcd": `--only is "etcd": want latency, sidecars, registry or drain`,
		"--rounds 10": "--rounds is 10: want at least 200",
		"--agents 0":  "--agents is 0: want 1 to 20",
		"--idle 1s":   "--idle is 1s: want at least 10s",
		"now":         `argument "now": want flags only`,
		"--nonsense":  "-nonsense",
	} {
		if _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("bench %s: %v, want %q in it", args, err, want)
		}
	}
	if _, err := parse([]string{"--help"}); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("--help: %v", err)
	}
}
