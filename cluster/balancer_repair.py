"""Give every expert of a layer the replicas that it shall have, by as few changes as can be.

A replica that finds no free slot takes the place of a spare one, or of one that can itself go elsewhere: the shortest
such chain is found by breadth-first search, as augmenting paths of a matching are (Hopcroft and Karp, 1973).

Shape suffixes: S shards, E experts of the layer.
"""

from collections import deque

import numpy as np

from expertmesh.cluster.balancer_layer import Bools, Ints, Layer
from expertmesh.cluster.errors import CapacityError


def repair(layer: Layer) -> int:
    """Bring a layer within its slots and each expert to min_replicas, on different nodes where slots allow.

    Return how many experts still have fewer replicas than min_replicas.

    Raises:
        CapacityError: an expert has no replica, and no slot can be made free for it.
    """
    _evict(layer)
    hottest_first = np.argsort(-layer.load_E, kind="stable").tolist()
    # Round by round, so that no expert gets its second replica before each has its first.
    for num_replicas in range(1, layer.min_replicas + 1):
        for expert in hottest_first:
            if layer.count_E[expert] < num_replicas and not _insist(layer, expert, num_replicas) and num_replicas == 1:
                raise CapacityError(
                    f"expert {expert} finds no slot: {len(layer.load_E)} experts, slots of the shards "
                    f"{layer.slots_S.tolist()}"
                )
    if layer.num_spread > 1:
        for expert in np.flatnonzero((layer.nodes_NE() > 0).sum(axis=0) < layer.num_spread).tolist():
            while _spread_further(layer, expert):
                pass
    return int((layer.count_E < layer.min_replicas).sum())


def _insist(layer: Layer, expert: int, num_replicas: int) -> bool:
    """Place a replica; if it must be, at the cost of others' spread over nodes, then of their further replicas."""
    min_replicas, num_spread = layer.min_replicas, layer.num_spread
    demands = ((min_replicas, num_spread), (min_replicas, 1), (num_replicas, 1))
    is_placed = False
    for layer.min_replicas, layer.num_spread in demands:
        is_placed = is_placed or place_replica(layer, expert)
    layer.min_replicas, layer.num_spread = min_replicas, num_spread
    return is_placed


def place_replica(layer: Layer, expert: int, *, on_new_node: bool = False) -> bool:
    """Add a replica of an expert, on a shard where it is not, by the shortest chain; return False if there is none."""
    may_S = ~layer.hosts_SE[:, expert] & (layer.slots_S > 0)
    if on_new_node:
        may_S &= ~np.isin(layer.node_S, layer.node_S[layer.hosts_SE[:, expert]])
    targets, free_S = _best_first(layer, expert, may_S), layer.free_S
    if targets and free_S[targets[0]] > 0:
        layer.add(targets[0], expert)
        return True
    droppable_SE = layer.droppable_SE()
    droppable_SE[:, expert] = False
    came_from: dict[int, tuple[int, int]] = {}  # shard -> (the expert that it would get, from which shard; -1: new)
    moved = {expert}
    queue: deque[int] = deque()
    _enqueue(queue, came_from, targets, expert, -1)
    while queue:
        shard = queue.popleft()
        spare = np.flatnonzero(droppable_SE[shard])
        spare = spare[~np.isin(spare, list(moved))]
        if free_S[shard] > 0 or len(spare):
            if free_S[shard] <= 0:
                layer.drop(shard, int(spare[layer.share_SE[shard, spare].argmin()]))
            _shift(layer, came_from, shard)
            return True
        hosted = np.flatnonzero(layer.hosts_SE[shard])
        for other in hosted[np.argsort(layer.share_SE[shard, hosted], kind="stable")].tolist():
            # A spare replica needs no new place: it is in `moved`, or the shard would have ended the chain.
            if other not in moved:
                targets = _best_first(layer, other, layer.may_relocate_S(shard, other))
                if any(target not in came_from for target in targets):
                    moved.add(other)
                    _enqueue(queue, came_from, targets, other, shard)
    return False


def _enqueue(
    queue: deque[int], came_from: dict[int, tuple[int, int]], targets: list[int], expert: int, at: int
) -> None:
    for target in targets:
        if target not in came_from:
            came_from[target] = (expert, at)
            queue.append(target)


def _best_first(layer: Layer, expert: int, may_S: Bools) -> list[int]:
    """Order shards: those with a free slot, then those in domains and nodes without the expert, then the idle ones."""
    full_S = layer.free_S <= 0
    order_S: Ints = np.lexsort((layer.time_S, layer.crowd_S(expert), full_S)).astype(np.int64)
    return [shard for shard in order_S.tolist() if may_S[shard]]


def _shift(layer: Layer, came_from: dict[int, tuple[int, int]], shard: int) -> None:
    """Move the experts of a chain one place each, from its end, at `shard`, to its beginning."""
    while shard >= 0:
        expert, source = came_from[shard]
        layer.add(shard, expert, layer.drop(source, expert) if source >= 0 else 0.0)
        shard = source


def _evict(layer: Layer) -> None:
    for shard in np.flatnonzero(layer.free_S < 0).tolist():
        for _ in range(-int(layer.free_S[shard])):
            hosted = np.flatnonzero(layer.hosts_SE[shard])
            keys = (layer.share_SE[shard, hosted], ~layer.droppable_SE()[shard, hosted])
            layer.drop(shard, int(hosted[np.lexsort(keys)[0]]))


def _spread_further(layer: Layer, expert: int) -> bool:
    """Move a replica of an expert that shares its node with another one to a node without; False if nobody can."""
    hosts = np.flatnonzero(layer.hosts_SE[:, expert])
    nodes = layer.node_S[hosts].tolist()
    if len(set(nodes)) >= min(layer.num_spread, len(nodes)):
        return False
    before = layer.snapshot()
    for shard in [int(host) for host, node in zip(hosts, nodes, strict=True) if nodes.count(node) > 1]:
        layer.drop(shard, expert)
        if place_replica(layer, expert, on_new_node=True):
            return True
        layer.restore(before)
    return False
