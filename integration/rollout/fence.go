package rollout

import (
	"context"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
)

// fence makes addresses of pods that are gone unreachable, as they are on other clusters: here each pod has a route of its own,
// and without one, what is sent to it would follow the default route out of this machine, and be answered by whoever is
// there. undo is never nil.
func fence(ctx context.Context, nodeIP string) (undo func() error, err error) {
	undo = func() error { return nil }
	addr, err := netip.ParseAddr(nodeIP)
	if err != nil {
		return undo, fmt.Errorf("making the addresses of dead pods unreachable: %w", err)
	}
	pods := netip.PrefixFrom(addr, 24).Masked().String() // the cluster's pod CIDR
	ip := func(ctx context.Context, verb string) error {
		if out, err := exec.CommandContext(ctx, "ip", "route", verb, "unreachable", pods).CombinedOutput(); err != nil {
			return fmt.Errorf("ip route %s unreachable %s: %w: %s", verb, pods, err, strings.TrimSpace(string(out)))
		}
		return nil
	}
	if err := ip(ctx, "add"); err != nil {
		if strings.Contains(err.Error(), "File exists") { // somebody else's fence does as well
			return undo, nil
		}
		return undo, err
	}
	return func() error { return ip(context.WithoutCancel(ctx), "del") }, nil
}
