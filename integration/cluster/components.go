package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The components of a cluster, as Start, Stop and Kill name them.
const (
	Etcd              = "etcd"     // Kubernetes' own
	Registry          = "registry" // the etcd that instances are registered in
	Containerd        = "containerd"
	APIServer         = "kube-apiserver"
	ControllerManager = "kube-controller-manager"
	Scheduler         = "kube-scheduler"
	Kubelet           = "kubelet"
	KubeProxy         = "kube-proxy"
)

const (
	nodeName   = "usher-node"
	cniNetwork = "usher-cluster"
	pauseImage = "usher.dev/pause:cluster"
)

func components() []string {
	return []string{Etcd, Registry, Containerd, APIServer, ControllerManager, Scheduler, Kubelet, KubeProxy}
}

func known(component string) error {
	if !slices.Contains(components(), component) {
		return fmt.Errorf("unknown component %q: want one of %s", component, strings.Join(components(), ", "))
	}
	return nil
}

// command is a component's command line. Where it can, it leaves every setting that concerns a pod's life at its default.
func (c *Cluster) command(name string) ([]string, error) {
	s := &c.state
	net := s.network()
	binary := c.Binary(name)
	etcd := func(name, clientHost string, noFsync bool) []string {
		client := fmt.Sprintf("http://%s:%d", clientHost, s.Ports[name])
		peer := fmt.Sprintf("http://127.0.0.1:%d", s.Ports[name+"-peer"])
		args := []string{
			c.Binary("etcd"), "--name", name, "--data-dir", c.path(name),
			"--listen-client-urls", client, "--advertise-client-urls", client,
			"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", name + "=" + peer,
			"--log-level", "warn",
		}
		if noFsync {
			args = append(args, "--unsafe-no-fsync")
		}
		return args
	}
	switch name {
	case Etcd:
		// Alone it waits for one election timeout before it serves, by default a second.
		return append(etcd(Etcd, "127.0.0.1", true), "--heartbeat-interval=20", "--election-timeout=200"), nil
	case Registry:
		return etcd(Registry, net.nodeIP, s.RegistryNoFsync), nil
	case Containerd:
		return []string{"containerd", "--config", c.path("containerd.toml")}, nil
	case APIServer:
		return []string{
			binary,
			"--etcd-servers", fmt.Sprintf("http://127.0.0.1:%d", s.Ports[Etcd]),
			"--bind-address", net.nodeIP, "--advertise-address", net.nodeIP, fmt.Sprintf("--secure-port=%d", s.Ports[APIServer]),
			"--tls-cert-file", c.path("pki/apiserver.crt"), "--tls-private-key-file", c.path("pki/apiserver.key"),
			"--client-ca-file", c.path("pki/ca.crt"),
			"--kubelet-certificate-authority", c.path("pki/ca.crt"),
			"--kubelet-client-certificate", c.path("pki/kubelet-client.crt"),
			"--kubelet-client-key", c.path("pki/kubelet-client.key"),
			// The node's name can't be resolved.
			"--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file", c.path("pki/service-accounts.key"),
			"--service-account-signing-key-file", c.path("pki/service-accounts.key"),
			"--service-cluster-ip-range", net.serviceCIDR,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
			"--profiling=false",
		}, nil
	case ControllerManager:
		return []string{
			binary,
			"--kubeconfig", c.path(name + ".kubeconfig"),
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", s.Ports[name]),
			"--service-account-private-key-file", c.path("pki/service-accounts.key"),
			"--root-ca-file", c.path("pki/ca.crt"),
			"--use-service-account-credentials", "--leader-elect=false", "--profiling=false",
			// At the default of 20 a second, its some forty controllers spend five seconds just on getting their tokens.
			"--kube-api-qps=200", "--kube-api-burst=400",
		}, nil
	case Scheduler:
		return []string{
			binary,
			"--kubeconfig", c.path(name + ".kubeconfig"),
			"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", s.Ports[name]),
			"--leader-elect=false", "--profiling=false",
		}, nil
	case Kubelet:
		return []string{
			binary,
			"--config", c.path("kubelet.yaml"), "--kubeconfig", c.path(name + ".kubeconfig"),
			"--root-dir", c.path("kubelet"), "--cert-dir", c.path("kubelet/pki"),
			"--hostname-override", nodeName, "--node-ip", net.nodeIP,
			"--node-labels", "topology.kubernetes.io/region=region-1,topology.kubernetes.io/zone=zone-1",
			"--v=2",
		}, nil
	case KubeProxy:
		return []string{binary, "--config", c.path("kube-proxy.yaml")}, nil
	}
	return nil, known(name)
}

