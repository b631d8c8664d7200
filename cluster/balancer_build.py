"""From shards and placements to the layers that are balanced one by one, and back.

Shape suffixes: L layers, S shards (by position in the facts), E experts of a layer.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.balancer_layer import Floats, Ints, Layer, Snapshot
from expertmesh.cluster.balancer_types import ShardFacts
from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.placement import Placement, ShardSlots


def empty_layers(
    load_LE: npt.ArrayLike,
    shards: Sequence[ShardFacts],
    *,
    num_layers: int,
    num_experts: int,
    min_replicas: int,
    used_LS: Ints | None = None,
) -> list[Layer]:
    """Return the layers without replicas, each with its part of every shard's slots.

    Args:
        load_LE: non-negative finite load of each expert.
        shards: the facts; those of draining shards give no slots.
        num_layers: the layers that load_LE shall have.
        num_experts: the experts of each.
        min_replicas: what `Layer` is told.
        used_LS: slots in use, which are kept where they are if every layer then has enough.

    Raises:
        InputError: a load that is not of this shape, negative or not finite, or a shard named twice.
        CapacityError: fewer usable slots than num_layers * num_experts * min_replicas.
    """
    load = np.asarray(load_LE, dtype=np.float64)
    if load.shape != (num_layers, num_experts):
        raise InputError(f"a load of shape {load.shape} for {num_layers} layers of {num_experts} experts")
    if not (np.isfinite(load) & (load >= 0)).all():
        raise InputError("a load must be finite and not negative")
    if len({facts.shard for facts in shards}) != len(shards):
        raise InputError(f"a shard is named twice among {[facts.shard for facts in shards]}")
    num_slots_S = [0 if f.is_draining else min(f.num_slots, num_layers * num_experts) for f in shards]
    needed = num_layers * num_experts * min_replicas
    if sum(num_slots_S) < needed:
        raise CapacityError(
            f"{needed} expert slots are needed ({num_layers} layers, {num_experts} experts, {min_replicas} replicas), "
            f"and {len(shards)} shards have {sum(num_slots_S)} that can be used"
        )
    slots_LS = _spread_slots(num_slots_S, np.zeros((num_layers, len(shards)), dtype=np.int64))
    if used_LS is not None:
        kept_LS = _spread_slots(num_slots_S, used_LS)
        if (np.minimum(kept_LS, num_experts).sum(axis=1) >= num_experts * min_replicas).all():
            slots_LS = kept_LS
    speed_S = np.array([facts.speed for facts in shards])
    node_S, domain_S = (_numbers([getattr(facts, name) for facts in shards]) for name in ("node", "domain"))
    return [
        Layer(
            load_E=load[layer],
            slots_S=slots_LS[layer],
            speed_S=speed_S,
            node_S=node_S,
            domain_S=domain_S,
            min_replicas=min_replicas,
        )
        for layer in range(num_layers)
    ]


def used_slots_LS(current: Placement, shards: Sequence[ShardFacts]) -> Ints:  # noqa: N802
    """Return how many experts each shard hosts in each layer."""
    used_LS = np.zeros((len(current.layers), len(shards)), dtype=np.int64)
    position_of_layer = {layer: position for position, layer in enumerate(current.layers)}
    position_of_shard = {facts.shard: position for position, facts in enumerate(shards)}
    for slots in current.shards:
        if slots.shard in position_of_shard:
            for key in slots.experts:
                used_LS[position_of_layer[key.layer], position_of_shard[slots.shard]] += 1
    return used_LS


def load_current(layers: Sequence[Layer], current: Placement, shards: Sequence[ShardFacts]) -> None:
    """Put a placement's replicas into empty layers; those of shards without facts are gone, the others share by weight.

    Replicas of which only those of weight 0 are left share evenly, as in dispatch.
    """
    position_of_shard = {facts.shard: position for position, facts in enumerate(shards)}
    position_S = np.array([position_of_shard.get(slots.shard, -1) for slots in current.shards] + [-1])
    shard_LER, weight_LER = current.replica_table
    for layer, shard_ER, weight_ER in zip(layers, position_S[shard_LER], weight_LER, strict=True):
        alive_ER = shard_ER >= 0
        share_ER = np.where(alive_ER, weight_ER, 0).astype(np.float64)
        share_ER[share_ER.sum(axis=1) == 0] = 1.0
        share_ER *= alive_ER
        share_ER *= (layer.load_E / np.maximum(share_ER.sum(axis=1), 1e-300))[:, None]
        expert_P, replica_P = np.nonzero(alive_ER)
        # Facts may name shards in another order than the placement.
        position_P = expert_P * len(shards) + shard_ER[expert_P, replica_P]
        order_P = np.argsort(position_P)
        layer.restore(Snapshot(position_P[order_P].astype(np.int32), share_ER[expert_P, replica_P][order_P]))


def to_placement(
    layers: Sequence[Layer], shards: Sequence[ShardFacts], *, layer_ids: Sequence[int], num_experts: int, epoch: int
) -> Placement:
    """Return the placement of balanced layers, weights included. The layers' shares become those of the weights."""
    weights = {
        ExpertKey(layer_id, expert): replica_weights
        for layer_id, layer in zip(layer_ids, layers, strict=True)
        for expert, replica_weights in layer.quantise().items()
    }
    keys_S: list[list[ExpertKey]] = [[] for _ in shards]
    for layer_id, layer in zip(layer_ids, layers, strict=True):
        for expert, position in zip(*(part.tolist() for part in layer.replicas[:2]), strict=True):
            keys_S[position].append(ExpertKey(layer_id, expert))
    hosted = [
        ShardSlots(shard=facts.shard, experts=tuple(keys))
        for facts, keys in zip(shards, keys_S, strict=True)
        if not facts.is_draining
    ]
    return Placement(
        epoch=epoch, num_experts=num_experts, layers=tuple(layer_ids), shards=tuple(hosted), weights=weights
    )


def time_LS(layers: Sequence[Layer]) -> Floats:  # noqa: N802
    """Return load over speed of every shard in every layer."""
    return np.array([layer.time_S for layer in layers])


def _spread_slots(num_slots_S: Sequence[int], used_LS: Ints) -> Ints:
    """Split each shard's slots over the layers: those in use, and the rest as evenly as can be."""
    slots_LS = used_LS.copy()
    for shard, num_slots in enumerate(num_slots_S):
        while (surplus := int(slots_LS[:, shard].sum()) - num_slots) > 0:
            highest = np.flatnonzero(slots_LS[:, shard] == slots_LS[:, shard].max())
            slots_LS[highest[:surplus], shard] -= 1
        while (missing := num_slots - int(slots_LS[:, shard].sum())) > 0:
            lowest = np.flatnonzero(slots_LS[:, shard] == slots_LS[:, shard].min())
            fewest_first = np.argsort(slots_LS[lowest].sum(axis=1), kind="stable")
            slots_LS[lowest[fewest_first[:missing]], shard] += 1
    return slots_LS


def _numbers(names: Sequence[str]) -> Ints:
    number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([number_of[name] for name in names], dtype=np.int64)
