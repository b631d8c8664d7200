"""The fast loop: dispatch weights that level the shards, for the replicas that exist.

For each layer a min-max flow as a linear programme: an expert's load is divided among its live replicas so that the
busiest shard, measured by load over speed, has as little as can be. (The fractional case of scheduling on restricted
machines: Lenstra, Shmoys and Tardos, "Approximation algorithms for scheduling unrelated parallel machines", 1990.) Of
the divisions that do so, it takes one that moves the least load away from the placement's own weights.

Shape suffixes: L MoE layers (by position in Placement.layers), E experts of a layer, F the experts whose load can be
divided, S shards (by position in Placement.shards), R the most replicas of any expert, N pairs of a divisible expert
and a live replica.
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

    Raises:
        InputError: an argument of another shape than the placement, or of unfit values.
    """
    shard_LER, weight_LER = placement.replica_table
    num_shards = len(placement.shards)
    load = _checked("a load", load_LE, shard_LER.shape[:2])
    speed = np.ones(num_shards) if speed_S is None else _checked("a speed", speed_S, (num_shards,))
    if not (speed > 0).all():
        raise InputError(f"a speed must be positive: {speed.tolist()}")
    alive = np.ones(num_shards, dtype=np.bool_) if alive_S is None else np.asarray(alive_S, dtype=np.bool_)
    if alive.shape != (num_shards,):
        raise InputError(f"which of {num_shards} shards are alive was given as shape {alive.shape}")
    live_LER = np.append(alive, False)[shard_LER]  # the last entry is for the padding, -1
    share_LER = live_shares(weight_LER, live_LER)
    share_LER[load == 0] = live_shares(live_LER[load == 0], live_LER[load == 0])
    for layer, load_E in enumerate(load):
        divisible_E = (live_LER[layer].sum(axis=-1) > 1) & (load_E > 0)
        if divisible_E.any():
            share_LER[layer, divisible_E] = _level_layer(
                load_E, shard_LER[layer], live_LER[layer], share_LER[layer], divisible_E, speed / speed[alive].mean()
            )
    num_replicas_LE = (shard_LER >= 0).sum(axis=-1)
    num_live_LE = live_LER.sum(axis=-1)
    is_even_LE = (num_replicas_LE == 1) | (num_live_LE == 0) | ((load == 0) & (num_live_LE == num_replicas_LE))
    weights_LER = _quantise(share_LER).tolist()
    return {
        ExpertKey(placement.layers[layer], expert): tuple(weights_LER[layer][expert][: num_replicas_LE[layer, expert]])
        for layer, expert in np.argwhere(~is_even_LE).tolist()
    }


def changed_weights(old: Weights, new: Weights, threshold: float) -> dict[ExpertKey, tuple[int, ...]]:
    """Return the new weights, save that an expert whose shares hardly change keeps its old ones.

    An expert without an entry is even. When no share changes by more than the threshold, the result equals old. (A dead
    replica may so keep a small weight: who dispatches leaves dead replicas out anyway.)

    Args:
        old: the weights in force.
        new: the weights wanted, for the same replicas.
        threshold: the greatest change of a replica's share of its expert, 0..1, that is left undone.

    Raises:
        InputError: a threshold outside 0..1, or old and new weights of different numbers of replicas.
    """
    if not 0 <= threshold <= 1:
        raise InputError(f"a threshold of {threshold}; a share changes by 0..1")
    kept: dict[ExpertKey, tuple[int, ...]] = {}
    for key in sorted(old.keys() | new.keys()):
        num_replicas = len(old.get(key, new.get(key, ())))
        even = (1,) * num_replicas
        before, after = old.get(key, even), new.get(key, even)
        if len(after) != num_replicas:
            raise InputError(f"expert {key} has weights {before} and then {after}")
        changes = [abs(a / sum(after) - b / sum(before)) for a, b in zip(after, before, strict=True)]
        chosen = new if max(changes) > threshold else old
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


