"""The status that KubeRay 1.7 writes of a RayCluster."""

from tests.kube.ray_pods import TYPE, head_service
from tests.kube.status import Manifest
from tests.kube.store import now


def status_of(cluster: Manifest, pods: list[Manifest], refused: str) -> Manifest:
    """Return a cluster's status.

    Args:
        cluster: as it is.
        pods: of it, all.
        refused: reason and message, if a pod could not be made; else empty.
    """
    groups = cluster["spec"].get("workerGroupSpecs", [])
    heads = [pod for pod in pods if pod["metadata"]["labels"][TYPE] == "head"]
    workers = [pod for pod in pods if pod["metadata"]["labels"][TYPE] == "worker"]
    running = [pod for pod in workers if pod["status"].get("phase") == "Running"]
    head_runs = bool(heads) and heads[0]["status"].get("phase") == "Running"
    desired = sum(max(g.get("minReplicas", 0), g.get("replicas", 0)) * g.get("numOfHosts", 1) for g in groups)
    old = cluster.get("status", {})
    # Once provisioned it stays so.
    provisioned = _is_true(old, "RayClusterProvisioned") or (head_runs and len(running) >= desired)
    conditions = [
        _of_head(heads, runs=head_runs),
        _condition(
            "RayClusterProvisioned",
            provisioned,
            "AllPodRunningAndReadyFirstTime" if provisioned else "RayClusterPodsProvisioning",
            "All Ray Pods are ready for the first time" if provisioned else "RayCluster Pods are being provisioned",
        ),
    ]
    if refused:
        reason, _, message = refused.partition(": ")
        conditions.append(_condition("ReplicaFailure", True, reason, message))
    for condition in conditions:
        same = [found for found in old.get("conditions", ()) if _without_time(found) == condition]
        condition["lastTransitionTime"] = same[0]["lastTransitionTime"] if same else now()
    status: Manifest = {
        "desiredWorkerReplicas": desired,
        "minWorkerReplicas": sum(g.get("minReplicas", 0) for g in groups),
        "maxWorkerReplicas": sum(g.get("maxReplicas", 0) for g in groups),
        "availableWorkerReplicas": len(running),
        "readyWorkerReplicas": len(running),
        "observedGeneration": cluster["metadata"]["generation"],
        "conditions": conditions,
        "endpoints": {"gcs-server": "6379", "dashboard": "8265", "client": "10001"},
    }
    if head_runs:
        ip = heads[0]["status"]["podIP"]
        found = {"podIP": ip, "podName": heads[0]["metadata"]["name"]}
        status["head"] = {**found, "serviceIP": ip, "serviceName": head_service(cluster)}
    if provisioned and not refused:
        status["state"] = "ready"
    return status


def _is_true(status: Manifest, kind: str) -> bool:
    return any(found["type"] == kind and found["status"] == "True" for found in status.get("conditions", ()))


def _of_head(heads: list[Manifest], *, runs: bool) -> Manifest:
    """Return the condition that tells whether the head runs, or what it waits for."""
    if runs:
        return _condition("HeadPodReady", True, "HeadPodRunningAndReady", "")
    if not heads:
        return _condition("HeadPodReady", False, "HeadPodNotFound", "Head Pod not found")
    states = [container["state"] for container in heads[0]["status"].get("containerStatuses", ())]
    waiting: Manifest = next((state["waiting"] for state in states if "waiting" in state), {})
    return _condition("HeadPodReady", False, waiting.get("reason", "ContainersNotReady"), waiting.get("message", ""))


def _condition(kind: str, holds: bool, reason: str, message: str) -> Manifest:
    return {"type": kind, "status": "True" if holds else "False", "reason": reason, "message": message}


def _without_time(condition: Manifest) -> Manifest:
    return {key: value for key, value in condition.items() if key != "lastTransitionTime"}
