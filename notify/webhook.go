package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"usher.dev/usher/internal/api"
)

// webhookTransport has no proxy, since the application is on this host, and no keep-alive: to the drain a connection that
// stays open looks like a client that has not let go.
func webhookTransport(dial func(ctx context.Context, network, address string) (net.Conn, error)) http.RoundTripper {
	return &http.Transport{DialContext: dial, DisableKeepAlives: true, TLSHandshakeTimeout: 5 * time.Second}
}

func (rs *Receivers) webhook(w Webhook, transport http.RoundTripper) *receiver {
	u, _ := url.Parse(w.URL) // valid, as the settings are
	timeout, _ := duration(w.Timeout, defaultWebhookTimeout)
	deadline, _ := duration(w.Deadline, defaultWebhookDeadline)
	client := &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return &receiver{
		// Without user and query, where secrets are.
		name: "webhook " + (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String(), counters: &rs.Webhooks, events: w.Events, patience: deadline,
		handle: func(ctx context.Context, e api.Event) error {
			ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s", timeout))
			defer cancel()
			if err := post(ctx, client, w, e); err != nil {
				if ctx.Err() != nil {
					return context.Cause(ctx)
				}
				return err
			}
			return nil
		},
	}
}

func post(ctx context.Context, client *http.Client, w Webhook, e api.Event) error {
	body, err := json.Marshal(e)
	if err != nil {
		return finalError{err}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.URL, bytes.NewReader(body))
	if err != nil {
		return finalError{err}
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("User-Agent", "usher-agent")
	for name, value := range w.Headers {
		if strings.EqualFold(name, "Host") {
			req.Host = value
		}
		req.Header.Set(name, value)
	}
	resp, err := client.Do(req)
	if err != nil {
		var e *url.Error
		if errors.As(err, &e) {
			err = e.Err // the whole has the URL
		}
		return err
	}
	defer resp.Body.Close()
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300:
		return nil
	default:
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 256)) // what there is of it
		err = fmt.Errorf("answered %s %s", resp.Status, quote(strings.TrimSpace(string(text))))
		if code >= 300 && code < 500 && code != http.StatusRequestTimeout && code != http.StatusTooManyRequests {
			err = finalError{err}
		}
		return err
	}
}
