package notify

import (
	"errors"
	"fmt"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
)

const (
	defaultWebhookTimeout  = time.Second
	defaultWebhookDeadline = 10 * time.Second
	defaultCommandTimeout  = 5 * time.Second
)

// Settings are the receivers, as the agent's file has them under "notify". Durations are texts such as "500ms" or "2s".
type Settings struct {
	Webhooks []Webhook `json:"webhooks,omitempty"`
	Commands []Command `json:"commands,omitempty"`
	// StateFile is where the newest event is kept as JSON, on a volume that the application shares; empty: nowhere. It is
	// replaced atomically, readable for everyone, and stays when the agent has ended: released, if all went well.
	StateFile string `json:"stateFile,omitempty"`
}

// Webhook has each event posted to it as JSON ([usher.dev/usher/internal/api.Event]). 2xx is success; 3xx (which is not
// followed) and 4xx but 408 and 429 are final; everything else is tried again.
type Webhook struct {
	URL string `json:"url"` // http or https
	// Events are those that it wants; none: all.
	Events []api.EventType `json:"events,omitempty"`
	// Timeout of one attempt; default 1s.
	Timeout string `json:"timeout,omitempty"`
	// Deadline is the age at which an event is no longer tried again; default 10s.
	Deadline string `json:"deadline,omitempty"`
	// Headers go with every request.
	Headers map[string]string `json:"headers,omitempty"`
}

// Command is started once for each event, with it as JSON at its standard input, and USHER_EVENT, USHER_STATE and
// USHER_CAUSE in its environment. Of the agent's own environment it has all but what begins with USHER_ or ETCDCTL_, since
// there are secrets among those.
type Command struct {
	// Events are those that it wants; none: all.
	Events []api.EventType `json:"events,omitempty"`
	// Command is the program, by path or looked up in PATH, and its arguments. No shell is involved.
	Command []string `json:"command"`
	// Timeout after which it is killed with all that it has started; default 5s.
	Timeout string `json:"timeout,omitempty"`
}

// Validate checks what can be checked without a look at the machine. Every error names the field, the value and what would
// be right.
func (s Settings) Validate() error {
	var errs []error
	check := func(err error, format string, args ...any) {
		if err != nil {
			errs = append(errs, fmt.Errorf("notify."+format+" %w", append(args, err)...))
		}
	}
	for i, w := range s.Webhooks {
		check(checkURL(w.URL), "webhooks[%d].url", i)
		check(checkEvents(w.Events), "webhooks[%d].events", i)
		timeout, err := duration(w.Timeout, defaultWebhookTimeout)
		check(err, "webhooks[%d].timeout", i)
		deadline, derr := duration(w.Deadline, defaultWebhookDeadline)
		check(derr, "webhooks[%d].deadline", i)
		if err == nil && derr == nil && deadline < timeout {
			check(fmt.Errorf("%q: want at least the timeout of one attempt, %s", deadline, timeout), "webhooks[%d].deadline", i)
		}
		seen := map[string]bool{}
		for _, name := range slices.Sorted(maps.Keys(w.Headers)) {
			check(checkHeader(name, w.Headers[name]), "webhooks[%d].headers", i)
			if lower := strings.ToLower(name); seen[lower] {
				check(fmt.Errorf("%q: is there twice: case makes no difference", name), "webhooks[%d].headers", i)
			} else {
				seen[lower] = true
			}
		}
	}
	for i, c := range s.Commands {
		if len(c.Command) == 0 || c.Command[0] == "" {
			check(fmt.Errorf("%q: want a program and its arguments, such as [/app/bin/offline, --now]", c.Command), "commands[%d].command", i)
		}
		if slices.ContainsFunc(c.Command, func(arg string) bool { return strings.ContainsRune(arg, 0) }) {
			check(fmt.Errorf("%q: want arguments without a NUL byte", c.Command), "commands[%d].command", i)
		}
		check(checkEvents(c.Events), "commands[%d].events", i)
		_, err := duration(c.Timeout, defaultCommandTimeout)
		check(err, "commands[%d].timeout", i)
	}
	if f := s.StateFile; f != "" && (!filepath.IsAbs(f) || strings.HasSuffix(f, "/") || strings.ContainsRune(f, 0)) {
		check(fmt.Errorf("%q: want the absolute path of a file, such as /run/usher/state.json", f), "stateFile")
	}
	return errors.Join(errs...)
}

func checkURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // the whole has the text, and so a password in it
		}
		return fmt.Errorf("is no URL: %w; want one such as http://127.0.0.1:8080/usher", err)
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		return fmt.Errorf("%q: want an http or https URL with a host, such as http://127.0.0.1:8080/usher", u.Redacted())
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("%q: want a port from 1 to 65535", u.Redacted())
		}
	}
	return nil
}

func checkEvents(events []api.EventType) error {
	for _, e := range events {
		if !slices.Contains(api.EventTypes(), e) {
			return fmt.Errorf("%q: want some of %s", e, join(api.EventTypes()))
		}
	}
	return nil
}

func join(events []api.EventType) string {
	names := make([]string, len(events))
	for i, e := range events {
		names[i] = string(e)
	}
	return strings.Join(names, ", ")
}

// checkHeader follows RFC 9110, 5.1 and 5.5. The value may be a secret, so it is not shown.
func checkHeader(name, value string) error {
	odd := func(r rune) bool {
		return r > '~' || r <= ' ' || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, r)
	}
	if name == "" || strings.ContainsFunc(name, odd) {
		return fmt.Errorf("%q: want a header's name, letters, digits and dashes", name)
	}
	if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
		return fmt.Errorf("%s: its value has control characters: want one line of text", name)
	}
	return nil
}

func duration(text string, def time.Duration) (time.Duration, error) {
	if text == "" {
		return def, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q: want a duration above zero, such as 500ms, 2s or 1m", text)
	}
	return d, nil
}
