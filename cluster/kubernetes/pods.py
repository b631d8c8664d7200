"""What pods are waiting for, read from their status and events: a word for progress, a line for trouble."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expertmesh.cluster.kubernetes.complaints import Cause, read_complaint

Manifest = Mapping[str, Any]

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
HEAD_GROUP = "headgroup"


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a pod from running.

    key stays the same while it lasts, where the line may change. does_wait: time alone may mend it, as where nodes
    are being made.
    """

    key: str
    line: str
    does_wait: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class PodState:
    """A pod. waits_for is empty where it is ready."""

    uid: str
    name: str
    group: str
    is_ready: bool
    waits_for: str
    trouble: Trouble | None


def is_ending(pod: Manifest) -> bool:
    """Return whether a pod is being deleted, or has ended."""
    return "deletionTimestamp" in pod["metadata"] or pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def group_of(pod: Manifest) -> str:
    """Return the group of the RayCluster that a pod is of."""
    return str(pod["metadata"].get("labels", {}).get("ray.io/group", ""))


def read_pod(pod: Manifest, events: Sequence[Manifest], kubectl: str) -> PodState:
    """Read a pod.

    Args:
        pod: as the server has it.
        events: about it; those of type Warning are looked at.
        kubectl: the command with its context and namespace, for what lines propose.
    """
    name, status = str(pod["metadata"]["name"]), pod.get("status", {})
    is_ready = _condition(status, "Ready").get("status") == "True"
    trouble = None if is_ready else _trouble(name, status, events, kubectl)
    waits_for = "" if is_ready else _waits_for(status)
    return PodState(
        uid=str(pod["metadata"]["uid"]),
        name=name,
        group=group_of(pod),
        is_ready=is_ready,
        waits_for=waits_for,
        trouble=trouble,
    )


def needs_events(pod: Manifest) -> bool:
    """Return whether only events can say what a pod waits for: a volume that is not there is not in its status."""
    reasons = {waiting.get("reason") for _, waiting in _waiting(pod.get("status", {}))}
    return bool(reasons & {"ContainerCreating", "PodInitializing"})


def read_owner(ray: Manifest, events: Sequence[Manifest], kubectl: str) -> Trouble | None:
    """Return why KubeRay makes no pods for a RayCluster: quota, a spec that it refuses."""
    status = ray.get("status") or {}
    failure = _condition(status, "ReplicaFailure")
    reasons = [failure["message"]] if failure.get("status") == "True" and failure.get("message") else []
    reasons += [status["reason"]] if status.get("state") == "failed" and status.get("reason") else []
    reasons += [event["message"] for event in _warnings(events) if re.search(r"Fail|Invalid", event.get("reason", ""))]
    if not reasons:
        return None
    complaint = read_complaint(str(reasons[0]), kubectl)
    name = ray["metadata"]["name"]
    line = complaint.line
    if complaint.cause is Cause.OTHER:
        line = f"{' '.join(str(reasons[0]).split())}; see {kubectl} describe raycluster {name}"
    return Trouble("owner", f"KubeRay cannot make pods of RayCluster {name}: {line}")


def describe_groups(states: Sequence[PodState], wanted: Mapping[str, int]) -> str:
    """Return one line: each group, how many of its pods are ready of how many, and what the others wait for."""
    parts = []
    for group, number in wanted.items():
        of_group = [state for state in states if state.group == group]
        waits = sorted({state.waits_for for state in of_group if not state.is_ready})
        if len(of_group) < number:
            waits.append(f"{number - len(of_group)} not made yet")
        name = "head" if group == HEAD_GROUP else group
        ready = sum(state.is_ready for state in of_group)
        parts.append(f"{name} {ready}/{number}" + (f" ({', '.join(waits)})" if waits else ""))
    return "; ".join(parts)


