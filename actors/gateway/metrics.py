"""What a gateway counts of its requests: how they ended, and how long their tokens took.

On a token's way are only a look at the clock and an append; `report` hands it on, from a loop that runs anyway.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from expertmesh.actors.gateway.callers import caller_name
from expertmesh.actors.gateway.key_metrics import KeyCounts
from expertmesh.actors.gateway.openai_errors import HttpError
from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.errors import CapacityError, InputError, UnavailableError
from expertmesh.cluster.service_rate import ServiceRate

# The gRPC statuses that status_codes.py gives, shown from the start, so that the first of each is a growth.
CODES = ("OK", "CANCELLED", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "INTERNAL")
_CODE_OF = (
    (InputError, "INVALID_ARGUMENT"),
    (CapacityError, "RESOURCE_EXHAUSTED"),
    (UnavailableError, "UNAVAILABLE"),
    ((asyncio.CancelledError, GeneratorExit), "CANCELLED"),
)
_CODE_OF_STATUS = {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}


class RequestTimes:
    """The times of one request's tokens. is_complete: all its samples have ended, whatever the client does now."""

    def __init__(self, meter: "RequestMeter") -> None:
        self.is_complete = False
        self._meter = meter
        self._began_s = meter.clock()
        self._last_s: dict[int, float] = {}
        self.first_s: float | None = None  # from the beginning to the first token

    @property
    def age_s(self) -> float:
        """Seconds since the beginning."""
        return self._meter.clock() - self._began_s

    def tokens_came(self, sample: int) -> None:
        """Note that new tokens of a sample came now."""
        now_s, last_s = self._meter.clock(), self._last_s.get(sample)
        if last_s is not None:
            self._meter.gaps_s.append(now_s - last_s)
        elif not self._last_s:
            self.first_s = now_s - self._began_s
            self._meter.first_s.append(self.first_s)
            self._meter.num_waiting -= 1
        self._last_s[sample] = now_s

    def ended(self) -> None:
        """Note that the request ended: it waits no more, or a place in the batch is free now."""
        if self._last_s:
            self._meter.served.ended(self._meter.clock())
        else:
            self._meter.num_waiting -= 1


class RequestMeter:
    """The counts of one gateway. Use it inside one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Count nothing yet; clock gives seconds that do not step back."""
        self.clock = clock
        self.ended = dict.fromkeys(CODES, 0)
        self.by_key = KeyCounts(CODES)
        self.first_s: list[float] = []
        self.gaps_s: list[float] = []
        # Told the times of first tokens and the gaps since the last report, in seconds.
        self.on_report: Callable[[list[float], list[float]], None] = lambda _first_s, _gaps_s: None
        self.num_waiting = 0  # requests without a token so far
        self.served = ServiceRate()

    @contextmanager
    def request(self) -> Iterator[RequestTimes]:
        """Count how the block ends as how a request ended. A client that goes away once all has come is served."""
        times = RequestTimes(self)
        self.num_waiting += 1
        try:
            with self._says_when(num_own=1):
                yield times
        except BaseException as error:
            self._count("OK" if times.is_complete else code_of(error))
            raise
        else:
            self._count("OK")
        finally:
            times.ended()

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Count a request that is refused inside, before it is one."""
        try:
            with self._says_when():
                yield
        except BaseException as error:
            self.refused(error)
            raise

    def refused(self, error: BaseException) -> None:
        """Count a request that is refused with this error."""
        self._count(code_of(error))

    @contextmanager
    def _says_when(self, num_own: int = 0) -> Iterator[None]:
        """Add to a CapacityError raised inside when to ask again, unless it says so. num_own: of those waiting."""
        try:
            yield
        except CapacityError as error:
            if error.retry_after_s is None:
                error.retry_after_s = self.served.wait_s(self.num_waiting - num_own, self.clock())
            raise

    def report(self, metrics: Metrics, *, num_live: int, num_failovers: int) -> None:
        """Hand on what is new.

        Args:
            metrics: of this process.
            num_live: requests that have not ended.
            num_failovers: requests that went on at another worker, since the start.
        """
        first_s, self.first_s = self.first_s, []
        gaps_s, self.gaps_s = self.gaps_s, []
        self.on_report(first_s, gaps_s)
        metrics.observe("expertmesh_time_to_first_token_seconds", first_s)
        metrics.observe("expertmesh_inter_token_seconds", gaps_s)
        for code, count in self.ended.items():
            metrics.count("expertmesh_requests_total", count, code=code)
        metrics.count("expertmesh_request_failovers_total", num_failovers)
        metrics.set("expertmesh_live_requests", num_live)
        self.by_key.report(metrics)

    def _count(self, code: str) -> None:
        self.ended[code] += 1
        self.by_key.request_ended(caller_name(), code)


def code_of(error: BaseException) -> str:
    """Return the name of the gRPC status that a client gets for an error; see status_codes.errors_to_status.

    What is refused over HTTP alone counts as what it would be over gRPC.
    """
    if isinstance(error, HttpError):
        return _CODE_OF_STATUS.get(error.status, "INVALID_ARGUMENT" if error.status < 500 else "INTERNAL")
    return next((code for kind, code in _CODE_OF if isinstance(error, kind)), "INTERNAL")
