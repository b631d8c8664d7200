"""A fleet on Kubernetes through kubectl: `expertmesh up`, `down`, and the provider behind `ray up`."""
