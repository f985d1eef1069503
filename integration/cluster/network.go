package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
)

// link is the interface that has the node's address. Pods are not attached to it but routed (CNI plugin ptp), so that a Service
// reached from a pod works without bridge netfilter.
const link = "usher0"

// network is the addresses that the choice of a subnet gives.
type network struct {
	nodeIP, podCIDR    string
	serviceCIDR, apiIP string
}

func (s *state) network() network {
	return network{
		nodeIP:      fmt.Sprintf("10.%d.0.1", s.Subnet),
		podCIDR:     fmt.Sprintf("10.%d.0.0/24", s.Subnet),
		serviceCIDR: fmt.Sprintf("10.%d.128.0/20", s.Subnet),
		apiIP:       fmt.Sprintf("10.%d.128.1", s.Subnet),
	}
}

// freeSubnet picks n so that no interface of this machine has an address in 10.n.0.0/16.
func freeSubnet() (int, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return 0, fmt.Errorf("listing this machine's addresses: %w", err)
	}
	return pickSubnet(addrs)
}

func pickSubnet(addrs []net.Addr) (int, error) {
	const from, to = 244, 254
	for n := from; n <= to; n++ {
		candidate := &net.IPNet{IP: net.IPv4(10, byte(n), 0, 0), Mask: net.CIDRMask(16, 32)}
		free := true
		for _, addr := range addrs {
			if in, ok := addr.(*net.IPNet); ok && (candidate.Contains(in.IP) || in.Contains(candidate.IP)) {
				free = false
			}
		}
		if free {
			return n, nil
		}
	}
	return 0, fmt.Errorf("this machine has addresses in each of 10.%d.0.0/16 to 10.%d.0.0/16; one must be free for pods", from, to)
}

// portNames are the ports that a cluster needs.
func portNames() []string {
	return []string{
		Etcd, "etcd-peer", Registry, "registry-peer", APIServer, ControllerManager, Scheduler,
		Kubelet, "kubelet-health", "kube-proxy-health", "kube-proxy-metrics",
	}
}

// freePorts picks ports that nobody listens on. They lie below those that the kernel gives to outgoing connections and
// below NodePorts, so a component that is stopped finds its port free when it is started again.
func freePorts(names []string) (map[string]int, error) {
	const from, to = 21000, 29999
	ports := map[string]int{}
	next := from + rand.IntN(to-from)
	for range to - from {
		if len(ports) == len(names) {
			return ports, nil
		}
		if listener, err := net.Listen("tcp", ":"+strconv.Itoa(next)); err == nil {
			listener.Close()
			ports[names[len(ports)]] = next
		}
		if next++; next > to {
			next = from
		}
	}
	return nil, fmt.Errorf("fewer than %d ports between %d and %d are free", len(names), from, to)
}

// sysctls are those that a cluster changes: forwarding is ours, the others the kubelet's.
func sysctls() []string {
	return []string{
		"net/ipv4/ip_forward", "vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	}
}

func readSysctls() map[string]string {
	values := map[string]string{}
	for _, name := range sysctls() {
		// One that this kernel lacks can't be changed either.
		if text, err := os.ReadFile("/proc/sys/" + name); err == nil {
			values[name] = strings.TrimSpace(string(text))
		}
	}
	return values
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting sysctl %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

// routeOrigin marks the cluster's own route, so that it is found again after a crash: a routing protocol's number that nobody
// has been given (/etc/iproute2/rt_protos).
const routeOrigin = "221"

// setUpNetwork makes the interface with the node's address and lets packets pass between pods.
func (c *Cluster) setUpNetwork(ctx context.Context) error {
	for _, args := range [][]string{
		{"link", "add", link, "type", "bridge"},
		{"addr", "add", c.state.network().nodeIP + "/32", "dev", link},
		{"link", "set", link, "up"},
		// Each pod has a route of its own. Without this one, what is sent to a pod that is gone would follow the default route
		// out of this machine, and be answered by whoever is there.
		{"route", "add", "unreachable", c.state.network().podCIDR, "proto", routeOrigin},
	} {
		if output, err := run(ctx, nil, "ip", args...); err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(output))
		}
	}
	return writeSysctl("net/ipv4/ip_forward", "1")
}

// foreignTables says whether kube-proxy's tables are there although no cluster of ours is.
func foreignTables(ctx context.Context) error {
	tables, err := proxyTables(ctx)
	if err != nil {
		return err
	}
	if len(tables) > 0 {
		return fmt.Errorf("the nftables table %s exists: another Kubernetes node runs on this machine; stop it first", tables[0])
	}
	return nil
}

// proxyTables lists kube-proxy's nftables tables, such as "ip kube-proxy". They are per machine, not per cluster.
func proxyTables(ctx context.Context) ([]string, error) {
	output, err := run(ctx, nil, "nft", "list", "tables")
	if err != nil {
		return nil, fmt.Errorf("listing nftables tables: %w: %s", err, strings.TrimSpace(output))
	}
	var found []string
	for line := range strings.Lines(output) {
		if table := strings.TrimPrefix(strings.TrimSpace(line), "table "); strings.HasSuffix(table, " kube-proxy") {
			found = append(found, table)
		}
	}
	return found, nil
}

func removeNetwork(ctx context.Context) error {
	var errs []error
	tables, err := proxyTables(ctx)
	errs = append(errs, err)
	for _, table := range tables {
		family, name, _ := strings.Cut(table, " ")
		if output, err := run(ctx, nil, "nft", "delete", "table", family, name); err != nil {
			errs = append(errs, fmt.Errorf("deleting the nftables table %s: %w: %s", table, err, strings.TrimSpace(output)))
		}
	}
	if output, err := run(ctx, nil, "ip", "route", "flush", "proto", routeOrigin, "type", "unreachable"); err != nil {
		errs = append(errs, fmt.Errorf("deleting the routes of dead pods: %w: %s", err, strings.TrimSpace(output)))
	}
	if _, err := net.InterfaceByName(link); err == nil {
		if output, err := run(ctx, nil, "ip", "link", "del", link); err != nil {
			errs = append(errs, fmt.Errorf("deleting the interface %s: %w: %s", link, err, strings.TrimSpace(output)))
		}
	}
	return errors.Join(errs...)
}
