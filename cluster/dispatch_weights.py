"""The fast loop: dispatch weights that level the shards, for the replicas that exist.

For each layer a min-max flow as a linear programme: an expert's load is divided among its live replicas so that the
busiest shard, measured by load over speed, has as little as can be. (The fractional case of scheduling on restricted
machines: Lenstra, Shmoys and Tardos, "Approximation algorithms for scheduling unrelated parallel machines", 1990.) Of
the divisions that do so, it takes one that moves the least load away from the placement's own weights.

Shape suffixes: L MoE layers (by position in Placement.layers), E experts of a layer, S shards (by position in
Placement.shards), N replicas of all experts (as in Placement.replica_pairs; in a layer, its own), D those that can be
given more or less: live ones of experts with load and another live replica, R replicas of one expert.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement

Weights = Mapping[ExpertKey, tuple[int, ...]]

# Moving all load costs as much as a busiest shard that is busier by this fraction of the mean: a tie-break, no more.
MOVE_PRICE = 1e-3


def level_weights(
    load_LE: npt.ArrayLike,
    placement: Placement,
    *,
    speed_S: npt.ArrayLike | None = None,
    alive_S: npt.ArrayLike | None = None,
    only_L: npt.ArrayLike | None = None,
) -> dict[ExpertKey, tuple[int, ...]]:
    """Return dispatch weights that level load over speed, as Placement.weights takes them, sorted by layer and expert.

    The weights of an expert sum to EVEN_WEIGHT, and a dead replica's is 0. An expert without an entry is even: it has
    one replica, or no load in the window and no dead replica, or no live replica at all (its load is left out here,
    and whoever dispatches to it finds NoReplicaError). The busiest shard of a layer is within MOVE_PRICE of the least
    possible, before the rounding of each weight by less than 1 / EVEN_WEIGHT.

    Args:
        load_LE: non-negative load of each expert, in any unit (tokens, as a rule).
        placement: the replicas; its weights are the current ones, near which the new ones stay.
        speed_S: positive load that each shard does in a unit of time; None: all the same.
        alive_S: bool, the shards that may have weight; None: all.
        only_L: bool, the layers to level; the others keep their weights as they are. None: all.

    Raises:
        InputError: an argument of another shape than the placement, or of unfit values.
    """
    num_layers, num_experts, num_shards = len(placement.layers), placement.num_experts, len(placement.shards)
    load = _checked("a load", load_LE, (num_layers, num_experts))
    speed = np.ones(num_shards) if speed_S is None else _checked("a speed", speed_S, (num_shards,))
    if not (speed > 0).all():
        raise InputError(f"a speed must be positive: {speed.tolist()}")
    alive = _checked_flags("shards are alive", alive_S, num_shards)
    only = _checked_flags("layers are to be levelled", only_L, num_layers)
    row_N, shard_N, weight_N = placement.replica_pairs
    load_N, live_N = load.ravel()[row_N], alive[shard_N]
    share_N = live_shares(np.where(load_N > 0, weight_N, 1), live_N, row_N, load.size)
    num_live_N = np.bincount(row_N, live_N, load.size)[row_N]
    may_divide_N = live_N & (num_live_N > 1) & (load_N > 0)
    begin_L = np.searchsorted(row_N, np.arange(num_layers + 1) * num_experts).tolist()
    for layer in np.flatnonzero(only).tolist():
        part = slice(begin_L[layer], begin_L[layer + 1])
        if may_divide_N[part].any():
            share_N[part] = _level_layer(
                load_N[part], row_N[part], shard_N[part], share_N[part], may_divide_N[part], speed / speed[alive].mean()
            )
    levelled_layers = {placement.layers[layer] for layer in np.flatnonzero(only).tolist()}
    kept = {key: weights for key, weights in placement.weights.items() if key.layer not in levelled_layers}
    is_even_N = (num_live_N == 0) | ((load_N == 0) & (num_live_N == np.bincount(row_N, minlength=load.size)[row_N]))
    may_N = ~is_even_N & only[row_N // num_experts] & (np.bincount(row_N, minlength=load.size)[row_N] > 1)
    levelled = _as_weights(row_N[may_N], _quantise(share_N, row_N)[may_N], placement)
    return dict(sorted((kept | levelled).items())) if kept else levelled


def changed_weights(old: Weights, new: Weights, threshold: float) -> dict[ExpertKey, tuple[int, ...]]:
    """Return the new weights, save that an expert whose shares hardly change keeps its old ones.

    An expert without an entry is even. When no share changes by more than the threshold, the result equals old. (A dead
    replica may so keep a small weight: who dispatches leaves dead replicas out anyway.)

    Args:
        old: the weights in force.
        new: the weights wanted, for the same replicas.
        threshold: the greatest change that is left undone, as a part of the even share of a replica, 0 or more.

    Raises:
        InputError: a negative threshold, or old and new weights of different numbers of replicas.
    """
    if not threshold >= 0:
        raise InputError(f"a threshold of {threshold}; it cannot be below 0")
    kept: dict[ExpertKey, tuple[int, ...]] = {}
    for key in sorted(old.keys() | new.keys()):
        if key in old and old[key] == new.get(key):
            kept[key] = old[key]
            continue
        num_replicas = len(old.get(key, new.get(key, ())))
        even = (1,) * num_replicas
        before, after = old.get(key, even), new.get(key, even)
        if len(after) != num_replicas:
            raise InputError(f"expert {key} has weights {before} and then {after}")
        changes = [abs(a / sum(after) - b / sum(before)) for a, b in zip(after, before, strict=True)]
        chosen = new if max(changes) * num_replicas > threshold else old
        if key in chosen:
            kept[key] = chosen[key]
    return kept


def _checked(what: str, values: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != shape:
        raise InputError(f"{what} of shape {array.shape}; the placement needs {shape}")
    if not (np.isfinite(array) & (array >= 0)).all():
        raise InputError(f"{what} must be finite and not negative")
    return array


def _checked_flags(what: str, values: npt.ArrayLike | None, count: int) -> npt.NDArray[np.bool_]:
    flags = np.ones(count, dtype=np.bool_) if values is None else np.asarray(values, dtype=np.bool_)
    if flags.shape != (count,):
        raise InputError(f"which of {count} {what} was given as shape {flags.shape}")
    return flags


def live_shares(
    weight_N: npt.NDArray[np.int64], live_N: npt.NDArray[np.bool_], row_N: npt.NDArray[np.int64], num_rows: int
) -> npt.NDArray[np.float64]:
    """Divide each expert among its live replicas by weight, evenly if those weigh nothing; all 0 without a live one."""
    weight = np.where(live_N, weight_N.astype(np.float64), 0.0)
    weight = np.where(np.bincount(row_N, weight, num_rows)[row_N] > 0, weight, live_N)
    shares: npt.NDArray[np.float64] = weight / np.maximum(np.bincount(row_N, weight, num_rows), 1)[row_N]
    return shares


def _level_layer(
    load_N: npt.NDArray[np.float64],
    row_N: npt.NDArray[np.int64],
    shard_N: npt.NDArray[np.int64],
    share_N: npt.NDArray[np.float64],
    may_divide_N: npt.NDArray[np.bool_],
    speed_S: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the shares of a layer's replicas; load_N is of their experts, speed_S has mean 1 over the live shards.

    Variables: the load gained and the load lost by each replica, then z, the largest load over speed. With loads scaled
    to a mean of 1 a live shard, all of the load is the number of live shards, whence the price of a unit moved.
    """
    num_shards, num_live = len(speed_S), len(np.unique(shard_N[may_divide_N | (share_N > 0)]))
    part_N = load_N * share_N
    scale = num_live / part_N.sum()
    current_S = np.bincount(shard_N, part_N * scale, num_shards)
    load_D, part_D, shard_D = load_N[may_divide_N] * scale, part_N[may_divide_N] * scale, shard_N[may_divide_N]
    expert_D = np.unique(row_N[may_divide_N], return_inverse=True)[1]
    num_pairs, num_rows = len(expert_D), int(expert_D.max()) + 1
    pair_D, one_D = np.arange(num_pairs), np.ones(num_pairs)
    by_expert = csr_array((one_D, (expert_D, pair_D)), shape=(num_rows, num_pairs))
    by_shard = csr_array((one_D, (shard_D, pair_D)), shape=(num_shards, num_pairs))
    # Any: the stubs of linprog do not know that it takes sparse matrices, and bounds as an array.
    sum_of_moves: Any = hstack([by_expert, -by_expert, csr_array((num_rows, 1))], format="csr")
    above_z: Any = hstack([by_shard, -by_shard, csr_array(-speed_S[:, None])], format="csr")
    most = np.concatenate([np.full(num_pairs, np.inf), part_D, [np.inf]])
    bounds: Any = np.stack([np.zeros(len(most)), most], axis=1)
    solved = linprog(
        c=np.concatenate([np.full(num_pairs, MOVE_PRICE / num_live), np.zeros(num_pairs), [1]]),
        A_eq=sum_of_moves,
        b_eq=np.zeros(num_rows),
        A_ub=above_z,
        b_ub=-current_S,
        bounds=bounds,
        method="highs",
    )
    assert solved.success, f"levelling {num_rows} experts over {num_live} shards: {solved.message}"
    assert solved.x is not None
    level_N = share_N.copy()
    level_N[may_divide_N] = np.maximum(part_D + solved.x[:num_pairs] - solved.x[num_pairs:-1], 0) / load_D
    return level_N


