"""Which experts of each layer are asked for most.

Shape suffixes: L MoE layers, E experts of a layer, K of the hottest.
"""

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError


def hottest_LK(  # noqa: N802
    load_LE: npt.NDArray[np.float64], count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the experts with the largest loads of each layer, the hottest first, of equals the first.

    Args:
        load_LE: non-negative load of each expert, in any unit.
        count: how many of each layer; all where a layer has fewer.

    Returns:
        Their indices, and their loads over the mean of their layer (0 where the layer has no load); both [L, K].

    Raises:
        InputError: count is negative.
    """
    if count < 0:
        raise InputError(f"the {count} hottest experts were asked for")
    index_LK = np.argsort(-load_LE, axis=1, kind="stable")[:, :count].astype(np.int64)
    mean_L1 = load_LE.mean(axis=1, keepdims=True)
    ratio_LK = np.take_along_axis(load_LE, index_LK, axis=1) / np.where(mean_L1 > 0, mean_L1, 1.0)
    return index_LK, ratio_LK
