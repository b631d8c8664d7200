"""What the counters of processes grew by between two looks at them."""

from collections.abc import Mapping

CLOCK = "at_s"


class Growth:
    """Remembers the last look at each process.

    Counters are cumulative since the process began; that named CLOCK is the process's own clock in seconds, so that
    growth over its growth is a rate however late a look comes.
    """

    def __init__(self) -> None:
        self._last: dict[str, Mapping[str, float]] = {}

    def look(self, counters: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
        """Return by how much each counter grew since the last look, by process.

        Left out are processes seen for the first time, those that told nothing new, and those with a counter that fell:
        a new life. Processes that are not looked at are forgotten.
        """
        grown = {}
        for name, now in counters.items():
            last = self._last.get(name)
            if last is not None and now[CLOCK] > last[CLOCK] and all(now[key] >= last[key] for key in now):
                grown[name] = {key: now[key] - last[key] for key in now}
        self._last = dict(counters)
        return grown
