package registry

import (
	"maps"
	"strings"
	"testing"

	"usher.dev/usher/lifecycle"
)

func TestAnnotationsGoBeforeConfigurationAndLabel(t *testing.T) {
	base := Attributes{Weight: 5, Metadata: map[string]string{"team": "a", "tier": "1"}}
	pod := lifecycle.Pod{
		Labels:      map[string]string{LabelVersion: "v1"},
		Annotations: map[string]string{AnnotationWeight: "20", AnnotationMetadata + ".team": "b", "other.dev/weight": "7"},
	}
	got, problem := base.of(pod)
	if problem != nil || got.Weight != 20 || got.Version != "v1" || !maps.Equal(got.Metadata, map[string]string{"team": "b", "tier": "1"}) {
		t.Errorf("got %+v, %v", got, problem)
	}
	if base.Metadata["team"] != "a" {
		t.Error("the configuration itself was changed")
	}
	pod.Annotations[AnnotationVersion] = "v2"
	if got, _ := base.of(pod); got.Version != "v2" {
		t.Errorf("version %q, want the annotation's", got.Version)
	}
	base.Version = "v3"
	delete(pod.Annotations, AnnotationVersion)
	if got, _ := base.of(pod); got.Version != "v3" {
		t.Errorf("version %q, want the configured one before the label's", got.Version)
	}
}

func TestBadWeightAnnotationIsNamedAndLeftAside(t *testing.T) {
	for _, w := range []string{"", "heavy", "-1", "65536", "1.5"} {
		got, problem := Attributes{Weight: 5}.of(lifecycle.Pod{Annotations: map[string]string{AnnotationWeight: w}})
		if problem == nil || !strings.Contains(problem.Error(), AnnotationWeight) || !strings.Contains(problem.Error(), "0 to 65535") || got.Weight != 5 {
			t.Errorf("%q: weight %d, %v; want 5 and a problem that names the annotation and the range", w, got.Weight, problem)
		}
	}
}
