"""Shards that are made to fail: which, and when."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.cluster.errors import InputError

_FAULT = re.compile(r"([0-9.eE+-]+):(shard|rack)-([0-9]+)")


@dataclass(frozen=True, kw_only=True, order=True)
class Fault:
    """A shard, or all shards of a rack, that fail at a time."""

    at_s: float
    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind}-{self.number}"

    def shards(self, rack_shards: int) -> range:
        """Return the numbers of the shards that fail, with racks of so many; some of them may not exist."""
        if self.kind == "shard":
            return range(self.number, self.number + 1)
        return range(self.number * rack_shards, (self.number + 1) * rack_shards)


def read_faults(texts: Iterable[str], *, num_shards: int, rack_shards: int, duration_s: float) -> tuple[Fault, ...]:
    """Read "T:shard-3" and "T:rack-1", T in seconds, and return them in the order of time.

    Raises:
        InputError: something else, a shard or rack that is not there at the start, or a time that is not simulated.
    """
    faults = []
    for text in texts:
        found = _FAULT.fullmatch(text)
        try:
            at_s = float(found[1]) if found else math.nan
        except ValueError:
            at_s = math.nan
        if found is None or math.isnan(at_s):
            raise InputError(f"--fail {text}: it must be like 600:shard-3 or 600:rack-1, seconds first")
        if not 0 <= at_s < duration_s:
            raise InputError(f"--fail {text}: {at_s:g} s is not within the {duration_s:g} s that are simulated")
        fault = Fault(at_s=at_s, kind=found[2], number=int(found[3]))
        count = num_shards if fault.kind == "shard" else -(-num_shards // rack_shards)
        if fault.number >= count:
            raise InputError(f"--fail {text}: no {fault}; there are {fault.kind}-0 to {fault.kind}-{count - 1}")
        faults.append(fault)
    return tuple(sorted(faults))
