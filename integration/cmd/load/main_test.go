package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/server/v3/embed"

	"usher.dev/usher/integration/load"
)

// startEtcd listens on unix sockets, which need no free port.
func startEtcd(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	client := url.URL{Scheme: "unix", Path: filepath.Join(dir, "c")}
	peer := url.URL{Scheme: "unix", Path: filepath.Join(dir, "p")}
	cfg := embed.NewConfig()
	cfg.Dir, cfg.LogLevel, cfg.UnsafeNoFsync = filepath.Join(dir, "data"), "fatal", true
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(20 * time.Second):
		t.Fatal("etcd is not ready after 20 s")
	}
	return client.String()
}

func TestRunPrintsProgressAndReportAndCountsFailures(t *testing.T) {
	etcd := startEtcd(t)
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd}})
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	var broken atomic.Bool
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if broken.Load() {
			w.WriteHeader(http.StatusInternalServerError)
		}
	}))
	defer srv.Close()
	m, err := endpoints.NewManager(cli, "shop/http")
	if err != nil {
		t.Fatal(err)
	}
	if err := m.AddEndpoint(t.Context(), "shop/http/a", endpoints.Endpoint{Addr: srv.Listener.Addr().String()}); err != nil {
		t.Fatal(err)
	}

	o, err := parse([]string{"--etcd", etcd, "--http", "shop/http", "--rate", "50", "--mix", "fast=1", "--for", "1500ms"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	var out, progress bytes.Buffer
	failed, err := run(t.Context(), o, &out, &progress)
	if err != nil || failed != 0 {
		t.Errorf("%d failed, %v; want none", failed, err)
	}
	if !strings.Contains(out.String(), "0 failed; longest answered") || !strings.Contains(progress.String(), "in flight") {
		t.Errorf("report\n%s\nprogress\n%s", out.String(), progress.String())
	}

	broken.Store(true)
	o.json, o.Duration = true, 200*time.Millisecond
	out.Reset()
	failed, err = run(t.Context(), o, &out, io.Discard)
	var r load.Report
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if err != nil || failed == 0 || r.Failed != failed || r.Classes[load.Status] != failed {
		t.Errorf("%d failed, %v; the report says %+v %v", failed, err, r.Counts, r.Classes)
	}

	o.HTTPTarget, o.FirstInstance = "shop/none", 100*time.Millisecond
	if _, err := run(t.Context(), o, io.Discard, io.Discard); err == nil || !strings.Contains(err.Error(), "no instance under shop/none/") {
		t.Errorf("an empty target: %v", err)
	}
}

func TestBadFlagsAreNamed(t *testing.T) {
	for want, args := range map[string]string{
		"--etcd is not set":                        "--http a --rate 1",
		"neither HTTPTarget nor GRPCTarget is set": "--etcd http://127.0.0.1:1 --rate 1",
		"neither Rate nor Workers is set":          "--etcd http://127.0.0.1:1 --http a",
		`kind "quick" is unknown`:                  "--etcd http://127.0.0.1:1 --http a --rate 1 --mix quick=1",
		`--mix: mix: "fast": give kind=weight`:     "--etcd http://127.0.0.1:1 --http a --rate 1 --mix fast",
		`unexpected argument "now"`:                "--etcd http://127.0.0.1:1 --http a --rate 1 now",
		"flag provided but not defined: -retry":    "--retry",
		`invalid value "x" for flag -rate`:         "--rate x",
	} {
		if _, err := parse(strings.Fields(args), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want one with %q", args, err, want)
		}
	}
	var help bytes.Buffer
	if _, err := parse([]string{"--help"}, &help); !errors.Is(err, flag.ErrHelp) || !strings.Contains(help.String(), "-workers") {
		t.Errorf("--help: %v\n%s", err, help.String())
	}
}
