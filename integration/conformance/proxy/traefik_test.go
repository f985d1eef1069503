// Package proxy_test holds what Usher writes for Traefik against Traefik itself, a whole proxy that requests go through. It
// has a package of its own because Traefik takes many minutes to build the first time.
package proxy_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/integration/internal/etcdtest"
	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry/format"
)

func TestTraefikFollows(t *testing.T) {
	binary := filepath.Join(t.TempDir(), "traefik")
	if out, err := exec.Command("go", "-C", "../traefik", "build", "-mod=readonly", "-o", binary, "github.com/traefik/traefik/v3/cmd/traefik").CombinedOutput(); err != nil {
		t.Fatalf("build Traefik: %v\n%s", err, out)
	}
	w := conformance.New(t, format.Spec{Type: "traefik", Port: "http"})
	route(t, w.Etcd)
	w.Readers = []conformance.Reader{traefik(t, binary, w.Etcd)}
	w.Run(pod(t, "api-a", "127.1.0.1"), pod(t, "api-b", "127.1.0.2"), 2)
}

// pod is an instance that answers with its address for as long as the test runs, whatever the registry says.
func pod(t *testing.T, name, v4 string) conformance.Instance {
	t.Helper()
	addr := netip.MustParseAddr(v4)
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, v4) })}
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return conformance.Instance{
		Pod: name, Addresses: []netip.Addr{addr},
		Ports: []lifecycle.Port{{Name: "http", Number: uint16(ln.Addr().(*net.TCPAddr).Port), Protocol: "TCP"}},
	}
}

// route writes the router, which is not the agent's to write.
func route(t *testing.T, etcd *etcdtest.Server) {
	t.Helper()
	for key, value := range map[string]string{"rule": "PathPrefix(`/`)", "service": "api", "entrypoints/0": "web"} {
		if _, err := etcd.Client().Put(t.Context(), "traefik/http/routers/api/"+key, value); err != nil {
			t.Fatal(err)
		}
	}
}

// traefik runs until the test ends.
func traefik(t *testing.T, binary string, etcd *etcdtest.Server) conformance.Reader {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := ln.Addr().String()
	ln.Close()
	log, err := os.Create(filepath.Join(t.TempDir(), "traefik.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "--global.checknewversion=false", "--global.sendanonymoususage=false", "--log.level=INFO",
		"--entrypoints.web.address="+at, "--providers.etcd.endpoints="+etcd.Endpoint())
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if said, err := os.ReadFile(log.Name()); t.Failed() {
			t.Logf("Traefik said: %s%v", said, err)
		}
	})
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	client := &http.Client{Transport: transport}
	get := func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+at, nil)
		if err != nil {
			return "", err
		}
		resp, err := client.Do(req)
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		switch {
		case err != nil:
			return "", err
		case resp.StatusCode == http.StatusOK:
			return string(body), nil
		case resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusServiceUnavailable:
			return "", nil // it knows of nobody
		}
		return "", fmt.Errorf("answer is %s", resp.Status)
	}
	return conformance.Reader{
		Name: "Traefik", Format: "traefik",
		Sees: func(in conformance.Instance) string { return in.Addresses[0].String() },
		Look: func(ctx context.Context) (seen []string, err error) {
			for range 6 {
				who, err := get(ctx)
				if err != nil {
					return nil, err
				}
				if who != "" {
					seen = append(seen, who)
				}
			}
			return seen, nil
		},
	}
}
