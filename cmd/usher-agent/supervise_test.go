package main

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"
)

func TestZombiesAreChildrenThatNobodyAskedAbout(t *testing.T) {
	alive, dead := exec.Command("sleep", "60"), exec.Command("true")
	for _, c := range []*exec.Cmd{alive, dead} {
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		alive.Process.Kill()
		alive.Wait()
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if z := zombies(os.Getpid()); slices.Equal(z, []int{dead.Process.Pid}) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("zombies %v, want %d", z, dead.Process.Pid)
		}
	}
	dead.Wait()
	if z := zombies(os.Getpid()); len(z) != 0 {
		t.Errorf("zombies %v after their exit was asked for", z)
	}
}
