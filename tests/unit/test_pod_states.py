from typing import Any

import pytest

from expertmesh.cluster.kubernetes.pods import (
    HEAD_GROUP,
    PodState,
    Trouble,
    describe_groups,
    is_ending,
    needs_events,
    read_owner,
    read_pod,
)
from expertmesh.cluster.kubernetes.turnover import Turnover

KUBECTL = "kubectl --namespace=ml"
SEE = f"see {KUBECTL} describe pod p"


def pod(phase: str = "Pending", group: str = "experts", **status: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "uid": "u", "labels": {"ray.io/group": group}},
        "status": {"phase": phase, **status},
    }


def waiting(reason: str, message: str = "", **container: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"containerStatuses": [{"name": "ray-worker", "image": "reg/mesh:1", "state": state, **container}]}


def condition(kind: str, status: str, **fields: str) -> dict[str, str]:
    return {"type": kind, "status": status, **fields}


def unschedulable(message: str) -> dict[str, Any]:
    return {"conditions": [condition("PodScheduled", "False", reason="Unschedulable", message=message)]}


def warning(reason: str, message: str, when: str = "2026-01-01T00:00:00Z", kind: str = "Warning") -> dict[str, str]:
    return {"type": kind, "reason": reason, "message": message, "lastTimestamp": when}


def read(manifest: dict[str, Any], *events: dict[str, str]) -> PodState:
    return read_pod(manifest, events, KUBECTL)


def test_a_ready_pod_waits_for_nothing() -> None:
    """What it went through before is over."""
    conditions = [condition("PodScheduled", "True"), condition("Ready", "True")]
    state = read(pod("Running", conditions=conditions, containerStatuses=[{"restartCount": 7, "ready": True}]))
    assert state == PodState(uid="u", name="p", group="experts", is_ready=True, waits_for="", trouble=None)


TROUBLES = [
    (
        unschedulable("0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available."),
        (),
        Trouble(
            "p node",
            "pod p finds no node: not enough nvidia.com/gpu: 0/3 nodes are available: 3 Insufficient nvidia.com/gpu; "
            + SEE,
            does_wait=True,
        ),
        "no node",
    ),
    (
        unschedulable("0/2 nodes are available: 1 Insufficient memory, 2 Insufficient cpu."),
        (),
        Trouble(
            "p node",
            "pod p finds no node: not enough memory and cpu: 0/2 nodes are available: 1 Insufficient memory, 2 "
            f"Insufficient cpu.; {SEE}",
            does_wait=True,
        ),
        "no node",
    ),
    (
        unschedulable("0/2 nodes are available: 2 node(s) had untolerated taint {gpu: yes}."),
        (),
        Trouble(
            "p node",
            f"pod p finds no node: 0/2 nodes are available: 2 node(s) had untolerated taint {{gpu: yes}}.; {SEE}",
            does_wait=True,
        ),
        "no node",
    ),
    (
        unschedulable('0/2 nodes are available: persistentvolumeclaim "expertmesh-models" not found.'),
        (),
        Trouble("p claim", f"pod p wants the PersistentVolumeClaim expertmesh-models, which is not there; {SEE}"),
        "no node",
    ),
    (
        waiting("ImagePullBackOff", 'Back-off pulling image\n"reg/mesh:1"'),
        (),
        Trouble(
            "p image",
            f'pod p cannot pull the image reg/mesh:1 (ImagePullBackOff): Back-off pulling image "reg/mesh:1"; {SEE}',
        ),
        "ImagePullBackOff",
    ),
    (
        waiting("ErrImagePull"),
        (),
        Trouble("p image", f"pod p cannot pull the image reg/mesh:1 (ErrImagePull); {SEE}"),
        "ErrImagePull",
    ),
    (
        waiting("CrashLoopBackOff", lastState={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}),
        (),
        Trouble(
            "p crash",
            "pod p: container ray-worker ends again and again (exit code 137, OOMKilled); see "
            f"{KUBECTL} logs p -c ray-worker --previous --tail=50",
        ),
        "CrashLoopBackOff",
    ),
    (
        waiting("CreateContainerConfigError", 'secret "expertmesh-redis" not found'),
        (),
        Trouble(
            "p start",
            "pod p: container ray-worker cannot start (CreateContainerConfigError): secret "
            f'"expertmesh-redis" not found; {SEE}',
        ),
        "CreateContainerConfigError",
    ),
    (
        waiting("ContainerCreating"),
        (
            warning("FailedMount", "older", "2025-01-01T00:00:00Z"),
            warning("FailedMount", 'MountVolume.SetUp failed for volume "tls" : secret "expertmesh-tls" not found'),
        ),
        Trouble("p mount", f"pod p wants the Secret expertmesh-tls, which is not there; {SEE}"),
        "ContainerCreating",
    ),
    (
        waiting("ContainerCreating"),
        (warning("FailedMount", 'MountVolume.SetUp failed for volume "s" : configmap "mine" not found'),),
        Trouble("p mount", f"pod p wants the ConfigMap mine, which is not there; {SEE}"),
        "ContainerCreating",
    ),
    (
        waiting("ContainerCreating"),
        (warning("FailedAttachVolume", "Multi-Attach error for volume v"),),
        Trouble("p mount", f"pod p waits for a volume or its network: Multi-Attach error for volume v; {SEE}"),
        "ContainerCreating",
    ),
    (
        waiting("ContainerCreating"),
        (warning("Pulling", "pulling"), warning("FailedMount", "x", kind="Normal")),
        None,
        "ContainerCreating",
    ),
]


