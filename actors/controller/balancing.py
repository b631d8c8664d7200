"""The two loops that follow the load: dispatch weights every few seconds, replicas and places now and then.

Both only propose; the keeper's thread carries out, and drops what was made for a placement that is no longer in force.

Replicas follow the slow window. Where the load has changed so much that no weights level it any more, they follow the
fast one at once; and what the slow window wants is left undone where it would do harm to the present load.
"""

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.balancer import rebalance
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, ShardFacts
from expertmesh.cluster.dispatch_weights import changed_weights, level_weights
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

_log = logging.getLogger(__name__)
_COLLECT_PERIOD_S = 1.0
# Weights that move less than this part of an expert's tokens stay: noise must not change which replica computes what.
_DEAD_BAND = 0.05
# Fewer tokens than this for each expert and layer say too little.
_LEAST_TOKENS = 8
# A load has changed when the best weights stay below this balancedness, in as many looks one after the other, counted
# over this many tokens for each expert and layer (fewer are uneven by chance).
_CHANGED_BELOW = 0.9
_CHANGED_LOOKS = 2
_CHANGED_TOKENS = 32
# A load that changed is expected to stay for this long: a copy that does not pay within it is not made.
_CHANGED_HORIZON_S = 60.0


class Balancing:
    """Loads in, proposals out. One thread runs `run`; any may call `plan`."""

    def __init__(self, keeper: Keeper, collector: LoadCollector, settings: ServeSettings, watchdog: Watchdog) -> None:
        self._keeper = keeper
        self._collector = collector
        self._settings = settings
        self._watchdog = watchdog
        self._looks_changed = 0
        self._stopping = threading.Event()

    def run(self) -> None:
        """Collect and propose until `stop`."""
        settings = self._settings
        loops = {"load windows": (_COLLECT_PERIOD_S, self._collect)}
        if settings.weights_period_s:
            loops["dispatch weights"] = (settings.weights_period_s, self._level)
        if settings.rebalance_period_s:
            loops["balancer"] = (settings.rebalance_period_s, self._rebalance)
        due_s = dict.fromkeys(loops, 0.0)
        for name, (period_s, _) in loops.items():
            self._watchdog.expect(name, period_s)
            due_s[name] = time.monotonic() + period_s
        while not self._stopping.wait(max(0.0, min(due_s.values()) - time.monotonic())):
            name = min(due_s, key=lambda loop: due_s[loop])
            due_s[name] = time.monotonic() + loops[name][0]
            try:
                loops[name][1]()
                self._watchdog.success(name, time.monotonic())
            except Exception as error:  # noqa: BLE001  it is told and the loops go on
                if not isinstance(error, ExpertMeshError):
                    _log.exception("the loop of the %s failed", name)
                self._watchdog.failure(name, time.monotonic(), str(error))

    def stop(self) -> None:
        """End `run`."""
        self._stopping.set()

    def plan(self) -> BalancePlan:
        """Return what the balancer would do now.

        Raises:
            UnavailableError: nothing is served yet.
        """
        placement = self._keeper.placement
        if placement is None:
            raise UnavailableError("the deployment is still starting")
        load = self._collector.slow(time.time())
        return self._plan(placement, load, self._collector.expert_s, self._collector.slow_s)

    def _plan(self, placement: Placement, load: Load, expert_time_s: float, horizon_s: float) -> BalancePlan:
        return rebalance(
            placement,
            load.prefill_LE + load.decode_LE,
            self._shard_facts(placement),
            epoch=placement.epoch + 1,
            expert_bytes=self._keeper.expert_bytes,
            expert_time_s=expert_time_s,
            window_s=max(load.span_s, 1.0),
            horizon_s=horizon_s,
            settings=BalanceSettings(min_replicas=min(self._settings.replicas, len(placement.shards))),
        )

    def _collect(self) -> None:
        self._collector.collect(time.time())

    def _level(self) -> None:
        placement = self._keeper.placement
        assert placement is not None, "the loops began before the fleet"
        load = self._collector.fast(time.time())
        load_LE = load.prefill_LE + load.decode_LE
        if load_LE.sum() < _LEAST_TOKENS * load_LE.size or not self._keeper.is_calm:
            return
        best = replace(placement, epoch=placement.epoch + 1, weights=level_weights(load_LE, placement))
        if self._has_changed(load_LE, best) and self._follow_change(placement, load):
            return
        weights = changed_weights(placement.weights, best.weights, _DEAD_BAND)
        if weights != placement.weights:
            self._keeper.propose(replace(best, weights=weights), "new dispatch weights")

    def _has_changed(self, load_LE: npt.NDArray[np.int64], best: Placement) -> bool:
        """Say whether not even the best weights have levelled the shards for some looks now."""
        if not self._settings.rebalance_period_s or load_LE.sum() < _CHANGED_TOKENS * load_LE.size:
            return False
        is_level = balancedness(shard_load_LS(load_LE, best)) >= _CHANGED_BELOW
        self._looks_changed = 0 if is_level else self._looks_changed + 1
        return self._looks_changed >= _CHANGED_LOOKS

    def _follow_change(self, placement: Placement, load: Load) -> bool:
        """Propose what the present load wants; return whether there was anything."""
        self._looks_changed = 0
        slow = self._collector.slow(time.time())
        part = load.prefill_LE.sum() + load.decode_LE.sum()
        whole = slow.prefill_LE.sum() + slow.decode_LE.sum()
        expert_time_s = self._collector.expert_s * float(part) / max(1.0, float(whole))
        plan = self._plan(placement, load, expert_time_s, _CHANGED_HORIZON_S)
        if plan.is_worthwhile:
            self._keeper.propose(plan.placement, f"the load has changed, {len(plan.moves)} moves: {plan.reason}")
        return plan.is_worthwhile

    def _rebalance(self) -> None:
        slow, fast = self._collector.slow(time.time()), self._collector.fast(time.time())
        if int(np.sum(slow.prefill_LE + slow.decode_LE)) < _LEAST_TOKENS * slow.prefill_LE.size:
            return
        if not self._keeper.is_calm:
            return
        plan = self.plan()
        if plan.is_worthwhile and not self._harms(fast, plan):
            self._keeper.propose(plan.placement, f"{len(plan.moves)} moves: {plan.reason}")

    def _harms(self, fast: Load, plan: BalancePlan) -> bool:
        """Say whether a plan would level the present load less than the placement in force does."""
        load_LE = fast.prefill_LE + fast.decode_LE
        placement = self._keeper.placement
        assert placement is not None, "the loops began before the fleet"
        if load_LE.sum() < _CHANGED_TOKENS * load_LE.size:
            return False
        now, then = (
            balancedness(shard_load_LS(load_LE, replace(p, weights=level_weights(load_LE, p))))
            for p in (placement, plan.placement)
        )
        return then < min(now, _CHANGED_BELOW)

    def _shard_facts(self, placement: Placement) -> list[ShardFacts]:
        """Give each shard its even part of all replicas and the spare room on top, or what it has already."""
        keeper = self._keeper
        num_replicas = len(placement.layers) * placement.num_experts * min(keeper.replicas, len(keeper.shard_ids))
        even = -(-num_replicas // len(keeper.shard_ids))
        # At least one spare slot in each layer, or none at all.
        spare = max(
            round(even * self._settings.spare_slots), len(placement.layers) if self._settings.spare_slots else 0
        )
        nodes = {shard: str(keeper.shards.facts.get(shard, {}).get("node", "")) for shard in keeper.shard_ids}
        return [
            ShardFacts(
                shard=shard,
                num_slots=max(even + spare, placement.num_slots(shard)),
                node=nodes[shard],
                domain=nodes[shard],
            )
            for shard in keeper.shard_ids
        ]
