package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"sigs.k8s.io/yaml"

	"usher.dev/usher/registry"
)

// item is an entry as JSON and YAML show it.
type item struct {
	Key    string           `json:"key"`
	Lease  registry.LeaseID `json:"lease"`            // the one that the key is under
	Error  string           `json:"error,omitempty"`  // why there is no record
	Record *registry.Record `json:"record,omitempty"` // as it is in etcd
}

func newItem(e registry.Entry) item {
	i := item{Key: e.Key, Lease: e.Lease}
	if e.Err != nil {
		i.Error = e.Err.Error()
	} else {
		i.Record = &e.Record
	}
	return i
}

// encode writes v as JSON or YAML.
func encode(w io.Writer, output string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err == nil && output == "yaml" {
		b, err = yaml.JSONToYAML(b)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", output, err)
	}
	_, err = fmt.Fprintln(w, strings.TrimSuffix(string(b), "\n"))
	return err
}

// table writes rows in columns, three spaces apart as kubectl does.
func table(w io.Writer, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	for _, row := range rows {
		fmt.Fprintln(tw, strings.Join(row, "\t"))
	}
	return tw.Flush()
}

func orNone(s string) string {
	if s == "" {
		return "<none>"
	}
	return s
}

// addresses joins every address with every port. A limit above 0 cuts the list as kubectl cuts endpoints.
func addresses(r registry.Record, limit int) string {
	var all []string
	for _, a := range r.Addresses {
		if len(r.Ports) == 0 {
			all = append(all, a)
		}
		for _, p := range r.Ports {
			all = append(all, net.JoinHostPort(a, strconv.Itoa(int(p.Port))))
		}
	}
	if n := len(all) - limit; limit > 0 && n > 0 {
		return fmt.Sprintf("%s + %d more...", strings.Join(all[:limit], ","), n)
	}
	return orNone(strings.Join(all, ","))
}

// shortDuration is the form of kubectl's AGE columns: two units while the first is small, else one.
func shortDuration(d time.Duration) string {
	const day = 24 * time.Hour
	const year = 365 * day
	two := func(big time.Duration, bigUnit string, small time.Duration, smallUnit string) string {
		s := strconv.Itoa(int(d/big)) + bigUnit
		if rest := d % big / small; rest > 0 {
			s += strconv.Itoa(int(rest)) + smallUnit
		}
		return s
	}
	switch {
	case d <= -2*time.Second:
		return "<invalid>" // clocks differ
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return strconv.Itoa(int(d/time.Second)) + "s"
	case d < 10*time.Minute:
		return two(time.Minute, "m", time.Second, "s")
	case d < 3*time.Hour:
		return strconv.Itoa(int(d/time.Minute)) + "m"
	case d < 8*time.Hour:
		return two(time.Hour, "h", time.Minute, "m")
	case d < 2*day:
		return strconv.Itoa(int(d/time.Hour)) + "h"
	case d < 8*day:
		return two(day, "d", time.Hour, "h")
	case d < 2*year:
		return strconv.Itoa(int(d/day)) + "d"
	case d < 8*year:
		return two(year, "y", day, "d")
	}
	return strconv.Itoa(int(d/year)) + "y"
}
