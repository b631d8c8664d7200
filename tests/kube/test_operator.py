"""The fake KubeRay operator: pods by group, whom it deletes, and what it says when it cannot."""

import json
from collections.abc import Callable

import pytest
import yaml
from ray.autoscaler._private.kuberay.node_provider import (
    finalizer_patch,
    worker_delete_patch,
    worker_replica_patch,
)
from ray.autoscaler.v2.instance_manager.cloud_providers.kuberay.cloud_provider import KubeRayProvider

from tests.kube.cluster import FakeKubernetes
from tests.kube.conftest import Kubectl
from tests.kube.kubelet import PlainKubelet
from tests.kube.operator import RAY_CLUSTERS
from tests.kube.rays import ray_cluster
from tests.kube.resources import EVENTS, PODS, QUOTAS
from tests.kube.status import Manifest

NAMESPACE = "default"


@pytest.fixture
def patch(kube: FakeKubernetes, run: Kubectl) -> Callable[..., str]:
    """A cluster of a head and two workers that run; returns what sends JSON patches as Ray's autoscaler does."""
    kube.install_kuberay()
    run("create", "-f", "-", stdin=yaml.safe_dump(ray_cluster()))
    kube.store.wait_until(lambda: len(running(kube)) == 3)

    def send(*operations: Manifest, code: int = 0) -> str:
        return run("patch", "raycluster", "mesh", "--type=json", "-p", json.dumps(operations), code=code).stderr

    return send


def running(kube: FakeKubernetes) -> list[Manifest]:
    return [pod for pod in kube.store.all(PODS, NAMESPACE) if pod["status"].get("phase") == "Running"]


def workers(kube: FakeKubernetes) -> set[str]:
    kind = "ray.io/node-type"
    return {pod["metadata"]["name"] for pod in running(kube) if pod["metadata"]["labels"][kind] == "worker"}


def cluster_of(kube: FakeKubernetes) -> Manifest:
    return kube.store.get(RAY_CLUSTERS, NAMESPACE, "mesh")


@pytest.mark.usefixtures("patch")
def test_pods_are_as_rays_autoscaler_wants_them(kube: FakeKubernetes) -> None:
    for pod in running(kube):
        instance = KubeRayProvider._cloud_instance_from_pod(pod)
        assert instance is not None
        assert instance.is_running
        assert instance.node_type == pod["metadata"]["labels"]["ray.io/group"]
        ray = pod["spec"]["containers"][0]
        names = {variable["name"] for variable in ray["env"]}
        assert {"RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME", "RAY_CLUSTER_NAME"} <= names
        assert "ray start" in ray["args"][0]
        (owner,) = pod["metadata"]["ownerReferences"]
        assert owner["uid"] == cluster_of(kube)["metadata"]["uid"]
    kube.store.wait_until(lambda: cluster_of(kube)["status"].get("state") == "ready")
    status = cluster_of(kube)["status"]
    assert (status["desiredWorkerReplicas"], status["availableWorkerReplicas"]) == (2, 2)
    assert status["head"]["podIP"] == "127.0.0.1"


def test_replicas_up(kube: FakeKubernetes, patch: Callable[..., str]) -> None:
    before = workers(kube)
    patch(worker_replica_patch("0", 3))
    kube.store.wait_until(lambda: len(workers(kube)) == 3)
    assert before < workers(kube)
    patch(worker_replica_patch("0", 9))
    kube.store.wait_until(lambda: len(workers(kube)) == 4)  # maxReplicas


def test_workers_to_delete_go_and_no_others(kube: FakeKubernetes, patch: Callable[..., str]) -> None:
    doomed, kept = sorted(workers(kube))
    patch(worker_replica_patch("0", 1), worker_delete_patch("0", [doomed]))
    kube.store.wait_until(lambda: workers(kube) == {kept})
    patch(worker_delete_patch("0", []))
    kube.store.wait_until(lambda: cluster_of(kube)["status"]["availableWorkerReplicas"] == 1)
    assert workers(kube) == {kept}


def test_fewer_replicas_delete_nobody_whom_the_autoscaler_has_not_named(
    kube: FakeKubernetes, patch: Callable[..., str]
) -> None:
    before = workers(kube)
    patch(worker_replica_patch("0", 1))
    kube.store.wait_until(lambda: cluster_of(kube)["status"]["desiredWorkerReplicas"] == 1)
    assert workers(kube) == before


