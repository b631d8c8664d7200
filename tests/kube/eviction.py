"""Evictions, as `kubectl drain` asks for them: a deletion that a PodDisruptionBudget may refuse for now."""

from tests.kube.resources import BUDGETS, PODS
from tests.kube.status import ApiError, Manifest
from tests.kube.store import Store, grace_of


def evict(store: Store, namespace: str, name: str, options: Manifest) -> None:
    """Delete a pod in order, if its budgets allow that now. Only `minAvailable` in whole pods is known.

    Args:
        store: the objects.
        namespace: of the pod.
        name: of the pod.
        options: of the deletion.

    Raises:
        ApiError: 404 for no pod, 429 if too few others would be left.
    """
    with store.locked():
        pod = store.get(PODS, namespace, name)
        for budget in store.all(BUDGETS, namespace):
            chosen = budget["spec"]["selector"]["matchLabels"].items()
            if not chosen <= pod["metadata"]["labels"].items():
                continue
            others = [
                other
                for other in store.all(PODS, namespace)
                if chosen <= other["metadata"].get("labels", {}).items() and other["metadata"]["name"] != name
            ]
            healthy = sum(_is_healthy(other) for other in others)
            if healthy < budget["spec"].get("minAvailable", 0) and _is_healthy(pod):
                cause = f"The disruption budget {budget['metadata']['name']} needs {budget['spec']['minAvailable']}"
                cause += f" healthy pods and has {healthy + 1} currently"
                told = "Cannot evict pod as it would violate the pod's disruption budget."
                raise ApiError(429, told, details={"causes": [{"reason": "DisruptionBudget", "message": cause}]})
        store.delete(PODS, namespace, name, grace_s=grace_of(pod, options.get("gracePeriodSeconds")))


def _is_healthy(pod: Manifest) -> bool:
    return pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
