// Package program is what the harness's commands have in common: how they begin and end.
package program

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Main runs a command until it is done, or SIGINT or SIGTERM ends its context, and exits: with 0, with 1 when run fails,
// with 2 when the arguments were wrong. parsed is what reading them came to; flag.ErrHelp prints usage.
func Main(name, usage string, parsed error, run func(ctx context.Context) error) {
	switch {
	case errors.Is(parsed, flag.ErrHelp):
		fmt.Print(usage)
		return
	case parsed != nil:
		fmt.Fprintf(os.Stderr, "%s: %v; see %s --help\n", name, parsed, name)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}
