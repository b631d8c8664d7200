"""The slowest rank: how many rows and experts the busiest group has when experts are chosen unequally.

E experts, G groups, D draws.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_DRAWS = 24  # of routing and placement; the mean of their maxima is good to some 3 %
_SEED = 20240613


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLoad:
    """One layer's load of a group of experts: rows are (token, expert) pairs, active_experts those that have any.

    busiest_* is of the slowest group, mean_rows of all. The simulator and measurements fill it from real counts.
    """

    mean_rows: float
    busiest_rows: float
    busiest_active_experts: float

    @property
    def imbalance(self) -> float:
        """Rows of the busiest over the mean: 1 is perfect."""
        return self.busiest_rows / self.mean_rows if self.mean_rows else 1.0


def inclusion_probabilities(num_experts: int, top_k: int, skew: float) -> Floats:
    """Return for each expert, hottest first, how likely a token chooses it; they sum up to top_k.

    Proportional to Zipf's law, rank**-skew, but never above 1: what an expert cannot take goes to the others.
    """
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -skew
    chosen = np.zeros(num_experts)
    for certain in range(top_k + 1):
        rest = weights[certain:]
        chosen = np.concatenate([np.ones(certain), (top_k - certain) * rest / rest.sum()])
        if certain == top_k or chosen[certain] <= 1:
            break
    return chosen


@lru_cache(maxsize=8192)
def slowest_rank(num_experts: int, top_k: int, num_groups: int, tokens: int, skew: float, replicas: int) -> RankLoad:
    """Return the expected load of the busiest of num_groups groups.

    Experts' rows are drawn as binomials of their probabilities (choices of one token not excluding each other), so
    small batches are unbalanced even where routing is uniform. Without replicas experts lie on groups at random, as the
    checkpoint's order is. With replicas the hottest are copied, split evenly, and all packed by load (the greedy
    heuristic of EPLB). The draws are seeded: the same question has the same answer.

    Args:
        num_experts: of a layer.
        top_k: experts of a token.
        num_groups: equal groups of experts.
        tokens: of the layer.
        skew: exponent of Zipf's law.
        replicas: slots for replicas of each group.
    """
    rng = np.random.default_rng(_SEED)
    chosen_E = inclusion_probabilities(num_experts, top_k, skew)
    rows_DE = rng.binomial(tokens, chosen_E, size=(_DRAWS, num_experts)).astype(np.float64)
    if replicas:
        rows_DGS = _packed(rows_DE, chosen_E, num_groups, replicas)
    else:
        order_DE = rng.permuted(np.tile(np.arange(num_experts), (_DRAWS, 1)), axis=1)
        rows_DGS = np.take_along_axis(rows_DE, order_DE, axis=1).reshape(_DRAWS, num_groups, -1)
    return RankLoad(
        mean_rows=tokens * top_k / num_groups,
        busiest_rows=float(rows_DGS.sum(axis=2).max(axis=1).mean()),
        busiest_active_experts=float(np.minimum(rows_DGS, 1).sum(axis=2).max(axis=1).mean()),
    )


def _packed(rows_DE: Floats, chosen_E: Floats, num_groups: int, replicas: int) -> Floats:
    """Return the rows of each slot of each group (D, G, S), replicas sharing their expert's rows evenly."""
    num_experts = len(chosen_E)
    num_slots = num_experts // num_groups + replicas
    copies_E = np.ones(num_experts, dtype=np.int64)
    hottest = [(-chosen, expert) for expert, chosen in enumerate(chosen_E)]
    heapq.heapify(hottest)
    for _ in range(replicas * num_groups):
        _, expert = hottest[0]
        copies_E[expert] += 1
        heapq.heapreplace(hottest, (-chosen_E[expert] / copies_E[expert], expert))
    share_E = chosen_E / copies_E
    instances = np.repeat(np.arange(num_experts), copies_E)
    groups = [(0.0, group) for group in range(num_groups)]
    placed: list[list[int]] = [[] for _ in range(num_groups)]
    for expert in sorted(instances.tolist(), key=lambda e: -share_E[e]):
        load, group = heapq.heappop(groups)
        placed[group].append(expert)
        if len(placed[group]) < num_slots:
            heapq.heappush(groups, (load + share_E[expert], group))
    slots_GS = np.array(placed)
    shared: Floats = rows_DE[:, slots_GS] / copies_E[slots_GS]
    return shared
