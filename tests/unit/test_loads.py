"""What workers count becomes windows: each token once, whatever restarts, repeats or fails."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from expertmesh.actors.controller import loads
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.cluster.errors import StateError, UnavailableError
from expertmesh.cluster.ids import WorkerId
from expertmesh.cluster.load_windows import LoadWindows

MODEL: Any = SimpleNamespace(moe_layers=(0, 2), num_experts=3, num_slices=3)


class Worker:
    """A worker that counts as it is told."""

    def __init__(self, life: int = 1) -> None:
        self.life = life
        self.total = np.zeros((2, 3), dtype=np.int64)
        self.decoded = np.zeros((2, 3), dtype=np.int64)
        self.expert_s = 0.0
        self.dropped: np.ndarray[Any, Any] | None = None
        self.counters = SimpleNamespace(remote=self._answer)
        self.is_away = False

    def compute(self, prefill: int, decode: int) -> None:
        self.total[1, 2] += prefill + decode
        self.decoded[1, 2] += decode
        self.expert_s += 0.5

    def _answer(self) -> dict[str, Any] | None:
        if self.is_away:
            return None
        counts = {"load_LE": self.total.copy(), "decode_LE": self.decoded.copy()}
        return {"life": self.life, **counts, "expert_s": self.expert_s, "dropped_LE": self.dropped}


class Store:
    """A store of windows."""

    def __init__(self) -> None:
        self.kept: LoadWindows | None = None
        self.error: Exception | None = None

    def save_windows(self, windows: LoadWindows) -> None:
        self.kept = LoadWindows.from_bytes(windows.to_bytes())

    def load_windows(self) -> LoadWindows | None:
        if self.error is not None:
            raise self.error
        return self.kept


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_for(references: list[Any], _timeout_s: float) -> list[Any]:
        if None in references:
            raise UnavailableError("a worker is away")
        return references

    monkeypatch.setattr(loads, "wait_for", wait_for)


def collector(store: Store, **workers: Worker) -> LoadCollector:
    ids = [WorkerId(name) for name in workers]
    tier: Any = SimpleNamespace(ready=ids, handles=dict(zip(ids, workers.values(), strict=True)))
    return LoadCollector(MODEL, store, tier)  # type: ignore[arg-type]  # a store in memory


def counted(found: LoadCollector, now_s: float) -> tuple[int, int]:
    load = found.slow(now_s)
    assert load.prefill_LE.sum() == load.prefill_LE[1, 2]
    return int(load.prefill_LE[1, 2]), int(load.decode_LE[1, 2])


def test_each_token_counts_once_and_in_its_kind() -> None:
    worker, other = Worker(), Worker(life=2)
    found = collector(Store(), a=worker, b=other)
    worker.compute(7, 3)
    found.collect(100.0)
    found.collect(101.0)
    worker.compute(0, 5)
    other.compute(2, 0)
    found.collect(102.0)
    assert counted(found, 102.0) == (9, 8)
    assert found.expert_s == pytest.approx(1.5)
    assert counted(found, 500.0) == (0, 0)


def test_a_worker_that_was_started_again_counts_from_nothing() -> None:
    worker = Worker()
    found = collector(Store(), a=worker)
    worker.compute(7, 3)
    found.collect(100.0)
    worker.__init__(life=9)  # type: ignore[misc]
    worker.compute(1, 1)
    found.collect(101.0)
    assert counted(found, 101.0) == (8, 4)


def test_a_worker_that_does_not_answer_holds_up_no_other_and_is_made_up_for() -> None:
    worker, other = Worker(), Worker(life=2)
    found = collector(Store(), a=worker, b=other)
    worker.compute(7, 0)
    other.compute(1, 0)
    worker.is_away = True
    with pytest.raises(UnavailableError, match="away"):
        found.collect(100.0)
    assert counted(found, 100.0) == (1, 0)
    worker.is_away = False
    found.collect(101.0)
    assert counted(found, 101.0) == (8, 0)


def test_what_the_workers_dropped_is_summed() -> None:
    worker, other, without = Worker(), Worker(life=2), Worker(life=3)
    found = collector(Store(), a=worker, b=other, c=without)
    worker.dropped, other.dropped = np.eye(2, 3, dtype=np.int64), np.full((2, 3), 2)
    assert not found.dropped_LE().any()
    found.collect(100.0)
    found.collect(101.0)
    assert found.dropped_LE().tolist() == [[3, 2, 2], [2, 3, 2]]


def test_an_answer_that_was_overtaken_changes_nothing() -> None:
    worker = Worker()
    found = collector(Store(), a=worker)
    worker.compute(1, 0)
    late = worker.counters.remote()
    worker.compute(7, 3)
    found.collect(100.0)
    newest = worker.counters.remote
    worker.counters.remote = lambda: late
    found.collect(101.0)
    worker.counters.remote = newest
    found.collect(102.0)
    assert counted(found, 102.0) == (8, 3)


def test_the_windows_survive_the_controller_and_old_counts_are_not_taken_for_new() -> None:
    store, worker = Store(), Worker()
    worker.compute(7, 3)
    collector(store, a=worker).collect(100.0)
    worker.compute(100, 100)  # while no controller was there
    again = collector(store, a=worker)
    assert counted(again, 101.0) == (7, 3)
    again.collect(101.0)
    worker.compute(1, 0)
    again.collect(102.0)
    assert counted(again, 102.0) == (8, 3)


@pytest.mark.parametrize("error", [StateError("damaged"), UnavailableError("no Redis")])
def test_windows_that_cannot_be_read_are_begun_anew(error: Exception) -> None:
    store = Store()
    store.error = error
    assert counted(collector(store, a=Worker()), 100.0) == (0, 0)


def test_windows_of_another_model_are_not_used() -> None:
    store = Store()
    store.kept = LoadWindows(5, 5)
    assert collector(store, a=Worker()).slow(100.0).prefill_LE.shape == (2, 3)
