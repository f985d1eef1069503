package api

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// MaxBody of a request, in bytes: far above any order, and below what would hurt.
const MaxBody = 64 << 10

// Fields of a request's body by their names in JSON: pointers to string, int or time.Time. All may be left out.
type Fields map[string]any

// BodyError is a body that is refused.
type BodyError struct {
	Code int // the HTTP status that says so
	err  error
}

func (e *BodyError) Error() string { return "body: " + e.err.Error() }

func (e *BodyError) Unwrap() error { return e.err }

// Read takes in a body: one JSON object and nothing else, no other fields, none twice, names to the letter. encoding/json alone
// would let pass the last two. It is nil, or a *BodyError; then some fields may have been set.
func (f Fields) Read(w http.ResponseWriter, r *http.Request) error { return f.read(w, r, false) }

// ReadOptional is Read for a body that may be missing altogether.
func (f Fields) ReadOptional(w http.ResponseWriter, r *http.Request) error { return f.read(w, r, true) }

func (f Fields) read(w http.ResponseWriter, r *http.Request, optional bool) error {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, MaxBody))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return &BodyError{http.StatusRequestEntityTooLarge, fmt.Errorf("is larger than %d bytes, which is the most there may be", MaxBody)}
	}
	if err == nil && !(optional && len(body) == 0) {
		err = f.decode(string(body))
	}
	if err != nil {
		return &BodyError{http.StatusBadRequest, err}
	}
	return nil
}

func (f Fields) decode(body string) error {
	names := strings.Join(slices.Sorted(maps.Keys(f)), ", ")
	dec := json.NewDecoder(strings.NewReader(body))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("is no JSON object; want one with %s", names)
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return fmt.Errorf("is no JSON: %w", err)
		}
		name, _ := t.(string)
		into, known := f[name]
		switch {
		case !known:
			return fmt.Errorf("field %.80q: there is none; want %s", name, names)
		case seen[name]:
			return fmt.Errorf("field %q: is there twice", name)
		}
		seen[name] = true
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return fmt.Errorf("field %q: is no JSON: %w", name, err)
		}
		if err := json.Unmarshal(raw, into); err != nil || string(raw) == "null" {
			want := "a string"
			switch into.(type) {
			case *int:
				want = "a whole number"
			case *time.Time:
				want = `a time like "2026-01-31T12:00:00Z"`
			}
			return fmt.Errorf("field %q: %.80s; want %s", name, raw, want)
		}
	}
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("is no JSON: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errors.New("goes on after its JSON object; want that alone")
	}
	return nil
}
