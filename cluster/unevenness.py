"""Which layers new dispatch weights would help: those whose busiest shard has more than it must and than chance has it.

Levelling solves a programme for each layer (dispatch_weights.py), which takes tens of milliseconds for a thousand
shards; and weights that follow chance change which replica computes what, for nothing.

Shape suffixes: L MoE layers, S shards, N replicas of one layer.
"""

import math

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.balance import shard_load_LS
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement

# A busiest shard within this of the least possible is left alone.
LEVEL_ENOUGH = 0.01


def uneven_layers(load_LE: npt.NDArray[np.int64], placement: Placement) -> npt.NDArray[np.bool_]:
    """Return for each layer whether its busiest shard has noticeably more than the least that weights could give it.

    Not noticed are a hundredth, the rounding of its weights, and what chance makes of counted tokens: of S shards that
    expect m tokens each the busiest is likely to count m + sqrt(2 m ln S), as counts scatter by sqrt(m) and the largest
    of S normal numbers is expected to be at most sqrt(2 ln S) (Boucheron, Lugosi and Massart, "Concentration
    Inequalities", 2013, section 2.5).

    Args:
        load_LE: counted tokens of each expert.
        placement: the replicas and the weights in force.

    Raises:
        InputError, NoReplicaError: see `shard_load_LS`.
    """
    load_LS = shard_load_LS(load_LE, placement)
    row_N, shard_N, weight_N = placement.replica_pairs
    begin_L = np.searchsorted(row_N, np.arange(len(load_LE) + 1) * placement.num_experts).tolist()
    load_N = np.asarray(load_LE).ravel()[row_N]
    uneven_L = np.zeros(len(load_LE), dtype=np.bool_)
    for layer, load_S in enumerate(load_LS):
        part = slice(begin_L[layer], begin_L[layer + 1])
        busiest = int(load_S.argmax())
        rounding = float(load_N[part][shard_N[part] == busiest].sum()) / EVEN_WEIGHT
        # The mean of all shards is never above that of those that can help, and often tells enough.
        if load_S[busiest] > _noticed(float(load_S.mean()), len(load_S)) + rounding:
            helpers_S = _can_help_S(busiest, row_N[part], shard_N[part], load_N[part] * weight_N[part] > 0, len(load_S))
            least = float(load_S[helpers_S].mean())
            uneven_L[layer] = load_S[busiest] > _noticed(least, int(helpers_S.sum())) + rounding
    return uneven_L


def _noticed(mean: float, num_shards: int) -> float:
    return mean * (1 + LEVEL_ENOUGH) + math.sqrt(2 * mean * math.log(num_shards))


def _can_help_S(  # noqa: N802
    busiest: int,
    row_N: npt.NDArray[np.int64],
    shard_N: npt.NDArray[np.int64],
    computes_N: npt.NDArray[np.bool_],
    num_shards: int,
) -> npt.NDArray[np.bool_]:
    """Return the shards that load of the busiest can come to, from shard to shard, itself among them.

    All that they compute is of experts that live on them alone, so weights cannot bring their largest below their mean.
    """
    expert_N = row_N - row_N[0]
    reached_S, num_reached = np.zeros(num_shards, dtype=np.bool_), 0
    reached_S[busiest] = True
    while num_reached < (num_reached := int(reached_S.sum())):
        reached_E = np.zeros(int(expert_N[-1]) + 1, dtype=np.bool_)
        reached_E[expert_N[computes_N & reached_S[shard_N]]] = True
        reached_S[shard_N[reached_E[expert_N]]] = True
    return reached_S
