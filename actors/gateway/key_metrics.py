"""What is counted of each API key: requests by how they ended, and tokens. As many series as the file has keys."""

from collections import Counter
from collections.abc import Sequence, Set

from expertmesh.actors.gateway.callers import ANONYMOUS
from expertmesh.actors.metrics import Metrics

KINDS = ("prompt", "output")


class KeyCounts:
    """The counts of one gateway."""

    def __init__(self, codes: Sequence[str]) -> None:
        """Count nothing yet; codes: the gRPC statuses by which requests end, shown from the start."""
        self._codes = codes
        self._requests: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._changed: set[tuple[str, str]] = set()
        self._names: set[str] = set()
        self._show(ANONYMOUS)

    def follow(self, names: Set[str]) -> set[str]:
        """Show these keys too, from 0 on; return those that are gone."""
        gone, self._names = self._names - names, set(names)
        for name in names:
            self._show(name)
        return gone

    def request_ended(self, name: str, code: str) -> None:
        """Count a request by the name of its gRPC status."""
        self._requests[name, code] += 1
        self._changed.add((name, code))

    def served(self, name: str, kind: str, num_tokens: int) -> None:
        """Count tokens."""
        self._tokens[name, kind] += num_tokens
        self._changed.add((name, kind))

    def report(self, metrics: Metrics) -> None:
        """Hand on what is new: of many keys few change in a moment."""
        changed, self._changed = self._changed, set()
        for name, what in changed:
            if what in KINDS:
                metrics.count("expertmesh_key_tokens_total", self._tokens[name, what], key=name, kind=what)
            else:
                metrics.count("expertmesh_key_requests_total", self._requests[name, what], key=name, code=what)

    def _show(self, name: str) -> None:
        self._changed.update((name, what) for what in (*self._codes, *KINDS))
