//go:build !clockstep || !amd64

package main

import "errors"

func stepClock(int64) error {
	return errors.New("only a build with the tag clockstep on amd64 can step its clock")
}
