import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kubernetes.objects import LABEL, Manifest, changed_groups, merged, prepare, resource_type


def group(name: str, replicas: int = 2, low: int = 1, high: int = 4, **fields: Any) -> Manifest:
    template = {"spec": {"containers": [{"name": "ray-worker", "image": "old"}, {"name": "other", "image": "side"}]}}
    return {
        "groupName": name,
        "replicas": replicas,
        "minReplicas": low,
        "maxReplicas": high,
        "scaleStrategy": {"workersToDelete": []},
        "template": template,
        **fields,
    }


def cluster(*groups: Manifest, **metadata: Any) -> Manifest:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": "mesh", **metadata},
        "spec": {
            "enableInTreeAutoscaling": True,
            "headGroupSpec": {"template": {"spec": {"containers": [{"name": "ray-head", "image": "old"}]}}},
            "workerGroupSpecs": list(groups),
        },
    }


def service(ray: Manifest) -> Manifest:
    return {**ray, "kind": "RayService", "spec": {"serveConfigV2": "", "rayClusterConfig": ray["spec"]}}


CONFIG_MAP: Manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {}}


def images(ray: Manifest) -> list[str]:
    groups = [ray["spec"]["headGroupSpec"], *ray["spec"]["workerGroupSpecs"]]
    return [container["image"] for one in groups for container in one["template"]["spec"]["containers"]]


def ready(*manifests: object, image: str = "") -> Any:
    return prepare(manifests, cluster_name="mesh", namespace="ml", image=image)


def test_the_ray_cluster_and_the_others_are_told_apart_and_labelled() -> None:
    ray, labelled = cluster(group("experts")), {**CONFIG_MAP, "metadata": {"name": "b", "labels": {"mine": "1"}}}
    before = copy.deepcopy((ray, CONFIG_MAP, labelled))
    wanted = ready(CONFIG_MAP, ray, None, {"apiVersion": "v1", "kind": "List", "items": [labelled]})
    assert (wanted.name, wanted.is_service) == ("mesh", False)
    assert [found["metadata"]["name"] for found in wanted.others] == ["settings", "b"]
    assert [found["metadata"]["labels"] for found in wanted.others] == [{LABEL: "mesh"}, {"mine": "1", LABEL: "mesh"}]
    assert wanted.ray["metadata"]["labels"] == {LABEL: "mesh"}
    assert (ray, CONFIG_MAP, labelled) == before, "what was given is as it was"


@pytest.mark.parametrize("make", [cluster, lambda *groups: service(cluster(*groups))])
def test_an_image_is_that_of_ray_s_container_in_every_group(make: Any) -> None:
    wanted = ready(make(group("gateway"), group("experts")), image="new:1")
    spec = wanted.ray["spec"]
    assert images({"spec": spec.get("rayClusterConfig", spec)}) == ["new:1", "new:1", "side", "new:1", "side"]


