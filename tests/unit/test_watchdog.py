import math
import sys
import threading
from collections.abc import Iterator

import pytest

from expertmesh.cluster.errors import InputError, UnknownNameError
from expertmesh.cluster.watchdog import LoopRecord, Watchdog


def test_worked_example() -> None:
    watchdog = Watchdog()
    watchdog.expect("the balancer", 5.0)
    watchdog.expect("health", 1.0)
    watchdog.success("the balancer", 100.0)
    watchdog.failure("the balancer", 107.0, "Redis is away")
    watchdog.success("health", 134.0)
    assert watchdog.stalled(125.0) == []
    assert watchdog.stalled(134.0) == [
        "the balancer has not succeeded for 34 s (every 5 s); last failure: Redis is away"
    ]
    assert watchdog.report(134.0) == [
        LoopRecord("health", 1.0, 134.0, 0.0, None, is_stalled=False),
        LoopRecord("the balancer", 5.0, 100.0, 34.0, "Redis is away", is_stalled=True),
    ]
    watchdog.success("the balancer", 134.5)
    assert watchdog.stalled(135.0) == []
    assert watchdog.report(135.0)[1].last_failure == "Redis is away", "status still tells of it"


def test_patience_is_in_periods_and_only_more_than_it_is_stalled() -> None:
    watchdog = Watchdog()
    watchdog.expect("scaling", 2.0, patience=1.5)
    watchdog.success("scaling", 10.0)
    assert [bool(watchdog.stalled(now_s)) for now_s in (9.0, 12.9, 13.0, 13.1)] == [False, False, False, True]
    assert watchdog.report(9.0)[0].since_s == 0.0, "a report of another thread may be a little ahead"


def test_a_loop_that_never_succeeds_is_stalled_from_when_it_was_first_seen() -> None:
    watchdog = Watchdog()
    watchdog.expect("the balancer", 1.0)
    assert watchdog.stalled(1e9) == []
    assert watchdog.stalled(1e9 + 6) == [
        "the balancer has never succeeded, in 6 s (every 1 s); last failure: none was reported"
    ]
    watchdog.expect("moves", 1.0)
    watchdog.failure("moves", 1e9, "no peer")
    watchdog.failure("moves", 1e9 + 5, "no room")
    watchdog.success("the balancer", 1e9 + 6)
    assert watchdog.stalled(1e9 + 5000.25) == [
        "moves has never succeeded, in 5000.2 s (every 1 s); last failure: no room",
        "the balancer has not succeeded for 4994.2 s (every 1 s); last failure: none was reported",
    ]
    assert watchdog.stalled(1e9 + 6)[0] == "moves has never succeeded, in 6 s (every 1 s); last failure: no room"
    assert watchdog.report(1e9 + 6)[0].last_success_s is None


def test_expecting_again_begins_anew() -> None:
    watchdog = Watchdog()
    watchdog.expect("moves", 1.0)
    watchdog.success("moves", 0.0)
    watchdog.expect("moves", 3.0)
    assert watchdog.report(100.0) == [LoopRecord("moves", 3.0, None, 0.0, None, is_stalled=False)]


def test_a_forgotten_loop_is_unknown() -> None:
    watchdog = Watchdog()
    watchdog.expect("moves", 1.0)
    watchdog.expect("scaling", 1.0)
    watchdog.forget("moves")
    watchdog.forget("moves")
    assert [record.name for record in watchdog.report(100.0)] == ["scaling"]
    with pytest.raises(UnknownNameError, match="no loop 'moves' is watched; there are: scaling"):
        watchdog.success("moves", 0.0)
    with pytest.raises(UnknownNameError, match="no loop 'moves'"):
        watchdog.failure("moves", 0.0, "late")


@pytest.mark.parametrize(
    ("period_s", "patience"), [(0.0, 5.0), (math.nan, 5.0), (math.inf, 5.0), (1.0, 0.0), (1.0, math.nan)]
)
def test_unfit_periods_are_refused(period_s: float, patience: float) -> None:
    with pytest.raises(InputError, match="cannot watch moves with"):
        Watchdog().expect("moves", period_s, patience)


@pytest.fixture
def _eager_switching() -> Iterator[None]:
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("_eager_switching")
def test_threads_do_not_disturb_each_other() -> None:
    watchdog, errors = Watchdog(), list[Exception]()
    num_threads, num_rounds = 4, 200

    def loop(name: str) -> None:
        try:
            for step in range(num_rounds):
                watchdog.expect(name, 1.0)
                watchdog.failure(name, float(step), f"{name} {step}")
                watchdog.success(name, float(step))
                record = next(record for record in watchdog.report(float(step)) if record.name == name)
                assert record == LoopRecord(name, 1.0, float(step), 0.0, f"{name} {step}", is_stalled=False)
                watchdog.stalled(1e6)
                watchdog.forget(name)
        except Exception as error:  # noqa: BLE001 - reported by the test
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(f"loop {index}",)) for index in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert watchdog.report(0.0) == []
