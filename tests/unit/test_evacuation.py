"""Which members move off nodes that are to end, in which order and until when, and who is called how afterwards."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.evacuation import (
    MAX_ATTEMPTS,
    due_moves,
    present_names,
    room_timeout_s,
    sole_owners,
    succeeded,
)
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.repair import repair

NODES = ["node-a", "node-b", "node-c"]
MEMBERS = ["shard-0", "shard-1", "shard-2", "shard-10", "worker-0", "worker-1"]
NOW_S = 1000.0


def moves(**changed: object) -> list[str]:
    """Return who moves, of a shard and a worker on node-a, which ends in a minute, and a shard on node-b."""
    asked = {
        "now_s": NOW_S,
        "leaving": {"node-a": NOW_S + 60},
        "nodes": {"shard-0": "node-a", "worker-0": "node-a", "shard-1": "node-b"},
        "sole_owners": (),
        "attempts": {},
        "under_way": (),
    }
    return [move.member for move in due_moves(**{**asked, **changed})]  # type: ignore[arg-type]


def test_who_is_on_a_node_that_ends_moves_and_nobody_else() -> None:
    assert moves() == ["shard-0", "worker-0"]
    assert moves(leaving={}) == []
    assert moves(leaving={"node-a": math.inf, "node-x": NOW_S}) == ["shard-0", "worker-0"]


def test_nobody_moves_twice_at_once_or_for_ever_or_too_late() -> None:
    assert moves(under_way=["shard-0"]) == ["worker-0"]
    assert moves(attempts={("shard-0", "node-a"): MAX_ATTEMPTS}) == ["worker-0"]
    assert moves(attempts={("shard-0", "node-a"): MAX_ATTEMPTS - 1, ("worker-0", "node-b"): 9}) == moves()
    assert moves(now_s=NOW_S + 60) == []


@given(
    leaving=st.dictionaries(st.sampled_from(NODES), st.floats(NOW_S - 10, NOW_S + 100) | st.just(math.inf)),
    nodes=st.dictionaries(st.sampled_from(MEMBERS), st.sampled_from(NODES)),
    sole=st.frozensets(st.sampled_from(MEMBERS[:4])),
    under_way=st.frozensets(st.sampled_from(MEMBERS)),
)
def test_the_most_urgent_come_first(
    leaving: dict[str, float], nodes: dict[str, str], sole: frozenset[str], under_way: frozenset[str]
) -> None:
    found = due_moves(now_s=NOW_S, leaving=leaving, nodes=nodes, sole_owners=sole, attempts={}, under_way=under_way)
    due = {member for member, node in nodes.items() if leaving.get(node, NOW_S) > NOW_S} - under_way
    assert {move.member for move in found} == due
    assert all((move.node, move.deadline_s) == (nodes[move.member], leaving[move.node]) for move in found)
    deadlines_s = [move.deadline_s for move in found]
    assert deadlines_s == sorted(deadlines_s)
    for node in leaving:
        ranks = [0 if m.member in sole else 1 + m.member.startswith("worker-") for m in found if m.node == node]
        assert ranks == sorted(ranks), "sole owners, then shards, then workers"


@given(left_s=st.floats(-100, 1e6), most_s=st.floats(0, 1e4))
def test_half_of_what_is_left_is_waited_for_room(left_s: float, most_s: float) -> None:
    waited_s = room_timeout_s(NOW_S, NOW_S + left_s, most_s)
    assert 0 <= waited_s <= most_s
    assert waited_s <= max(0.0, left_s / 2) + 1e-6
    assert room_timeout_s(NOW_S, math.inf, most_s) == most_s


def test_sole_owners_are_those_whose_loss_takes_experts_away() -> None:
    keys = [ExpertKey(0, expert) for expert in range(3)]
    assert sole_owners(initial_placement((0,), 4, [ShardId("shard-0"), ShardId("shard-1")], 2)) == frozenset()
    one = initial_placement((0,), 3, [ShardId("shard-0"), ShardId("shard-1")], 2)
    slots = (one.shards[0], replace(one.shards[1], experts=tuple(keys[:2])))
    assert sole_owners(replace(one, shards=slots)) == {"shard-0"}
    assert sole_owners(Placement(epoch=0, num_experts=1, layers=(0,), shards=())) == frozenset()


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, int]:
    num_shards = draw(st.integers(1, 5))
    replicas = draw(st.integers(1, num_shards))
    shards = [ShardId(f"shard-{index}") for index in range(num_shards)]
    placement = initial_placement((0, 2), draw(st.integers(num_shards, 12)), shards, replicas, epoch=7)
    key = ExpertKey(2, 0)
    weights = {key: tuple(range(1, 1 + len(placement.replicas(key))))}
    return replace(placement, weights=weights), replicas


@given(placed=placements(), data=st.data())
def test_a_successor_has_what_its_predecessor_had_and_nothing_else_moves(
    placed: tuple[Placement, int], data: st.DataObject
) -> None:
    placement, replicas = placed
    before = {slots.shard: slots.experts for slots in placement.shards}
    leaving = data.draw(st.frozensets(st.sampled_from(sorted(before)), min_size=1))
    heirs = {str(old): f"shard-{100 + index}" for index, old in enumerate(sorted(leaving))}
    shards = [ShardId(heirs.get(shard, shard)) for shard in before]
    after = repair(succeeded(placement, heirs), shards, {}, replicas=replicas, level=True)
    assert after.epoch == placement.epoch + 1
    assert {slots.shard: set(slots.experts) for slots in after.shards} == {
        heirs.get(shard, shard): set(experts) for shard, experts in before.items()
    }
    assert after.weights == placement.weights
    assert not after.missing(shards)


def operation(number: int, old: str, new: str, phase: Phase, ended_s: float = 0.0, node: str = "node-a") -> Operation:
    return Operation(
        id=f"op-{number}", request="", adding=(new,), removing=(old,), phase=phase, progress="", error="",
        started_s=0.0, ended_s=ended_s, deadline_s=9.0, node=node,
    )  # fmt: skip


FIRST = operation(0, "shard-1", "shard-2", Phase.DONE, 6.0)


@pytest.mark.parametrize(
    ("operations", "name"),
    [
        ([], "shard-1"),
        ([operation(0, "shard-1", "shard-2", Phase.COMMIT)], "shard-1"),
        ([operation(0, "shard-1", "shard-2", Phase.ROLLED_BACK, 6.0)], "shard-1"),
        ([operation(0, "shard-1", "shard-2", Phase.DRAIN)], "shard-2"),
        ([operation(0, "shard-1", "shard-2", Phase.DONE, 4.0)], "shard-1"),
        ([operation(0, "shard-1", "shard-2", Phase.DONE, 6.0, node="")], "shard-1"),
        ([FIRST], "shard-2"),
        ([FIRST, operation(1, "shard-2", "shard-3", Phase.DRAIN)], "shard-3"),
        ([FIRST, operation(1, "shard-2", "shard-1", Phase.DRAIN)], "shard-1"),
    ],
)
def test_a_member_is_found_under_the_name_that_it_has_now(operations: list[Operation], name: str) -> None:
    assert present_names(["shard-0", "shard-1"], operations, since_s=5.0) == ("shard-0", name)
