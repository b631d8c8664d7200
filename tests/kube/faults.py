"""What goes wrong on request, and what was requested."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.kube.api import Call
from tests.kube.status import ApiError, Manifest


@dataclass(frozen=True)
class Hang:
    """The request is answered only after a time."""

    seconds: float


@dataclass(frozen=True)
class Close:
    """The connection is closed: before the request does anything, or when it is done and only its answer is lost."""

    done: bool = False


Fault = ApiError | Hang | Close


@dataclass
class _Planned:
    verb: str
    resource: str
    fault: Fault
    left: int


@dataclass(frozen=True)
class Request:
    """One request that was answered. resource is plural, with its subresource; body is of those that change things."""

    user: str
    verb: str
    resource: str
    namespace: str
    name: str
    code: int
    body: Manifest | list[Manifest] | None
    version: int
    """Of the store, when it was answered."""


@dataclass
class Faults:
    """Faults to come, and the log of requests, in the order in which they were answered."""

    log: list[Request] = field(default_factory=list)
    observers: list[Callable[[Call], None]] = field(default_factory=list)
    """Called with each request that is about to be carried out; they may block, and ask other servers."""
    _planned: list[_Planned] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, verb: str, resource: str, fault: Fault, count: int = 1) -> None:
        """Let the next `count` requests of a verb on a resource (`pods`, `pods/exec`; `*` is any) fail so."""
        with self._lock:
            self._planned.append(_Planned(verb, resource, fault, count))

    def next(self, verb: str, resource: str) -> Fault | None:
        """Return what is to go wrong with a request, which is then used up."""
        with self._lock:
            for planned in self._planned:
                if planned.left and planned.verb in ("*", verb) and planned.resource in ("*", resource):
                    planned.left -= 1
                    return planned.fault
        return None

    def outstanding(self) -> int:
        """Return how many faults have not happened yet."""
        with self._lock:
            return sum(planned.left for planned in self._planned)

    def forget(self) -> None:
        """Let nothing more go wrong."""
        with self._lock:
            self._planned.clear()

    def requests(self, verb: str, resource: str) -> list[Request]:
        return [request for request in self.log if (request.verb, request.resource) == (verb, resource)]