@pytest.mark.parametrize(("status", "events", "trouble", "waits_for"), TROUBLES)
def test_each_trouble_says_which_and_how_to_see_more(
    status: dict[str, Any], events: tuple[dict[str, str], ...], trouble: Trouble | None, waits_for: str
) -> None:
    state = read(pod(**status), *events)
    assert (state.trouble, state.waits_for, state.is_ready) == (trouble, waits_for, False)


def test_only_what_creates_containers_needs_its_events() -> None:
    assert needs_events(pod(**waiting("ContainerCreating")))
    assert not needs_events(pod(**waiting("ImagePullBackOff")))
    assert not needs_events(pod("Running"))


def test_between_two_crashes_the_trouble_has_the_same_key() -> None:
    def running(restarts: int) -> dict[str, Any]:
        return pod(
            "Running",
            containerStatuses=[
                {
                    "name": "ray-head",
                    "restartCount": restarts,
                    "ready": False,
                    "state": {"running": {}},
                    "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}},
                }
            ],
        )

    again = read(running(2)).trouble
    assert again is not None
    assert again.key == "p crash"
    assert "(exit code 1, Error)" in again.line
    assert read(running(1)).trouble is None, "a first end may be a start before its head"


def test_a_pod_that_has_failed_says_why() -> None:
    state = read(pod("Failed", reason="Evicted", message="The node was low on resource: memory."))
    assert state.trouble == Trouble(
        "p failed", f"pod p has failed (Evicted: The node was low on resource: memory.); {SEE}"
    )


def test_a_pod_whose_container_has_ended_says_which() -> None:
    state = {"terminated": {"exitCode": 2, "reason": "Error"}}
    containers = [{"name": "side", "state": {"terminated": {"exitCode": 0}}}, {"name": "ray-worker", "state": state}]
    line = f"pod p: container ray-worker has ended (exit code 2, Error); see {KUBECTL} logs p -c ray-worker --tail=50"
    assert read(pod("Failed", containerStatuses=containers)).trouble == Trouble("p failed", line)


def state_of(uid: str, group: str) -> PodState:
    return PodState(uid=uid, name=uid, group=group, is_ready=False, waits_for="x", trouble=None)


def test_pods_that_come_and_go_are_counted_by_group() -> None:
    turnover = Turnover()
    assert turnover.restless([state_of(f"old-{number}", "experts") for number in range(9)]) is None
    for number in range(3):
        head = state_of(f"head-{number}", HEAD_GROUP) if number < 2 else state_of("head-1", HEAD_GROUP)
        assert turnover.restless([head, state_of(str(number), "experts")]) is None, "old ones that go are no concern"
    assert turnover.restless([state_of("3", "experts")]) == ("experts", 3)
    assert turnover.restless([state_of("3", "experts"), state_of("2", "experts")]) is None, "it was only missed"


def test_ending_pods_are_those_deleted_or_done() -> None:
    deleted = pod("Running")
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert [is_ending(one) for one in (pod(), deleted, pod("Failed"), pod("Succeeded"))] == [False, True, True, True]


def owner(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "mesh"}, "status": status}


QUOTA = (
    'Failed to create head Pod ml/mesh-head, pods "mesh-head" is forbidden: exceeded quota: small, requested: cpu=2, '
    "used: cpu=8, limited: cpu=8"
)
QUOTA_LINE = (
    'KubeRay cannot make pods of RayCluster mesh: pods "mesh-head" is beyond the quota small: requested: cpu=2, used: '
    f"cpu=8, limited: cpu=8; see {KUBECTL} describe resourcequota small"
)


def test_a_quota_is_found_in_the_condition_and_in_the_events() -> None:
    told = owner(conditions=[condition("ReplicaFailure", "True", reason="FailedCreateHeadPod", message=QUOTA)])
    for trouble in (
        read_owner(told, [], KUBECTL),
        read_owner(owner(), [warning("FailedToCreateHeadPod", QUOTA), warning("Scaled", "x")], KUBECTL),
    ):
        assert trouble == Trouble("owner", QUOTA_LINE)


def test_what_kuberay_refuses_is_told_and_what_is_well_is_not() -> None:
    event = warning("InvalidRayClusterSpec", "The RayCluster spec is invalid ml/mesh: no head")
    trouble = read_owner(owner(), [event], KUBECTL)
    assert trouble is not None
    assert trouble.line == (
        "KubeRay cannot make pods of RayCluster mesh: The RayCluster spec is invalid ml/mesh: no head; see "
        f"{KUBECTL} describe raycluster mesh"
    )
    over = owner(conditions=[condition("ReplicaFailure", "False", message=QUOTA)])
    assert read_owner(over, [warning("CreatedHeadPod", "x", kind="Normal")], KUBECTL) is None
    assert read_owner({"metadata": {"name": "mesh"}}, [], KUBECTL) is None


def test_progress_tells_each_group_and_what_it_waits_for() -> None:
    def state(group: str, waits_for: str) -> PodState:
        return PodState(uid="u", name="p", group=group, is_ready=not waits_for, waits_for=waits_for, trouble=None)

    states = [state("headgroup", ""), state("experts", ""), state("experts", "no node"), state("experts", "not ready")]
    line = describe_groups(states, {"headgroup": 1, "gateway": 2, "experts": 4})
    assert line == "head 1/1; gateway 0/2 (2 not made yet); experts 1/4 (no node, not ready, 1 not made yet)"
