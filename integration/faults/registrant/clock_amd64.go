//go:build clockstep

package main

import (
	"sync/atomic"
	_ "unsafe" // for linkname
)

// The Go runtime asks the kernel's vDSO for the time, so neither libfaketime nor a time namespace (it has no wall clock)
// can step a Go program's clock alone. This puts a function of ours in between, which needs -ldflags=-checklinkname=0.

//go:linkname vdsoClockgettime runtime.vdsoClockgettimeSym
var vdsoClockgettime uintptr

var (
	kernels uintptr // the vDSO's own clock_gettime
	offset  int64   // seconds that the wall clock is off
)

// steppedAddr is the address of a function with C's calling convention.
func steppedAddr() uintptr

// stepClock moves this process's wall clock by so many seconds, and leaves the monotonic one alone.
func stepClock(seconds int64) error {
	if kernels == 0 {
		kernels = vdsoClockgettime
		atomic.StoreUintptr(&vdsoClockgettime, steppedAddr())
	}
	atomic.AddInt64(&offset, seconds)
	return nil
}
