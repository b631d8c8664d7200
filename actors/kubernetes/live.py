"""What is there now: the Ray cluster, its pods, what they wait for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.cluster.errors import ConflictError
from expertmesh.cluster.kubernetes.objects import LABEL, Manifest, groups_of
from expertmesh.cluster.kubernetes.pods import (
    HEAD_GROUP,
    PodState,
    Trouble,
    is_ending,
    needs_events,
    read_owner,
    read_pod,
)

# Pods of one group wait for the same as a rule: events of so many tell enough, and cost a call each.
_MAX_EVENT_CALLS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A look at a cluster.

    cluster: name of the RayCluster, empty where there is none yet; wanted: pods of each group; troubles: what keeps
    some from running.
    """

    ray: Manifest | None
    cluster: str = ""
    states: tuple[PodState, ...] = ()
    wanted: dict[str, int] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()
    head: Manifest | None = None

    @property
    def is_head_ready(self) -> bool:
        """Return whether commands can be run in the head's pod, and Ray runs there."""
        return any(state.is_ready for state in self.states if state.group == HEAD_GROUP)


def find_ray(kubectl: Kubectl, name: str) -> Manifest | None:
    """Return the RayCluster or RayService of a name, None where there is neither.

    Raises:
        ConflictError: there are both.
        ExpertMeshError: the server cannot be asked.
    """
    found = kubectl.find(f"rayclusters.ray.io/{name}", f"rayservices.ray.io/{name}")
    if len(found) > 1:
        raise ConflictError(
            f"there are a RayCluster and a RayService {name}: one of them is another fleet; "
            f"see {kubectl.shown()} get rayclusters,rayservices"
        )
    return found[0] if found else None


def cluster_names(ray: Manifest | None, name: str) -> list[str]:
    """Return the names of the RayClusters behind a name: of a RayService the one that serves, and the next."""
    if ray is None or ray["kind"] == "RayCluster":
        return [name]
    status: dict[str, Any] = ray.get("status") or {}
    parts = [status.get("activeServiceStatus") or {}, status.get("pendingServiceStatus") or {}]
    return [part["rayClusterName"] for part in parts if part.get("rayClusterName")]


def find_pods(kubectl: Kubectl, names: Sequence[str]) -> list[Manifest]:
    """Return the pods of RayClusters, those that end among them.

    Raises:
        ExpertMeshError: the server cannot be asked.
    """
    return kubectl.list("pods", f"--selector=ray.io/cluster in ({','.join(names)})") if names else []


def find_head(pods: Sequence[Manifest]) -> Manifest | None:
    """Return the head's pod, None where it is not made yet, or ends."""
    heads = [pod for pod in pods if pod["metadata"].get("labels", {}).get("ray.io/node-type") == "head"]
    return next((pod for pod in heads if not is_ending(pod)), None)


def look(kubectl: Kubectl, name: str) -> Picture:
    """Look at a cluster.

    Raises:
        ExpertMeshError: the server cannot be asked.
    """
    ray = find_ray(kubectl, name)
    names = cluster_names(ray, name)
    if ray is None or not names:
        return Picture(ray=ray)
    # Of an upgrade's two clusters the next one is what is waited for.
    waited = names[-1]
    if ray["kind"] == "RayCluster":
        cluster = ray
    else:
        clusters = kubectl.find(f"rayclusters.ray.io/{waited}")
        if not clusters:
            return Picture(ray=ray)
        (cluster,) = clusters
    pods = [pod for pod in find_pods(kubectl, [waited]) if not is_ending(pod) or _has_failed(pod)]
    states = _read(kubectl, pods)
    wanted = {group.get("groupName", HEAD_GROUP): int(group.get("replicas", 1)) for group in groups_of(cluster)}
    troubles = [state.trouble for state in states if state.trouble is not None]
    if len(states) < sum(wanted.values()):
        owner = read_owner(cluster, _events(kubectl, waited), kubectl.shown())
        troubles = [owner, *troubles] if owner is not None else troubles
    return Picture(
        ray=ray, cluster=waited, states=states, wanted=wanted, troubles=tuple(troubles), head=find_head(pods)
    )


def has_label(manifest: Manifest, name: str) -> bool:
    """Return whether `up` applied an object for a cluster."""
    return bool(manifest["metadata"].get("labels", {}).get(LABEL) == name)


def _read(kubectl: Kubectl, pods: Sequence[Manifest]) -> tuple[PodState, ...]:
    asked = [pod["metadata"]["name"] for pod in pods if needs_events(pod)][:_MAX_EVENT_CALLS]
    events = {name: _events(kubectl, name) for name in asked}
    shown = kubectl.shown()
    return tuple(read_pod(pod, events.get(pod["metadata"]["name"], ()), shown) for pod in pods)


def _events(kubectl: Kubectl, name: str) -> list[Manifest]:
    return kubectl.list("events", f"--field-selector=involvedObject.name={name}")


def _has_failed(pod: Manifest) -> bool:
    return bool(pod.get("status", {}).get("phase") == "Failed" and "deletionTimestamp" not in pod["metadata"])
