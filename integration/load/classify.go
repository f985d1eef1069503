package load

import (
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Class is how a request failed.
type Class string

// The classes.
const (
	// Refused: nobody listened at the address.
	Refused Class = "refused"
	// Unreachable: there is no way to the address, as when its pod is gone.
	Unreachable Class = "unreachable"
	// Reset: the connection was reset or broken under the request.
	Reset Class = "reset"
	// EOF: the connection or the answer ended before the answer did.
	EOF Class = "eof"
	// Timeout: no answer within Config.Timeout.
	Timeout Class = "timeout"
	// Unavailable: gRPC's code for any other trouble with the connection.
	Unavailable Class = "unavailable"
	// Status: an answer that says it failed (HTTP other than 200, any other gRPC code).
	Status Class = "status"
	// NoInstance: the registry named none.
	NoInstance Class = "no-instance"
	// Other is all the rest.
	Other Class = "other"
)

// classify never returns an empty class.
func classify(err error) Class {
	var se *statusError
	switch {
	case errors.Is(err, errNoInstance):
		return NoInstance
	case errors.As(err, &se):
		return Status
	case errors.Is(err, syscall.ECONNREFUSED):
		return Refused
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return Unreachable
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return Reset
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return Timeout
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, errTruncated):
		return EOF
	}
	st, ok := status.FromError(err)
	if !ok {
		// net/http's error for a kept-alive connection that the server closed just before the answer has no type.
		if strings.Contains(err.Error(), "server closed idle connection") {
			return EOF
		}
		return Other
	}
	switch st.Code() {
	case codes.DeadlineExceeded:
		return Timeout
	case codes.Unavailable:
		return ofText(st.Message())
	}
	return Status
}

// ofText finds the cause in the message: gRPC keeps only the text of a connection's error.
func ofText(text string) Class {
	for _, t := range []struct {
		part  string
		class Class
	}{
		// What round_robin says of a resolver's empty list (grpc balancer/endpointsharding and balancer/base).
		{"no children to pick from", NoInstance},
		{"produced zero addresses", NoInstance},
		{"connection refused", Refused},
		{"no route to host", Unreachable},
		{"network is unreachable", Unreachable},
		{"connection reset", Reset},
		{"broken pipe", Reset},
		{"timed out", Timeout},
		{"EOF", EOF},
	} {
		if strings.Contains(text, t.part) {
			return t.class
		}
	}
	return Unavailable
}
