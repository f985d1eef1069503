package registry

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
)

func env(vars map[string]string) func(string) string {
	return func(name string) string { return vars[name] }
}

func TestFromETCDCTLReadsEveryVariable(t *testing.T) {
	var c Connection
	if err := c.FromETCDCTL(env(map[string]string{
		"ETCDCTL_ENDPOINTS": "https://a:2379, https://b:2379", "ETCDCTL_CACERT": "ca", "ETCDCTL_CERT": "cert", "ETCDCTL_KEY": "key",
		"ETCDCTL_INSECURE_SKIP_TLS_VERIFY": "true", "ETCDCTL_USER": "root", "ETCDCTL_PASSWORD": "secret",
		"ETCDCTL_DIAL_TIMEOUT": "3s", "ETCDCTL_KEEPALIVE_TIME": "20s", "ETCDCTL_KEEPALIVE_TIMEOUT": "4s",
		"ETCDCTL_API": "3", "ETCDCTL_WRITE_OUT": "json",
	})); err != nil {
		t.Fatal(err)
	}
	want := Connection{CACert: "ca", Cert: "cert", Key: "key", InsecureSkipVerify: true, User: "root", Password: "secret",
		DialTimeout: 3 * time.Second, KeepAliveTime: 20 * time.Second, KeepAliveTimeout: 4 * time.Second}
	if !slices.Equal(c.Endpoints, []string{"https://a:2379", "https://b:2379"}) {
		t.Errorf("endpoints %q", c.Endpoints)
	}
	c.Endpoints = nil
	if c.CACert != want.CACert || c.Cert != want.Cert || c.Key != want.Key || !c.InsecureSkipVerify || c.User != want.User ||
		c.Password != want.Password || c.DialTimeout != want.DialTimeout || c.KeepAliveTime != want.KeepAliveTime ||
		c.KeepAliveTimeout != want.KeepAliveTimeout {
		t.Errorf("got %+v, want %+v", c, want)
	}
}

func TestFromETCDCTLLeavesWhatIsNotSet(t *testing.T) {
	c := Connection{Endpoints: []string{"etcd:2379"}, User: "me", CACert: "ca"}
	if err := c.FromETCDCTL(env(map[string]string{"ETCDCTL_USER": ""})); err != nil {
		t.Fatal(err)
	}
	if c.Endpoints[0] != "etcd:2379" || c.User != "me" || c.CACert != "ca" {
		t.Errorf("got %+v", c)
	}
}

func TestFromETCDCTLDefaultsToLocalEtcd(t *testing.T) {
	var c Connection
	if err := c.FromETCDCTL(env(nil)); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.Endpoints, []string{"127.0.0.1:2379"}) {
		t.Errorf("endpoints %q", c.Endpoints)
	}
}

func TestFromETCDCTLSecureTransport(t *testing.T) {
	var c Connection
	if err := c.FromETCDCTL(env(map[string]string{
		"ETCDCTL_ENDPOINTS": "a:2379,https://b:2379", "ETCDCTL_INSECURE_TRANSPORT": "false"})); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct{ endpoints, want []string }{
		{c.Endpoints, []string{"https://a:2379", "https://b:2379"}},
		{[]string{"c:2379"}, []string{"https://c:2379"}}, // of a flag, say, which comes after the environment
		{[]string{"http://d:2379"}, []string{"http://d:2379"}},
	} {
		c.Endpoints = tc.endpoints
		cli, err := c.Dial(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer cli.Close()
		if got := cli.Endpoints(); !slices.Equal(got, tc.want) {
			t.Errorf("endpoints %q are reached as %q, want %q", tc.endpoints, got, tc.want)
		}
	}
}

func TestFromETCDCTLNamesWhatIsWrong(t *testing.T) {
	for _, tc := range []struct{ name, value, want string }{
		{"ETCDCTL_DIAL_TIMEOUT", "5", "want a duration above 0"},
		{"ETCDCTL_KEEPALIVE_TIME", "-1s", "want a duration above 0"},
		{"ETCDCTL_INSECURE_SKIP_TLS_VERIFY", "maybe", "want true or false"},
		{"ETCDCTL_AUTH_JWT_TOKEN", "ey", "use ETCDCTL_USER"},
		{"ETCDCTL_DISCOVERY_SRV", "example.com", "use ETCDCTL_ENDPOINTS"},
	} {
		var c Connection
		err := c.FromETCDCTL(env(map[string]string{tc.name: tc.value}))
		if err == nil || !strings.Contains(err.Error(), tc.name) || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s=%s: error %v, want one with %q", tc.name, tc.value, err, tc.want)
		}
	}
}

// keyPair writes a self-signed certificate for 127.0.0.1 and its key.
func keyPair(t *testing.T, dir, name string, serial int64) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: keyDER}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

