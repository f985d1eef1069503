package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

const (
	// DefaultEndpoint is where etcdctl looks when it is told nothing.
	DefaultEndpoint = "127.0.0.1:2379"
	// DefaultDialTimeout is etcdctl's --dial-timeout.
	DefaultDialTimeout = 2 * time.Second
	// DefaultKeepAliveTime is the shortest that gRPC allows a client (it raises etcdctl's 2 s to this), and twice what
	// an etcd server puts up with (--grpc-keepalive-min-time, 5 s).
	DefaultKeepAliveTime = 10 * time.Second
	// DefaultKeepAliveTimeout, together with DefaultKeepAliveTime, finds a silent connection within the agent's lease
	// TTL of 15 s. It is also how long data may stay unacknowledged (gRPC sets TCP_USER_TIMEOUT to it).
	DefaultKeepAliveTimeout = 3 * time.Second
)

// Connection says how to reach etcd. Its fields mean what etcdctl's flags of the same names mean, and errors name them
// as etcdctl does.
type Connection struct {
	// Endpoints are host:port, http://host:port, https://host:port, unix:///path or unixs:///path; at least one. An
	// endpoint without a scheme, and unix, uses TLS when one of the TLS fields is set. All must agree on TLS, since the
	// client decides by the first one for all of them.
	Endpoints []string
	// HTTPS is what an endpoint host:port means, whatever else is set.
	HTTPS bool

	// CACert, Cert and Key are PEM files. Without CACert a TLS server is held against the system's roots. All are read
	// again on every handshake, so that a reconnect is enough after they were renewed.
	CACert, Cert, Key string
	// InsecureSkipVerify leaves the server's certificate unchecked.
	InsecureSkipVerify bool

	// User is a name, or "name:password" when Password is empty.
	User, Password string
	// PasswordFile holds the password instead, and is read again on every login, so that a password can be changed while
	// the client runs. White space around it doesn't count.
	PasswordFile string

	// DialTimeout bounds one connection attempt, and the authentication in Dial. Default 2 s.
	DialTimeout time.Duration
	// KeepAliveTime is how long a connection may be silent before it is tested. Default, and least, 10 s.
	KeepAliveTime time.Duration
	// KeepAliveTimeout is how long the test may take before the connection counts as dead. Default 3 s.
	KeepAliveTimeout time.Duration
}

