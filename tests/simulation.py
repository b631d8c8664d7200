"""Small fleets in virtual time, whose sums are done by hand.

Shape suffixes: L MoE layers, E experts of a layer.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.simulator import simulate
from expertmesh.cluster.simulation.step_time import StepClock
from expertmesh.cluster.simulation.traffic import Interval
from tests.planner import machine, small_shape, tier

LAYERS = (0, 1, 2, 3)
NUM_EXPERTS = 16
QUIET: dict[str, Any] = {"weights_period_s": 0.0, "rebalance_period_s": 0.0}


def plan(num_shards: int, **changes: int) -> Plan:
    values = {"attention_tp": 1, "attention_dp": num_shards, "ep": num_shards, "expert_tp": 1, **changes}
    return Plan(**values)


def small_clock(num_shards: int = 4, *, overlap: float = 0.0, num_gpus: int = 64, **changes: Any) -> StepClock:
    hardware = machine(tier(domain_size=64), num_gpus=num_gpus, **changes)
    workload = Workload(context=64, overlap=overlap)
    return StepClock(small_shape(), hardware, plan(num_shards), workload, find_format("bf16"))


def even_load(tokens: int) -> npt.NDArray[np.float64]:
    return np.full((len(LAYERS), NUM_EXPERTS), tokens * 2 / NUM_EXPERTS)


def hot_load(tokens: int, hot: int = 0) -> npt.NDArray[np.float64]:
    """Every token chooses one expert of each layer, and another one evenly."""
    load_LE = np.full((len(LAYERS), NUM_EXPERTS), tokens / (NUM_EXPERTS - 1))
    load_LE[:, hot] = tokens
    return load_LE


def intervals(load_LE: npt.NDArray[np.float64], tokens: int, num: int, length_s: float = 1.0) -> Iterator[Interval]:
    for number in range(num):
        begin_s = number * length_s
        yield Interval(begin_s=begin_s, end_s=begin_s + length_s, tokens=tokens, load_LE=load_LE)


def run(
    made: Iterator[Interval] | Sequence[Interval], duration_s: float, clock: StepClock | None = None, **changes: Any
) -> Result:
    extra = {name: changes.pop(name) for name in ("faults", "seed") if name in changes}
    settings = SimulationSettings(**changes)
    return simulate(clock or small_clock(), LAYERS, made, settings, duration_s=duration_s, **extra)
