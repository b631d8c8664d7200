"""Where more shards stop paying: the same traffic on fleets of several sizes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

KNEE = 0.1  # a doubling of the shards that shortens the step by less than this does not pay


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A fleet of the sweep. tokens_per_s_per_gpu: those of steps, waiting between them not counted."""

    shards: int
    gpus: int
    step_p50_s: float
    step_p99_s: float
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    balancedness: float
    moves: int
    slots: int
    short_of_bytes: float
    tokens_left: int

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return asdict(self)


def gain_per_doubling(before: Point, after: Point) -> float:
    """Return by which part the median step is shorter for each doubling of the shards; negative where it is longer."""
    return 1 - (after.step_p50_s / before.step_p50_s) ** (1 / math.log2(after.shards / before.shards))


def knee(points: Sequence[Point]) -> Point:
    """Return the last fleet before more shards stop paying, by KNEE; points rise in shards, at least one."""
    for before, after in pairwise(points):
        if gain_per_doubling(before, after) < KNEE:
            return before
    return points[-1]