def _trouble(name: str, status: Manifest, events: Sequence[Manifest], kubectl: str) -> Trouble | None:
    see = f"see {kubectl} describe pod {name}"
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable":
        return _unschedulable(name, str(scheduled.get("message", "")), see)
    for container, waiting in _waiting(status):
        reason, message = str(waiting.get("reason", "")), " ".join(str(waiting.get("message", "")).split())
        what = str(container.get("name", ""))
        if reason in IMAGE_REASONS:
            said = f": {message}" if message else ""
            image = container.get("image", "")
            return Trouble(f"{name} image", f"pod {name} cannot pull the image {image} ({reason}){said}; {see}")
        if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            return Trouble(f"{name} start", f"pod {name}: container {what} cannot start ({reason}): {message}; {see}")
    for container in _containers(status):
        if _ends_again(container):
            what = str(container.get("name", ""))
            how = f"{kubectl} logs {name} -c {what} --previous --tail=50"
            line = f"pod {name}: container {what} ends again and again{_last_end(container)}; see {how}"
            return Trouble(f"{name} crash", line)
    if status.get("phase") == "Failed":
        return _failed(name, status, kubectl)
    for event in _warnings(events):
        if str(event.get("reason", "")) in ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox"):
            return _mount(name, " ".join(str(event.get("message", "")).split()), see)
    return None


def _unschedulable(name: str, message: str, see: str) -> Trouble:
    claim = re.search(r'persistentvolumeclaim "([^"]+)" (?:not found|is being deleted)', message)
    if claim:
        line = f"pod {name} wants the PersistentVolumeClaim {claim[1]}, which is not there; {see}"
        return Trouble(f"{name} claim", line)
    # `0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: ...`
    lacking = list(dict.fromkeys(re.findall(r"Insufficient ([\w./-]*\w)", message)))
    why = re.sub(r"\.? *preemption:.*", "", " ".join(message.split()))
    what = f"not enough {' and '.join(lacking)}: " if lacking else ""
    return Trouble(f"{name} node", f"pod {name} finds no node: {what}{why}; {see}", does_wait=True)


def _mount(name: str, message: str, see: str) -> Trouble:
    missing = re.search(r'(secret|configmap|persistentvolumeclaim) "([^"]+)" not found', message, re.IGNORECASE)
    if missing:
        kinds = {"secret": "Secret", "configmap": "ConfigMap", "persistentvolumeclaim": "PersistentVolumeClaim"}
        kind = kinds[missing[1].lower()]
        return Trouble(f"{name} mount", f"pod {name} wants the {kind} {missing[2]}, which is not there; {see}")
    return Trouble(f"{name} mount", f"pod {name} waits for a volume or its network: {message}; {see}")


def _failed(name: str, status: Manifest, kubectl: str) -> Trouble:
    ended = [(one, one.get("state", {}).get("terminated") or {}) for one in _containers(status)]
    for container, end in ended:
        if end.get("exitCode"):
            what = container.get("name", "")
            how = f"{kubectl} logs {name} -c {what} --tail=50"
            line = f"pod {name}: container {what} has ended{_told(end)}; see {how}"
            return Trouble(f"{name} failed", line)
    why = " ".join(f"{status.get('reason', '')}: {status.get('message', '')}".split()).strip(": ")
    see = f"see {kubectl} describe pod {name}"
    return Trouble(f"{name} failed", f"pod {name} has failed{f' ({why})' if why else ''}; {see}")


def _ends_again(container: Manifest) -> bool:
    """Between two ends a container runs for a while: the second restart counts as long as it is not ready."""
    reason = (container.get("state", {}).get("waiting") or {}).get("reason")
    return bool(
        reason == "CrashLoopBackOff" or (container.get("restartCount", 0) >= 2 and not container.get("ready", False))
    )


def _last_end(container: Manifest) -> str:
    return _told(container.get("lastState", {}).get("terminated") or {})


def _told(ended: Manifest) -> str:
    return f" (exit code {ended.get('exitCode')}, {ended.get('reason', 'no reason')})" if ended else ""


def _waits_for(status: Manifest) -> str:
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return "no node"
    reasons = [str(waiting.get("reason", "")) for _, waiting in _waiting(status)]
    if reasons:
        return reasons[0] or "waiting"
    return "not ready" if status.get("phase") == "Running" else str(status.get("phase", "") or "Pending").lower()


def _waiting(status: Manifest) -> list[tuple[Manifest, Manifest]]:
    found = [(container, container.get("state", {}).get("waiting")) for container in _containers(status)]
    return [(container, waiting) for container, waiting in found if waiting]


def _containers(status: Manifest) -> list[Manifest]:
    return [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]


def _condition(status: Manifest, kind: str) -> Manifest:
    return next((found for found in status.get("conditions") or () if found.get("type") == kind), {})


def _warnings(events: Sequence[Manifest]) -> list[Manifest]:
    """Return warnings, the newest first."""
    found = [event for event in events if event.get("type") == "Warning"]
    return sorted(
        found, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""), reverse=True
    )
