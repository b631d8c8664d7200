"""How the (token, expert) pairs of a batch are given to replicas: four policies with one signature.

- rendezvous: each pair by the weighted hash alone, whatever else is in the batch (`dispatch_hash`).
- quota: each replica gets its exact share of its expert's pairs in this batch, to within one; a pair leaves its
  rendezvous choice only for that. For large batches, whose time follows the tokens of the busiest shard.
- concentrate: each expert of the batch is computed on one replica, chosen so that the shards have equally many experts.
  For small batches, whose time follows the expert weights that the busiest shard reads.
- auto: concentrate, rendezvous or quota, by the number of tokens.

Equal arguments give equal choices, on any machine.

Shape suffixes: T tokens, K experts chosen for a token, E experts of the layer, R the most replicas of any expert,
S shards (by position in Placement.shards), M experts with several replicas to choose from, P pairs of these.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.dispatch_hash import DispatchTable, token_keys
from expertmesh.cluster.errors import NoReplicaError, UnknownNameError
from expertmesh.cluster.ids import ExpertKey

# The arguments, the result and the errors are those of DispatchTable.choose.
ChooseShards = Callable[[npt.NDArray[np.integer], npt.NDArray[np.uint64], npt.NDArray[np.bool_]], npt.NDArray[np.int32]]

# By benchmarks/dispatch_policies.py. Up to 64 tokens `concentrate` costs the busiest shard least, with a weight read as
# dear as 8 tokens or as 256 (but not with 8 and routing as skewed as Zipf 1.1: then up to 32). From 128 `quota` levels
# tokens best and, where most experts have one replica, takes no longer to compute than `rendezvous`.
CONCENTRATE_UP_TO_TOKENS = 64
QUOTA_FROM_TOKENS = 128

_SEVERAL, _NOWHERE = -1, -2


def open_policy(name: str, table: DispatchTable) -> ChooseShards:
    """Return a policy's choice for a layer's table. Open it once for each epoch and layer.

    Raises:
        UnknownNameError: no policy has this name.
    """
    if name not in POLICIES:
        raise UnknownNameError(f"no dispatch policy is named {name!r}; there are {', '.join(sorted(POLICIES))}")
    return POLICIES[name](table)


def _rendezvous(table: DispatchTable) -> ChooseShards:
    return table.choose


class _Usable(NamedTuple):
    """The replicas of a table that may be chosen; a slot is a replica of an expert that has several, as m * R + r.

    It changes only when a shard dies or comes back, so it is kept from one call to the next.
    """

    hosts_E: list[tuple[int, ...]]
    only_E: npt.NDArray[np.int32]  # the expert's one shard, or _SEVERAL, or _NOWHERE
    weight_MR: npt.NDArray[np.int64]
    shard_of_slot: npt.NDArray[np.int32]
    slot_of_ES: npt.NDArray[np.unsignedinteger]  # 0 where there is none

    @classmethod
    def of(cls, table: DispatchTable, alive: bytes) -> "_Usable":
        alive_S = np.frombuffer(alive, dtype=np.bool_)
        weight_ER = live_weights(table, alive_S)
        hosts_E = [tuple(row[usable].tolist()) for row, usable in zip(table.shard_ER, weight_ER > 0, strict=True)]
        only = [hosts[0] if len(hosts) == 1 else _SEVERAL if hosts else _NOWHERE for hosts in hosts_E]
        only_E = np.array(only, dtype=np.int32)
        several_M = np.flatnonzero(only_E == _SEVERAL)
        shard_MR, weight_MR = table.shard_ER[several_M], weight_ER[several_M]
        # The smallest type: numpy sorts 16 bits in linear time.
        slot_of_ES = np.zeros((len(only_E), len(alive_S)), dtype=np.min_scalar_type(weight_MR.size))
        # Those of weight 0 too: rendezvous may draw one, if hardly ever, and quota then moves the pair.
        row, replica = np.nonzero(shard_MR >= 0)
        slot_of_ES[several_M[row], shard_MR[row, replica]] = row * weight_MR.shape[1] + replica
        return cls(hosts_E, only_E, weight_MR, shard_MR.ravel(), slot_of_ES)


def _usable_by_life(table: DispatchTable) -> Callable[[bytes], _Usable]:
    return lru_cache(maxsize=2)(partial(_Usable.of, table))


class _Quota:
    """The exact share of each replica."""

    def __init__(self, table: DispatchTable) -> None:
        self._table = table
        self._usable = _usable_by_life(table)

    def choose(
        self, topk_ids_TK: npt.NDArray[np.integer], token_keys_T: npt.NDArray[np.uint64], alive_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int32]:
        usable = self._usable(alive_S.tobytes())
        shard_TK: npt.NDArray[np.int32] = usable.only_E.take(topk_ids_TK)
        _refuse_nowhere(self._table, topk_ids_TK, shard_TK)
        pair_P = np.flatnonzero(shard_TK == _SEVERAL)
        if not len(pair_P):
            return shard_TK
        ids_P = topk_ids_TK.take(pair_P)
        keys_P = token_keys_T[pair_P // topk_ids_TK.shape[1]]
        shard_P = self._table.choose(ids_P[:, None], keys_P, alive_S)[:, 0]
        slot_P = usable.slot_of_ES.take(ids_P * len(alive_S) + shard_P)
        _move_to_quotas(shard_P, slot_P, usable, _fractions(token_keys_T, usable.weight_MR.shape[1]))
        shard_TK.put(pair_P, shard_P)
        return shard_TK


def _move_to_quotas(
    shard_P: npt.NDArray[np.int32],
    slot_P: npt.NDArray[np.unsignedinteger],
    usable: _Usable,
    ties_R: npt.NDArray[np.float64],
) -> None:
    """Change shard_P, whose slots are slot_P, as little as the quotas need."""
    count_MR = np.bincount(slot_P, minlength=usable.weight_MR.size).reshape(usable.weight_MR.shape)
    surplus = (count_MR - quotas(count_MR, usable.weight_MR, ties_R)).ravel()
    # Pairs of one slot stand together, in the order of the batch; the last of them leave. Slots are numbered by expert,
    # so those who leave and the places that are free, both in that order, agree in their experts.
    leaving = np.maximum(surplus, 0)
    first_leaving = np.repeat(count_MR.cumsum() - leaving.cumsum(), leaving)
    moved = slot_P.argsort(kind="stable")[first_leaving + np.arange(len(first_leaving))]
    free = np.repeat(np.arange(len(surplus)), np.maximum(-surplus, 0))
    shard_P[moved] = usable.shard_of_slot[free]


def quotas(
    count_MR: npt.NDArray[np.int64], weight_MR: npt.NDArray[np.int64], ties_R: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return how many pairs each replica shall get: its share by weight, rounded down or up, int64.

    What rounding down leaves goes first to replicas that have more than that, so that few pairs move, then by remainder
    and chance, so that none is favoured over many batches.

    Args:
        count_MR: pairs of each replica now; the shares depend on their sum over an expert's replicas alone.
        weight_MR: integer weights; positive somewhere for each expert with pairs.
        ties_R: numbers in (0, 1), drawn for each batch.
    """
    pairs_M1 = count_MR.sum(axis=1, keepdims=True)
    total_M1 = np.maximum(weight_MR.sum(axis=1, keepdims=True), 1)
    due_MR = pairs_M1 * weight_MR
    quota_MR: npt.NDArray[np.int64] = due_MR // total_M1
    remainder_MR = due_MR - quota_MR * total_M1
    left_M1 = pairs_M1 - quota_MR.sum(axis=1, keepdims=True)
    # A remainder is below the total, so the first criterion decides before the second. Nothing for a remainder of 0.
    claim_MR = remainder_MR * ties_R + (count_MR > quota_MR) * total_M1
    claim_MR *= remainder_MR > 0
    rank_MR = (-claim_MR).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    quota_MR += rank_MR < left_M1
    return quota_MR


