package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"time"

	"usher.dev/usher/client"
)

// workerTTL is how long the agent believes in a worker that has died.
const workerTTL = 3 * time.Second

// report tells the agent that this process is ready, until ctx ends.
func report(ctx context.Context, agent, id, role string) error {
	c, err := client.New(client.Config{Address: agent})
	if err != nil {
		return err
	}
	return c.Worker(ctx, id, func() client.Worker {
		return client.Worker{State: client.WorkerReady, Role: role, TTLSeconds: int(workerTTL / time.Second)}
	})
}

// untilInputEnds ends with the standard input, and so with the process that holds its other end.
func untilInputEnds() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	return ctx, cancel
}

// work is the life of one worker process: it ends when its standard input does, and so with the process that began it.
func work(cfg config) error {
	ctx, cancel := untilInputEnds()
	defer cancel()
	return report(ctx, cfg.agent, fmt.Sprintf("worker-%d", os.Getpid()), client.RoleWorker)
}

// manage is the master of cfg.workers processes, each of which gets a successor some time after its end. In a list of
// processes they are worker-1, worker-2 and so on.
func manage(cfg config, log *slog.Logger) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	failed := make(chan error)
	go func() { failed <- report(context.Background(), cfg.agent, "master", client.RoleMaster) }()
	for n := range cfg.workers {
		go func() {
			for {
				cmd := exec.Command(self, "--worker", "--agent="+cfg.agent)
				cmd.Args[0], cmd.Stderr = fmt.Sprintf("worker-%d", n+1), os.Stderr
				_, err := cmd.StdinPipe() // closed when this process ends
				if err == nil {
					err = cmd.Run()
				}
				log.Info("worker ended", "name", cmd.Args[0], "error", fmt.Sprint(err))
				if errors.As(err, new(*exec.ExitError)) {
					time.Sleep(cfg.replaceAfter)
					continue
				}
				failed <- fmt.Errorf("%s: %w", cmd.Args[0], err)
				return
			}
		}()
	}
	return <-failed
}
