"""Ray as we use it, against stand-ins: how long a member waits for room, and which nodes are to end."""

import math
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RpcError

from expertmesh.actors.runtime import Room, _gcs_client, _is_placed, draining_nodes
from expertmesh.cluster.errors import UnavailableError


class Group:
    """A placement group that is placed at the n-th wait."""

    def __init__(self, placed_at: int, on_wait: Any = lambda: None) -> None:
        self._placed_at, self._on_wait = placed_at, on_wait
        self.waits_s: list[float] = []

    def wait(self, timeout_s: float) -> bool:
        self.waits_s.append(timeout_s)
        self._on_wait()
        return len(self.waits_s) == self._placed_at


def placed(group: Group, room: Room) -> bool:
    found: Any = group
    return _is_placed(found, room)


def test_without_a_way_to_give_up_one_wait_is_enough() -> None:
    for placed_at, expected in ((1, True), (2, False)):
        group = Group(placed_at)
        assert placed(group, Room(timeout_s=900.0)) == expected
        assert group.waits_s == [900.0]


def test_room_is_waited_for_until_it_is_given_up() -> None:
    give_up = threading.Event()
    group = Group(3)
    assert placed(group, Room(timeout_s=900.0, give_up=give_up))
    assert group.waits_s == [1.0] * 3
    abandoned = Group(3, on_wait=give_up.set)
    assert not placed(abandoned, Room(timeout_s=900.0, give_up=give_up))
    assert len(abandoned.waits_s) == 1


def test_room_is_waited_for_until_the_time_is_over() -> None:
    group = Group(1000, on_wait=lambda: time.sleep(0.01))
    assert not placed(group, Room(timeout_s=0.02, give_up=threading.Event()))
    assert 1 <= len(group.waits_s) <= 3
    assert all(0 <= wait_s <= 0.02 for wait_s in group.waits_s)


class Gcs:
    """Ray's client, with an answer or a failure."""

    answer: dict[str, int] | Exception

    def __init__(self, address: str) -> None:
        assert address == "head:6379"

    def get_draining_nodes(self, timeout: float) -> dict[str, int]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Gcs]]:
    _gcs_client.cache_clear()
    monkeypatch.setattr("ray._raylet.GcsClient", Gcs)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(gcs_address="head:6379"))
    yield Gcs
    _gcs_client.cache_clear()


def test_nodes_are_told_with_the_time_of_their_end(gcs: type[Gcs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "answer", {"a": 1500, "b": 0}, raising=False)
    assert draining_nodes(5.0) == {"a": 1.5, "b": math.inf}


def test_a_head_that_is_away_is_told(gcs: type[Gcs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcs, "answer", RpcError("no answer"), raising=False)
    with pytest.raises(UnavailableError, match="does not say which nodes end: no answer"):
        draining_nodes(5.0)
