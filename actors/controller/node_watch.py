"""Looks now and then which nodes Ray was told to drain: a pod or machine that is about to end, whoever said so."""

import threading
import time
from collections.abc import Callable, Mapping

from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.watchdog import Watchdog

_log = EventLog(__name__)
_NAME = "look at nodes that end"
# A look takes Ray's head half a millisecond.
_PERIOD_S = 1.0
_TIMEOUT_S = 5.0
_PATIENCE_LOOKS = 60.0


class NodeWatch:
    """One thread runs `run`. While Ray's head does not answer, what it said last holds."""

    def __init__(
        self,
        look: Callable[[float], Mapping[str, float]],
        tell: Callable[[Mapping[str, float]], None],
        watchdog: Watchdog,
    ) -> None:
        """Make one that has seen nothing yet.

        Args:
            look: returns when each node that is to end may end, within so many seconds; raises UnavailableError.
            tell: told that at first, and when it has changed.
            watchdog: told whether looks succeed.
        """
        self._look, self._tell, self._watchdog = look, tell, watchdog
        self._leaving: dict[str, float] = {}
        self._stopping = threading.Event()

    def run(self) -> None:
        """Look until `stop`."""
        self._watchdog.expect(_NAME, _PERIOD_S, patience=_PATIENCE_LOOKS)
        while not self._stopping.wait(_PERIOD_S):
            self.step(time.monotonic())

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def step(self, now_s: float) -> None:
        """Look once.

        Args:
            now_s: seconds of a clock that does not step back.
        """
        try:
            leaving = dict(self._look(_TIMEOUT_S))
        except UnavailableError as error:
            self._watchdog.failure(_NAME, now_s, str(error))
            return
        except Exception as error:  # noqa: BLE001  it is told and the loop goes on
            _log.tell("loop_failed", error, loop=_NAME)
            self._watchdog.failure(_NAME, now_s, repr(error))
            return
        self._watchdog.success(_NAME, now_s)
        if leaving != self._leaving:
            self._leaving = leaving
            self._tell(leaving)