// writeConfig writes the components' configuration files.
func (c *Cluster) writeConfig() error {
	s := &c.state
	net := s.network()
	for _, f := range []struct{ name, text string }{
		{"containerd.toml", fmt.Sprintf(`version = 2
root = %q
state = %q

[grpc]
  address = %q

[plugins."io.containerd.internal.v1.opt"]
  path = %q

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  # Without CAP_SYS_RESOURCE the negative scores that the kubelet asks for would fail every sandbox.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = %q
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = %q
`, c.path("containerd/root"), c.path("containerd/state"), c.path("containerd.sock"), c.path("containerd/opt"),
			pauseImage, s.CNIDir, c.path("cni"), s.Snapshotter, c.path("runc"))},

		{"cni/10-usher.conflist", fmt.Sprintf(`{
  "cniVersion": "0.4.0",
  "name": %q,
  "plugins": [{
    "type": "ptp",
    "ipam": {
      "type": "host-local",
      "ranges": [[{"subnet": %q}]],
      "routes": [{"dst": "0.0.0.0/0"}],
      "dataDir": %q
    }
  }]
}
`, cniNetwork, net.podCIDR, c.path("ipam"))},

		{"kubelet.yaml", fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: %q
port: %d
healthzBindAddress: 127.0.0.1
healthzPort: %d
readOnlyPort: 0
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %q}
authorization: {mode: Webhook}
tlsCertFile: %q
tlsPrivateKeyFile: %q
containerRuntimeEndpoint: %q
podLogsDir: %q
volumePluginDir: %q
# No name can be resolved in pods, and each attempt fails at once. Without an address here each pod would get a warning.
clusterDNS: [127.0.0.1]
clusterDomain: cluster.local
resolvConf: %q
# Works on cgroup v1 and v2, and where the kubelet may not manage the root.
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
failSwapOn: false
makeIPTablesUtilChains: false
oomScoreAdj: 0
# A disk that is nearly full must not evict pods or delete images: there is no registry to pull them from again.
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
maxPods: 200
`, net.nodeIP, s.Ports[Kubelet], s.Ports["kubelet-health"], c.path("pki/ca.crt"), c.path("pki/kubelet-server.crt"),
			c.path("pki/kubelet-server.key"), "unix://"+c.path("containerd.sock"), c.path("pod-logs"),
			c.path("kubelet/volume-plugins"), c.path("resolv.conf"))},

		{"resolv.conf", "nameserver 127.0.0.1\n"},

		{"kube-proxy.yaml", fmt.Sprintf(`apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {kubeconfig: %q}
hostnameOverride: %q
mode: nftables
clusterCIDR: %q
healthzBindAddress: "127.0.0.1:%d"
metricsBindAddress: "127.0.0.1:%d"
oomScoreAdj: 0
# Leave the machine's connection tracking alone.
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
`, c.path(KubeProxy+".kubeconfig"), nodeName, net.podCIDR, s.Ports["kube-proxy-health"], s.Ports["kube-proxy-metrics"])},
	} {
		file := c.path(f.name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(f.text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// probe asks a component whether it works.
func (c *Cluster) probe(ctx context.Context, name string) error {
	s := &c.state
	switch name {
	case Etcd:
		return get(ctx, fmt.Sprintf("http://127.0.0.1:%d/health", s.Ports[name]))
	case Registry:
		return get(ctx, c.RegistryEndpoint()+"/health")
	case Containerd:
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.path("containerd.sock"))
		if err != nil {
			return err
		}
		return conn.Close()
	case APIServer:
		// Includes the bootstrap of the roles that the other components need.
		return get(ctx, c.apiURL()+"/readyz")
	case ControllerManager, Scheduler:
		return get(ctx, fmt.Sprintf("https://127.0.0.1:%d/healthz", s.Ports[name]))
	case Kubelet:
		return get(ctx, fmt.Sprintf("http://127.0.0.1:%d/healthz", s.Ports["kubelet-health"]))
	case KubeProxy:
		// Healthy once the rules are written.
		return get(ctx, fmt.Sprintf("http://127.0.0.1:%d/healthz", s.Ports["kube-proxy-health"]))
	}
	return known(name)
}

// get fails unless the answer is 200. It is for health endpoints that anybody may ask, some of whose certificates are made up.
func get(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	transport := &http.Transport{
		TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
		DisableKeepAlives: true,
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("%s answered %s: %s", url, resp.Status, strings.TrimSpace(string(body)))
	}
	return nil
}
