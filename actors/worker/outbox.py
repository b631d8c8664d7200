"""New tokens on their way to the gateways: one batch a step for each, kept until the gateway has them."""

import asyncio
from collections import deque

from expertmesh.cluster.requests import TokenEvent


class Outbox:
    """The events of one gateway. Lives on one event loop."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, list[TokenEvent]]] = deque()
        self._last = 0
        self._arrived = asyncio.Event()

    def put(self, events: list[TokenEvent]) -> None:
        """Add a step's events."""
        self._last += 1
        self._events.append((self._last, events))
        self._arrived.set()

    async def poll(self, after: int, timeout_s: float) -> tuple[int, list[TokenEvent]]:
        """Return the events newer than `after`, and the number of the last; waits up to timeout_s for one.

        What is not newer than `after` is forgotten: the gateway has it.
        """
        while self._events and self._events[0][0] <= after:
            self._events.popleft()
        if not self._events:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), timeout_s)
            except TimeoutError:
                return after, []
        return self._last, [event for _, events in self._events for event in events]
