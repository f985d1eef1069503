// Package wire is the protocol of the sample application, for the application itself and for those who call it.
//
//	HTTP/1.1                              gRPC                                  what it does
//	GET|POST /fast                        Wait(1ms)                             answers after 1 ms
//	GET|POST /slow?for=2s                 Wait(2s)                              answers after that long
//	GET|POST /stream?for=5s&every=100ms   Stream(5s), a message every 100 ms    keeps answering, then ends
//	POST     /upload                                                            reads the body to its end
//	POST     /pending                                                           answers once it is let go, by PUT
//
// The gRPC service is described by hand over Protocol Buffers' well-known types, so that neither a compiler nor
// generated code is needed.
package wire

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Paths of the HTTP server.
const (
	FastPath   = "/fast"
	SlowPath   = "/slow"
	StreamPath = "/stream"
	UploadPath = "/upload"
	// PendingPath answers POST once somebody sends PUT there, or after the longest time that an answer may take, or
	// LetGoAfter.
	PendingPath = "/pending"
	// ReadyPath and LivePath answer 200 or 503 to GET, and are set by PUT with the body true or false.
	ReadyPath = "/readyz"
	LivePath  = "/livez"
	// InFlightPath answers the number of requests that are owed an answer now, HTTP and gRPC together, as a decimal number.
	InFlightPath = "/inflight"
	// ToldPath takes the agent's events by POST, logs each, and answers after the duration in the query parameter for.
	ToldPath = "/told"
)

// LetGoAfter is how long after a SIGTERM an application that drains answers what is pending.
const LetGoAfter = 2 * time.Second

// Flooded is what became of the calls of a flood, as it writes it.
type Flooded struct {
	Calls   int64 `json:"calls"`
	Refused int64 `json:"refused"` // 403
	Cut     int64 `json:"cut"`     // no answer
	Taken   int64 `json:"taken"`   // any other answer
	Slow    int64 `json:"slow"`    // slow connections so far; one that is cut is opened anew
}

// PodHeader names the pod in every HTTP answer.
const PodHeader = "X-Pod"

// StreamEnd is the last line of a whole HTTP stream.
const StreamEnd = "end\n"

// StreamEvery is the pause between two messages of a gRPC stream, and the default of an HTTP one.
const StreamEvery = 100 * time.Millisecond

// Names of the gRPC service and its methods.
const (
	ServiceName  = "usher.sample.v1.Sample"
	WaitMethod   = "/" + ServiceName + "/Wait"
	StreamMethod = "/" + ServiceName + "/Stream"
)

// Server is the gRPC service: the request is how long to take, the answer names the pod.
type Server interface {
	Wait(context.Context, *durationpb.Duration) (*wrapperspb.StringValue, error)
	Stream(*durationpb.Duration, grpc.ServerStream) error
}

// ServiceDesc describes the service to grpc.Server.RegisterService.
func ServiceDesc() *grpc.ServiceDesc {
	stream := StreamDesc()
	stream.Handler = func(srv any, ss grpc.ServerStream) error {
		in := new(durationpb.Duration)
		if err := ss.RecvMsg(in); err != nil {
			return err
		}
		return srv.(Server).Stream(in, ss)
	}
	return &grpc.ServiceDesc{
		ServiceName: ServiceName,
		HandlerType: (*Server)(nil),
		Methods:     []grpc.MethodDesc{{MethodName: "Wait", Handler: wait}},
		Streams:     []grpc.StreamDesc{*stream},
	}
}

// StreamDesc describes the method Stream to grpc.ClientConn.NewStream.
func StreamDesc() *grpc.StreamDesc {
	return &grpc.StreamDesc{StreamName: "Stream", ServerStreams: true}
}

func wait(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	in := new(durationpb.Duration)
	if err := decode(in); err != nil {
		return nil, err
	}
	if interceptor == nil {
		return srv.(Server).Wait(ctx, in)
	}
	info := &grpc.UnaryServerInfo{Server: srv, FullMethod: WaitMethod}
	return interceptor(ctx, in, info, func(ctx context.Context, req any) (any, error) {
		return srv.(Server).Wait(ctx, req.(*durationpb.Duration))
	})
}