// FromETCDCTL sets the fields that etcdctl's environment speaks of, and leaves the others. When neither it nor the
// caller names an endpoint, that is DefaultEndpoint. As in etcdctl, an empty variable is an unset one.
//
//	ETCDCTL_ENDPOINTS                 comma-separated
//	ETCDCTL_CACERT, _CERT, _KEY       files
//	ETCDCTL_INSECURE_SKIP_TLS_VERIFY  boolean
//	ETCDCTL_INSECURE_TRANSPORT        boolean; false: endpoints without a scheme are https://
//	ETCDCTL_USER, ETCDCTL_PASSWORD    "name", or "name:password" without ETCDCTL_PASSWORD
//	ETCDCTL_DIAL_TIMEOUT              duration, as are ETCDCTL_KEEPALIVE_TIME and ETCDCTL_KEEPALIVE_TIMEOUT
//
// ETCDCTL_AUTH_JWT_TOKEN and ETCDCTL_DISCOVERY_SRV are refused, since leaving them out would mean another identity or
// another etcd. The rest is about etcdctl itself. Errors name the variable.
func (c *Connection) FromETCDCTL(getenv func(string) string) error {
	for name, instead := range map[string]string{
		"ETCDCTL_AUTH_JWT_TOKEN": "ETCDCTL_USER and ETCDCTL_PASSWORD, or a client certificate",
		"ETCDCTL_DISCOVERY_SRV":  "ETCDCTL_ENDPOINTS",
	} {
		if getenv(name) != "" {
			return fmt.Errorf("environment variable %s is not supported: use %s", name, instead)
		}
	}
	if v := getenv("ETCDCTL_ENDPOINTS"); v != "" {
		c.Endpoints = nil
		for e := range strings.SplitSeq(v, ",") {
			c.Endpoints = append(c.Endpoints, strings.TrimSpace(e))
		}
	}
	if len(c.Endpoints) == 0 {
		c.Endpoints = []string{DefaultEndpoint}
	}
	for name, field := range map[string]*string{
		"ETCDCTL_CACERT": &c.CACert, "ETCDCTL_CERT": &c.Cert, "ETCDCTL_KEY": &c.Key,
		"ETCDCTL_USER": &c.User, "ETCDCTL_PASSWORD": &c.Password,
	} {
		if v := getenv(name); v != "" {
			*field = v
		}
	}
	for name, field := range map[string]*time.Duration{
		"ETCDCTL_DIAL_TIMEOUT": &c.DialTimeout, "ETCDCTL_KEEPALIVE_TIME": &c.KeepAliveTime,
		"ETCDCTL_KEEPALIVE_TIMEOUT": &c.KeepAliveTimeout,
	} {
		if v := getenv(name); v != "" {
			d, err := time.ParseDuration(v)
			if err != nil || d <= 0 {
				return fmt.Errorf("environment variable %s is %q: want a duration above 0, such as 2s", name, v)
			}
			*field = d
		}
	}
	insecureTransport := !c.HTTPS
	for name, field := range map[string]*bool{
		"ETCDCTL_INSECURE_SKIP_TLS_VERIFY": &c.InsecureSkipVerify, "ETCDCTL_INSECURE_TRANSPORT": &insecureTransport,
	} {
		if v := getenv(name); v != "" {
			b, err := strconv.ParseBool(v)
			if err != nil {
				return fmt.Errorf("environment variable %s is %q: want true or false", name, v)
			}
			*field = b
		}
	}
	c.HTTPS = !insecureTransport
	return nil
}

// Validate checks everything that can be checked without a network; the files are read. The error names the field, its
// value (never the password) and what would be right.
func (c Connection) Validate() error {
	if len(c.Endpoints) == 0 {
		return errors.New("endpoints is empty: want at least one, such as https://etcd.example:2379")
	}
	first, err := c.secure(c.Endpoints[0])
	if err != nil {
		return err
	}
	for _, e := range c.Endpoints[1:] {
		s, err := c.secure(e)
		if err != nil {
			return err
		}
		if s != first {
			return fmt.Errorf("endpoints has %q and %q: want all of them with TLS (https) or none", c.Endpoints[0], e)
		}
	}
	if name := c.tlsField(); name != "" && !first {
		return fmt.Errorf("%s is set, but endpoint %q does without TLS: want https://, or no %s", name, c.Endpoints[0], name)
	}
	if err := c.validateFiles(); err != nil {
		return err
	}
	user, password := c.credentials()
	if c.PasswordFile != "" {
		switch {
		case password != "":
			return fmt.Errorf("password-file is %q, and there is a password too: want one of them", c.PasswordFile)
		case user == "":
			return fmt.Errorf("password-file is %q, but user is empty: want both or neither", c.PasswordFile)
		}
		if password, err = readPassword(c.PasswordFile); err != nil {
			return err
		}
	}
	switch {
	case user == "" && password != "":
		return errors.New("password is set, but user is empty: want both or neither")
	case user != "" && password == "":
		return fmt.Errorf("user is %q, but there is no password: want password, password-file, or user as name:password", user)
	}
	for _, d := range []struct {
		name  string
		value time.Duration
	}{
		{"dial-timeout", c.DialTimeout}, {"keepalive-time", c.KeepAliveTime}, {"keepalive-timeout", c.KeepAliveTimeout},
	} {
		if d.value < 0 {
			return fmt.Errorf("%s is %s: want a duration above 0, or 0 for the default", d.name, d.value)
		}
	}
	return nil
}

