package format_test

import (
	"errors"
	"fmt"
	"log"
	"net/netip"

	"usher.dev/usher/registry/format"
)

// What consumers of two kinds read of one instance.
func Example() {
	instance := format.Instance{
		ID: "0b7c", Namespace: "prod", Service: "shop", Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.1")},
		Ports: []format.Port{{Name: "http", Number: 8080}, {Name: "grpc", Number: 9090}},
	}
	for _, spec := range []format.Spec{
		{Type: "grpc", Target: "shop/grpc", Port: "grpc"},
		{Type: "template", Port: "http", Key: "/services/{{.Service}}/{{.ID}}", Value: "{{hostport .Address .Port}}"},
	} {
		f, err := format.New(spec)
		if err != nil {
			log.Fatal(err)
		}
		records, err := f.Records(instance)
		if err != nil {
			log.Fatal(err)
		}
		for _, r := range records {
			fmt.Println(r.Key, r.Value)
		}
	}
	// Output:
	// shop/grpc/0b7c {"Op":0,"Addr":"10.0.0.1:9090"}
	// /services/shop/0b7c 10.0.0.1:8080
}

// Settings that would break a reader are refused before anything is written.
func ExampleError() {
	_, err := format.New(format.Spec{Type: "grpc", Target: "shop//grpc"})
	var wrong *format.Error
	fmt.Println(errors.As(err, &wrong), err)
	// Output: true format grpc: target "shop//grpc": want no empty segment
}
