"""Which expert shard hosts which experts, and in what proportions replicas share their tokens.

Shape suffixes: L MoE layers (by position in Placement.layers), E experts of a layer, S shards (by position in
Placement.shards), R the most replicas that any expert has, N replicas of all experts.
"""

import heapq
import struct
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import CapacityError, InputError, StateError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.spread import node_indices, spread_over_nodes

# What the replicas of an expert without weights of its own share. With a thousand shards an expert may have a hundred
# replicas, each of which needs some forty steps for its part to be exact to a hundredth.
EVEN_WEIGHT = 1 << 12

_HEADER = struct.Struct(">4sHI")  # magic, version, CRC-32 of the msgpack body that follows
_MAGIC = b"EMPL"
_VERSION = 1


class ReplicaPairs(NamedTuple):
    """A placement's replicas one by one, read-only, sorted by layer and expert, then in the order of the shards."""

    row_N: npt.NDArray[np.int64]  # position of the layer * num_experts + expert
    shard_N: npt.NDArray[np.int64]
    weight_N: npt.NDArray[np.int64]


class ReplicaTable(NamedTuple):
    """A placement as arrays, read-only. An expert's replicas are in the order of the shards; the rest is padding."""

    shard_LER: npt.NDArray[np.int32]  # -1 is padding
    weight_LER: npt.NDArray[np.int64]  # 0 in the padding


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSlots:
    """The slots of one shard: the experts that it hosts."""

    shard: ShardId
    experts: tuple[ExpertKey, ...]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One epoch's placement. It may be incomplete: see `missing`.

    layers are the MoE layers' indices in the model. weights holds, for an expert, the integer dispatch weights of its
    replicas in the order of `replicas`; the replicas of an expert that is not in it share evenly. A replica of weight 0
    gets tokens only when the others are dead.

    Raises:
        InputError: an expert out of range or twice on a shard, a shard or layer named twice, or unfit weights.
    """

    epoch: int
    num_experts: int
    layers: tuple[int, ...]
    shards: tuple[ShardSlots, ...]
    weights: Mapping[ExpertKey, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.epoch < 0 or self.num_experts < 1:
            raise InputError(f"a placement cannot have epoch={self.epoch} and num_experts={self.num_experts}")
        _refuse_repeats("layer", self.layers)
        _refuse_repeats("shard", [slots.shard for slots in self.shards])
        for slots in self.shards:
            _refuse_repeats(f"expert of shard {slots.shard}", slots.experts)
            for key in slots.experts:
                self._refuse_unknown(key)
        count_LE = self._count_LE if self.weights else []
        for key, weights in self.weights.items():
            self._refuse_unknown(key)
            num_replicas = count_LE[self._row(key)]
            if len(weights) != num_replicas or min(weights, default=0) < 0 or not any(weights):
                raise InputError(f"expert {key} has {num_replicas} replicas and weights {weights}")

    def replicas(self, key: ExpertKey) -> tuple[ShardId, ...]:
        """Return the shards that host an expert, in the placement's order of shards.

        Raises:
            InputError: the placement knows no such expert.
        """
        self._refuse_unknown(key)
        shard_R = self.replica_table.shard_LER[self._position_of_layer[key.layer], key.expert]
        return tuple(self.shards[shard].shard for shard in shard_R.tolist() if shard >= 0)

    def num_slots(self, shard: ShardId) -> int:
        """Return how many experts of all layers a shard hosts; 0 for a shard that is not in the placement."""
        return sum(len(slots.experts) for slots in self.shards if slots.shard == shard)

    def missing(self, live: Collection[ShardId]) -> tuple[ExpertKey, ...]:
        """Return the experts without a replica on any of the live shards, sorted."""
        # The last entry is for the padding, -1.
        alive_S = np.array([slots.shard in live for slots in self.shards] + [False])
        hosted_LE = alive_S[self.replica_table.shard_LER].any(axis=-1)
        return tuple(
            sorted(ExpertKey(self.layers[layer], expert) for layer, expert in np.argwhere(~hosted_LE).tolist())
        )

    def on_one_node(self, nodes: Mapping[ShardId, str]) -> tuple[ExpertKey, ...]:
        """Return the experts whose replicas are all on one node, sorted; those without replicas are not among them."""
        return tuple(
            key
            for key in (ExpertKey(layer, expert) for layer in sorted(self.layers) for expert in range(self.num_experts))
            if len({nodes.get(shard, "") for shard in self.replicas(key)}) == 1
        )

    @cached_property
    def replica_pairs(self) -> ReplicaPairs:
        """The placement's replicas one by one, for arithmetic on loads."""
        row_N = self._row_N
        order_N = np.argsort(row_N, kind="stable")  # stable: replicas stay in the order of the shards
        shard_N = np.repeat(np.arange(len(self.shards)), [len(slots.experts) for slots in self.shards])
        count_LE = np.array(self._count_LE)
        weight_N = np.maximum(1, EVEN_WEIGHT // count_LE[row_N[order_N]])
        begin_LE = (np.cumsum(count_LE) - count_LE).tolist()
        for key, weights in self.weights.items():
            begin = begin_LE[self._row(key)]
            weight_N[begin : begin + len(weights)] = weights
        return ReplicaPairs(*_read_only(row_N[order_N], shard_N[order_N], weight_N))

    @cached_property
    def replica_table(self) -> ReplicaTable:
        """The placement as arrays, for dispatch."""
        row_N, shard_N, weight_N = self.replica_pairs
        count_LE = np.array(self._count_LE)
        rank_N = np.arange(len(row_N)) - np.repeat(np.cumsum(count_LE) - count_LE, count_LE)
        shape = (len(count_LE), max(1, int(count_LE.max(initial=0))))
        shard_LER, weight_LER = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.int64)
        shard_LER[row_N, rank_N] = shard_N
        weight_LER[row_N, rank_N] = weight_N
        shape_LER = (len(self.layers), self.num_experts, shape[1])
        return ReplicaTable(*_read_only(shard_LER.reshape(shape_LER), weight_LER.reshape(shape_LER)))

    def to_bytes(self) -> bytes:
        """Pack the placement into a versioned record with a checksum."""
        body: bytes = msgpack.packb(
            [
                self.epoch,
                self.num_experts,
                self.layers,
                [[slots.shard, [self._row(key) for key in slots.experts]] for slots in self.shards],
                [[self._row(key), weights] for key, weights in self.weights.items()],
            ]
        )
        return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, record: bytes) -> "Placement":
        """Unpack what `to_bytes` packed.

        Raises:
            StateError: the record is damaged, something else, or of another version.
        """
        if len(record) < _HEADER.size or not record.startswith(_MAGIC):
            raise StateError(f"not a placement record: {len(record)} bytes that begin with {record[:4]!r}")
        _, version, checksum = _HEADER.unpack_from(record)
        if version != _VERSION:
            raise StateError(f"a placement record of version {version}; this release reads version {_VERSION}")
        body = record[_HEADER.size :]
        if zlib.crc32(body) != checksum:
            raise StateError(f"a damaged placement record: checksum {zlib.crc32(body):08x}, expected {checksum:08x}")
        try:
            epoch, num_experts, layers, shards, weights = msgpack.unpackb(body)

            def key_of(row: int) -> ExpertKey:
                return ExpertKey(layers[row // num_experts], row % num_experts)

            return cls(
                epoch=epoch,
                num_experts=num_experts,
                layers=tuple(layers),
                shards=tuple(ShardSlots(shard=shard, experts=tuple(map(key_of, rows))) for shard, rows in shards),
                weights={key_of(row): tuple(replica_weights) for row, replica_weights in weights},
            )
        except (InputError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise StateError(f"a placement record with a sound checksum and unusable content: {error}") from error

    @cached_property
    def _position_of_layer(self) -> dict[int, int]:
        return {layer: position for position, layer in enumerate(self.layers)}

    @cached_property
    def _row_N(self) -> npt.NDArray[np.int64]:  # noqa: N802  # a shape suffix
        """The row of each replica, shard after shard."""
        return np.array([self._row(key) for slots in self.shards for key in slots.experts], dtype=np.int64)

    @cached_property
    def _count_LE(self) -> list[int]:  # noqa: N802
        """The replicas of each row."""
        counts: list[int] = np.bincount(self._row_N, minlength=len(self.layers) * self.num_experts).tolist()
        return counts

    def _row(self, key: ExpertKey) -> int:
        return self._position_of_layer[key.layer] * self.num_experts + key.expert

    def _refuse_unknown(self, key: ExpertKey) -> None:
        if key.layer not in self._position_of_layer or not 0 <= key.expert < self.num_experts:
            raise InputError(f"expert {key} is not among {self.num_experts} experts of the layers {self.layers}")


def initial_placement(
    layers: Sequence[int],
    num_experts: int,
    shards: Sequence[ShardId],
    replicas: int,
    capacities: Mapping[ShardId, int] | None = None,
    *,
    epoch: int = 0,
    nodes: Mapping[ShardId, str] | None = None,
) -> Placement:
    """Place the same number of replicas of every expert, balanced by slots, before any load is known.

    No two replicas of an expert share a shard. Without capacities the slots of two shards differ by at most one, in
    each layer and in all; with them, slots are in proportion to capacity. As far as these slots allow, replicas of an
    expert are on different nodes. Equal arguments give equal placements.

    Args:
        layers: the MoE layers' indices in the model.
        num_experts: experts of each layer.
        shards: the shards, all of which are alive.
        replicas: replicas of each expert.
        capacities: the most slots of each shard, over all layers; None: no limit.
        epoch: the placement's number.
        nodes: of the shards; those that are not in it are on one node of their own.

    Raises:
        InputError: more replicas than shards, or arguments that make no placement.
        CapacityError: the shards have too few slots.
    """
    if not layers or num_experts < 1 or not 1 <= replicas <= len(shards):
        raise InputError(
            f"cannot place {replicas} replicas of {num_experts} experts in {len(layers)} layers on {len(shards)} shards"
        )
    if capacities is not None and (set(capacities) != set(shards) or min(capacities.values()) < 0):
        raise InputError(f"capacities {dict(capacities)} are not those of the shards {list(shards)}")
    num_keys = len(layers) * num_experts
    limit_S = [num_keys if capacities is None else capacities[shard] for shard in shards]
    node_S = node_indices(shards, nodes or {})
    num_slots_LS = _slots_by_layer(num_keys * replicas, limit_S, num_keys, node_S, len(layers))
    experts_S: list[list[ExpertKey]] = [[] for _ in shards]
    for position, num_slots_of_layer_S in enumerate(num_slots_LS):
        hosts_E = _deal(num_slots_of_layer_S, num_experts, replicas, seed=position)
        spread_over_nodes(hosts_E, node_S, replicas)
        for expert, hosts in enumerate(hosts_E):
            for host in hosts:
                experts_S[host].append(ExpertKey(layers[position], expert))
    slots = tuple(ShardSlots(shard=shard, experts=tuple(keys)) for shard, keys in zip(shards, experts_S, strict=True))
    return Placement(epoch=epoch, num_experts=num_experts, layers=tuple(layers), shards=slots)


def _slots_by_layer(
    total: int, capacity_S: Sequence[int], most: int, node_S: Sequence[int], num_layers: int
) -> list[list[int]]:
    """Apportion slots to shards, and each shard's to the layers, so that nodes of equal shards are as level as these.

    What does not divide evenly goes to the nodes in turn, and to the layers node by node.
    """
    shards = range(len(capacity_S))
    in_turn = sorted(shards, key=lambda shard: list(node_S[:shard]).count(node_S[shard]))
    num_slots = dict(zip(in_turn, _apportion(total, [capacity_S[s] for s in in_turn], most), strict=True))
    by_node = sorted(shards, key=lambda shard: node_S[shard])
    place = {shard: index for index, shard in enumerate(by_node)}
    spread = _spread([num_slots[s] for s in by_node], num_layers)
    return [[num_slots_of_layer[place[s]] for s in shards] for num_slots_of_layer in spread]


def _apportion(total: int, capacity_S: Sequence[int], most: int) -> list[int]:
    """Split total slots in proportion to capacity (D'Hondt's method), at most `most` and the capacity for each shard.

    A shard can use one slot for each expert and no more; that `total` fits under these limits is also enough for
    distinct replicas (Gale and Ryser's theorem).
    """
    usable = sum(min(capacity, most) for capacity in capacity_S)
    if total > usable:
        raise CapacityError(
            f"{total} expert slots are needed, and the shards have {usable} that can be used: {capacity_S}"
        )
    num_slots_S = [0] * len(capacity_S)
    heap = [(1 / capacity, shard) for shard, capacity in enumerate(capacity_S) if capacity]
    heapq.heapify(heap)
    for _ in range(total):
        _, shard = heapq.heappop(heap)
        num_slots_S[shard] += 1
        if num_slots_S[shard] < min(capacity_S[shard], most):
            heapq.heappush(heap, ((num_slots_S[shard] + 1) / capacity_S[shard], shard))
    return num_slots_S


def _spread(num_slots_S: Sequence[int], num_layers: int) -> list[list[int]]:
    """Split each shard's slots over the layers, as evenly as can be, with the same sum in each layer.

    The shards' slots, one after the other, go to the layers in turn (McNaughton's wrap-around rule).
    """
    num_slots_LS = [[num_slots // num_layers for num_slots in num_slots_S] for _ in range(num_layers)]
    next_layer = 0
    for shard, num_slots in enumerate(num_slots_S):
        for _ in range(num_slots % num_layers):
            num_slots_LS[next_layer][shard] += 1
            next_layer = (next_layer + 1) % num_layers
    return num_slots_LS


def _deal(num_slots_S: Sequence[int], num_experts: int, replicas: int, *, seed: int) -> list[list[int]]:
    """Return the shards of each expert of a layer: those with the most slots left (Gale and Ryser's construction).

    Ties are broken by a multiplicative hash, so that shards share experts in many ways and load can flow between all.
    """
    hosts_E: list[list[int]] = []
    heap = [(-num_slots, 0, shard) for shard, num_slots in enumerate(num_slots_S)]
    heapq.heapify(heap)
    for expert in range(num_experts):
        taken = [heapq.heappop(heap) for _ in range(replicas)]
        assert taken[-1][0] < 0, f"expert {expert} finds fewer than {replicas} shards with room among {num_slots_S}"
        for minus_left, _, shard in taken:
            tie = (seed * num_experts + expert + 1) * (shard + 1) * 2654435761 >> 8 & 0xFFFF
            heapq.heappush(heap, (minus_left + 1, tie, shard))
        hosts_E.append(sorted(shard for _, _, shard in taken))
    return hosts_E


def _read_only(*arrays: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _refuse_repeats(what: str, values: Sequence[object]) -> None:
    if len(set(values)) != len(values):
        repeated = next(value for index, value in enumerate(values) if value in values[:index])
        raise InputError(f"{what} {repeated} is named twice")
