package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"usher.dev/usher/internal/api"
)

func (rs *Receivers) stateFile(path string) (*receiver, error) {
	if info, err := os.Stat(path); err == nil && !info.Mode().IsRegular() {
		return nil, errors.New("want a file, and there is something else by that name")
	}
	trial, err := os.CreateTemp(filepath.Dir(path), ".usher-")
	if err != nil {
		return nil, fmt.Errorf("want a path in a folder that exists and can be written to, such as one of an emptyDir volume: %w", err)
	}
	trial.Close()
	if err := os.Remove(trial.Name()); err != nil {
		return nil, err
	}
	return &receiver{
		name: "state file " + path, counters: &rs.StateFile, newest: true,
		handle: func(_ context.Context, e api.Event) error { return replace(path, e) },
	}, nil
}

// replace writes the file anew so that a reader sees the old text or the new one. The temporary file has one name, so that
// an agent that is killed leaves one at most; it is made anew, so that nobody else's link is followed.
func replace(path string, e api.Event) error {
	text, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		return err
	}
	temp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".usher")
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	err = errors.Join(err, f.Chmod(0o644), f.Close()) // whatever the umask is
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		os.Remove(temp)
	}
	return err
}