func TestValidateAccepts(t *testing.T) {
	cert, key := keyPair(t, t.TempDir(), "a", 1)
	for _, c := range []Connection{
		{Endpoints: []string{"127.0.0.1:2379"}},
		{Endpoints: []string{"etcd-0.etcd:2379", "http://[::1]:2379/"}},
		{Endpoints: []string{"https://a:2379", "b:2379"}, CACert: cert},
		{Endpoints: []string{"https://a:2379"}},
		{Endpoints: []string{"a:2379"}, InsecureSkipVerify: true},
		{Endpoints: []string{"unix:///run/etcd.sock"}},
		{Endpoints: []string{"unixs:///run/etcd.sock"}, CACert: cert, Cert: cert, Key: key},
		{Endpoints: []string{"a:2379"}, User: "me", Password: "a:b"},
		{Endpoints: []string{"a:2379"}, User: "me:secret"},
	} {
		if err := c.Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestValidateNamesFieldValueAndRemedy(t *testing.T) {
	dir := t.TempDir()
	cert, key := keyPair(t, dir, "a", 1)
	_, otherKey := keyPair(t, dir, "b", 2)
	a := []string{"https://a:2379"}
	for _, tc := range []struct {
		name string
		c    Connection
		want []string
	}{
		{"no endpoint", Connection{}, []string{"endpoints is empty", "want"}},
		{"empty endpoint", Connection{Endpoints: []string{""}}, []string{`endpoints has ""`, "host:port"}},
		{"no port", Connection{Endpoints: []string{"a"}}, []string{`endpoints has "a"`, "host:port"}},
		{"no host", Connection{Endpoints: []string{":2379"}}, []string{`":2379"`, "host:port"}},
		{"port 0", Connection{Endpoints: []string{"a:0"}}, []string{`"a:0"`, "1 to 65535"}},
		{"port name", Connection{Endpoints: []string{"http://a:etcd"}}, []string{`"http://a:etcd"`, "host:port"}},
		{"bare IPv6", Connection{Endpoints: []string{"::1:2379"}}, []string{`"::1:2379"`, "host:port"}},
		{"space", Connection{Endpoints: []string{"a b:2379"}}, []string{`"a b:2379"`, "host:port"}},
		{"scheme", Connection{Endpoints: []string{"grpc://a:2379"}}, []string{`"grpc://a:2379"`, "https://host:port"}},
		{"path", Connection{Endpoints: []string{"http://a:2379/v3"}}, []string{`"http://a:2379/v3"`, "nothing after the port"}},
		{"relative socket", Connection{Endpoints: []string{"unix://etcd.sock"}}, []string{`"unix://etcd.sock"`, "unix:///absolute/path"}},
		{"second endpoint", Connection{Endpoints: []string{"a:1", "b"}}, []string{`endpoints has "b"`}},
		{"mixed", Connection{Endpoints: []string{"http://a:1", "https://b:1"}}, []string{`"http://a:1" and "https://b:1"`, "or none"}},
		{"TLS over http", Connection{Endpoints: []string{"http://a:1"}, CACert: cert}, []string{"cacert is set", `"http://a:1"`, "want https://"}},
		{"cert alone", Connection{Endpoints: a, Cert: cert}, []string{"cert is", "key is empty", "want both"}},
		{"key alone", Connection{Endpoints: a, Key: key}, []string{"key is", "cert is empty", "want both"}},
		{"no such CA", Connection{Endpoints: a, CACert: dir + "/none"}, []string{"cacert is", dir + "/none", "want a readable file"}},
		{"CA is no PEM", Connection{Endpoints: a, CACert: key}, []string{"cacert is", key, "want a PEM file"}},
		{"foreign key", Connection{Endpoints: a, Cert: cert, Key: otherKey}, []string{cert, otherKey, "belong together"}},
		{"password alone", Connection{Endpoints: a, Password: "hidden"}, []string{"password is set", "user is empty"}},
		{"two passwords", Connection{Endpoints: a, User: "me:hidden", PasswordFile: cert}, []string{"password-file is", cert, "want one of them"}},
		{"password file alone", Connection{Endpoints: a, PasswordFile: cert}, []string{"password-file is", cert, "user is empty"}},
		{"no such password file", Connection{Endpoints: a, User: "me", PasswordFile: dir + "/none"}, []string{"password-file is", dir + "/none", "want a readable file"}},
		{"empty password file", Connection{Endpoints: a, User: "me", PasswordFile: os.DevNull}, []string{"password-file is", os.DevNull, "it is empty"}},
		{"user alone", Connection{Endpoints: a, User: "me"}, []string{`user is "me"`, "want password"}},
		{"duration", Connection{Endpoints: a, DialTimeout: -1}, []string{"dial-timeout is -1ns", "above 0"}},
		{"URL credentials", Connection{Endpoints: []string{"https://me:hidden@a:1"}}, []string{`credentials for "a:1"`, "user and password"}},
	} {
		err := tc.c.Validate()
		for _, want := range tc.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: error %q, want one with %q", tc.name, err, want)
			}
		}
		if err != nil && strings.Contains(err.Error(), "hidden") {
			t.Errorf("%s: the error shows the password: %v", tc.name, err)
		}
	}
}

