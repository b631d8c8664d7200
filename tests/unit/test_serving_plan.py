"""Plans that `serve` runs: by kind, and from what `expertmesh plan --json` prints."""

from typing import Any

import pytest

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.serving_plan import ServingPlan, read_plan, slices_of

PLAN: dict[str, Any] = {"attention_tp": 1, "attention_dp": 2, "ep": 4, "expert_tp": 2, "pp": 1, "instances": 1}


def test_kinds_by_the_number_of_shards() -> None:
    assert [slices_of("ep", n) for n in (1, 2, 6)] == [1, 1, 1]
    assert [slices_of("tp", n) for n in (1, 2, 6)] == [1, 2, 6]
    assert [slices_of("tpxep", n) for n in (4, 6, 8, 9)] == [2, 2, 2, 3]


@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_shards_that_form_no_groups_are_refused(shards: int) -> None:
    with pytest.raises(InputError, match=f"such as 4; shards={shards}"):
        slices_of("tpxep", shards)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="'pp' is not one of auto, ep, tp, tpxep, nor a file"):
        slices_of("pp", 4)


def test_a_plan_by_itself_and_the_recommended_one_are_the_same() -> None:
    expected = ServingPlan(shards=8, workers=2, expert_tp=2)
    assert read_plan("a", PLAN) == expected
    assert read_plan("a", {"plans": [{}, PLAN], "recommended": 1}) == expected
    assert str(expected) == "ep=4, expert_tp=2, attention_dp=2"


def test_copies_of_everything_are_replicas() -> None:
    plan = read_plan("a", {**PLAN, "instances": 3})
    assert plan == ServingPlan(shards=24, workers=6, expert_tp=2, replicas=3)
    assert str(plan) == "ep=4, expert_tp=2, 3 replicas, attention_dp=6"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attention_tp": 4}, "attention_tp=4 is not served: a worker is one process"),
        ({"pp": 2}, "pp=2 is not served: a worker has all layers"),
        ({"ep": 0}, "ep must be a positive whole number, got 0"),
        ({"expert_tp": "2"}, "expert_tp must be a positive whole number, got '2'"),
        ({"attention_dp": None}, "attention_dp must be a positive whole number"),
        ({"ep": True}, "ep must be a positive whole number, got True"),
        ({"plans": [PLAN], "recommended": None}, "recommended=None is none of its plans"),
        ({"plans": [PLAN], "recommended": 1}, "recommended=1 is none of its plans"),
        ({"plans": [3], "recommended": 0}, r"plans\[0\] is int, not a plan"),
    ],
)
def test_what_is_not_served_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_plan("a.json", {**PLAN, **change})
