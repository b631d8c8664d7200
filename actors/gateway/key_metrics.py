"""What is counted of each API key: requests by how they ended, and tokens. As many series as the file has keys."""

from collections import Counter
from collections.abc import Sequence, Set

from expertmesh.actors.gateway.callers import ANONYMOUS
from expertmesh.actors.metrics import Metrics


class KeyCounts:
    """The counts of one gateway."""

    def __init__(self, codes: Sequence[str]) -> None:
        """Count nothing yet; codes: the gRPC statuses by which requests end, shown from the start."""
        self._codes = codes
        self._requests: Counter[tuple[str, str]] = Counter()
        self._prompt: Counter[str] = Counter()
        self._output: Counter[str] = Counter()
        self._ended: set[tuple[str, str]] = set()
        self._served: set[str] = set()
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
        self._ended.add((name, code))

    def prompt(self, name: str, num_tokens: int) -> None:
        """Count tokens of a prompt."""
        self._prompt[name] += num_tokens
        self._served.add(name)

    def output(self, name: str, num_tokens: int) -> None:
        """Count tokens of output."""
        self._output[name] += num_tokens
        self._served.add(name)

    def report(self, metrics: Metrics) -> None:
        """Hand on what is new: of many keys few change in a moment."""
        ended, self._ended = self._ended, set()
        for name, code in ended:
            metrics.count("expertmesh_key_requests_total", self._requests[name, code], key=name, code=code)
        served, self._served = self._served, set()
        for name in served:
            for kind, counts in (("prompt", self._prompt), ("output", self._output)):
                metrics.count("expertmesh_key_tokens_total", counts[name], key=name, kind=kind)

    def _show(self, name: str) -> None:
        self._ended.update((name, code) for code in self._codes)
        self._served.add(name)
