"""Where more shards stop paying: the same traffic on fleets of several sizes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.step_time import StepClock

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


def point(clock: StepClock, result: Result) -> Point:
    """Return what a sweep shows of a simulation."""
    steps = result.step_percentiles()
    step_s = float(np.sum(result.step_s))
    typical = int(np.median(result.tokens)) if result.tokens else 0
    balance = [sample.balancedness for sample in result.samples]
    return Point(
        shards=clock.plan.ep,
        gpus=clock.plan.num_gpus,
        step_p50_s=steps.get("p50", 0.0),
        step_p99_s=steps.get("p99", 0.0),
        tokens_per_s=result.served / result.duration_s,
        tokens_per_s_per_gpu=result.served / step_s / clock.plan.num_gpus if step_s else 0.0,
        balancedness=float(np.mean(balance)) if balance else 1.0,
        moves=sum(event.num_experts for event in result.copied if event.kind != "failure"),
        slots=result.slots,
        short_of_bytes=clock.short_of_bytes(clock.plan.ep, result.slots, typical),
        tokens_left=result.left,
    )


def gain_per_doubling(before: Point, after: Point) -> float:
    """Return by which part the median step is shorter for each doubling of the shards; negative where it is longer."""
    ratio = after.step_p50_s / max(before.step_p50_s, 1e-300)
    return 1 - float(ratio ** (1 / math.log2(after.shards / before.shards)))


def knee(points: Sequence[Point]) -> Point:
    """Return the last fleet before more shards stop paying, by KNEE; points rise in shards, at least one."""
    for before, after in pairwise(points):
        if gain_per_doubling(before, after) < KNEE:
            return before
    return points[-1]