def live_shares(weight_ER: npt.NDArray[np.generic], live_ER: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Divide each expert among its live replicas by weight, evenly if those weigh nothing; all 0 without a live one."""
    weight = np.where(live_ER, weight_ER.astype(np.float64), 0)
    weight = np.where(weight.sum(axis=-1, keepdims=True) > 0, weight, live_ER)
    shares: npt.NDArray[np.float64] = weight / np.maximum(weight.sum(axis=-1, keepdims=True), 1)
    return shares


def _level_layer(
    load_E: npt.NDArray[np.float64],
    shard_ER: npt.NDArray[np.int32],
    live_ER: npt.NDArray[np.bool_],
    share_ER: npt.NDArray[np.float64],
    divisible_E: npt.NDArray[np.bool_],
    speed_S: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Return the share_FR of the divisible experts' replicas; speed_S has mean 1 over the live shards.

    Variables: the load gained and the load lost by each pair, then z, the largest load over speed. With loads scaled to
    a mean of 1 a live shard, all of the load is the number of live shards, whence the price of a unit moved.
    """
    num_shards = len(speed_S)
    num_live = len(np.unique(shard_ER[live_ER]))
    load_E = load_E * (num_live / load_E[live_ER.any(axis=-1)].sum())
    expert_N, replica_N = np.nonzero(live_ER & divisible_E[:, None])
    shard_N = shard_ER[expert_N, replica_N]
    load_N = load_E[expert_N] * share_ER[expert_N, replica_N]
    current_S = np.bincount(shard_ER[live_ER], (load_E[:, None] * share_ER)[live_ER], num_shards)

    num_pairs = len(expert_N)
    row_N = np.unique(expert_N, return_inverse=True)[1]
    num_rows = int(divisible_E.sum())
    pair_N, one_N = np.arange(num_pairs), np.ones(num_pairs)
    by_expert = csr_array((one_N, (row_N, pair_N)), shape=(num_rows, num_pairs))
    by_shard = csr_array((one_N, (shard_N, pair_N)), shape=(num_shards, num_pairs))
    # Any: the stubs of linprog do not know that it takes sparse matrices.
    sum_of_moves: Any = hstack([by_expert, -by_expert, csr_array((num_rows, 1))], format="csr")
    above_z: Any = hstack([by_shard, -by_shard, csr_array(-speed_S[:, None])], format="csr")
    gained_bounds: list[tuple[float, float | None]] = [(0, None)] * num_pairs
    lost_bounds: list[tuple[float, float | None]] = [(0, load) for load in load_N.tolist()]
    solved = linprog(
        c=np.concatenate([np.full(num_pairs, MOVE_PRICE / num_live), np.zeros(num_pairs), [1]]),
        A_eq=sum_of_moves,
        b_eq=np.zeros(num_rows),
        A_ub=above_z,
        b_ub=-current_S,
        bounds=[*gained_bounds, *lost_bounds, (0, None)],
        method="highs",
    )
    assert solved.success, f"levelling {num_rows} experts over {num_live} shards: {solved.message}"
    assert solved.x is not None
    level_ER = np.zeros(shard_ER.shape)
    level_ER[expert_N, replica_N] = load_N + solved.x[:num_pairs] - solved.x[num_pairs:-1]
    return np.maximum(level_ER[divisible_E], 0) / load_E[divisible_E, None]


def _quantise(share_LER: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Round shares to integers that sum to EVEN_WEIGHT by largest remainder, the first replica first among equals.

    What the solver's last bits differ by is rounded away before; so a tie is a tie on every machine.
    """
    exact_LER = np.round(share_LER * EVEN_WEIGHT, 6)
    weight_LER = np.floor(exact_LER).astype(np.int64)
    missing_LE = EVEN_WEIGHT - weight_LER.sum(axis=-1)
    order_LER = np.argsort(weight_LER - exact_LER, axis=-1, kind="stable")
    rank_LER = np.argsort(order_LER, axis=-1, kind="stable")
    weight_LER += rank_LER < missing_LE[..., None]
    return weight_LER
