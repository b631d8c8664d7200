"""Operations that a controller finds when it comes back, and those that were refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.links.ends import LinkEnd
from expertmesh.cluster.errors import CapacityError, InputError, UnavailableError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import initial_placement

SHARDS = [ShardId("shard-0"), ShardId("shard-1")]


class Store:
    """Operations in memory."""

    def __init__(self, kept: list[Operation]) -> None:
        self.kept = kept

    def load_operations(self) -> list[Operation]:
        return self.kept

    def save_operation(self, operation: Operation) -> None:
        self.kept = [operation, *(o for o in self.kept if o.id != operation.id)]


def operator(kept: list[Operation], free_bytes: int = 1 << 30) -> tuple[Operator, Any]:
    adopted: list[object] = []
    changed: list[object] = []
    facts = {s: {"link_end": LinkEnd(node="here"), "free_bytes": free_bytes} for s in SHARDS}
    keeper: Any = SimpleNamespace(
        placement=initial_placement((0,), 4, SHARDS, 1, epoch=3),
        shard_ids=SHARDS,
        worker_ids=["worker-0"],
        replicas=1,
        expert_bytes=1000,
        shards=SimpleNamespace(facts=facts, ready=SHARDS, nodes=dict.fromkeys(SHARDS, "here")),
        workers=SimpleNamespace(facts={}, ready=["worker-0"]),
        alarm=lambda: None,
        adopt=adopted.append,
        change_members=lambda *members: changed.append(members),
        adopted=adopted,
        changed=changed,
    )
    return Operator(keeper, Store(kept)), keeper  # type: ignore[arg-type]  # a store in memory


def kept(phase: Phase, removing: tuple[str, ...] = (), target: bytes = b"") -> Operation:
    return Operation(
        id="op-1", request="rebalance", adding=(), removing=removing, phase=phase, progress="", error="",
        started_s=1.0, ended_s=0.0, deadline_s=1e12, target=target,
    )  # fmt: skip


def test_a_target_that_cannot_be_read_rolls_back() -> None:
    found, keeper = operator([kept(Phase.COMMIT, target=b"junk")])
    found.resume()
    found.step()
    assert found.get("op-1").phase is Phase.ROLLED_BACK
    assert "not a placement record" in found.get("op-1").error
    assert not keeper.adopted


def test_one_with_members_goes_on() -> None:
    found, keeper = operator([kept(Phase.COMMIT, removing=("shard-1",))])
    found.resume()
    found.step()
    assert found.get("op-1").phase is Phase.DRAIN
    assert keeper.changed == [([SHARDS[0]], ["worker-0"])]


def test_a_placement_that_was_refused_is_not_carried_out_by_the_next_operation() -> None:
    found, keeper = operator([], free_bytes=0)
    target = initial_placement((0,), 4, SHARDS, 2)
    keeper.placement = initial_placement((0,), 4, SHARDS[:1], 1, epoch=3)
    with pytest.raises(CapacityError, match="on node here would need"):
        found.go_to(target, "rebalance")
    for facts in keeper.shards.facts.values():
        facts["free_bytes"] = 1 << 30
    same = found.scale(2, None)
    for _ in range(3):
        found.step()
    assert found.get(same.id).phase is Phase.DONE
    assert not keeper.adopted


def test_the_last_of_a_tier_and_a_stranger_are_not_drained() -> None:
    found, _ = operator([])
    with pytest.raises(InputError, match="worker-0 is the last of its kind and cannot be drained"):
        found.drain("worker-0")
    with pytest.raises(InputError, match="there is no 'shard-7'; there are shard-0, shard-1, worker-0"):
        found.drain("shard-7")
    assert not found.all()


def test_nothing_is_moved_onto_a_shard_that_is_being_started() -> None:
    found, keeper = operator([])
    del keeper.shards.facts[SHARDS[1]]
    with pytest.raises(UnavailableError, match="shard-1 is being started; ask again"):
        found.drain("shard-0")
    assert not found.all()


def test_each_step_of_an_operation_is_told() -> None:
    found, _ = operator([])
    told: list[tuple[str, Phase]] = []
    found.book.on_noted = lambda operation: told.append((operation.request, operation.phase))
    found.scale(2, None)
    for _ in range(3):
        found.step()
    assert told == [("scale to 2 shards", phase) for phase in (Phase.PREPARE, Phase.COMMIT, Phase.DRAIN, Phase.DONE)]
