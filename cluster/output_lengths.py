"""How many tokens will a sequence generate? Learned from those that ended lately."""

import math
from bisect import bisect_right, insort
from collections import deque

# Enough for the quantile of one mix of requests, few enough to follow when it changes.
WINDOW = 256
# Of nine sequences in ten no more is needed than is expected; where more is, a preemption sets it right.
QUANTILE = 0.9


class OutputLengths:
    """The lengths of the last outputs, and what they say of one that goes on."""

    def __init__(self) -> None:
        self._in_order: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, num_tokens: int) -> None:
        """Note that a sequence ended after so many tokens."""
        if len(self._in_order) == WINDOW:
            del self._sorted[bisect_right(self._sorted, self._in_order.popleft()) - 1]
        self._in_order.append(num_tokens)
        insort(self._sorted, num_tokens)

    def expected(self, num_generated: int, max_tokens: int) -> int:
        """Return how many tokens, in all, to make room for: above num_generated, at most max_tokens.

        It is the 0.9 quantile of those recent lengths that are longer than what is generated already, or max_tokens
        where there are none. After Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", 2025,
        which draws from that distribution.

        Args:
            num_generated: tokens so far, below max_tokens.
            max_tokens: of the request.
        """
        first = bisect_right(self._sorted, num_generated)
        num_longer = len(self._sorted) - first
        if not num_longer:
            return max_tokens
        return min(self._sorted[first + math.ceil(QUANTILE * num_longer) - 1], max_tokens)
