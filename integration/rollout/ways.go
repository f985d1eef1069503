package rollout

import (
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
)

// Way is one way of ending pods.
type Way struct {
	// Name is what --only calls it, Title what the table does.
	Name, Title string
	// Ours is Usher's: the one that has to lose nothing.
	Ours bool
	// Blind is the one that must be seen to lose requests, or the measurement shows nothing.
	Blind bool
	edit  func(d *appsv1.Deployment, prefix string)
}

// Ways are all of them.
func Ways() []Way {
	return []Way{
		{Name: "ttl", Title: "no hook, record leaves by TTL (15 s)", Blind: true, edit: func(d *appsv1.Deployment, prefix string) {
			app(d).Lifecycle = nil
			d.Spec.Template.Spec.InitContainers = nil
			app(d).Args = []string{"--register=" + prefix + "/http=$(POD_IP):8080", "--register=" + prefix + "/grpc=$(POD_IP):9090"}
			app(d).Env = []corev1.EnvVar{{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "status.podIP"}}}}
			app(d).EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "usher-registry"}}}}
		}},
		{Name: "no-hook", Title: "no hook, deregistered on deletion", edit: func(d *appsv1.Deployment, _ string) { app(d).Lifecycle = nil }},
		sleep(5),
		sleep(15),
		{Name: "connections", Title: "drain until no connection is open", edit: func(d *appsv1.Deployment, _ string) {
			agent := &d.Spec.Template.Spec.InitContainers[0]
			agent.Args = append(agent.Args, "--multiplexed-ports=http,grpc")
		}},
		usher(),
	}
}

// usher is the example as it stands.
func usher() Way {
	return Way{Name: "usher", Title: "Usher", Ours: true, edit: func(*appsv1.Deployment, string) {}}
}

func sleep(seconds int64) Way {
	return Way{Name: fmt.Sprintf("sleep-%d", seconds), Title: fmt.Sprintf("preStop sleep %d", seconds), edit: func(d *appsv1.Deployment, _ string) {
		app(d).Lifecycle = &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: seconds}}}
	}}
}

func app(d *appsv1.Deployment) *corev1.Container { return &d.Spec.Template.Spec.Containers[0] }

// Select returns the named ways, in their own order; all for an empty list.
func Select(names []string) ([]Way, error) {
	all := Ways()
	known := make([]string, len(all))
	for i, w := range all {
		known[i] = w.Name
	}
	for _, n := range names {
		if !slices.Contains(known, n) {
			return nil, fmt.Errorf("way %q is unknown: want some of %s", n, strings.Join(known, ","))
		}
	}
	if len(names) == 0 {
		return all, nil
	}
	return slices.DeleteFunc(all, func(w Way) bool { return !slices.Contains(names, w.Name) }), nil
}
