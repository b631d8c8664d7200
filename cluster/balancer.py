"""Decide which experts have how many replicas on which shards, and whether to go there.

`balance` packs from scratch. `rebalance` starts from what is there: it repairs what must be repaired, then takes from
each layer's search the steps with the largest gain for each copy, while they save more time than they cost.

Shape suffixes: L layers (by position in Placement.layers), E experts of a layer, S shards (by position in `shards`).
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.balance import balancedness
from expertmesh.cluster.balancer_build import empty_layers, load_current, time_LS, to_placement, used_slots_LS
from expertmesh.cluster.balancer_layer import Bools, Floats, Layer, Snapshot
from expertmesh.cluster.balancer_repair import repair
from expertmesh.cluster.balancer_search import improve
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, Move, ShardFacts
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.packing import MAX_STEPS, pack, use_free_slots
from expertmesh.cluster.placement import Placement

_MAX_ROUNDS = 4  # of searches in a plan, so that the next plan finds nothing more


class _Step(NamedTuple):
    """A layer after some steps of its search."""

    largest_time: float
    num_copies: int
    state: Snapshot


def balance(
    load_LE: npt.ArrayLike,
    shards: Sequence[ShardFacts],
    *,
    layers: Sequence[int],
    num_experts: int,
    epoch: int,
    min_replicas: int = 1,
) -> Placement:
    """Place all experts from scratch, weights included. Equal arguments give equal placements.

    Args:
        load_LE: float64 [L, E], tokens for each expert over a window; non-negative.
        shards: the live shards.
        layers: the MoE layers' indices in the model.
        num_experts: experts of each layer.
        epoch: the placement's number.
        min_replicas: shards that hold each expert; with 2 or more also as many nodes, as far as nodes and slots allow.

    Raises:
        InputError: arguments that make no placement, or an unfit load.
        CapacityError: the shards have too few slots.
    """
    packed = empty_layers(load_LE, shards, num_layers=len(layers), num_experts=num_experts, min_replicas=min_replicas)
    for layer in packed:
        pack(layer)
    return to_placement(packed, shards, layer_ids=layers, num_experts=num_experts, epoch=epoch)


def rebalance(
    current: Placement,
    load_LE: npt.ArrayLike,
    shards: Sequence[ShardFacts],
    *,
    epoch: int,
    expert_bytes: int,
    expert_time_s: float,
    window_s: float,
    horizon_s: float,
    settings: BalanceSettings,
) -> BalancePlan:
    """Plan few moves from the current placement to a better one.

    Whatever the gain, the plan places experts that are missing or lack replicas, empties draining shards, and puts
    experts on shards that have none. If the slots do not suffice for min_replicas of each expert, as after a loss, it
    gives as many replicas as there is room for, and the reason says so. Equal arguments give equal plans.

    Args:
        current: the placement in force; shards in it that are not in `shards` are gone.
        load_LE: float64 [L, E], tokens for each expert over the window; non-negative.
        shards: the live shards, new and draining ones too.
        epoch: the new placement's number.
        expert_bytes: weights of one expert.
        expert_time_s: seconds that the window's tokens spent waiting for experts, as measured.
        window_s: seconds that the window covers.
        horizon_s: seconds for which the load is expected to stay like this.
        settings: thresholds, caps and bandwidths.

    Raises:
        InputError: an unfit load, or a shard named twice.
        CapacityError: the shards have too few slots to hold each expert once.
    """
    layers = _current_layers(current, load_LE, shards, settings.min_replicas)
    before_LS = time_LS(layers)
    is_missing = any(bool((layer.count_E == 0).any()) for layer in layers)
    at_start = [layer.hosts_SE.copy() for layer in layers]
    was_empty_S = _is_empty_S(at_start)
    draining_S = np.array([facts.is_draining for facts in shards])
    num_short = sum(repair(layer) for layer in layers)
    has_repaired = any(bool((layer.hosts_SE != was_SE).any()) for layer, was_SE in zip(layers, at_start, strict=True))
    could_save = _part_saved(before_LS, sum(layer.ideal_time for layer in layers))
    is_same_fleet = {slots.shard for slots in current.shards} == {facts.shard for facts in shards}
    may_stay = is_same_fleet and not has_repaired and not was_empty_S.any() and not draining_S.any()
    if may_stay and could_save < settings.min_improvement:
        return _nothing_to_gain(replace(current, epoch=epoch), before_LS, could_save, num_short, settings)
    # A copy's part of the time that all take side by side; whether it stays in a domain is not known yet.
    copy_s = expert_bytes / settings.network_bytes_per_s / len(shards)
    seconds_per_time = expert_time_s * horizon_s / window_s / max(float(before_LS.max(axis=1).sum()), 1e-300)
    least_gain = float("inf") if seconds_per_time <= 0 else copy_s / seconds_per_time
    budget = settings.max_moves - _improve(layers, at_start, settings.max_moves, least_gain)
    # Those without an expert at the start, and those that repair has left without.
    empty_S = was_empty_S | _is_empty_S([layer.hosts_SE for layer in layers])
    budget -= _fill_empty(layers, empty_S, budget)
    for _ in range(_MAX_ROUNDS):
        # As the next plan would begin: from here other steps may pay.
        for layer in layers:
            layer.quantise()
        num_copies = _improve(layers, at_start, budget, least_gain)
        budget -= num_copies
        if not num_copies or not budget:
            break
    placement = to_placement(layers, shards, layer_ids=current.layers, num_experts=current.num_experts, epoch=epoch)
    after_LS = time_LS(layers)
    moves = _moves(layers, at_start, current.layers, shards)
    cost_s = _cost_s(moves, shards, expert_bytes, settings)
    saved = 0.0 if is_missing else _part_saved(before_LS, float(after_LS.max(axis=1).sum()))
    gain_s = saved * expert_time_s * horizon_s / window_s
    has_filled = any(bool(layer.hosts_SE[was_empty_S].any()) for layer in layers)
    is_needed = has_repaired or has_filled
    return BalancePlan(
        placement=placement,
        moves=moves,
        bytes_moved=len(moves) * expert_bytes,
        balancedness_before=0.0 if is_missing else balancedness(before_LS[:, ~(was_empty_S & draining_S)]),
        balancedness_after=balancedness(after_LS[:, ~draining_S]),
        gain_s=gain_s,
        cost_s=cost_s,
        is_worthwhile=is_needed or (saved > 0 and saved >= settings.min_improvement and gain_s > cost_s),
        reason=_reason(is_needed, num_short, saved, gain_s, cost_s, len(moves), settings),
    )


def _part_saved(before_LS: Floats, after: float) -> float:
    """Return which part of the layers' largest times is saved if these are `after` in all; 0 without a load."""
    return 1 - after / float(before_LS.max(axis=1).sum()) if before_LS.any() else 0.0


