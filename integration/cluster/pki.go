package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

// authority is the cluster's one certificate authority, for servers and clients alike.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

// identity is who a certificate speaks for.
type identity struct {
	name   string // file name without extension
	user   string // common name, which Kubernetes takes as the user
	group  string // organization, which Kubernetes takes as the group
	server bool
}

// writePKI makes the authority, all certificates and a kubeconfig for each client. Everything is new for each cluster and
// is valid for a year.
func (c *Cluster) writePKI() error {
	ca, err := newAuthority()
	if err != nil {
		return fmt.Errorf("making the certificate authority: %w", err)
	}
	if err := os.WriteFile(c.path("pki/ca.crt"), ca.pem, 0o644); err != nil {
		return fmt.Errorf("writing the certificate authority: %w", err)
	}
	for _, id := range []identity{
		{name: "apiserver", user: "kube-apiserver", server: true},
		{name: "kubelet-server", user: nodeName, server: true},
		{name: "kubelet-client", user: "kube-apiserver-kubelet-client", group: "system:masters"},
		{name: "admin", user: "admin", group: "system:masters"},
		{name: ControllerManager, user: "system:kube-controller-manager"},
		{name: Scheduler, user: "system:kube-scheduler"},
		{name: KubeProxy, user: "system:kube-proxy"},
		{name: Kubelet, user: "system:node:" + nodeName, group: "system:nodes"},
	} {
		cert, key, err := c.issue(ca, id)
		if err != nil {
			return fmt.Errorf("making the certificate of %s: %w", id.name, err)
		}
		if err := writePair(c.path("pki/"+id.name), cert, key); err != nil {
			return fmt.Errorf("writing the certificate of %s: %w", id.name, err)
		}
		switch id.name {
		case "admin", ControllerManager, Scheduler, KubeProxy, Kubelet:
			file := c.path(id.name + ".kubeconfig")
			if err := os.WriteFile(file, c.kubeconfig(ca.pem, cert, key, id.user), 0o600); err != nil {
				return fmt.Errorf("writing the kubeconfig of %s: %w", id.name, err)
			}
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making the key that signs service account tokens: %w", err)
	}
	text, err := encodeKey(key)
	if err != nil {
		return fmt.Errorf("encoding the key that signs service account tokens: %w", err)
	}
	if err := os.WriteFile(c.path("pki/service-accounts.key"), text, 0o600); err != nil {
		return fmt.Errorf("writing the key that signs service account tokens: %w", err)
	}
	return nil
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := template("usher-cluster")
	template.IsCA = true
	template.BasicConstraintsValid = true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &authority{cert: cert, key: key, pem: encodeCert(der)}, nil
}

// issue returns a certificate and its key, both in PEM.
func (c *Cluster) issue(ca *authority, id identity) (cert, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := template(id.user)
	if id.group != "" {
		template.Subject.Organization = []string{id.group}
	}
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if id.server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		template.DNSNames = []string{"localhost", nodeName, "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
		template.IPAddresses = []net.IP{
			net.IPv4(127, 0, 0, 1), net.ParseIP(c.state.network().nodeIP), net.ParseIP(c.state.network().apiIP),
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, private.Public(), ca.key)
	if err != nil {
		return nil, nil, err
	}
	key, err = encodeKey(private)
	return encodeCert(der), key, err
}

func template(commonName string) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()),
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(1, 0, 0),
	}
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func writePair(base string, cert, key []byte) error {
	if err := os.WriteFile(base+".crt", cert, 0o644); err != nil {
		return err
	}
	return os.WriteFile(base+".key", key, 0o600)
}

func (c *Cluster) kubeconfig(ca, cert, key []byte, user string) []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters:
- name: usher
  cluster:
    server: %s
    certificate-authority-data: %s
users:
- name: %q
  user:
    client-certificate-data: %s
    client-key-data: %s
contexts:
- name: usher
  context:
    cluster: usher
    user: %q
current-context: usher
`, c.apiURL(), b64(ca), user, b64(cert), b64(key), user)
}