@pytest.mark.parametrize(
    ("manifests", "complaint"),
    [
        ([CONFIG_MAP], "must have one RayCluster or RayService; they have none"),
        ([cluster(), service(cluster())], "they have RayCluster mesh, RayService mesh"),
        (["hello"], "object 1 of the manifests is no object of Kubernetes: 'hello'"),
        (
            [CONFIG_MAP, {"kind": "Service", "metadata": {}}],
            "object 2 of the manifests lacks apiVersion, metadata.name",
        ),
        ([{**cluster(), "apiVersion": "ray.io/v1alpha1"}], "is of ray.io/v1alpha1; ray.io/v1 is what is supported"),
        ([cluster(name="other")], "cluster_name is 'mesh', and the manifests have RayCluster other"),
        ([{**cluster(), "spec": {}}], "RayCluster mesh: its spec lacks 'headGroupSpec'"),
        ([cluster({"groupName": "g"})], "RayCluster mesh: its spec lacks 'template'"),
        (
            [{**cluster(), "spec": {**cluster()["spec"], "enableInTreeAutoscaling": False}}],
            "enableInTreeAutoscaling must be true",
        ),
        (
            [cluster(group("a"), group("b", scaleStrategy=None, minReplicas=None))],
            r"workerGroupSpecs\[1\] \(b\) lacks minReplicas, scaleStrategy",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused_by_its_name(manifests: list[object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        ready(*manifests)


def test_what_names_the_namespace_of_the_ray_cluster_goes_with_it() -> None:
    def subject(**fields: str) -> Manifest:
        return {"kind": "ServiceAccount", "name": "mesh", **fields}

    def binding(**metadata: str) -> Manifest:
        subjects = [subject(), subject(namespace="home"), subject(namespace="else"), {"kind": "User", "name": "u"}]
        kind = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding"}
        return {**kind, "metadata": {"name": "b", **metadata}, "subjects": subjects}

    other = {**CONFIG_MAP, "metadata": {"name": "elsewhere", "namespace": "monitoring"}}
    wanted = ready(cluster(namespace="home"), binding(namespace="home"), other, CONFIG_MAP)
    assert wanted.ray["metadata"]["namespace"] == "ml"
    assert [found["metadata"].get("namespace") for found in wanted.others] == ["ml", "monitoring", None]
    expected = [
        subject(namespace="ml"),
        subject(namespace="ml"),
        subject(namespace="else"),
        {"kind": "User", "name": "u"},
    ]
    assert wanted.others[0]["subjects"] == expected
    (unnamed,) = ready(cluster(), binding()).others
    assert unnamed["subjects"][:2] == [subject(namespace="ml"), subject(namespace="home")]


def test_groups_whose_pods_would_be_made_otherwise_are_named() -> None:
    before = cluster(group("a"), group("b"), group("gone"))
    after = copy.deepcopy(cluster(group("a", replicas=9, high=9), group("b"), group("new")))
    assert changed_groups(before, after) == []
    after["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["image"] = "next"
    after["spec"]["headGroupSpec"]["rayStartParams"] = {"num-cpus": "0"}
    assert changed_groups(before, after) == ["head", "b"]
    after["spec"]["upgradeStrategy"] = {"type": "Recreate"}
    assert changed_groups(before, after) == []
    assert changed_groups(service(before), service(after)) == []


def test_a_group_may_have_no_pods_at_all() -> None:
    assert ready(cluster(group("experts", replicas=0, low=0))).ray["spec"]["workerGroupSpecs"][0]["replicas"] == 0


def test_what_the_autoscaler_decided_stays_and_the_rest_is_as_wanted() -> None:
    deleting = {"workersToDelete": ["mesh-experts-1"]}
    live = cluster(
        group("experts", replicas=3, scaleStrategy=deleting),
        group("gone"),
        resourceVersion="41",
        uid="u",
        annotations={"theirs": "1", "both": "live"},
        labels={"theirs": "1"},
        managedFields=[{"manager": "kubectl"}],
    )
    live["status"] = {"state": "ready"}
    wanted = cluster(
        group("new", replicas=1),
        group("experts", replicas=2, high=8),
        annotations={"both": "wanted"},
        labels={"o": "1"},
    )
    before = copy.deepcopy((live, wanted))
    result = merged(live, wanted)
    assert result["metadata"] == {
        "name": "mesh",
        "resourceVersion": "41",
        "uid": "u",
        "annotations": {"theirs": "1", "both": "wanted"},
        "labels": {"theirs": "1", "o": "1"},
    }
    # The live one's order, as the autoscaler patches by index; what is new comes last.
    assert result["spec"]["workerGroupSpecs"] == [
        group("experts", replicas=3, high=8, scaleStrategy=deleting),
        group("new", replicas=1),
    ]
    assert "status" not in result
    assert (live, wanted) == before


def test_a_service_s_groups_are_not_the_autoscaler_s() -> None:
    """KubeRay makes RayClusters of it, and the autoscaler changes those."""
    live, wanted = service(cluster(group("experts", replicas=9))), service(cluster(group("experts", replicas=2)))
    assert merged(live, wanted)["spec"] == wanted["spec"]


@given(live=st.integers(0, 20), low=st.integers(0, 10), span=st.integers(0, 10))
def test_replicas_stay_within_the_bounds_now_wanted(live: int, low: int, span: int) -> None:
    wanted = cluster(group("experts", replicas=low, low=low, high=low + span))
    (result,) = merged(cluster(group("experts", replicas=live)), wanted)["spec"]["workerGroupSpecs"]
    assert result["replicas"] == sorted([low, live, low + span])[1]


@given(st.permutations(["a", "b", "c", "d"]), st.sets(st.sampled_from("abcdxy"), min_size=1))
def test_no_live_group_overtakes_another(live: list[str], wanted: set[str]) -> None:
    """An index that the autoscaler read a moment ago is that of the same group, where none before it is dropped."""
    result = merged(cluster(*map(group, live)), cluster(*map(group, sorted(wanted))))["spec"]["workerGroupSpecs"]
    names = [found["groupName"] for found in result]
    assert sorted(names) == sorted(wanted)
    assert names[: len(wanted & set(live))] == [name for name in live if name in wanted]


def test_merging_again_changes_nothing() -> None:
    live = cluster(group("b", replicas=4), group("a", replicas=1), resourceVersion="7")
    wanted = cluster(group("a"), group("b"))
    once = merged(live, wanted)
    assert merged(once, wanted) == once


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (CONFIG_MAP, "ConfigMap.v1."),
        ({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role"}, "Role.v1.rbac.authorization.k8s.io"),
    ],
)
def test_kinds_are_named_with_version_and_group(manifest: Manifest, expected: str) -> None:
    assert resource_type(manifest) == expected
