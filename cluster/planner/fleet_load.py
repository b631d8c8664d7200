"""How long a fleet's shards compute one layer: what each has to do, and how they share cores.

E experts, S shards, D draws of routing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import initial_placement
from expertmesh.cluster.planner.skew import inclusion_probabilities

_MOST_DRAWS, _LEAST_DRAWS, _CHOICES = 32, 4, 1 << 21
_SEED = 20240613

Counts = npt.NDArray[np.int64]


@lru_cache(maxsize=256)
def shard_rows(
    num_experts: int, top_k: int, expert_tp: int, num_shards: int, tokens: int, skew: float
) -> tuple[tuple[Counts, ...], ...]:
    """Draw a layer's routing and return, of each draw and shard, the rows of each (slice of an) expert that has any.

    Slices lie where `placement.initial_placement` puts them, in a layer of its own for each draw. A token chooses
    top_k different experts (the largest of exponential keys, which is drawing without replacement by weight; Efraimidis
    and Spirakis, "Weighted random sampling with a reservoir", 2006). Seeded: the same question has the same answer.
    """
    rng = np.random.default_rng(_SEED)
    weight_E = inclusion_probabilities(num_experts, top_k, skew)
    draws = int(np.clip(_CHOICES // (tokens * num_experts), _LEAST_DRAWS, _MOST_DRAWS))
    shards = [ShardId(f"shard-{index}") for index in range(num_shards)]
    placement = initial_placement(range(draws), num_experts * expert_tp, shards, 1)
    found = []
    for draw in range(draws):
        keys_TE = rng.standard_exponential((tokens, num_experts)) / rng.permutation(weight_E)
        chosen_TK = np.argpartition(keys_TE, top_k - 1, axis=1)[:, :top_k]
        rows_E = np.bincount(chosen_TK.ravel(), minlength=num_experts)
        here_S = [[key.expert // expert_tp for key in slots.experts if key.layer == draw] for slots in placement.shards]
        found.append(tuple(rows[rows > 0] for rows in (rows_E[here] for here in here_S)))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardWork:
    """One shard's part of a layer, in seconds of one core.

    busy_s: while all cores read memory. lone_s: while it alone does. most_cores: that it can use at once.
    """

    busy_s: float
    lone_s: float
    most_cores: float


def finish_s(works: Sequence[ShardWork], num_cores: float, lone_gain: float) -> float:
    """Return when the last of shards that begin together on shared cores is done.

    Cores are divided evenly among the shards that still compute, none getting more than it can use (processor sharing).
    A core that reads while others idle is faster, by lone_gain at most, until together they read all that memory gives.

    Args:
        works: of the shards, those without any left out.
        num_cores: that they share.
        lone_gain: reading rate of a core alone over its rate while all read.
    """
    left = [1.0] * len(works)  # parts that are still to be done
    clock_s = 0.0
    while active := [index for index, part in enumerate(left) if part > 0]:
        cores = {index: min(works[index].most_cores, num_cores / len(active)) for index in active}
        ease = _ease(sum(cores.values()), num_cores, lone_gain)
        rate = {
            index: cores[index] / (works[index].lone_s * ease + works[index].busy_s * (1 - ease)) for index in active
        }
        first = min(active, key=lambda index: left[index] / rate[index])
        passed_s = left[first] / rate[first]
        clock_s += passed_s
        for index in active:
            left[index] = 0.0 if index == first else max(0.0, left[index] - passed_s * rate[index])
    return clock_s


def _ease(busy_cores: float, num_cores: float, lone_gain: float) -> float:
    """Return how far a core is between reading as while all do (0) and as alone (1), in seconds a byte."""
    if lone_gain <= 1:
        return 0.0
    gain = min(lone_gain, num_cores / busy_cores)
    return (1 - 1 / gain) / (1 - 1 / lone_gain)