class _Concentrate:
    """One replica for each expert of the batch, chosen greedily: the experts of most tokens choose first."""

    def __init__(self, table: DispatchTable) -> None:
        self._table = table
        self._usable = _usable_by_life(table)

    def choose(
        self, topk_ids_TK: npt.NDArray[np.integer], token_keys_T: npt.NDArray[np.uint64], alive_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int32]:
        usable = self._usable(alive_S.tobytes())
        only_E = usable.only_E
        pairs_E = np.bincount(topk_ids_TK.ravel(), minlength=len(only_E))
        asked = pairs_E.nonzero()[0]
        only = only_E[asked]
        _refuse_nowhere(self._table, asked, only)
        several = asked[only == _SEVERAL]
        shard_E = only_E.copy()
        if len(several):
            # An expert more counts more than all tokens; the fraction, drawn from the batch, breaks ties.
            expert_cost = topk_ids_TK.size + 1
            cost_of_expert_E = pairs_E + expert_cost
            fixed = asked[only >= 0]
            fixed_S = np.bincount(only_E[fixed], cost_of_expert_E[fixed], len(alive_S))
            load = (fixed_S + _fractions(token_keys_T, len(alive_S))).tolist()
            load_of = load.__getitem__
            several = several[(-pairs_E[several]).argsort(kind="stable")]
            for expert, cost in zip(several.tolist(), cost_of_expert_E[several].tolist(), strict=True):
                best = min(usable.hosts_E[expert], key=load_of)
                load[best] += cost
                shard_E[expert] = best
        shard_TK: npt.NDArray[np.int32] = shard_E.take(topk_ids_TK)
        return shard_TK


