package etcdtest

import (
	"context"
	"net"
	"os"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

func TestDataOutlivesRestartUnderOneAddress(t *testing.T) {
	s := Start(t)
	c := s.Client()
	for _, v := range []string{"1", "2"} {
		if _, err := c.Put(t.Context(), "a", v); err != nil {
			t.Fatal(err)
		}
	}
	s.Restart()
	events, err := History(t.Context(), c)
	if err != nil || len(events) != 2 || string(events[1].Kv.Value) != "2" {
		t.Fatalf("after a restart: %v, %v; want both puts", events, err)
	}
	s.RestartEmpty()
	if events, err := History(t.Context(), c); err != nil || len(events) != 0 {
		t.Fatalf("after a restart without data: %v, %v; want nothing", events, err)
	}
}

func TestLinkFailsAsAsked(t *testing.T) {
	s := Start(t)
	direct, link := s.Client(), s.Link()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{link.Endpoint()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	put := func(value string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		_, err := c.Put(ctx, "a", value)
		return err
	}
	stored := func() string {
		resp, err := direct.Get(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if resp.Count == 0 {
			return ""
		}
		return string(resp.Kvs[0].Value)
	}
	for _, step := range []struct {
		mode   Mode
		value  string
		fails  bool
		stored string
	}{
		{Pass, "1", false, "1"},
		{DropAnswers, "2", true, "2"},
		{Refuse, "3", true, "2"},
	} {
		link.Set(step.mode)
		if err := put(step.value); (err != nil) != step.fails {
			t.Errorf("mode %d: put: %v, want failure: %t", step.mode, err, step.fails)
		}
		if got := stored(); got != step.stored {
			t.Errorf("mode %d: stored %q, want %q", step.mode, got, step.stored)
		}
	}
	link.Set(Pass)
	for deadline := time.Now().Add(10 * time.Second); put("4") != nil; {
		if time.Now().After(deadline) {
			t.Fatal("the link never passes again")
		}
	}
	link.Set(Hold)
	if err := put("5"); err == nil {
		t.Error("held: the put was answered")
	}
	if got := stored(); got != "4" {
		t.Errorf("held: stored %q, want 4", got)
	}
}

func TestServedMemberIsGoneAfterStop(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	endpoint, stop, err := Serve()
	if err != nil {
		t.Fatal(err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Put(t.Context(), "a", "1"); err != nil {
		t.Fatal(err)
	}
	stop()
	if conn, err := net.Dial("tcp", endpoint); err == nil {
		conn.Close()
		t.Error("somebody listens after stop")
	}
	if left, err := os.ReadDir(os.TempDir()); err != nil || len(left) != 0 {
		t.Errorf("left after stop: %v, %v", left, err)
	}
}
