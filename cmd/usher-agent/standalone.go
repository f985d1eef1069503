package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"usher.dev/usher/lifecycle"
	"usher.dev/usher/registry/format"
)

// What tells that the instance is ready.
const (
	readinessEndpoint = "endpoint"
	readinessProbe    = "probe"
)

// defaultStandaloneGrace is what `docker stop` gives between SIGTERM and SIGKILL. systemd's default, 90 s, is longer.
const defaultStandaloneGrace = 10 * time.Second

// standalone is an instance without Kubernetes: a process of a VM, or of docker compose. What EndpointSlices say elsewhere,
// its own probes say here.
type standalone struct {
	pod   lifecycle.Pod
	ports map[string][]lifecycle.Port // by Service
	names []string
}

// identify fills in what the downward API says of a Pod elsewhere.
func (c *config) identify() error {
	var errs []error
	if c.Namespace == "" {
		c.Namespace = "default"
	}
	if c.Pod == "" {
		name, err := os.Hostname()
		if err != nil {
			errs = append(errs, fmt.Errorf("--pod-name: empty, and the host's name can't be read: %w", err))
		}
		c.Pod, _, _ = strings.Cut(strings.ToLower(name), ".")
	}
	if c.PodUID == "" {
		// A new life each time: what an agent before it left under the same name is older, and taken over.
		c.PodUID = strings.ToLower(rand.Text())
	}
	if len(c.PodIPs) == 0 {
		ip, err := ownAddress()
		if err != nil {
			errs = append(errs, fmt.Errorf("--pod-ips: empty, and the host's own address can't be told: %w", err))
		}
		c.PodIPs = []netip.Addr{ip}
	}
	return errors.Join(errs...)
}

// checkRecords makes the records of a format. Without Kubernetes, all that they are made of is known at the start.
func (c *config) checkRecords(spec format.Spec, f format.Format) error {
	in := format.Instance{
		ID: c.PodUID, Namespace: c.Namespace, Addresses: c.PodIPs,
		Weight: c.Attributes.Weight, Version: c.Attributes.Version, Metadata: c.Attributes.Metadata,
	}
	numbers, err := portNumbers(spec)
	if err != nil {
		return err
	}
	for _, n := range numbers {
		in.Ports = append(in.Ports, format.Port{Number: n})
	}
	_, err = f.Records(in)
	return err
}

// portNumbers are the ports that a format names, which are at least one.
func portNumbers(spec format.Spec) ([]uint16, error) {
	ports, err := spec.Ports()
	if err != nil {
		return nil, err
	}
	numbers := make([]uint16, 0, len(ports))
	for _, p := range ports {
		if n, err := strconv.ParseUint(p, 10, 16); err == nil && n > 0 {
			numbers = append(numbers, uint16(n))
		}
	}
	if len(numbers) == 0 || len(numbers) < len(ports) {
		return nil, fmt.Errorf("port %q: want a number from 1 to 65535; without Kubernetes there are no named ports", spec.Port)
	}
	return numbers, nil
}

// ownAddress is the one that this host uses towards others. Connecting a UDP socket sends nothing; the address is from a
// block that is kept for documentation (RFC 5737), so it takes the default route.
func ownAddress() (netip.Addr, error) {
	conn, err := net.Dial("udp", "192.0.2.1:9")
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

func newStandalone(c config) *standalone {
	s := &standalone{
		pod: lifecycle.Pod{
			Known: true, Namespace: c.Namespace, Name: c.Pod, UID: c.PodUID, Node: c.Node, Created: time.Now(),
			IPs: c.PodIPs, Grace: c.Grace, HostNetwork: true, HostIPs: c.PodIPs,
		},
		ports: map[string][]lifecycle.Port{},
	}
	for _, svc := range c.Services {
		s.names = append(s.names, svc.Name)
		for _, f := range svc.Formats {
			numbers, _ := portNumbers(f) // checkRecords had no complaint
			for _, n := range numbers {
				p := lifecycle.Port{Number: n, Protocol: "TCP"}
				if !slices.Contains(s.ports[svc.Name], p) {
					s.ports[svc.Name] = append(s.ports[svc.Name], p)
				}
			}
		}
	}
	return s
}

// observe is what the probes make of the instance. Nothing said is not ready, as in Kubernetes.
func (s *standalone) observe(a lifecycle.Availability) lifecycle.Observation {
	_, refusing := a.Refusing()
	ready := a.Readiness.State == lifecycle.AcceptingTraffic && !refusing
	o := lifecycle.Observation{Pod: s.pod}
	o.Pod.Ready = ready
	for _, name := range s.names {
		o.Endpoints = append(o.Endpoints, lifecycle.Endpoint{
			Service: name, Found: true, Ready: ready, Serving: ready, Addresses: s.pod.IPs, Ports: s.ports[name],
		})
	}
	return o
}
