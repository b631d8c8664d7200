"""Which of the loops that should run have stopped succeeding.

Without locks, and safe for several threads: every call reads or replaces single entries and attributes, which Python
does in one piece, with the global interpreter lock or without it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.cluster.errors import InputError, UnknownNameError


class LoopRecord(NamedTuple):
    """How a loop is doing. since_s counts from the last success, before the first from when the loop was first seen."""

    name: str
    period_s: float
    last_success_s: float | None
    since_s: float
    last_failure: str | None
    is_stalled: bool


class _Failure(NamedTuple):
    at_s: float
    reason: str


@dataclass(slots=True)
class _Watch:
    period_s: float
    patience: float
    first_seen_s: float | None = None
    last_success_s: float | None = None
    last_failure: _Failure | None = None


class Watchdog:
    """The loops of a process, each of which reports its successes and failures.

    Times are seconds of one clock that does not step back.
    """

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}

    def expect(self, name: str, period_s: float, patience: float = 5.0) -> None:
        """Begin to watch a loop, or begin anew. Its time runs from the first later call that tells the time.

        Args:
            name: what sentences call it, such as "the balancer".
            period_s: how often it should succeed.
            patience: the loop is stalled when it has not succeeded for more than this many periods.

        Raises:
            InputError: period_s or patience is not a positive number.
        """
        if not (0 < period_s < math.inf and 0 < patience < math.inf):
            raise InputError(f"cannot watch {name} with {period_s=} and {patience=}")
        self._watches[name] = _Watch(period_s, patience)

    def success(self, name: str, now_s: float) -> None:
        """Note that a loop's step has succeeded.

        Raises:
            UnknownNameError: the loop is not watched.
        """
        self._watch(name).last_success_s = now_s

    def failure(self, name: str, now_s: float, reason: str) -> None:
        """Note that a loop's step has failed.

        Raises:
            UnknownNameError: the loop is not watched.
        """
        watch = self._watch(name)
        watch.last_failure = _Failure(now_s, reason)
        if watch.first_seen_s is None:
            watch.first_seen_s = now_s

    def forget(self, name: str) -> None:
        """Stop to watch a loop, after it has ended. Forgetting an unknown one does nothing."""
        self._watches.pop(name, None)

    def stalled(self, now_s: float) -> list[str]:
        """Return a sentence for each loop that has not succeeded for too long, sorted by name."""
        return [_sentence(record) for record in self.report(now_s) if record.is_stalled]

    def report(self, now_s: float) -> list[LoopRecord]:
        """Return how each loop is doing, sorted by name."""
        return [_record(name, watch, now_s) for name, watch in sorted(self._watches.copy().items())]

    def _watch(self, name: str) -> _Watch:
        watch = self._watches.get(name)
        if watch is None:
            raise UnknownNameError(f"no loop {name!r} is watched; there are: {', '.join(sorted(self._watches.copy()))}")
        return watch


def _record(name: str, watch: _Watch, now_s: float) -> LoopRecord:
    if watch.first_seen_s is None:
        watch.first_seen_s = now_s
    success_s, failure = watch.last_success_s, watch.last_failure
    since_s = max(0.0, now_s - (watch.first_seen_s if success_s is None else success_s))
    is_stalled = since_s > watch.patience * watch.period_s
    reason = None if failure is None else failure.reason
    return LoopRecord(name, watch.period_s, success_s, since_s, reason, is_stalled)


def _sentence(record: LoopRecord) -> str:
    ever = "has never succeeded, in" if record.last_success_s is None else "has not succeeded for"
    failure = "none was reported" if record.last_failure is None else record.last_failure
    since = f"{record.since_s:.1f}".removesuffix(".0")
    return f"{record.name} {ever} {since} s (every {record.period_s:g} s); last failure: {failure}"
