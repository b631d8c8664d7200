"""Replicate and pack the experts of one layer from scratch, so that the shards' loads are level.

Where there are slots to spare (one a shard, less one), shards are filled one after the other, each with whole cold
experts and a part of a hotter one, as Walker's alias method fills bins of two ("An efficient method for generating
discrete random variables", 1977), here with any number of slots. With k slots each and at most n * (k - 1) + 1 experts,
n equal shards come out exactly level: among the windows of k neighbours in the experts' sorted loads, the first that
reaches the target does so with its last expert alone, so the other k - 1 are done with and the last one's rest goes on.

Where there are fewer slots, the experts with the largest load for each replica are replicated, and the replicas go,
largest first, to the shard that finishes first (Graham's LPT rule, 1969).

Shape suffixes: S shards, E experts of the layer, M unfinished experts and fillers.
"""

import numpy as np

from expertmesh.cluster.balancer_layer import Bools, Floats, Ints, Layer
from expertmesh.cluster.balancer_repair import repair
from expertmesh.cluster.balancer_search import exchange, improve

MAX_STEPS = 200  # of the search that follows the packing


def pack(layer: Layer) -> None:
    """Place the experts of an empty layer: replicas on distinct shards, min_replicas each, all slots in use, level.

    Raises:
        CapacityError: the slots do not suffice for one replica of each expert.
    """
    usable_S = layer.slots_S - _reserve(layer.slots_S, (layer.min_replicas - 1) * len(layer.load_E))
    if int(np.maximum(usable_S - 1, 0).sum()) + 1 >= len(layer.load_E):
        _fill_shards(layer, usable_S)
    else:
        _replicate_and_pack(layer)
    repair(layer)
    use_free_slots(layer, layer.slots_S > 0, int(layer.slots_S.sum()))
    layer.level()
    for _ in zip(range(MAX_STEPS), improve(layer), strict=False):
        pass


def _reserve(slots_S: Ints, total: int) -> Ints:
    """Split `total` slots over the shards in proportion to their slots, by largest remainder."""
    exact_S = slots_S * min(1.0, total / max(int(slots_S.sum()), 1))
    reserve_S: Ints = np.floor(exact_S).astype(np.int64)
    missing = min(total, int(slots_S.sum())) - int(reserve_S.sum())
    reserve_S[np.argsort(reserve_S - exact_S, kind="stable")[:missing]] += 1
    return reserve_S


def _fill_shards(layer: Layer, slots_S: Ints) -> None:
    rest_E, unfinished_E = layer.load_E.copy(), np.ones(len(layer.load_E), dtype=np.bool_)
    target_S = layer.ideal_time * layer.speed_S
    waiting = [int(shard) for shard in np.argsort(-target_S / np.maximum(slots_S, 1), kind="stable") if slots_S[shard]]
    while waiting:
        room = int((slots_S[waiting] - 1).sum()) + 1
        experts = np.flatnonzero(unfinished_E)
        experts = experts[np.argsort(rest_E[experts], kind="stable")]
        fillers = np.full(room - len(experts), -1)
        expert_M = np.concatenate([fillers, experts])
        first, part = _window(
            np.where(expert_M < 0, 0.0, rest_E[expert_M]), int(slots_S[waiting[0]]), target_S[waiting[0]]
        )
        *whole, last = expert_M[first : first + int(slots_S[waiting[0]])].tolist()
        shard = _least_crowded(layer, waiting, slots_S, [expert for expert in (*whole, last) if expert >= 0])
        for expert in whole:
            if expert >= 0:
                layer.add(shard, expert, float(rest_E[expert]))
                unfinished_E[expert] = False
        waiting.remove(shard)
        is_rest = rest_E[last] - part > 1e-9 * target_S[shard] and bool(waiting)
        if last >= 0 and (part > 0 or not is_rest):
            layer.add(shard, last, part if is_rest else float(rest_E[last]))
            unfinished_E[last] = is_rest
            rest_E[last] -= part


def _window(load_M: Floats, width: int, target: float) -> tuple[int, float]:
    """Return where the first window begins that reaches the target, and what its last expert gives to reach it."""
    sum_M = np.concatenate([[0.0], load_M.cumsum()])
    reached = np.flatnonzero(sum_M[width:] - sum_M[:-width] >= target)
    first = int(reached[0]) if len(reached) else len(load_M) - width
    return first, float(min(max(target - load_M[first : first + width - 1].sum(), 0.0), load_M[first + width - 1]))


def _least_crowded(layer: Layer, waiting: list[int], slots_S: Ints, experts: list[int]) -> int:
    """Choose, of the shards like the first, that with the fewest of these experts in its domain and node."""
    like = waiting[0]
    alike = [s for s in waiting if slots_S[s] == slots_S[like] and layer.speed_S[s] == layer.speed_S[like]]
    begun = [expert for expert in experts if layer.hosts_SE[:, expert].any()]
    crowd_S = np.sum([layer.crowd_S(expert) for expert in begun], axis=0) if begun else np.zeros(len(slots_S))
    return min(alike, key=lambda shard: (float(crowd_S[shard]), shard))


def _replicate_and_pack(layer: Layer) -> None:
    count_E = np.full(len(layer.load_E), layer.min_replicas)
    num_shards = int((layer.slots_S > 0).sum())
    for _ in range(int(layer.slots_S.sum() - count_E.sum())):
        expert = int(np.where(count_E < num_shards, layer.load_E / count_E, -1.0).argmax())
        count_E[expert] += count_E[expert] < num_shards
    piece_E = layer.load_E / count_E
    free_S = layer.slots_S.copy()
    for expert in np.argsort(-piece_E, kind="stable").tolist():
        for _ in range(int(count_E[expert])):
            may_S = (free_S > 0) & ~layer.hosts_SE[:, expert]
            if not may_S.any():
                break  # `repair` gives it what it must have
            time_S = np.where(may_S, (layer.load_S + piece_E[expert]) / layer.speed_S, np.inf)
            shard = int(np.lexsort((layer.crowd_S(expert), time_S))[0])
            layer.add(shard, expert, float(piece_E[expert]))
            free_S[shard] -= 1
    _exchange_evenly(layer)


def _exchange_evenly(layer: Layer) -> None:
    """Exchange experts between the busiest shard and others while this helps and replicas share evenly."""
    for _ in range(MAX_STEPS):
        before, largest = layer.snapshot(), float(layer.time_S.max())
        if not exchange(layer, int(layer.time_S.argmax())):
            return
        if layer.time_S.max() >= largest * (1 - 1e-9):
            layer.restore(before)
            return


def use_free_slots(layer: Layer, may_S: Bools, most: int) -> int:
    """Give free slots of these shards to further replicas, at most so many, and return how many.

    The experts of the largest load for each replica come first. The new replicas compute nothing until `level`.
    """
    num_free_S = np.where(may_S, np.maximum(layer.free_S, 0), 0)
    shards = np.repeat(np.arange(len(num_free_S)), num_free_S)[:most].tolist()
    count_E = layer.count_E
    for shard in shards:
        expert = int(np.where(layer.hosts_SE[shard], -1.0, layer.load_E / np.maximum(count_E, 1)).argmax())
        layer.add(shard, expert)
        count_E[expert] += 1
    return len(shards)
