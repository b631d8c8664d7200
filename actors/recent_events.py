"""The latest events of a process, for whoever looks. Bounded by kind: what is frequent pushes nothing else out."""

import threading
import time
from collections import deque
from collections.abc import Callable

from expertmesh.cluster.events import Event, EventKind

MAX_OF_A_KIND = 100


class RecentEvents:
    """Events, numbered from 1 in the order in which they were added. Any thread may call."""

    def __init__(self, wall_clock: Callable[[], float] = time.time, max_of_a_kind: int = MAX_OF_A_KIND) -> None:
        """Begin without events; wall_clock gives seconds since 1970."""
        self._wall_clock = wall_clock
        self._number = 0
        self._kept: dict[EventKind, deque[Event]] = {kind: deque(maxlen=max_of_a_kind) for kind in EventKind}
        self._lock = threading.Lock()

    def add(self, kind: EventKind, text: str, time_s: float | None = None) -> None:
        """Add what happened now, or at time_s."""
        with self._lock:
            self._number += 1
            self._kept[kind].append(Event(self._number, self._wall_clock() if time_s is None else time_s, kind, text))

    def after(self, number: int) -> list[Event]:
        """Return the events that are kept and came after one with this number, in order."""
        with self._lock:
            return sorted(event for events in self._kept.values() for event in events if event.number > number)
