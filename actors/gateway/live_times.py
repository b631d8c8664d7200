"""How long tokens took in the last seconds, in three numbers; kept only while somebody wants to know."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

WINDOW_S = 10.0


class TimesSummary(NamedTuple):
    """Seconds, None where nothing was measured. Gaps are those between two messages of a sample with new tokens."""

    gap_p50_s: float | None
    gap_p99_s: float | None
    first_token_p50_s: float | None


class TokenTimes:
    """The times of the last window_s seconds. Use it inside one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, window_s: float = WINDOW_S) -> None:
        """Keep nothing until is_wanted is set; clock gives seconds that do not step back."""
        self._clock = clock
        self._window_s = window_s
        self._parts: deque[tuple[float, Sequence[float], Sequence[float]]] = deque()
        self._is_wanted = False

    @property
    def is_wanted(self) -> bool:
        """Whether times are kept."""
        return self._is_wanted

    @is_wanted.setter
    def is_wanted(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted
        self._parts.clear()

    def add(self, first_s: Sequence[float], gaps_s: Sequence[float]) -> None:
        """Take in what was measured since the last call; see RequestMeter."""
        if self._is_wanted and (first_s or gaps_s):
            self._parts.append((self._clock(), first_s, gaps_s))

    def summary(self) -> TimesSummary:
        """Return the window's quantiles."""
        while self._parts and self._parts[0][0] < self._clock() - self._window_s:
            self._parts.popleft()
        first_s = np.concatenate([np.empty(0), *(first_s for _, first_s, _ in self._parts)])
        gaps_s = np.concatenate([np.empty(0), *(gaps_s for _, _, gaps_s in self._parts)])
        p50_s, p99_s = np.quantile(gaps_s, (0.5, 0.99)).tolist() if gaps_s.size else (None, None)
        return TimesSummary(p50_s, p99_s, float(np.median(first_s)) if first_s.size else None)
