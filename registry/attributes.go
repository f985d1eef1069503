package registry

import (
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"

	"usher.dev/usher/lifecycle"
)

// Annotations of the own Pod that change what its records say, while it runs.
const (
	AnnotationWeight   = "usher.dev/weight"   // a number from 0 to MaxWeight
	AnnotationVersion  = "usher.dev/version"  // before the label LabelVersion
	AnnotationMetadata = "usher.dev/metadata" // and a dot and a key: usher.dev/metadata.team: checkout

	// LabelVersion is Kubernetes' recommended label for an application's version.
	LabelVersion = "app.kubernetes.io/version"

	// MaxWeight is the largest that all formats can write.
	MaxWeight = 65535
)

// Attributes are what records can say of an instance beside its addresses.
type Attributes struct {
	Weight   int // share of the traffic; 0: the default of the format's readers
	Version  string
	Metadata map[string]string
}

// attributes are the configured ones with what the Pod's label and annotations say in their place. An annotation that
// is wrong is named in the problem and left aside.
func (a Attributes) of(pod lifecycle.Pod) (_ Attributes, problem error) {
	if v := pod.Labels[LabelVersion]; v != "" && a.Version == "" {
		a.Version = v
	}
	a.Metadata = maps.Clone(a.Metadata)
	for key, value := range pod.Annotations {
		switch {
		case key == AnnotationWeight:
			w, err := ParseWeight(value)
			if err != nil {
				problem = errors.Join(problem, fmt.Errorf("annotation %s: %w", key, err))
				continue
			}
			a.Weight = w
		case key == AnnotationVersion:
			a.Version = value
		case strings.HasPrefix(key, AnnotationMetadata+"."):
			if a.Metadata == nil {
				a.Metadata = map[string]string{}
			}
			a.Metadata[strings.TrimPrefix(key, AnnotationMetadata+".")] = value
		}
	}
	return a, problem
}

// ParseWeight reads a weight.
func ParseWeight(text string) (int, error) {
	w, err := strconv.ParseUint(text, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("weight %q: want a number from 0 to %d", text, MaxWeight)
	}
	return int(w), nil
}