func (c Connection) validateFiles() error {
	switch {
	case c.Cert != "" && c.Key == "":
		return fmt.Errorf("cert is %q, but key is empty: want both or neither", c.Cert)
	case c.Cert == "" && c.Key != "":
		return fmt.Errorf("key is %q, but cert is empty: want both or neither", c.Key)
	}
	if c.CACert != "" {
		pem, err := os.ReadFile(c.CACert)
		if err != nil {
			return fmt.Errorf("cacert is %q: want a readable file: %w", c.CACert, err)
		}
		if !x509.NewCertPool().AppendCertsFromPEM(pem) {
			return fmt.Errorf("cacert is %q: want a PEM file with at least one certificate", c.CACert)
		}
	}
	if c.Cert != "" {
		if _, err := tls.LoadX509KeyPair(c.Cert, c.Key); err != nil {
			return fmt.Errorf("cert is %q and key is %q: want PEM files that belong together: %w", c.Cert, c.Key, err)
		}
	}
	return nil
}

// secure says whether an endpoint is reached with TLS, by the rules of the etcd client.
func (c Connection) secure(endpoint string) (bool, error) {
	wrong := func(want string) error {
		return fmt.Errorf("endpoints has %q: want %s", endpoint, want)
	}
	const shape = "host:port, http://host:port or https://host:port"
	if i := strings.LastIndexByte(endpoint, '@'); i >= 0 {
		return false, fmt.Errorf("endpoints has credentials for %q: want them in user and password", endpoint[i+1:])
	}
	scheme, rest, found := strings.Cut(endpoint, "://")
	if !found {
		scheme, rest = "", endpoint
	}
	tls := c.tlsField() != ""
	switch scheme {
	case "unix", "unixs":
		if !strings.HasPrefix(rest, "/") {
			return false, wrong(scheme + ":///absolute/path")
		}
		return scheme == "unixs" || tls, nil
	case "http", "https":
		u, err := url.Parse(endpoint)
		if err != nil {
			return false, wrong(shape)
		}
		// The etcd client would drop these silently.
		if (u.Path != "" && u.Path != "/") || u.RawQuery != "" || u.Fragment != "" {
			return false, wrong("nothing after the port")
		}
		rest, tls = u.Host, scheme == "https"
	case "":
		tls = tls || c.HTTPS
	default:
		return false, wrong(shape)
	}
	host, port, err := net.SplitHostPort(rest)
	if err != nil || host == "" || strings.ContainsAny(host, " /\t\n") {
		return false, wrong(shape)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return false, wrong("a port from 1 to 65535")
	}
	return tls, nil
}

// tlsField is the name of a field that asks for TLS, or empty.
func (c Connection) tlsField() string {
	switch {
	case c.CACert != "":
		return "cacert"
	case c.Cert != "":
		return "cert"
	case c.Key != "":
		return "key"
	case c.InsecureSkipVerify:
		return "insecure-skip-tls-verify"
	}
	return ""
}

func (c Connection) credentials() (user, password string) {
	if c.Password == "" {
		if user, password, ok := strings.Cut(c.User, ":"); ok {
			return user, password
		}
	}
	return c.User, c.Password
}

func readPassword(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("password-file is %q: want a readable file: %w", file, err)
	}
	password := strings.TrimSpace(string(text))
	if password == "" {
		return "", fmt.Errorf("password-file is %q: want a password in it, and it is empty", file)
	}
	return password, nil
}

// freshPassword logs in with the password that a file has at the moment. The client logs in through its own Auth.
type freshPassword struct {
	clientv3.Auth
	file string
}

func (f freshPassword) Authenticate(ctx context.Context, name, _ string) (*clientv3.AuthenticateResponse, error) {
	password, err := readPassword(f.file)
	if err != nil {
		return nil, err
	}
	return f.Auth.Authenticate(ctx, name, password)
}

// freshTLS reads the files of a TLS connection anew for each handshake. A tls.Config alone can do that for the client's
// certificate, but not for RootCAs.
type freshTLS struct {
	credentials.TransportCredentials // of the files as Dial found them
	config                           func() (*tls.Config, error)
}

