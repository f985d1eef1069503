package conformance_test

import (
	"context"
	"fmt"
	"net"
	"strconv"
	"testing"

	"github.com/coredns/caddy"
	"github.com/coredns/coredns/core/dnsserver"
	_ "github.com/coredns/coredns/plugin/bind"
	_ "github.com/coredns/coredns/plugin/cache"
	_ "github.com/coredns/coredns/plugin/etcd"
	"github.com/miekg/dns"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/integration/internal/etcdtest"
)

// coreDNS is a whole CoreDNS, started from a Corefile, as three readers: one asks it for A, one for AAAA, one for SRV.
func coreDNS(t *testing.T, etcd *etcdtest.Server, more string) []conformance.Reader {
	t.Helper()
	caddy.Quiet, dnsserver.Quiet = true, true
	server, err := caddy.Start(caddy.CaddyfileInput{ServerTypeName: "dns", Filepath: "Corefile", Contents: fmt.Appendf(nil, `
example.com:0 {
	bind 127.0.0.1
	%s
	etcd {
		endpoint http://%s
	}
}`, more, etcd.Endpoint())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Stop() })
	at := server.Servers()[0].LocalAddr().String()

	ask := func(ctx context.Context, name string, kind uint16) (*dns.Msg, error) {
		q := new(dns.Msg)
		q.SetQuestion(name, kind)
		answer, _, err := new(dns.Client).ExchangeContext(ctx, q, at)
		if err != nil {
			return nil, err
		}
		if answer.Rcode != dns.RcodeSuccess && answer.Rcode != dns.RcodeNameError {
			return nil, fmt.Errorf("answer is %s", dns.RcodeToString[answer.Rcode])
		}
		return answer, nil
	}
	suffix := ""
	if more != "" {
		suffix = " with " + more
	}
	const name = "api.shop.example.com."
	return []conformance.Reader{
		{
			Name: "CoreDNS A" + suffix, Format: "skydns", NeedsEtcd: true,
			Sees: func(in conformance.Instance) string { return in.Addresses[0].String() },
			Look: func(ctx context.Context) (seen []string, err error) {
				answer, err := ask(ctx, name, dns.TypeA)
				if err != nil {
					return nil, err
				}
				for _, rr := range answer.Answer {
					seen = append(seen, rr.(*dns.A).A.String())
				}
				return seen, nil
			},
		},
		{
			Name: "CoreDNS AAAA" + suffix, Format: "skydns", NeedsEtcd: true,
			Sees: func(in conformance.Instance) string { return in.Addresses[1].String() },
			Look: func(ctx context.Context) (seen []string, err error) {
				answer, err := ask(ctx, name, dns.TypeAAAA)
				if err != nil {
					return nil, err
				}
				for _, rr := range answer.Answer {
					seen = append(seen, rr.(*dns.AAAA).AAAA.String())
				}
				return seen, nil
			},
		},
		{
			Name: "CoreDNS SRV" + suffix, Format: "skydns", NeedsEtcd: true,
			Sees: func(in conformance.Instance) string {
				return fmt.Sprintf("%s and %s, port %d", in.Addresses[0], in.Addresses[1], in.Ports[0].Number)
			},
			Look: func(ctx context.Context) (seen []string, err error) {
				answer, err := ask(ctx, "_grpc._tcp."+name, dns.TypeSRV)
				if err != nil {
					return nil, err
				}
				hosts := map[string][2]net.IP{}
				for _, rr := range answer.Extra {
					h := hosts[rr.Header().Name]
					switch rr := rr.(type) {
					case *dns.A:
						h[0] = rr.A
					case *dns.AAAA:
						h[1] = rr.AAAA
					}
					hosts[rr.Header().Name] = h
				}
				for _, rr := range answer.Answer {
					srv := rr.(*dns.SRV)
					h := hosts[srv.Target]
					seen = append(seen, h[0].String()+" and "+h[1].String()+", port "+strconv.Itoa(int(srv.Port)))
				}
				return seen, nil
			},
		},
	}
}