class _Auto:
    """The policy that fits the number of tokens."""

    def __init__(self, table: DispatchTable) -> None:
        self._concentrate = _Concentrate(table).choose
        self._rendezvous = table.choose
        self._quota = _Quota(table).choose

    def choose(
        self, topk_ids_TK: npt.NDArray[np.integer], token_keys_T: npt.NDArray[np.uint64], alive_S: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int32]:
        num_tokens = len(topk_ids_TK)
        if num_tokens <= CONCENTRATE_UP_TO_TOKENS:
            return self._concentrate(topk_ids_TK, token_keys_T, alive_S)
        if num_tokens < QUOTA_FROM_TOKENS:
            return self._rendezvous(topk_ids_TK, token_keys_T, alive_S)
        return self._quota(topk_ids_TK, token_keys_T, alive_S)


POLICIES: Mapping[str, Callable[[DispatchTable], ChooseShards]] = MappingProxyType(
    {
        "rendezvous": _rendezvous,
        "quota": lambda table: _Quota(table).choose,
        "concentrate": lambda table: _Concentrate(table).choose,
        "auto": lambda table: _Auto(table).choose,
    }
)


def live_weights(table: DispatchTable, alive_S: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return weight_ER without the dead replicas; where the live ones all weigh 0, they weigh 1."""
    live_ER = np.append(alive_S, False)[table.shard_ER]  # the last entry is for the padding, -1
    weight_ER = np.where(live_ER, table.weight_ER, 0)
    return np.where(weight_ER.any(axis=1, keepdims=True), weight_ER, live_ER)


def _refuse_nowhere(table: DispatchTable, experts: npt.NDArray[np.integer], only: npt.NDArray[np.int32]) -> None:
    if (only == _NOWHERE).any():
        expert = int(experts[only == _NOWHERE][0])
        raise NoReplicaError(f"expert {ExpertKey(table.layer, expert)} has no live replica")


def _fractions(token_keys_T: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.float64]:
    """Return count numbers in (0, 1), drawn by the key of the batch's first token; they break ties."""
    drawn = token_keys(token_keys_T[:1], np.arange(count))
    fractions: npt.NDArray[np.float64] = ((drawn >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return fractions