def _nothing_to_gain(
    current: Placement, before_LS: Floats, could_save: float, num_short: int, settings: BalanceSettings
) -> BalancePlan:
    """Return the plan to stay, as not even level shards would save enough."""
    level = balancedness(before_LS)
    return BalancePlan(
        placement=current,
        moves=(),
        bytes_moved=0,
        balancedness_before=level,
        balancedness_after=level,
        gain_s=0.0,
        cost_s=0.0,
        is_worthwhile=False,
        reason=f"declined, below the threshold of {settings.min_improvement:.1%}: level shards would save "
        f"{could_save:.1%} of expert time{_short(num_short, settings)}",
    )


def _current_layers(
    current: Placement, load_LE: npt.ArrayLike, shards: Sequence[ShardFacts], min_replicas: int
) -> list[Layer]:
    num_layers, num_experts = len(current.layers), current.num_experts
    num_usable = sum(min(f.num_slots, num_layers * num_experts) for f in shards if not f.is_draining)
    used_LS = used_slots_LS(current, shards)
    layers = empty_layers(
        load_LE,
        shards,
        num_layers=num_layers,
        num_experts=num_experts,
        # What all have room for; `repair` gives those more replicas that find room.
        min_replicas=max(1, min(min_replicas, num_usable // (num_layers * num_experts))),
        used_LS=used_LS,
    )
    for layer in layers:
        layer.set_min_replicas(min_replicas)
    load_current(layers, current, shards)
    return layers


def _improve(layers: Sequence[Layer], at_start: Sequence[Bools], budget: int, least_gain: float) -> int:
    """Take the best steps of all layers for at most `budget` copies, each of at least this gain; return the copies."""
    # A layer's even part twice: what one does not need is there for another, and for the next search.
    most = min(MAX_STEPS, -(-2 * budget // len(layers)))
    paths = [_search(layer, hosts_SE, most) for layer, hosts_SE in zip(layers, at_start, strict=True)]
    taken, left = [0] * len(paths), budget
    # The best option of each layer, the best of all first; they stay what they are until taken, or beyond what is left.
    options = [_entry(option, layer) for layer, path in enumerate(paths) if (option := _next_option(path, 0, left))]
    heapq.heapify(options)
    while options:
        _, layer, option = heapq.heappop(options)
        if option.gain_per_copy < least_gain:
            break
        if option.num_copies <= left:
            taken[layer] = option.end
            left -= option.num_copies
        if (following := _next_option(paths[layer], taken[layer], left)) is not None:
            heapq.heappush(options, _entry(following, layer))
    for found, path, end in zip(layers, paths, taken, strict=True):
        found.restore(path[end].state)
    return budget - left


class _Option(NamedTuple):
    gain_per_copy: float
    end: int
    num_copies: int


def _entry(option: _Option, layer: int) -> tuple[float, int, _Option]:
    """Return an entry of a heap: the largest gain per copy first, then the first layer."""
    return -option.gain_per_copy, layer, option


def _next_option(path: Sequence[_Step], begin: int, budget: int) -> _Option | None:
    """Return how far to go on along a layer's steps for the largest gain per copy."""
    best: _Option | None = None
    for end in range(begin + 1, len(path)):
        num_copies = path[end].num_copies - path[begin].num_copies
        gain = path[begin].largest_time - path[end].largest_time
        if gain <= 0 or num_copies > budget:
            continue
        option = _Option(gain / num_copies if num_copies > 0 else float("inf"), end, num_copies)
        if best is None or option.gain_per_copy > best.gain_per_copy:
            best = option
    return best


def _search(layer: Layer, at_start_SE: Bools, most: int) -> list[_Step]:
    layer.level()
    steps = (_step(layer, at_start_SE) for _ in zip(range(most), improve(layer), strict=False))
    return [_step(layer, at_start_SE), *steps]


def _step(layer: Layer, at_start_SE: Bools) -> _Step:
    expert_P, shard_P, _ = layer.replicas
    num_copies = int((~at_start_SE[shard_P, expert_P]).sum())
    return _Step(float(layer.time_S.max()), num_copies, layer.snapshot())


def _is_empty_S(hosts: Sequence[Bools]) -> Bools:  # noqa: N802
    return np.asarray(~np.any([hosts_SE.any(axis=1) for hosts_SE in hosts], axis=0))


def _fill_empty(layers: Sequence[Layer], empty_S: Bools, budget: int) -> int:
    """Use the free slots of shards that had no expert, while the budget lasts; return how many."""
    num_filled = 0
    for layer in layers:
        num_filled += use_free_slots(layer, empty_S, budget - num_filled)
    return num_filled


def _moves(
    layers: Sequence[Layer], at_start: Sequence[Bools], layer_ids: Sequence[int], shards: Sequence[ShardFacts]
) -> tuple[Move, ...]:
    """Return a copy for each new replica, from the source in the target's domain that has copied least, if there is."""
    num_copies: dict[ShardId, int] = {facts.shard: 0 for facts in shards}
    moves = []
    for layer_id, layer, hosts_SE in zip(layer_ids, layers, at_start, strict=True):
        for target, expert in np.argwhere(layer.hosts_SE & ~hosts_SE).tolist():
            sources: Iterable[ShardFacts] = (shards[shard] for shard in np.flatnonzero(hosts_SE[:, expert]).tolist())
            source = min(
                sources,
                key=lambda facts: (facts.domain != shards[target].domain, num_copies[facts.shard]),
                default=None,
            )
            if source is not None:
                num_copies[source.shard] += 1
            moves.append(
                Move(
                    key=ExpertKey(layer_id, expert),
                    source=None if source is None else source.shard,
                    target=shards[target].shard,
                )
            )
    return tuple(moves)


def _cost_s(moves: Sequence[Move], shards: Sequence[ShardFacts], expert_bytes: int, settings: BalanceSettings) -> float:
    """Return how long the copies take: shards copy side by side, each one expert after the other."""
    domain_of = {facts.shard: facts.domain for facts in shards}
    seconds_of = {facts.shard: 0.0 for facts in shards}
    for move in moves:
        if move.source is None:
            bytes_per_s = settings.checkpoint_bytes_per_s
        elif domain_of[move.source] == domain_of[move.target]:
            bytes_per_s = settings.domain_bytes_per_s
        else:
            bytes_per_s = settings.network_bytes_per_s
        seconds_of[move.target] += expert_bytes / bytes_per_s
    return max(seconds_of.values(), default=0.0)


def _reason(
    is_needed: bool,
    num_short: int,
    saved: float,
    gain_s: float,
    cost_s: float,
    num_moves: int,
    settings: BalanceSettings,
) -> str:
    figures = f"{num_moves} moves in {cost_s:.3g} s save {saved:.1%} of expert time, {gain_s:.3g} s over the horizon"
    short = _short(num_short, settings)
    if is_needed:
        return f"repair: {figures}{short}"
    if saved <= 0 or saved < settings.min_improvement:
        return f"declined, below the threshold of {settings.min_improvement:.1%}: {figures}{short}"
    if gain_s <= cost_s:
        return f"declined, costs more than it saves: {figures}{short}"
    return f"worthwhile: {figures}{short}"


def _short(num_short: int, settings: BalanceSettings) -> str:
    if not num_short:
        return ""
    return f"; {num_short} experts have fewer than {settings.min_replicas} replicas for want of slots"
