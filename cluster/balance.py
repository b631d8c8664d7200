"""How evenly a placement spreads a load over the shards.

Shape suffixes: L MoE layers (by position in Placement.layers), E experts of a layer, S shards (by position in
Placement.shards), N replicas of all experts.
"""

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError, NoReplicaError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.placement import Placement


def shard_load_LS(load_LE: npt.ArrayLike, placement: Placement) -> npt.NDArray[np.float64]:  # noqa: N802
    """Return the load of each shard when replicas share their expert's load by their dispatch weights.

    Args:
        load_LE: non-negative load of each expert, in any unit (tokens, as a rule); the result is in the same.
        placement: the replicas and weights.

    Raises:
        InputError: load_LE has another shape than the placement, or values that are negative or not finite.
        NoReplicaError: an expert with load has no replica.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    num_layers, num_experts, num_shards = len(placement.layers), placement.num_experts, len(placement.shards)
    if load.shape != (num_layers, num_experts):
        raise InputError(f"a load of shape {load.shape} for {num_layers} layers of {num_experts} experts")
    if not (np.isfinite(load) & (load >= 0)).all():
        raise InputError("a load must be finite and not negative")
    row_N, shard_N, weight_N = placement.replica_pairs
    total_LE = np.bincount(row_N, weight_N, load.size).reshape(load.shape)
    lost = np.argwhere((load > 0) & (total_LE == 0))
    if len(lost):
        layer, expert = lost[0].tolist()
        raise NoReplicaError(f"expert {ExpertKey(placement.layers[layer], expert)} has load and no replica")
    load_N = weight_N * (load / np.maximum(total_LE, 1)).ravel()[row_N]
    position_N = row_N // num_experts * num_shards + shard_N
    sums: npt.NDArray[np.float64] = np.bincount(position_N, load_N, num_layers * num_shards).astype(np.float64)
    return sums.reshape(num_layers, num_shards)


def balancedness(load_LS: npt.ArrayLike) -> float:
    """Return the sum over layers of the mean shard load, divided by the sum over layers of the largest: 1 is perfect.

    Layers run one after the other, and each waits for its slowest shard, so this is the fraction of shard time in use.
    No load at all counts as perfect.

    Args:
        load_LS: non-negative load of each shard, as counted or from `shard_load_LS`.

    Raises:
        InputError: load_LS is not a matrix with at least one shard.
    """
    load = np.asarray(load_LS, dtype=np.float64)
    if load.ndim != 2 or load.shape[1] == 0:
        raise InputError(f"balancedness of a load of shape {load.shape}; it must be layers by shards")
    largest = float(load.max(axis=1).sum())
    return float(load.mean(axis=1).sum()) / largest if largest > 0 else 1.0
