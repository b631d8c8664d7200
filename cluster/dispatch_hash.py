"""Which replica of an expert computes a token: weighted rendezvous hashing, the same to the bit at every worker.

Each live replica draws a number from an exponential distribution with its weight as rate, by hashing the token's key
with the shard's identity and the layer; the smallest wins. So the shares are proportional to the weights, a changed
weight or a dead shard moves only tokens to or from that replica, and a token's experts with the same replicas go to one
shard.

Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates" (1998), for rendezvous hashing;
Schindelhauer and Schomaker, "Weighted distributed hash tables" (2005), for weights by -ln(u) / w.

Shape suffixes: T tokens, K experts chosen for a token, E experts of the layer, R the most replicas of any expert,
S shards (by position in Placement.shards).
"""

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError, NoReplicaError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.placement import Placement

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# 1 / the rate of a replica of weight 0: it loses to any other live one, save about once in 1e12 tokens.
_IDLE = 2.0**40


def identity_hash(text: str) -> int:
    """Return the start of a name's BLAKE2b digest: 64 bits that stand for a request or a shard in every process."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def token_keys(request_hash_T: npt.NDArray[np.uint64], position_T: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """Return the key of each token: output number `position` of a SplitMix64 generator seeded with its request's hash.

    Args:
        request_hash_T: uint64, `identity_hash` of each token's request id.
        position_T: non-negative integers, the token's position in its sequence.
    """
    steps_T = np.asarray(position_T).astype(np.uint64) + np.uint64(1)
    return _mix(request_hash_T + steps_T * _GOLDEN_GAMMA)


class DispatchTable:
    """The replicas of one layer's experts, laid out for `choose_shards`. Build it once for each epoch and layer.

    shard_ER: int32, the shard of each replica as its position in Placement.shards; -1 is padding.
    weight_ER: int64, its dispatch weight; 0 in the padding.
    """

    def __init__(self, placement: Placement, layer: int) -> None:
        if layer not in placement.layers:
            raise InputError(f"layer {layer} is not among the placement's layers {placement.layers}")
        position = placement.layers.index(layer)
        self.layer = layer
        self.shard_ER = placement.replica_table.shard_LER[position]
        self.weight_ER = placement.replica_table.weight_LER[position]
        self.is_complete = bool((self.shard_ER[:, 0] >= 0).all())
        layer_hash = _mix(np.array([layer], dtype=np.uint64) + _GOLDEN_GAMMA)
        identity_S = np.array([identity_hash(slots.shard) for slots in placement.shards] + [0], dtype=np.uint64)
        # Replicas before experts: choose_shards then works on contiguous rows. The entry for padding is the last.
        self._shard_RE = np.ascontiguousarray(self.shard_ER.T)
        self._salt_RE = _mix(identity_S ^ layer_hash)[self._shard_RE]
        self._scale_RE = np.where(self._shard_RE >= 0, 1 / np.maximum(self.weight_ER.T, 1 / _IDLE), np.inf)

    def choose(
        self, topk_ids_TK: npt.NDArray[np.integer], token_keys_T: npt.NDArray[np.uint64], alive_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int32]:
        """Do the work of `choose_shards`, whose text describes it."""
        all_alive = self.is_complete and bool(alive_S.all())
        if all_alive and len(self._shard_RE) == 1:
            only_TK: npt.NDArray[np.int32] = self._shard_RE[0].take(topk_ids_TK)
            return only_TK
        scale_RE = self._scale_RE if all_alive else self._scale_of_live(topk_ids_TK, alive_S)
        draw_RTK = _exponential(self._salt_RE[:, topk_ids_TK] ^ token_keys_T[:, None])
        draw_RTK *= scale_RE[:, topk_ids_TK]
        index_TK = draw_RTK.argmin(axis=0) * self._shard_RE.shape[1] + topk_ids_TK
        shard_TK: npt.NDArray[np.int32] = self._shard_RE.take(index_TK)
        return shard_TK

    def _scale_of_live(
        self, topk_ids_TK: npt.NDArray[np.integer], alive_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        live_RE = np.append(alive_S, False)[self._shard_RE]
        dead_TK = ~live_RE.any(axis=0)[topk_ids_TK]
        if dead_TK.any():
            expert = int(topk_ids_TK[dead_TK][0])
            raise NoReplicaError(f"expert {ExpertKey(self.layer, expert)} has no live replica")
        return np.where(live_RE, self._scale_RE, np.inf)


def choose_shards(
    topk_ids_TK: npt.NDArray[np.integer],
    token_keys_T: npt.NDArray[np.uint64],
    layer: int,
    table: DispatchTable,
    alive_S: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int32]:
    """Choose a live replica for each (token, expert). Return its shard_TK, int32 positions in Placement.shards.

    Args:
        topk_ids_TK: the router's experts of each token, integers in 0..E-1.
        token_keys_T: uint64, from `token_keys`.
        layer: the layer's index in the model.
        table: that layer's table.
        alive_S: which shards of the placement may be chosen.

    Raises:
        NoReplicaError: an expert that is asked for has no live replica.
    """
    assert layer == table.layer, f"the table of layer {table.layer} was used for layer {layer}"
    return table.choose(topk_ids_TK, token_keys_T, alive_S)


def _mix(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return SplitMix64's finaliser (Steele, Lea and Flood, 2014, with Stafford's constants, variant 13)."""
    mixed = bits ^ (bits >> np.uint64(30))
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def _exponential(bits: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Return -ln(u), float64 above 0, for uniform u in (0, 1) drawn by hashing the bits.

    numpy's logarithm may differ in the last bit from one processor to another, so this uses only operations that IEEE
    754 rounds exactly: with u = m * 2**e, ln(m) is the series 2 * (s + s**3/3 + s**5/5 + ...) in s = (m - 1) / (m + 1).
    Five terms are within 2e-6 of the logarithm, far finer than the weights' steps.
    """
    # 52 bits and a half, so that u is exact and neither 0 nor 1.
    mantissa, exponent = np.frexp((_mix(bits) >> np.uint64(12)) + 0.5)
    s = (1 - mantissa) / (1 + mantissa)
    square = s * s
    series: npt.NDArray[np.float64] = square * (1 / 9)
    for coefficient in (1 / 7, 1 / 5, 1 / 3):
        series += coefficient
        series *= square
    series += 1
    series *= 2 * s
    series += (52 - exponent) * 0.6931471805599453
    return series
