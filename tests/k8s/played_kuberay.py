"""What KubeRay does of a RayService, as far as `up` waits for it: a RayCluster each time it changes, and its status."""

from tests.k8s.lab import NAME, NAMESPACE, Lab
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.resources import Resource
from tests.kube.status import Manifest

RAY_SERVICES = Resource("ray.io", "v1", "RayService", "rayservices")


def play(lab: Lab, changes: int) -> None:
    """Follow the RayService through a number of generations: the next cluster serves when its pods are there."""
    for number in range(changes):
        lab.kube.store.wait_until(Generation(lab, number + 1).is_there)
        (service,) = lab.kube.store.all(RAY_SERVICES)
        name = f"{NAME}-{number}"
        owner = {"apiVersion": "ray.io/v1", "kind": "RayService", "name": NAME, "uid": service["metadata"]["uid"]}
        cluster = {"metadata": {"name": name, "ownerReferences": [owner]}, "spec": service["spec"]["rayClusterConfig"]}
        lab.kube.store.create(RAY_CLUSTERS, NAMESPACE, cluster)
        set_status(lab, active=f"{NAME}-{number - 1}" if number else "", pending=name)
        lab.kube.store.wait_until(PodsOf(lab, name).are_there)
        set_status(lab, active=name, pending="")


class Generation:
    """Whether the RayService has come to a generation."""

    def __init__(self, lab: Lab, number: int) -> None:
        self._lab = lab
        self._number = number

    def is_there(self) -> bool:
        return any(found["metadata"]["generation"] >= self._number for found in self._lab.kube.store.all(RAY_SERVICES))


class PodsOf:
    """Whether a cluster has all four of the lab's pods."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab = lab
        self._name = name

    def are_there(self) -> bool:
        return sum(pod.startswith(f"{self._name}-") for pod in self._lab.pods()) == 4


def set_status(lab: Lab, *, active: str, pending: str) -> None:
    """Write what KubeRay writes: Ready as long as one serves, and whether an upgrade is under way."""

    def change(found: Manifest) -> Manifest:
        states = {"Ready": bool(active), "UpgradeInProgress": bool(active and pending)}
        status = {
            "observedGeneration": found["metadata"]["generation"],
            "conditions": [{"type": kind, "status": str(holds)} for kind, holds in states.items()],
            "activeServiceStatus": {"rayClusterName": active},
            "pendingServiceStatus": {"rayClusterName": pending},
        }
        return {**found, "status": status}

    lab.kube.store.update(RAY_SERVICES, NAMESPACE, NAME, change)
