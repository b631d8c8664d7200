"""What happens at a gateway that people want to be told of, whether anybody looks or not."""

import time
from collections.abc import Callable

from expertmesh.actors.recent_events import RecentEvents
from expertmesh.cluster.events import Event, EventKind


class GatewayEvents:
    """The events of one gateway. Use it inside one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, log: RecentEvents | None = None) -> None:
        """Begin without events, with a controller that answers and a gateway that does not serve yet.

        Args:
            clock: seconds that do not step back.
            log: to keep them in; None: a new one.
        """
        self._clock = clock
        self._log = log or RecentEvents()
        self._is_ready = False
        self._away_since_s: float | None = None

    def heard(self, is_ready: bool, reason: str) -> None:
        """Take in the controller's answer: whether requests are served, and why not."""
        if self._away_since_s is not None:
            away_s = self._clock() - self._away_since_s
            self._away_since_s = None
            self._log.add(EventKind.RECOVERY, f"the controller answers again after {away_s:.1f} s")
        if is_ready != self._is_ready:
            self._is_ready = is_ready
            kind = EventKind.RECOVERY if is_ready else EventKind.FAULT
            self._log.add(kind, "requests are served" if is_ready else f"requests are not served: {reason}")

    def unheard(self, problem: str) -> None:
        """Take in that the controller did not answer."""
        if self._away_since_s is None:
            self._away_since_s = self._clock()
            self._log.add(EventKind.FAULT, f"the controller does not answer, tokens go on: {problem}")

    def failed_over(self, worker_id: str, num_requests: int, why: str) -> None:
        """Take in that a worker's requests go on at others."""
        if num_requests:
            text = f"{num_requests} {'request goes' if num_requests == 1 else 'requests go'} on elsewhere"
            self._log.add(EventKind.FAULT, f"{worker_id} is lost, {text}: {why}")

    def after(self, number: int) -> list[Event]:
        """See RecentEvents.after."""
        return self._log.after(number)
