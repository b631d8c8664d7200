"""What the loops that follow the load propose: dispatch weights every few seconds, replicas and places now and then.

Replicas follow the slow window. Where the load has changed so much that no weights level it any more, they follow the
fast one at once; and what the slow window wants is left undone where it would do harm to the present load.

Shape suffixes: L MoE layers, E experts of a layer (or slices of them, where experts are cut).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.balancer import rebalance
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, ShardFacts
from expertmesh.cluster.dispatch_weights import changed_weights, level_weights
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.unevenness import uneven_layers

# Weights that move less than this part of a replica's even share stay, a twentieth of the tokens of an expert with two:
# a small gain must not change which replica computes what.
_DEAD_BAND = 0.1
# Fewer tokens than this for each expert and layer say too little.
_LEAST_TOKENS = 8
# A load has changed when the best weights stay below this balancedness, in as many looks one after the other, counted
# over this many tokens for each expert and layer (fewer are uneven by chance).
_CHANGED_BELOW = 0.9
_CHANGED_LOOKS = 2
_CHANGED_TOKENS = 32
# A load that changed is expected to stay for this long: a copy that does not pay within it is not made.
_CHANGED_HORIZON_S = 60.0
# Copies of a plan, where there are so many shards that BalanceSettings' own cap would be fewer.
_COPIES_A_SHARD = 16


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A placement to go to, and why. num_moves: experts to be copied for it; 0: its weights alone are new."""

    placement: Placement
    reason: str
    num_moves: int = 0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What is known at a look: the load of both windows, seconds spent on experts in the slow one, the shards."""

    fast: Load
    slow: Load
    expert_time_s: float
    shards: Sequence[ShardFacts]
    expert_bytes: int


class LoadFollower:
    """Decides for one deployment. can_move: whether replicas may follow the load by themselves, or weights alone."""

    def __init__(self, *, replicas: int, slow_s: float, can_move: bool) -> None:
        self._replicas, self._slow_s, self._can_move = replicas, slow_s, can_move
        self._looks_changed = 0

    def level(self, placement: Placement, seen: Seen) -> Proposal | None:
        """Return weights that level the load of the last seconds; where none do, replicas that will. None: no change.

        Raises:
            InputError, CapacityError: see `rebalance`.
        """
        load_LE = _total_LE(seen.fast)
        if load_LE.sum() < _LEAST_TOKENS * load_LE.size:
            return None
        best = _levelled(placement, load_LE)
        if self._has_changed(load_LE, best):
            self._looks_changed = 0
            part, whole = float(load_LE.sum()), float(_total_LE(seen.slow).sum())
            expert_time_s = seen.expert_time_s * part / max(1.0, whole)
            plan = self._plan(placement, seen.fast, expert_time_s, _CHANGED_HORIZON_S, seen)
            if plan.is_worthwhile:
                return _proposal(plan, "the load has changed, ")
        weights = changed_weights(placement.weights, best.weights, _DEAD_BAND)
        if weights == placement.weights:
            return None
        return Proposal(placement=replace(best, weights=weights), reason="new dispatch weights")

    def rebalance(self, placement: Placement, seen: Seen) -> Proposal | None:
        """Return replicas that suit the load of the last minutes. None: those that there are suit it.

        Raises:
            InputError, CapacityError: see `rebalance`.
        """
        if int(_total_LE(seen.slow).sum()) < _LEAST_TOKENS * seen.slow.prefill_LE.size:
            return None
        plan = self.plan(placement, seen)
        return _proposal(plan) if plan.is_worthwhile and not _harms(placement, plan, seen.fast) else None

    def plan(self, placement: Placement, seen: Seen) -> BalancePlan:
        """Return what the balancer makes of the load of the last minutes, worthwhile or not.

        Raises:
            InputError, CapacityError: see `rebalance`.
        """
        return self._plan(placement, seen.slow, seen.expert_time_s, self._slow_s, seen)

    def _plan(
        self, placement: Placement, load: Load, expert_time_s: float, horizon_s: float, seen: Seen
    ) -> BalancePlan:
        caps = BalanceSettings()
        settings = BalanceSettings(
            min_replicas=min(self._replicas, len(placement.shards)),
            max_moves=max(caps.max_moves, _COPIES_A_SHARD * len(seen.shards)),
        )
        return rebalance(
            placement,
            _total_LE(load),
            seen.shards,
            epoch=placement.epoch + 1,
            expert_bytes=seen.expert_bytes,
            expert_time_s=expert_time_s,
            window_s=max(load.span_s, 1.0),
            horizon_s=horizon_s,
            settings=settings,
        )

    def _has_changed(self, load_LE: npt.NDArray[np.int64], best: Placement) -> bool:
        """Say whether not even the best weights have levelled the shards for some looks now."""
        if not self._can_move or load_LE.sum() < _CHANGED_TOKENS * load_LE.size:
            return False
        is_level = balancedness(shard_load_LS(load_LE, best)) >= _CHANGED_BELOW
        self._looks_changed = 0 if is_level else self._looks_changed + 1
        return self._looks_changed >= _CHANGED_LOOKS


def shard_facts(
    placement: Placement,
    shards: Sequence[ShardId],
    nodes: Mapping[ShardId, str],
    *,
    replicas: int,
    spare_slots: float,
) -> list[ShardFacts]:
    """Give each shard its even part of all replicas and the spare room on top, or what it has already.

    Args:
        placement: in force.
        shards: that are alive.
        nodes: of each; a node is a domain.
        replicas: of each expert, as far as there are shards.
        spare_slots: room for more replicas, as a part of a shard's slots; at least one in each layer, or none at all.
    """
    num_replicas = len(placement.layers) * placement.num_experts * min(replicas, len(shards))
    even = -(-num_replicas // len(shards))
    spare = max(round(even * spare_slots), len(placement.layers) if spare_slots else 0)
    used = {slots.shard: len(slots.experts) for slots in placement.shards}
    return [
        ShardFacts(
            shard=shard,
            num_slots=max(even + spare, used.get(shard, 0)),
            node=nodes[shard],
            domain=nodes[shard],
        )
        for shard in shards
    ]


def _harms(placement: Placement, plan: BalancePlan, fast: Load) -> bool:
    """Say whether a plan would level the present load less than the placement in force does."""
    load_LE = _total_LE(fast)
    if load_LE.sum() < _CHANGED_TOKENS * load_LE.size:
        return False
    now, then = (balancedness(shard_load_LS(load_LE, _levelled(p, load_LE))) for p in (placement, plan.placement))
    return then < min(now, _CHANGED_BELOW)


def _levelled(placement: Placement, load_LE: npt.NDArray[np.int64]) -> Placement:
    """Return a placement with weights that level a load, in the layers where that is worth it."""
    uneven_L = uneven_layers(load_LE, placement)
    if not uneven_L.any():
        return placement
    weights = level_weights(load_LE, placement, only_L=uneven_L)
    return replace(placement, epoch=placement.epoch + 1, weights=weights)


def _proposal(plan: BalancePlan, why: str = "") -> Proposal:
    num_moves = len(plan.moves)
    return Proposal(placement=plan.placement, reason=f"{why}{num_moves} moves: {plan.reason}", num_moves=num_moves)


def _total_LE(load: Load) -> npt.NDArray[np.int64]:  # noqa: N802  # a shape suffix
    return load.prefill_LE + load.decode_LE