// deadEndpoint is an address that refuses connections.
func deadEndpoint(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestDialDoesNotWaitForEtcd(t *testing.T) {
	start := time.Now()
	cli, err := Connection{Endpoints: []string{deadEndpoint(t)}, DialTimeout: time.Minute}.Dial(zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("Dial took %s", took)
	}
}

func TestDialWithUserGivesUpAfterDialTimeout(t *testing.T) {
	ep := deadEndpoint(t)
	_, err := Connection{Endpoints: []string{ep}, User: "me:secret", DialTimeout: 50 * time.Millisecond}.Dial(nil)
	if err == nil || !strings.Contains(err.Error(), `logging in as "me"`) || !strings.Contains(err.Error(), ep) {
		t.Fatalf("error %v, want one that names the user and the endpoint", err)
	}
	if strings.Contains(err.Error(), "secret") {
		t.Errorf("the error shows the password: %v", err)
	}
}

func TestDialRefusesWhatIsNotValid(t *testing.T) {
	if _, err := (Connection{}).Dial(nil); err == nil || !strings.Contains(err.Error(), "endpoints is empty") {
		t.Fatalf("error %v", err)
	}
}

// A server that hangs up after each handshake makes the client connect again and again: a certificate that was renewed
// on disk in between must be the one that it presents, without another Dial.
func TestRenewedClientCertificateIsUsedOnReconnect(t *testing.T) {
	dir := t.TempDir()
	srvCert, srvKey := keyPair(t, dir, "server", 1)
	cert, key := keyPair(t, dir, "client", 100)
	pair, err := tls.LoadX509KeyPair(srvCert, srvKey)
	if err != nil {
		t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair},
		ClientAuth: tls.RequireAnyClientCert, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	serials := make(chan int64, 100)
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			tc := conn.(*tls.Conn)
			if tc.HandshakeContext(t.Context()) == nil {
				serials <- tc.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
			}
			conn.Close()
		}
	}()
	cli, err := Connection{Endpoints: []string{"https://" + l.Addr().String()}, CACert: srvCert, Cert: cert, Key: key}.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go cli.Get(ctx, "x") // the client connects when it is used
	next := func() int64 {
		select {
		case s := <-serials:
			return s
		case <-ctx.Done():
			t.Fatal("the client stopped connecting")
			return 0
		}
	}
	if got := next(); got != 100 {
		t.Fatalf("certificate %d, want 100", got)
	}
	keyPair(t, dir, "client", 200)
	for got := next(); got != 200; got = next() {
		if got != 100 {
			t.Fatalf("certificate %d", got)
		}
	}
}

// The server gets a certificate of another CA; once the client's file of CAs is that one's, it connects without another Dial.
func TestRenewedCAIsUsedOnReconnect(t *testing.T) {
	dir := t.TempDir()
	firstCert, firstKey := keyPair(t, dir, "first", 1)
	secondCert, secondKey := keyPair(t, dir, "second", 2)
	ca := filepath.Join(dir, "ca.crt")
	trust := func(cert string) {
		text, err := os.ReadFile(cert)
		if err == nil {
			err = os.WriteFile(ca, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	trust(firstCert)
	var pair atomic.Pointer[tls.Certificate]
	serve := func(cert, key string) {
		p, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		pair.Store(&p)
	}
	serve(firstCert, firstKey)
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{NextProtos: []string{"h2"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return pair.Load(), nil }})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	shakes := make(chan bool, 1000)
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// The client's word on the certificate comes after the server's handshake, as an alert instead of a byte.
			tc := conn.(*tls.Conn)
			_, err = tc.Read(make([]byte, 1))
			shakes <- err == nil
			conn.Close()
		}
	}()
	cli, err := Connection{Endpoints: []string{"https://" + l.Addr().String()}, CACert: ca}.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go cli.Get(ctx, "x")
	until := func(want bool) {
		for {
			select {
			case got := <-shakes:
				if got == want {
					return
				}
			case <-ctx.Done():
				t.Fatalf("no handshake with success %t", want)
			}
		}
	}
	until(true)
	serve(secondCert, secondKey)
	until(false)
	trust(secondCert)
	until(true)
}

// gRPC's own back-off would have grown to more than 10 s by the last of these attempts.
func TestReconnectsOftenEnough(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cli, err := Connection{Endpoints: []string{l.Addr().String()}}.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	go cli.Get(ctx, "x")
	last := time.Now()
	for i := range 10 {
		if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		conn, err := l.Accept()
		if err != nil {
			t.Fatalf("attempt %d hasn't come %s after the one before: %v", i, time.Since(last), err)
		}
		last = time.Now()
		conn.Close()
	}
}

func TestRequestGivenUpIsNoWarning(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	core, logs := observer.New(zap.InfoLevel)
	cli, err := Connection{Endpoints: []string{silent.Addr().String()}}.Dial(zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	defer cli.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := cli.Grant(ctx, 10); err == nil {
		t.Fatal("a silent server granted a lease")
	}
	if all := logs.All(); len(all) != 0 {
		t.Errorf("told of a cancelled request: %v", all)
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := cli.Grant(ctx, 10); err == nil {
		t.Fatal("a silent server granted a lease")
	}
	if logs.FilterLevelExact(zap.WarnLevel).Len() == 0 {
		t.Error("not a word on a request that had no answer in time")
	}
}
