"""Improve a packed layer step by step, each step a replica or two that lower the load of the busiest shards most.

Shape suffixes: S shards, E experts of the layer, P its replicas, K experts of one shard.
"""

from collections.abc import Iterator

import numpy as np

from expertmesh.cluster.balancer_layer import Floats, Ints, Layer

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
    gains = Gains(layer)
    for _ in range(_TRIES):
        expert = gains.best()
        if expert is None:
            break
        shard = _pick(layer, expert, gains.of_S(expert))
        gains.leave_out(shard, expert)
        if _make_room(layer, shard, expert):
            layer.add(shard, expert)
            layer.fill(expert)
            yield
    busiest = np.argsort(-layer.time_S, kind="stable")[:3].tolist()
    for shard in busiest:
        if exchange(layer, shard):
            yield


class Gains:
    """Estimates of how much a further replica of an expert lowers the potential; halved where one has to make room.

    With d the difference of times between an expert's shards, of speed W together, and the new shard, of speed v, to
    move x tokens lowers it by 2 * x * d - x**2 * (1 / W + 1 / v), most at x = d * W * v / (W + v). Of shards of one
    speed with as much room the idlest gains most, so not every pair of a shard and an expert is looked at.

    Shape suffixes: H experts that are hot: their shards are above the ideal time.
    """

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._time_S = layer.time_S
        expert_P, shard_P, share_P = layer.replicas
        num_experts, computes_P = len(layer.load_E), share_P > 0
        speed_E = np.bincount(expert_P[computes_P], layer.speed_S[shard_P[computes_P]], num_experts)
        self._speed_E = np.maximum(speed_E, 1e-300)
        time_E = np.bincount(expert_P, share_P * self._time_S[shard_P], num_experts)
        self._time_E = time_E / np.maximum(layer.load_E, 1e-300)
        self._hot_H = np.flatnonzero(self._time_E > (1 + GOOD_ENOUGH) * layer.ideal_time)
        self._has_room_S = (layer.free_S > 0) | layer.droppable_SE().any(axis=1)
        self._left_out: list[tuple[int, int]] = []
        self._best_H = self._find_best_H()

    def best(self) -> int | None:
        """Return the expert that promises most; None: none does."""
        if not len(self._hot_H) or self._best_H.max() <= 0:
            return None
        return int(self._hot_H[self._best_H.argmax()])

    def of_S(self, expert: int) -> Floats:  # noqa: N802
        """Return the gains of a replica of an expert on each shard."""
        gain_S = self._gain(np.arange(len(self._time_S)), np.array(expert))
        gain_S[self._layer.hosts_SE[:, expert] | (self._layer.slots_S <= 0)] = 0.0
        gain_S[[shard for shard, other in self._left_out if other == expert]] = 0.0
        return gain_S

    def leave_out(self, shard: int, expert: int) -> None:
        """Take a replica for tried."""
        self._left_out.append((shard, expert))
        self._best_H[self._hot_H == expert] = self.of_S(expert).max()

    def _find_best_H(self) -> Floats:  # noqa: N802
        best_H = np.zeros(len(self._hot_H))
        usable_S = np.flatnonzero(self._layer.slots_S > 0)
        idlest_S = usable_S[np.argsort(self._time_S[usable_S], kind="stable")]
        alike_S = self._layer.speed_S[idlest_S] * np.where(self._has_room_S[idlest_S], 1.0, -1.0)
        # One more than an expert has hosts: one of them is none.
        enough = 1 + int(self._layer.count_E[self._hot_H].max(initial=0))
        for kind in np.unique(alike_S).tolist():
            shard_C = idlest_S[alike_S == kind][:enough]
            may_CH = ~self._layer.hosts_SE[np.ix_(shard_C, self._hot_H)]
            gain_H = self._gain(shard_C[may_CH.argmax(axis=0)], self._hot_H)
            best_H = np.maximum(best_H, np.where(may_CH.any(axis=0), gain_H, 0.0))
        return best_H

    def _gain(self, shards: Ints, experts: Ints) -> Floats:
        slack = self._time_E[experts] - self._time_S[shards]
        inverse = 1 / self._speed_E[experts] + 1 / self._layer.speed_S[shards]
        moved = np.minimum(np.maximum(slack, 0.0) / inverse, self._layer.load_E[experts])
        gain = moved * (2 * slack - moved * inverse)
        # Two moves instead of one.
        return np.asarray(np.where(self._has_room_S[shards], gain, gain / 2))


def _pick(layer: Layer, expert: int, gain_S: Floats) -> int:
    """Choose of the shards nearly as good as the best the least crowded."""
    crowd_S = np.where(gain_S >= 0.9 * gain_S.max(), layer.crowd_S(expert), np.inf)
    return int(np.lexsort((-gain_S, crowd_S))[0])


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

    Shape suffixes: C what may be given in return: a replica of an expert that the busy shard has not, or nothing.
    """
    time_S, speed_S, nothing = layer.time_S, layer.speed_S, len(layer.load_E)
    expert_P, shard_P, share_P = layer.replicas
    apart_P, free = ~layer.hosts_SE[busy, expert_P], np.flatnonzero(layer.free_S > 0)
    shard_C = np.concatenate([shard_P[apart_P], free])
    other_C = np.concatenate([expert_P[apart_P], np.full(len(free), nothing)])
    share_C = np.concatenate([share_P[apart_P], np.zeros(len(free))])
    slack_C = time_S[busy] - time_S[shard_C]
    inverse_C = 1 / speed_S[busy] + 1 / speed_S[shard_C]
    best = (0.0, -1, -1, -1)
    for expert in np.flatnonzero(layer.share_SE[busy] > 0).tolist():
        moved_C = layer.share_SE[busy, expert] - share_C
        gain_C = moved_C * (2 * slack_C - moved_C * inverse_C)
        gain_C[~layer.may_relocate_S(busy, expert)[shard_C]] = 0.0
        if gain_C.max(initial=0.0) > best[0]:
            equal = np.flatnonzero(gain_C == gain_C.max())
            first = equal[np.lexsort((other_C[equal], shard_C[equal]))[0]]
            best = (float(gain_C[first]), expert, int(shard_C[first]), int(other_C[first]))
    _, expert, shard, other = best
    if expert < 0 or (other != nothing and not layer.may_relocate_S(shard, other)[busy]):
        return False
    layer.add(shard, expert, layer.drop(busy, expert))
    if other != nothing:
        layer.add(busy, other, layer.drop(shard, other))
    return True
