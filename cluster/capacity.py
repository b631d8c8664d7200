"""Which pairs of tokens and experts are left out where an expert may take only so many of a step.

Shape suffixes: T tokens, K choices a token, E experts, N pairs.
"""

import math

import numpy as np
import numpy.typing as npt


def expert_capacity(capacity_factor: float, num_pairs: int, num_experts: int) -> int:
    """Return how many of a step's pairs one expert of a layer takes: an even share times the factor, rounded up.

    Source: Switch Transformer (Fedus et al. 2021), section 2.2, with every choice of a token counted.
    """
    return math.ceil(capacity_factor * num_pairs / num_experts)


def kept_pairs(
    ids_TK: npt.NDArray[np.int64], weights_TK: npt.NDArray[np.float32], num_experts: int, capacity_factor: float
) -> npt.NDArray[np.bool_]:
    """Say which pairs are kept: of each expert those of the highest router's weight, up to its capacity.

    Of equal weights those of earlier tokens, and of a token's earlier choices, are kept. Nothing else decides: equal
    arguments give equal answers.

    Args:
        ids_TK: the experts that a step's tokens chose in one layer, each 0 to num_experts - 1.
        weights_TK: the router's weights.
        num_experts: of the layer.
        capacity_factor: above 0.

    Returns:
        [T, K]; False: the pair is dropped.
    """
    capacity = expert_capacity(capacity_factor, ids_TK.size, num_experts)
    id_N = ids_TK.ravel()
    load_E = np.bincount(id_N, minlength=num_experts)
    kept_N = np.ones(id_N.shape, dtype=np.bool_)
    if load_E.max(initial=0) > capacity:
        order_N = np.lexsort((-weights_TK.ravel(), id_N))  # stable: ties stay in the order of positions
        rank_N = np.arange(len(id_N)) - (np.cumsum(load_E) - load_E)[id_N[order_N]]
        kept_N[order_N] = rank_N < capacity
    return kept_N.reshape(ids_TK.shape)
