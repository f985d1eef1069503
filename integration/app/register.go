package main

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
)

// record is what --register asks for.
type record struct{ target, addr string }

func parseRecord(text string) (record, error) {
	target, addr, ok := strings.Cut(text, "=")
	host, port, err := net.SplitHostPort(addr)
	if !ok || target == "" || strings.HasSuffix(target, "/") || err != nil || host == "" || port == "" {
		return record{}, fmt.Errorf("%q: give TARGET=HOST:PORT, such as shop/http=10.0.0.7:8080", text)
	}
	return record{target, addr}, nil
}

// register puts the records under a lease and keeps that alive for as long as the process lives. Nothing takes them back: a
// process that dies leaves them to the lease's TTL.
func register(ctx context.Context, cfg config) error {
	cli, err := clientv3.New(clientv3.Config{Endpoints: cfg.etcd, DialTimeout: 5 * time.Second})
	if err != nil {
		return fmt.Errorf("connect to etcd at %v: %w", cfg.etcd, err)
	}
	session, err := concurrency.NewSession(cli, concurrency.WithTTL(int(cfg.registerTTL/time.Second)), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("get a lease from etcd at %v: %w", cfg.etcd, err)
	}
	for _, r := range cfg.register {
		m, err := endpoints.NewManager(cli, r.target)
		if err == nil {
			err = m.AddEndpoint(ctx, r.target+"/"+cfg.pod, endpoints.Endpoint{Addr: r.addr}, clientv3.WithLease(session.Lease()))
		}
		if err != nil {
			return fmt.Errorf("register %s: %w", r.target, err)
		}
	}
	return nil
}
