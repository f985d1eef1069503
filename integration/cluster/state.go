package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	stateFile = "state.json"
	// machineFile is locked while a cluster of this machine comes up or goes down, and says where it is.
	machineFile = "/run/usher-cluster"
)

// state is what another process, or the next one after a crash, has to know. It is written before anything is started.
type state struct {
	// Owner is the process whose Up made the cluster and which is expected to take it down; nobody when detached.
	Owner    process `json:"owner,omitzero"`
	Ready    bool    `json:"ready"` // Up has succeeded
	Binaries Binaries
	// RegistryNoFsync is as in Config.
	RegistryNoFsync bool               `json:"registryNoFsync"`
	CNIDir          string             `json:"cniDir"`
	Snapshotter     string             `json:"snapshotter"`
	Subnet          int                `json:"subnet"` // the n of 10.n.0.0/24, the pods' addresses
	Ports           map[string]int     `json:"ports"`
	Daemons         map[string]process `json:"daemons"`
	// Sysctls are the kernel's settings as they were before.
	Sysctls map[string]string `json:"sysctls"`
	// Made are the folders outside of the cluster's own that were not there before.
	Made []string `json:"made"`
}

// process is a process that can't be mistaken for a later one with the same id.
type process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // in clock ticks after boot, from /proc/PID/stat
}

// findProcess describes the process that has the id now.
func findProcess(pid int) (process, error) {
	start, _, err := readStat(pid)
	return process{PID: pid, Start: start}, err
}

// alive says whether the process still runs. A zombie does not.
func (p process) alive() bool {
	if p.PID == 0 {
		return false
	}
	start, status, err := readStat(p.PID)
	return err == nil && start == p.Start && status != "Z" && status != "X"
}

func readStat(pid int) (start uint64, status string, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, "", err
	}
	return parseStat(string(text))
}

// parseStat reads the state (field 3) and the start time (field 22) of proc(5)'s stat. The second field is the program's name in
// parentheses, and may itself hold spaces and parentheses.
func parseStat(text string) (start uint64, status string, err error) {
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return 0, "", fmt.Errorf("process status %q is too short", text)
	}
	start, err = strconv.ParseUint(fields[19], 10, 64)
	return start, fields[0], err
}

// readState returns an error that is fs.ErrNotExist if dir isn't a cluster's folder.
func readState(dir string) (*state, error) {
	if err := checkOwner(dir); err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(dir, stateFile))
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(text, &s); err != nil {
		return nil, fmt.Errorf("reading %s: %w", filepath.Join(dir, stateFile), err)
	}
	return &s, nil
}

// checkOwner refuses a folder in which another user could have put words into our mouth.
func checkOwner(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("the cluster's folder: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("the cluster's folder %s is no folder", dir)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid != 0 {
		return fmt.Errorf("the cluster's folder %s belongs to user %d: want root", dir, stat.Uid)
	}
	return nil
}

func (s *state) write(dir string) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	file := filepath.Join(dir, stateFile)
	if err := os.WriteFile(file+".partial", append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".partial", file)
}

// anyAlive names a component that runs, if one does.
func (s *state) anyAlive() (name string, pid int) {
	for _, name := range components() {
		if p := s.Daemons[name]; p.alive() {
			return name, p.PID
		}
	}
	return "", 0
}

// lockFile takes an exclusive lock that ends with the process at the latest. It calls waiting once if somebody else has it.
func lockFile(ctx context.Context, file string, waiting func()) (unlock func(), err error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", file, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// claimed is the folder of the machine's cluster, empty if there is none. The caller holds the lock.
func claimed() (string, error) {
	text, err := os.ReadFile(machineFile)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(text)), nil
}

// claim records where the machine's cluster is. It keeps the file, which carries the lock.
func claim(dir string) error {
	return os.WriteFile(machineFile, []byte(dir+"\n"), 0o600)
}