def _quantise(share_N: npt.NDArray[np.float64], row_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Round shares to integers that sum to EVEN_WEIGHT by largest remainder, the first replica first among equals.

    What the solver's last bits differ by is rounded away before; so a tie is a tie on every machine.
    """
    exact_N = np.round(share_N * EVEN_WEIGHT, 6)
    weight_N = np.floor(exact_N).astype(np.int64)
    begin_N = np.searchsorted(row_N, row_N)
    missing_N = EVEN_WEIGHT - np.bincount(begin_N, weight_N, len(row_N))[begin_N]
    order_N = np.lexsort((weight_N - exact_N, row_N))
    weight_N[order_N] += np.arange(len(row_N)) - begin_N < missing_N[order_N]
    return weight_N


def _as_weights(
    row_N: npt.NDArray[np.int64], weight_N: npt.NDArray[np.int64], placement: Placement
) -> dict[ExpertKey, tuple[int, ...]]:
    """Return weights by expert; row_N rises."""
    weights_of: dict[int, list[int]] = {}
    for row, weight in zip(row_N.tolist(), weight_N.tolist(), strict=True):
        weights_of.setdefault(row, []).append(weight)
    keys = (
        (ExpertKey(placement.layers[row // placement.num_experts], row % placement.num_experts), row)
        for row in weights_of
    )
    return {key: tuple(weights_of[row]) for key, row in keys}
