"""Members that are gone: started again, given up for now where there is no room, ended where they were drained."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from expertmesh.actors.controller import reviver
from expertmesh.actors.controller.reviver import Reviver
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.ids import ShardId

SHARD = ShardId("shard-0")


class DeadShard:
    """A tier of one shard, which is gone."""

    def __init__(self) -> None:
        self.handles: dict[ShardId, Any] = {SHARD: "old"}
        self.facts: dict[ShardId, dict[str, Any]] = {SHARD: {"id": SHARD, "state": "dead"}}
        self.room = True
        self.members = {SHARD}
        self.may_start = threading.Event()

    @property
    def dead(self) -> list[ShardId]:
        return [shard for shard, facts in self.facts.items() if facts["state"] == "dead"]

    @property
    def loading(self) -> list[ShardId]:
        return [shard for shard, facts in self.facts.items() if facts["state"] == "loading"]

    def dismiss(self, shard: ShardId, *, returns: bool = False) -> None:
        self.handles.pop(shard, None)
        self.facts.pop(shard, None)
        if returns:
            self.facts[shard] = {"id": shard, "state": "starting"}

    def start(self, shard: ShardId) -> None:
        assert self.may_start.wait(5)
        if not self.room:
            raise CapacityError("no node has room")
        self.handles[shard] = "new"
        self.facts[shard] = {"id": shard, "state": "ready"}

    def reviver(self) -> Reviver:
        return Reviver(self.start, lambda shard: shard in self.members, lambda _: None)


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_what_is_half_started_is_not_begun_anew() -> None:
    tier = DeadShard()
    tier.facts[SHARD]["state"] = "loading"
    tier.may_start.set()
    dismissed: list[ShardId] = []
    tier.dismiss = dismissed.append  # type: ignore[method-assign,assignment]
    reviving = tier.reviver()
    reviving.begin(tier)
    until(lambda: not reviving.is_busy)
    assert tier.facts[SHARD]["state"] == "ready"
    assert not dismissed


def test_it_is_started_once_and_awaited() -> None:
    tier = DeadShard()
    reviving = tier.reviver()
    reviving.begin(tier)
    reviving.begin(tier)
    assert reviving.is_busy
    assert reviving.may_be_soon_done
    until(lambda: tier.facts[SHARD]["state"] == "starting")  # whoever looks now sees that one is missing
    tier.may_start.set()
    until(lambda: not reviving.is_busy)
    assert tier.handles == {SHARD: "new"}
    assert not reviving.may_be_soon_done


def test_without_room_it_is_tried_again_and_no_longer_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviver, "_SOON_S", 0.05)
    tier = DeadShard()
    tier.room = False
    tier.may_start.set()
    reviving = tier.reviver()
    reviving.begin(tier)
    until(lambda: not reviving.is_busy)
    assert tier.dead == [SHARD]
    time.sleep(0.06)
    tier.may_start.clear()
    reviving.begin(tier)
    assert reviving.is_busy
    assert not reviving.may_be_soon_done, "the others take its experts' replicas meanwhile"
    tier.room = True
    tier.may_start.set()
    until(lambda: not reviving.is_busy)
    assert tier.handles == {SHARD: "new"}


@pytest.mark.parametrize("room", [True, False])
def test_one_that_is_drained_meanwhile_is_ended_again(room: bool) -> None:
    tier = DeadShard()
    tier.room = room
    reviving = tier.reviver()
    reviving.begin(tier)
    tier.members.clear()
    tier.may_start.set()
    until(lambda: not reviving.is_busy)
    assert not tier.handles
    assert not tier.facts


def test_one_that_has_a_successor_to_come_is_left_alone() -> None:
    tier = DeadShard()
    reviving = tier.reviver()
    reviving.begin(tier, {SHARD})
    assert reviving.starting == frozenset()
    reviving.begin(tier, {"shard-1"})
    assert reviving.starting == {SHARD}
    tier.may_start.set()
    until(lambda: not reviving.is_busy)
