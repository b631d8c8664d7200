"""The keeper without a shard that never comes back, and with successors of members that move off a node."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.cluster.errors import CapacityError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

SHARDS = [ShardId("shard-0"), ShardId("shard-1"), ShardId("shard-2")]
GONE = SHARDS[2]


class Shards:
    """Two shards that host, and one that is dead and cannot be started."""

    def __init__(self) -> None:
        self.facts: dict[str, dict[str, Any]] = {s: {"id": s, "state": "ready", "epoch": 1} for s in SHARDS[:2]}
        self.facts[GONE] = {"id": GONE, "state": "dead", "epoch": 0}
        self.handles: dict[str, Any] = {}
        self.nodes: dict[str, str] = {}
        self.loading: list[str] = []

    @property
    def ready(self) -> list[str]:
        return [shard for shard, facts in self.facts.items() if facts["state"] == "ready"]

    @property
    def dead(self) -> list[str]:
        return [shard for shard, facts in self.facts.items() if facts["state"] == "dead"]

    def ask(self, timeout_s: float) -> None:
        """They are as they are."""

    def dismiss(self, shard: str, *, returns: bool = False) -> None:
        """There is nothing to end."""

    def create(self, shard: str, **_: Any) -> Any:
        raise CapacityError(f"no node has room for {shard}")


class Workers(Shards):
    """None is needed here."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = {}


def keeper_of(absence_s: float) -> tuple[Keeper, list[str]]:
    """A keeper whose placement has left the dead shard out already, and what it says."""
    notes: list[str] = []
    settings = ServeSettings(model=Path("model"), shards=3, absence_s=absence_s)
    records: Any = SimpleNamespace(keep=lambda *_: None, save=lambda *_: None)
    tiers: tuple[Any, Any] = Shards(), Workers()
    keeper = Keeper(settings, SimpleNamespace(), records, *tiers, notes.append, Watchdog())  # type: ignore[arg-type]
    keeper._mover = SimpleNamespace(  # type: ignore[assignment]  # moves take no time here
        **dict.fromkeys(("bring", "publish", "settle"), lambda *_, **__: None)
    )
    keeper.shard_ids = list(SHARDS)
    keeper.placement = initial_placement((0,), 4, SHARDS[:2], 1, epoch=1)
    return keeper, notes


def other_placement(keeper: Keeper) -> Placement:
    assert keeper.placement is not None
    first, second = keeper.placement.shards
    swapped = (
        type(first)(shard=first.shard, experts=second.experts),
        type(first)(shard=second.shard, experts=first.experts),
    )
    return Placement(epoch=2, num_experts=4, layers=(0,), shards=swapped)


def test_a_proposal_waits_for_a_shard_that_may_come_back() -> None:
    keeper, notes = keeper_of(absence_s=1e9)
    keeper.propose(other_placement(keeper), "it is better")
    keeper.round(1.0)
    assert not keeper.is_calm
    assert keeper.placement is not None
    assert keeper.placement.epoch == 1
    assert not any("balanced without it" in note for note in notes)


def test_the_others_are_balanced_without_one_that_stays_away() -> None:
    keeper, notes = keeper_of(absence_s=0.0)
    keeper.propose(other_placement(keeper), "it is better")
    keeper.round(1.0)
    assert keeper.is_calm
    assert keeper.placement is not None
    assert keeper.placement.epoch == 2
    keeper.round(1.0)
    assert sum("shard-2 has been away for 0 s" in note for note in notes) == 1, "said once"
    assert keeper.shard_ids == SHARDS, "it is a member still, and joins again when it comes"


def test_what_an_operator_asks_for_waits_for_all() -> None:
    keeper, _ = keeper_of(absence_s=0.0)
    keeper.round(1.0)
    with pytest.raises(UnavailableError, match="being started or left out"):
        keeper.adopt(other_placement(keeper))


def keeper_with_successor(*, third_state: str) -> tuple[Keeper, list[tuple[str, Any]]]:
    """A keeper of three shards, each expert on two of them; one has a successor. And the mover's calls."""
    keeper, _ = keeper_of(absence_s=1e9)
    calls: list[tuple[str, Any]] = []

    def recorded(name: str) -> Any:
        return lambda *given, **_: calls.append((name, given))

    keeper._mover = SimpleNamespace(  # type: ignore[assignment]
        **{name: recorded(name) for name in ("bring", "publish", "settle")}
    )
    keeper._settings = keeper._settings.model_copy(update={"replicas": 2})
    keeper._keys_of = lambda shard: frozenset()  # type: ignore[method-assign]
    keeper.placement = initial_placement((0,), 4, SHARDS, 2, epoch=1)
    facts = keeper.shards.facts
    facts[SHARDS[2]] = {"id": SHARDS[2], "state": third_state, "epoch": 1}
    facts[ShardId("shard-3")] = {"id": "shard-3", "state": "ready", "epoch": 0}
    return keeper, calls


def hosted(placement: Placement) -> dict[str, set[int]]:
    return {str(slots.shard): {key.expert for key in slots.experts} for slots in placement.shards}


def test_a_successor_takes_what_its_predecessor_has_before_that_is_given_up() -> None:
    keeper, calls = keeper_with_successor(third_state="ready")
    assert keeper.placement is not None
    before = hosted(keeper.placement)
    keeper.replace_members({"shard-1": "shard-3"})
    assert [name for name, _ in calls] == ["bring", "publish", "settle"]
    _, (current, target, hosting) = calls[0]
    assert hosted(current) == before
    assert "shard-1" in hosting, "experts are copied from it"
    assert hosted(target) == {"shard-0": before["shard-0"], "shard-3": before["shard-1"], "shard-2": before["shard-2"]}
    assert "shard-1" not in calls[2][1][1], "it is asked to free nothing: workers may still use it"
    assert keeper.shard_ids == ["shard-0", "shard-3", "shard-2"]


def test_while_another_is_away_no_more_moves_than_must() -> None:
    keeper, calls = keeper_with_successor(third_state="dead")
    assert keeper.placement is not None
    before = hosted(keeper.placement)
    keeper.replace_members({"shard-1": "shard-3"})
    _, (_, target, _) = calls[0]
    after = hosted(target)
    assert after.keys() == {"shard-0", "shard-3"}
    assert after["shard-0"] == before["shard-0"]
    assert after["shard-3"] == before["shard-1"]
    assert keeper.shard_ids == ["shard-0", "shard-3", "shard-2"]


def test_workers_are_replaced_without_a_move_of_experts() -> None:
    keeper, calls = keeper_with_successor(third_state="ready")
    keeper.worker_ids = [WorkerId("worker-0"), WorkerId("worker-1")]
    keeper.replace_members({"worker-0": "worker-2"})
    assert not calls
    assert keeper.worker_ids == ["worker-2", "worker-1"]


def test_one_with_a_successor_is_not_started_again() -> None:
    keeper, _ = keeper_of(absence_s=1e9)
    may_end = threading.Event()

    def create(shard: ShardId, **_: Any) -> None:
        may_end.wait(30)
        raise CapacityError(f"no node has room for {shard}")

    keeper.shards.create = create  # type: ignore[method-assign,assignment]
    keeper.succeeded = lambda: frozenset({GONE})
    keeper.round(1.0)
    assert keeper._reviver.starting == frozenset()
    keeper.succeeded = frozenset
    keeper.round(1.0)
    assert keeper._reviver.starting == {GONE}
    may_end.set()