func (f freshTLS) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	cfg, err := f.config()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the TLS files: %w", err)
	}
	return credentials.NewTLS(cfg).ClientHandshake(ctx, authority, conn)
}

func (f freshTLS) Clone() credentials.TransportCredentials {
	return freshTLS{f.TransportCredentials.Clone(), f.config}
}

// givenUp tells at debug level of what was cancelled: nothing has failed, its caller wanted it no more.
type givenUp struct{ zapcore.Core }

func (g givenUp) With(fields []zapcore.Field) zapcore.Core { return givenUp{g.Core.With(fields)} }

func (g givenUp) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if !g.Enabled(e.Level) {
		return ce
	}
	return ce.AddCore(e, g)
}

func (g givenUp) Write(e zapcore.Entry, fields []zapcore.Field) error {
	for _, f := range fields {
		err, ok := f.Interface.(error)
		if !ok || !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
			continue
		}
		if e.Level = zapcore.DebugLevel; !g.Enabled(e.Level) {
			return nil
		}
	}
	return g.Core.Write(e, fields)
}

// Dial validates, and makes a client. Without a user it never waits: the client connects in the background, and again
// after every loss, at most about a second after etcd is back. With a user it logs in, which takes at most DialTimeout
// and fails when etcd can't be reached: call it again then. The client's own logs go to logger; nil discards them. That a
// request was cancelled by its caller, of which the client warns, is told at debug level.
func (c Connection) Dial(logger *zap.Logger) (*clientv3.Client, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("etcd connection: %w", err)
	}
	if logger == nil {
		logger = zap.NewNop()
	}
	logger = logger.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return givenUp{c} }))
	or := func(d, def time.Duration) time.Duration {
		if d == 0 {
			return def
		}
		return d
	}
	user, password := c.credentials()
	if c.PasswordFile != "" {
		var err error
		if password, err = readPassword(c.PasswordFile); err != nil {
			return nil, fmt.Errorf("etcd connection: %w", err)
		}
	}
	endpoints := slices.Clone(c.Endpoints)
	for i, e := range endpoints {
		if c.HTTPS && !strings.Contains(e, "://") {
			endpoints[i] = "https://" + e
		}
	}
	cfg := clientv3.Config{
		Endpoints:            endpoints,
		DialTimeout:          or(c.DialTimeout, DefaultDialTimeout),
		DialKeepAliveTime:    or(c.KeepAliveTime, DefaultKeepAliveTime),
		DialKeepAliveTimeout: or(c.KeepAliveTimeout, DefaultKeepAliveTimeout),
		Username:             user,
		Password:             password,
		Logger:               logger,
	}
	// gRPC's own back-off goes up to two minutes, far more than a lease's TTL.
	cfg.DialOptions = []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
		Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 800 * time.Millisecond},
		MinConnectTimeout: cfg.DialTimeout,
	})}
	if c.tlsField() != "" {
		info := transport.TLSInfo{
			TrustedCAFile: c.CACert, CertFile: c.Cert, KeyFile: c.Key,
			InsecureSkipVerify: c.InsecureSkipVerify, Logger: logger,
		}
		var err error
		if cfg.TLS, err = info.ClientConfig(); err != nil {
			return nil, fmt.Errorf("etcd connection: TLS: %w", err)
		}
		// The client's own credentials come before, so these win.
		cfg.DialOptions = append(cfg.DialOptions, grpc.WithTransportCredentials(freshTLS{credentials.NewTLS(cfg.TLS), info.ClientConfig}))
	}
	cli, err := clientv3.New(cfg)
	if err != nil {
		doing := "making the client"
		if user != "" {
			doing = fmt.Sprintf("logging in as %q", user)
		}
		return nil, fmt.Errorf("etcd connection to %s: %s: %w", strings.Join(c.Endpoints, ","), doing, err)
	}
	if c.PasswordFile != "" {
		cli.Auth = freshPassword{cli.Auth, c.PasswordFile}
	}
	return cli, nil
}
