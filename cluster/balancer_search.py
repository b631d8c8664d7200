"""Improve a packed layer step by step, each step a replica or two that lower the load of the busiest shards most.

Shape suffixes: S shards, E experts of the layer, K experts of one shard.
"""

from collections.abc import Iterator

import numpy as np

from expertmesh.cluster.balancer_layer import Floats, Layer

GOOD_ENOUGH = 0.01  # a largest time within this of the ideal is left alone
_TRIES = 6  # candidates that a step may try before the search gives up


def improve(layer: Layer) -> Iterator[None]:
    """Change a levelled layer step by step; each step has lowered the sum of load**2 / speed. The end: no step helps.

    A step is a new replica (in a free slot, in place of a spare replica, or of a cold expert that goes to such a slot)
    or an exchange of two experts between two shards. All keep min_replicas and the spread over nodes.
    """
    while _is_uneven(layer):
        before, potential = layer.snapshot(), _potential(layer)
        least_gain = 1e-3 * layer.ideal_time**2 * float(layer.speed_S.mean())
        for _ in _candidates(layer):
            layer.level()
            if potential - _potential(layer) > least_gain:
                break
            layer.restore(before)
        else:
            return
        yield


def _is_uneven(layer: Layer) -> bool:
    return float(layer.time_S.max()) > (1 + GOOD_ENOUGH) * layer.ideal_time


def _potential(layer: Layer) -> float:
    return float((layer.load_S**2 / layer.speed_S).sum())


def _candidates(layer: Layer) -> Iterator[None]:
    """Make the changes one after the other that promise most; who asks for the next has taken the last one back."""
    gain_SE = _gain_of_replica_SE(layer)
    room_S = (layer.free_S > 0) | layer.droppable_SE().any(axis=1)
    gain_SE = np.where(room_S[:, None], gain_SE, gain_SE / 2)  # two moves instead of one
    for _ in range(_TRIES):
        best = float(gain_SE.max())
        if best <= 0:
            break
        shard, expert = _pick(layer, gain_SE, best)
        gain_SE[shard, expert] = 0.0
        if _make_room(layer, shard, expert):
            layer.add(shard, expert)
            layer.fill(expert)
            yield
    busiest = np.argsort(-layer.time_S, kind="stable")[:3].tolist()
    for shard in busiest:
        if exchange(layer, shard):
            yield


def _gain_of_replica_SE(layer: Layer) -> Floats:  # noqa: N802
    """Estimate by how much a further replica lowers the potential.

    With d the difference of times between an expert's shards, of speed W together, and the new shard, of speed v, to
    move x tokens lowers it by 2 * x * d - x**2 * (1 / W + 1 / v), most at x = d * W * v / (W + v).
    """
    time_S, used_SE = layer.time_S, layer.share_SE > 0
    speed_E = np.maximum((layer.speed_S[:, None] * used_SE).sum(axis=0), 1e-300)
    time_E = (layer.share_SE * time_S[:, None]).sum(axis=0) / np.maximum(layer.load_E, 1e-300)
    slack_SE = time_E - time_S[:, None]
    inverse_SE = 1 / speed_E + 1 / layer.speed_S[:, None]
    moved_SE = np.minimum(np.maximum(slack_SE, 0.0) / inverse_SE, layer.load_E)
    gain_SE = moved_SE * (2 * slack_SE - moved_SE * inverse_SE)
    may_SE = ~layer.hosts_SE & (layer.slots_S > 0)[:, None] & (time_E > (1 + GOOD_ENOUGH) * layer.ideal_time)
    return np.where(may_SE, gain_SE, 0.0)


def _pick(layer: Layer, gain_SE: Floats, best: float) -> tuple[int, int]:
    """Choose the expert that promises most, and of the shards nearly as good for it the least crowded."""
    expert = int(gain_SE.max(axis=0).argmax())
    crowd_S = np.where(gain_SE[:, expert] >= 0.9 * best, layer.crowd_S(expert), np.inf)
    return int(np.lexsort((-gain_SE[:, expert], crowd_S))[0]), expert


def _make_room(layer: Layer, shard: int, expert: int) -> bool:
    """Free a slot of a shard: there is one, a spare replica ends, or its coldest expert goes to where one can."""
    if layer.free_S[shard] > 0:
        return True
    droppable_SE = layer.droppable_SE()
    droppable_SE[:, expert] = False
    if droppable_SE[shard].any():
        _drop_spare(layer, shard, droppable_SE[shard])
        return True
    share_K = np.where(layer.hosts_SE[shard], layer.share_SE[shard], np.inf)
    cold = int(share_K.argmin())
    droppable_SE[:, cold] = False
    room_S = layer.may_relocate_S(shard, cold) & ((layer.free_S > 0) | droppable_SE.any(axis=1))
    if not room_S.any():
        return False
    target = int(np.where(room_S, layer.time_S, np.inf).argmin())
    if layer.free_S[target] <= 0:
        _drop_spare(layer, target, droppable_SE[target])
    layer.add(target, cold, layer.drop(shard, cold))
    return True


def _drop_spare(layer: Layer, shard: int, droppable_E: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
    spare = int(np.where(droppable_E, layer.share_SE[shard], np.inf).argmin())
    layer.drop(shard, spare)
    layer.fill(spare)


def exchange(layer: Layer, busy: int) -> bool:
    """Exchange an expert of a busy shard for a colder one, or a free slot, of the shard where this helps most.

    Return False if there is none. Shares go with their replicas.
    """
    time_S, speed_S = layer.time_S, layer.speed_S
    slack_S1 = (time_S[busy] - time_S)[:, None]
    inverse_S1 = (1 / speed_S[busy] + 1 / speed_S)[:, None]
    best = (0.0, -1, -1, -1)
    for expert in np.flatnonzero(layer.share_SE[busy] > 0).tolist():
        # The last column stands for giving nothing in return.
        moved_SE = layer.share_SE[busy, expert] - np.c_[layer.share_SE, np.zeros(len(speed_S))]
        gain_SE = moved_SE * (2 * slack_S1 - moved_SE * inverse_S1)
        may_SE = np.c_[layer.hosts_SE & ~layer.hosts_SE[busy], layer.free_S > 0]
        may_SE &= layer.may_relocate_S(busy, expert)[:, None]
        gain_SE = np.where(may_SE, gain_SE, 0.0)
        if gain_SE.max() > best[0]:
            best = (float(gain_SE.max()), expert, *divmod(int(gain_SE.argmax()), gain_SE.shape[1]))
    _, expert, shard, other = best
    if expert < 0 or (other < len(layer.load_E) and not layer.may_relocate_S(shard, other)[busy]):
        return False
    layer.add(shard, expert, layer.drop(busy, expert))
    if other < len(layer.load_E):
        layer.add(busy, other, layer.drop(shard, other))
    return True
