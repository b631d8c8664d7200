"""Patches and selectors by themselves."""

import pytest

from tests.kube.patches import json_patch, merge_patch
from tests.kube.resources import EVENTS, NAMESPACES
from tests.kube.selectors import by_fields, by_labels
from tests.kube.status import ApiError, Manifest
from tests.kube.store import Store
from tests.kube.strategic import strategic_merge

FOUND = {"groups": [{"name": "a"}, {"name": "b", "replicas": 1}]}
A, B = FOUND["groups"]


@pytest.mark.parametrize(
    ("operation", "groups"),
    [
        ({"op": "replace", "path": "/groups/1/replicas", "value": 2}, [A, {"name": "b", "replicas": 2}]),
        ({"op": "replace", "path": "/groups/0/replicas", "value": 2}, [{"name": "a", "replicas": 2}, B]),
        ({"op": "add", "path": "/groups/-", "value": {}}, [A, B, {}]),
        ({"op": "add", "path": "/groups/0", "value": {}}, [{}, A, B]),
        ({"op": "remove", "path": "/groups/0"}, [B]),
        ({"op": "test", "path": "/groups/1/replicas", "value": 1}, [A, B]),
        ({"op": "copy", "from": "/groups/0", "path": "/groups/2"}, [A, B, A]),
        ({"op": "move", "from": "/groups/0", "path": "/groups/1"}, [B, A]),
    ],
)
def test_json_patch(operation: Manifest, groups: list[Manifest]) -> None:
    assert json_patch(FOUND, [operation]) == {"groups": groups}


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "replace", "path": "/missing/key", "value": 1},
        {"op": "replace", "path": "/groups/2", "value": 1},
        {"op": "remove", "path": "/missing"},
        {"op": "test", "path": "/groups/1/replicas", "value": 2},
        {"op": "add", "path": "/groups/5", "value": 2},
    ],
)
def test_a_json_patch_that_cannot_be_applied(operation: Manifest) -> None:
    with pytest.raises(ApiError) as refused:
        json_patch(FOUND, [operation])
    assert refused.value.code == 422


def test_merge_patch() -> None:
    found = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge_patch(found, {"a": {"b": None, "c": [3]}, "e": {"f": None}}) == {"a": {"c": [3]}, "d": 1, "e": {}}


def test_strategic_merge() -> None:
    found = {"containers": [{"name": "a", "image": "1"}, {"name": "b"}], "finalizers": ["x"]}
    patch = {
        "$setElementOrder/containers": [{"name": "c"}],
        "containers": [{"name": "a", "image": "2"}, {"name": "b", "$patch": "delete"}, {"name": "c"}],
        "finalizers": ["y"],
    }
    assert strategic_merge(found, patch) == {
        "containers": [{"name": "a", "image": "2"}, {"name": "c"}],
        "finalizers": ["y"],
    }


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("", True),
        ("app=a", True),
        ("app==a,tier!=y", True),
        ("app!=a", False),
        ("app in (a, b),tier", True),
        ("app notin (a,b)", False),
        ("missing notin (a)", True),
        ("!missing", True),
        ("missing", False),
        ("missing=a", False),
    ],
)
def test_label_selectors(selector: str, matches: bool) -> None:
    assert by_labels(selector)({"metadata": {"labels": {"app": "a", "tier": "x"}}}) is matches


def test_field_selectors() -> None:
    event = {"metadata": {"name": "e"}, "involvedObject": {"name": "pod", "kind": "Pod"}}
    assert by_fields("metadata.name=e,involvedObject.name=pod")(event)
    assert not by_fields("involvedObject.kind!=Pod")(event)
    with pytest.raises(ApiError):
        by_fields("spec.replicas=1")
    with pytest.raises(ApiError):
        by_labels("a = = b")


def test_generated_names_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(["aaaaaa", "aaaaaa", "bbbbbb"])
    monkeypatch.setattr("tests.kube.store.secrets.token_hex", lambda size: next(drawn))
    store = Store()
    store.create(NAMESPACES, "", {"metadata": {"name": "default"}})
    names = [store.create(EVENTS, "default", {"metadata": {"generateName": "e-"}})["metadata"]["name"] for _ in "12"]
    assert names == ["e-aaaaa", "e-bbbbb"]
