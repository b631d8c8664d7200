"""When is it worth asking again? From how fast requests were served lately."""

from collections import deque

# Requests over which the rate is taken, and how far back at most: what was served before says little of now.
WINDOW = 128
WINDOW_S = 60.0
# A client that is to come back sooner gains nothing; one that is told more may as well ask somebody else.
LEAST_S, MOST_S = 1.0, 60.0
# Told where some wait and none was served lately: a server that has just begun, or one that stands still.
UNKNOWN_S = 5.0


class ServiceRate:
    """The moments at which the last requests ended. Time is an argument, in seconds of one clock."""

    def __init__(self) -> None:
        self._ended_s: deque[float] = deque(maxlen=WINDOW)

    def ended(self, now_s: float) -> None:
        """Note that a request ended that was served."""
        self._ended_s.append(now_s)

    def wait_s(self, num_waiting: int, now_s: float) -> float:
        """Return in how many seconds so many requests, and one more, will have been served, from 1 to 60.

        It goes by the rate of the last 128 of the last minute. Where none was served in it, nobody knows: then it is
        5, or 1 if none wait.
        """
        while self._ended_s and self._ended_s[0] < now_s - WINDOW_S:
            self._ended_s.popleft()
        if not self._ended_s:
            return UNKNOWN_S if num_waiting else LEAST_S
        seconds_each = (now_s - self._ended_s[0]) / len(self._ended_s)
        return min(max(LEAST_S, (num_waiting + 1) * seconds_each), MOST_S)
