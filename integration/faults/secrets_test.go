package faults_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"usher.dev/usher/registry"
)

// Simple tokens of etcd end when they have not been used for --auth-token-ttl.
func TestAuthTokenExpires(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1, "--auth-token-ttl", "1", "--bcrypt-cost", "4")
	w.env = []string{"ETCDCTL_USER=usher:first"}
	w.enableAuth("first")
	r := w.register(pod{})
	f := w.fault(130, "auth token expired, then keys deleted", atOnce, atOnce)
	for end := time.Now().Add(2 * ttl); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if !r.advertised() {
			t.Fatalf("an expired token took it out: %+v", r.status())
		}
	}
	name := r.status().Keys[1]
	if _, err := w.cli.Delete(t.Context(), name); err != nil {
		t.Fatal(err)
	}
	f.over()
	eventually(t, patience, "the deletion is seen", func() bool { return w.seen.longestNow() > 0 })
	f.healed(r)
	if r.said("lease was lost") {
		t.Errorf("the lease was lost: %s", r.saidAll())
	}
}

func TestPasswordRotated(t *testing.T) {
	rotate := func(w *world, to string) {
		w.t.Helper()
		if _, err := w.cli.UserChangePassword(w.t.Context(), "usher", to); err != nil {
			w.t.Fatal(err)
		}
	}
	inFile := func(t *testing.T) (*world, *registrant, string) {
		w := newWorld(t, 1, "--bcrypt-cost", "4")
		w.enableAuth("first")
		file := filepath.Join(t.TempDir(), "password")
		write(t, file, []byte("first\n"))
		w.env = []string{"ETCDCTL_USER=usher"}
		return w, w.register(pod{passwordFile: file}), file
	}
	t.Run("in a file, then in etcd", func(t *testing.T) {
		t.Parallel()
		w, r, file := inFile(t)
		f := w.fault(140, "password rotated, first in its file, then in etcd", retry, 0)
		write(t, file, []byte("second\n"))
		rotate(w, "second")
		f.over()
		for end := time.Now().Add(ghostAfter); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if len(w.seen.under(r.status().Lease)) == 0 {
				t.Fatalf("the changed password took it out: %s", r.saidAll())
			}
		}
		f.over()
		r.say("online after the change")
		r.wrote("after the change")
		f.healed(r)
		if r.said("invalid user ID or password") || r.said("lease was lost") {
			t.Errorf("it said:\n%s", r.saidAll())
		}
	})
	// etcd holds every renewal against the user, so the lease of an agent that can't log in ends.
	t.Run("in etcd, then in a file", func(t *testing.T) {
		t.Parallel()
		w, r, file := inFile(t)
		f := w.fault(142, "password rotated in etcd, its file follows past the TTL", retry, time.Minute)
		f.note = "until it follows"
		rotate(w, "second")
		eventually(t, patience, "its records go", func() bool { return len(w.seen.under()) == 0 })
		eventually(t, patience, "it says that it can't log in", func() bool { return r.said("invalid user ID or password") })
		write(t, file, []byte("second\n"))
		f.over()
		f.healed(r)
	})
	t.Run("in the environment", func(t *testing.T) {
		t.Parallel()
		w := newWorld(t, 1, "--bcrypt-cost", "4")
		w.enableAuth("first")
		w.env = []string{"ETCDCTL_USER=usher:first"}
		r := w.register(pod{})
		f := w.fault(150, "password rotated, agent restarted with the new one in its environment", soon, 0)
		rotate(w, "second")
		w.env = []string{"ETCDCTL_USER=usher:second"}
		r.kill()
		again := w.launch(pod{})
		f.over()
		f.healed(again)
	})
}

// enableAuth makes a user usher who may write the ledger and what the formats need, and turns w into root.
func (w *world) enableAuth(password string) {
	w.t.Helper()
	ctx := w.t.Context()
	must := func(_ any, err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	for user, pw := range map[string]string{"root": "root", "usher": password} {
		must(w.cli.UserAdd(ctx, user, pw))
		must(w.cli.RoleAdd(ctx, user))
		must(w.cli.UserGrantRole(ctx, user, user))
	}
	for _, prefix := range []string{registry.Root, "shop/", "/microservices/", "/skydns/"} {
		must(w.cli.RoleGrantPermission(ctx, "usher", prefix, clientv3.GetPrefixRangeEnd(prefix), clientv3.PermissionType(clientv3.PermReadWrite)))
	}
	must(w.cli.AuthEnable(ctx))
	w.use(w.etcd.client(func(c *clientv3.Config) { c.Username, c.Password = "root", "root" }))
}

// etcd comes back with a certificate of another CA, and takes clients of that CA only. The agent's files follow later, as
// those of a mounted Secret do.
func TestTLSRotated(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server, client := filepath.Join(dir, "server"), filepath.Join(dir, "client")
	issue := func(folder, name string, ca authority) {
		t.Helper()
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		cert, key := ca.issue(t, name)
		write(t, filepath.Join(folder, "ca.crt"), ca.pem)
		write(t, filepath.Join(folder, "tls.crt"), cert)
		write(t, filepath.Join(folder, "tls.key"), key)
	}
	first, second := newAuthority(t, "first"), newAuthority(t, "second")
	issue(server, "etcd", first)
	issue(client, "agent", first)

	w := &world{t: t, etcd: startEtcd(t, 1, true, "--client-cert-auth", "--trusted-ca-file", filepath.Join(server, "ca.crt"),
		"--cert-file", filepath.Join(server, "tls.crt"), "--key-file", filepath.Join(server, "tls.key"))}
	w.use(w.etcd.client(func(c *clientv3.Config) { c.TLS = bothTrusted(t, first, second) }))
	w.env = []string{"ETCDCTL_CACERT=" + filepath.Join(client, "ca.crt"), "ETCDCTL_CERT=" + filepath.Join(client, "tls.crt"),
		"ETCDCTL_KEY=" + filepath.Join(client, "tls.key")}
	r := w.register(pod{ttl: 15 * time.Second})
	lease := r.status().Lease

	f := w.fault(160, "CA, etcd's and the agent's certificate rotated, the agent's files last", retry, 0)
	issue(server, "etcd", second)
	w.etcd.kill(0)
	w.etcd.start(0)
	w.answers()
	r.say("online after the change")
	eventually(t, patience, "it can't connect", func() bool { return r.said("no answer within") })
	issue(client, "agent", second)
	f.over()
	r.wrote("after the change")
	f.healed(r)
	if r.status().Lease != lease {
		t.Errorf("under lease %s, want the same as before, %s", r.status().Lease, lease)
	}
}

// bothTrusted is the test's own access: it has certificates of both, and trusts both.
func bothTrusted(t *testing.T, all ...authority) *tls.Config {
	t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool()}
	for _, ca := range all {
		cfg.RootCAs.AppendCertsFromPEM(ca.pem)
		cert, key := ca.issue(t, "test")
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = append(cfg.Certificates, pair) // the one that the server's CAs have issued is taken
	}
	return cfg
}

type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T, name string) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue makes a certificate for server and client, with its key.
func (a authority) issue(t *testing.T, name string) (cert, key []byte) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, k.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})
}

func write(t *testing.T, file string, text []byte) {
	t.Helper()
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
}
