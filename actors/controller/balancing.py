"""The two loops that follow the load: dispatch weights every few seconds, replicas and places now and then.

Both only propose; the keeper's thread carries out, and drops what was made for a placement that is no longer in force.
"""

import logging
import threading
import time

import numpy as np

from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.cluster.balancer import rebalance
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, ShardFacts
from expertmesh.cluster.dispatch_weights import changed_weights, level_weights
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog

_log = logging.getLogger(__name__)
_COLLECT_PERIOD_S = 1.0
# Weights that move less than this part of an expert's tokens stay: noise must not change which replica computes what.
_DEAD_BAND = 0.05
# Fewer tokens than this for each expert and layer say too little.
_LEAST_TOKENS = 8


class Balancing:
    """Loads in, proposals out. One thread runs `run`; any may call `plan`."""

    def __init__(self, keeper: Keeper, collector: LoadCollector, settings: ServeSettings, watchdog: Watchdog) -> None:
        self._keeper = keeper
        self._collector = collector
        self._settings = settings
        self._watchdog = watchdog
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
        settings = self._settings
        return rebalance(
            placement,
            load.prefill_LE + load.decode_LE,
            self._shard_facts(placement),
            epoch=placement.epoch + 1,
            expert_bytes=self._keeper.expert_bytes,
            expert_time_s=self._collector.expert_s,
            window_s=max(load.span_s, 1.0),
            horizon_s=self._collector.slow_s,
            settings=BalanceSettings(min_replicas=min(settings.replicas, len(placement.shards))),
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
        weights = changed_weights(placement.weights, level_weights(load_LE, placement), _DEAD_BAND)
        if weights != placement.weights:
            self._keeper.propose(
                Placement(
                    epoch=placement.epoch + 1,
                    num_experts=placement.num_experts,
                    layers=placement.layers,
                    shards=placement.shards,
                    weights=weights,
                ),
                "new dispatch weights",
            )

    def _rebalance(self) -> None:
        load = self._collector.slow(time.time())
        if int(np.sum(load.prefill_LE + load.decode_LE)) < _LEAST_TOKENS * load.prefill_LE.size:
            return
        if not self._keeper.is_calm:
            return
        plan = self.plan()
        if plan.is_worthwhile:
            self._keeper.propose(plan.placement, f"{len(plan.moves)} moves: {plan.reason}")

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
