"""How long sequences wait at a worker until a step computes something of them."""

from collections.abc import Iterable


class QueueTimes:
    """The waits of one engine. Its caller sees to it that one thread is here at a time; times are of one clock."""

    def __init__(self) -> None:
        self._arrived_s: dict[str, float] = {}
        self._waited_s: list[float] = []

    def arrived(self, sequence_id: str, now_s: float) -> None:
        """Note that a sequence came."""
        self._arrived_s[sequence_id] = now_s

    def begun(self, sequence_ids: Iterable[str], now_s: float) -> None:
        """Note that a step computes these; those whose wait is over already are passed over."""
        if not self._arrived_s:
            return  # as in nearly every step
        for sequence_id in sequence_ids:
            arrived_s = self._arrived_s.pop(sequence_id, None)
            if arrived_s is not None:
                self._waited_s.append(now_s - arrived_s)

    def gone(self, sequence_id: str) -> None:
        """Note that a sequence ended, perhaps before it began."""
        self._arrived_s.pop(sequence_id, None)

    def take(self) -> list[float]:
        """Return the waits that ended since the last call, in seconds."""
        taken, self._waited_s = self._waited_s, []
        return taken
