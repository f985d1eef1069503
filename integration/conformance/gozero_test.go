package conformance_test

import (
	"context"
	"testing"

	"github.com/zeromicro/go-zero/core/discov"
	"github.com/zeromicro/go-zero/core/logx"

	"usher.dev/usher/integration/internal/conformance"
	"usher.dev/usher/integration/internal/etcdtest"
)

// goZero is what a zRPC client's resolver takes its addresses from.
func goZero(t *testing.T, etcd *etcdtest.Server) conformance.Reader {
	t.Helper()
	logx.Disable()
	sub, err := discov.NewSubscriber([]string{etcd.Endpoint()}, "api.rpc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sub.Close)
	return conformance.Reader{Name: "go-zero Subscriber", Format: "gozero", Sees: grpcAddress, Look: func(context.Context) ([]string, error) {
		return sub.Values(), nil
	}}
}
