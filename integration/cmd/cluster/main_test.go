package main

import (
	"bytes"
	"errors"
	"flag"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestWrongUseIsToldApart(t *testing.T) {
	for args, want := range map[string]string{
		"":                        "no command: want up, down, load or kubeconfig",
		"pu":                      `unknown command "pu": want up, down, load or kubeconfig`,
		"up now":                  `up: unexpected argument "now"`,
		"up --dri x":              "up: flag provided but not defined: -dri",
		"down --dir":              "down: flag needs an argument: -dir",
		"down -registry-no-fsync": "down: flag provided but not defined: -registry-no-fsync",
		"load":                    "load: want NAME FILE",
		"load app:dev":            "load: want NAME FILE",
		"load app:dev a/x b/x":    "load: a/x and b/x would both be /x in the image",
	} {
		err := run(t.Context(), strings.Fields(args), &bytes.Buffer{}, &bytes.Buffer{})
		if !errors.Is(err, errUsage) || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("cluster %s: %v\nwant %q and the exit code of wrong use", args, err, want)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range []string{"--help", "-h", "help", "up --help"} {
		if err := run(t.Context(), strings.Fields(args), &bytes.Buffer{}, &bytes.Buffer{}); !errors.Is(err, flag.ErrHelp) {
			t.Errorf("cluster %s: %v", args, err)
		}
	}
}

func TestWithoutAClusterEachCommandSaysSo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	for _, args := range []string{"kubeconfig --dir " + dir, "load --dir " + dir + " app:dev /bin/true"} {
		err := run(t.Context(), strings.Fields(args), &bytes.Buffer{}, &bytes.Buffer{})
		if err == nil || err.Error() != "no cluster is up in "+dir {
			t.Errorf("cluster %s: %v", args, err)
		}
	}
	var stderr bytes.Buffer
	if err := run(t.Context(), []string{"down", "--dir", dir}, &bytes.Buffer{}, &stderr); err != nil {
		t.Errorf("cluster down: %v, want it to be done already", err)
	}
	if want := "nothing to take down: no cluster is up in " + dir + "\n"; stderr.String() != want {
		t.Errorf("cluster down printed %q, want %q", &stderr, want)
	}
}

func TestFilesLandByTheirNameOrWhereTold(t *testing.T) {
	image, err := parseImage([]string{"app:dev", "../bin/app", "/etc/app.yaml=config/x=y.yaml", "odd=name"})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"/app": "../bin/app", "/etc/app.yaml": "config/x=y.yaml", "/odd=name": "odd=name"}
	if !maps.Equal(image.Files, want) {
		t.Errorf("files %v, want %v", image.Files, want)
	}
	if !slices.Equal(image.Entrypoint, []string{"/app"}) {
		t.Errorf("entrypoint %v, want the first file", image.Entrypoint)
	}
}