def test_a_missing_key_is_added_a_missing_parent_is_not(kube: FakeKubernetes, patch: Callable[..., str]) -> None:
    patch({"op": "remove", "path": "/spec/workerGroupSpecs/0/scaleStrategy"})
    patch(worker_delete_patch("0", []))
    assert cluster_of(kube)["spec"]["workerGroupSpecs"][0]["scaleStrategy"] == {"workersToDelete": []}
    told = patch({"op": "replace", "path": "/spec/workerGroupSpecs/7/replicas", "value": 1}, code=1)
    assert "the server rejected our request due to an error in our request" in told
    before = cluster_of(kube)
    stale = finalizer_patch("ray.io/test", [], "1")
    assert "rejected" in patch(worker_replica_patch("0", 3), *stale, code=1)
    assert cluster_of(kube)["spec"] == before["spec"], "half of a patch"


def test_a_pod_that_ended_is_replaced(kubelet: PlainKubelet, kube: FakeKubernetes, patch: Callable[..., str]) -> None:
    ended, kept = sorted(workers(kube))
    kubelet.end(ended, 137)
    kube.store.wait_until(lambda: len(workers(kube)) == 2 and ended not in workers(kube))
    assert kept in workers(kube)
    kube.store.wait_until(lambda: ("stop", ended) in kubelet.events)


def test_a_quota_is_kept_and_told(kube: FakeKubernetes, patch: Callable[..., str]) -> None:
    kube.store.create(QUOTAS, NAMESPACE, {"metadata": {"name": "small"}, "spec": {"hard": {"pods": "3"}}})
    patch(worker_replica_patch("0", 3))
    kube.store.wait_until(lambda: "ReplicaFailure" in conditions(kube))
    condition = conditions(kube)["ReplicaFailure"]
    assert condition["reason"] == "FailedCreateWorkerPod"
    assert "exceeded quota: small, requested: pods=1, used: pods=3, limited: pods=3" in condition["message"]
    event, *_ = [e for e in kube.store.all(EVENTS, NAMESPACE) if e["reason"] == "FailedToCreateWorkerPod"]
    assert "exceeded quota" in event["message"]
    kube.store.delete(QUOTAS, NAMESPACE, "small")
    kube.store.wait_until(lambda: len(workers(kube)) == 3 and "ReplicaFailure" not in conditions(kube))


def conditions(kube: FakeKubernetes) -> dict[str, Manifest]:
    return {condition["type"]: condition for condition in cluster_of(kube)["status"]["conditions"]}


@pytest.mark.parametrize("reason", ["ImagePullBackOff", "Unschedulable"])
def test_pods_that_cannot_start_say_why(
    kube: FakeKubernetes, patch: Callable[..., str], run: Kubectl, reason: str
) -> None:
    kube.runner.fail("ray.io/group=experts", reason, "not here")
    patch(worker_replica_patch("0", 3))

    def told() -> list[Manifest]:
        events = kube.store.all(EVENTS, NAMESPACE)
        return [event for event in events if event["message"] == "not here"]

    kube.store.wait_until(lambda: bool(told()))
    pending = json.loads(run("get", "pods", "--field-selector", "status.phase=Pending", "-o", "json").stdout)["items"]
    assert reason in json.dumps(pending[0]["status"])
    assert "not here" in run("describe", "pod", pending[0]["metadata"]["name"]).stdout
    kube.runner.heal()
    kube.store.wait_until(lambda: len(workers(kube)) == 3)


def test_the_cluster_takes_its_pods_with_it(
    kubelet: PlainKubelet, kube: FakeKubernetes, patch: Callable[..., str], run: Kubectl
) -> None:
    run("delete", "raycluster", "mesh")
    kube.store.wait_until(lambda: not kube.store.all(PODS, NAMESPACE))
    assert sorted(name for kind, name in kubelet.events if kind == "start") == sorted(
        name for kind, name in kubelet.events if kind == "stop"
    )


@pytest.mark.usefixtures("patch")
def test_a_node_is_drained_as_far_as_budgets_allow(kube: FakeKubernetes, run: Kubectl) -> None:
    spec = {"minAvailable": 2, "selector": {"matchLabels": {"ray.io/group": "experts"}}}
    budget = {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "some"}, "spec": spec}
    run("apply", "-f", "-", stdin=yaml.safe_dump(budget))
    pods = [pod for pod in running(kube) if pod["metadata"]["name"] in workers(kube)]
    gone, node = pods[0]["metadata"]["name"], pods[0]["spec"]["nodeName"]
    chosen = ("--pod-selector", "ray.io/group=experts", "--delete-emptydir-data")
    told = run("drain", node, *chosen, "--timeout", "2s", code=1).stderr
    assert "would violate the pod's disruption budget" in told
    assert gone in workers(kube)
    run("patch", "pdb", "some", "--type=merge", "-p", '{"spec": {"minAvailable": 1}}')
    run("drain", node, *chosen, "--timeout", "60s")
    kube.store.wait_until(lambda: len(workers(kube)) == 2 and gone not in workers(kube))
    assert all(pod["spec"]["nodeName"] != node for pod in running(kube) if pod["metadata"]["name"] in workers(kube))
