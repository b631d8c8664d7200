"""What the controller reports of the fleet: what members said last, what workers counted, how its own loops do.

Nobody is asked for it: the facts are those of the keeper's rounds, the counters those of the load windows.

Shape suffixes: L MoE layers, E experts (or slices of experts), S shards.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.actors.metrics import Metrics
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.hot_experts import hottest_LK
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.watchdog import Watchdog

STATES = ("ready", "starting", "loading", "unresponsive", "dead")
Facts = Sequence[Mapping[str, Any]]
Counts = npt.NDArray[Any]


class FleetMeter:
    """Reports of one deployment. One thread calls `report`, any may call `placement_changed`."""

    def __init__(
        self,
        model: ModelInfo,
        *,
        hot_experts: int,
        metrics: Metrics | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Report nothing yet.

        Args:
            model: what is served.
            hot_experts: experts of each layer that are shown by name, the hottest ones.
            metrics: of this process.
            wall_clock: seconds since 1970.
        """
        self._model = model
        self._hot_experts = hot_experts
        self._metrics = metrics or Metrics()
        self._wall_clock = wall_clock
        self._changes_s: list[float] = []
        self._changed_at_s: float | None = None
        # What each worker, of which life, had counted at the last report.
        self._seen: dict[str, tuple[object, Counts]] = {}
        self._tokens_of: dict[str, float] = {}

    def placement_changed(self, duration_s: float) -> None:
        """Hear that another placement is in force, and how long it took to bring that about."""
        self._changes_s.append(duration_s)
        self._changed_at_s = self._wall_clock()

    def report(
        self,
        *,
        shards: Facts,
        workers: Facts,
        counters: Facts,
        placement: Placement | None,
        is_ready: bool,
        slow: Load,
        recent: Load,
    ) -> None:
        """Hand on what is known now.

        Args:
            shards: what `ShardActor.describe` answered last.
            workers: what `WorkerActor.describe` answered last.
            counters: what `WorkerActor.counters` answered last.
            placement: the one in force.
            is_ready: whether requests can be served.
            slow: the long window.
            recent: the short window.
        """
        metrics = self._metrics
        metrics.set("expertmesh_ready", is_ready)
        for tier, members in (("shard", shards), ("worker", workers)):
            states = [facts["state"] for facts in members]
            for state in STATES:
                metrics.set("expertmesh_members", states.count(state), tier=tier, state=state)
        for facts in workers:
            self._worker(facts)
        for facts in shards:
            self._shard(facts)
        self._count_work(counters, placement)
        if placement is not None:
            metrics.set("expertmesh_epoch", placement.epoch)
            for window, load in (("slow", slow), ("recent", recent)):
                load_LE = load.prefill_LE + load.decode_LE
                if load_LE.any():
                    ratio = balancedness(shard_load_LS(load_LE, placement))
                    metrics.set("expertmesh_balancedness_ratio", ratio, window=window)
        self._hot(slow.prefill_LE + slow.decode_LE)
        changes_s, self._changes_s = self._changes_s, []
        metrics.observe("expertmesh_placement_change_seconds", changes_s)
        if self._changed_at_s is not None:
            metrics.set("expertmesh_last_placement_change_timestamp_seconds", self._changed_at_s)

    def report_loops(self, watchdog: Watchdog, now_s: float) -> None:
        """Hand on how the controller's loops do; now_s is of the watchdog's clock."""
        for loop in watchdog.report(now_s):
            self._metrics.set("expertmesh_loop_stalled", loop.is_stalled, loop=loop.name)
            self._metrics.set("expertmesh_loop_last_success_age_seconds", loop.since_s, loop=loop.name)

    def _worker(self, facts: Mapping[str, Any]) -> None:
        if "counters" not in facts:
            return  # it has said nothing yet
        worker, life, counted = facts["id"], facts["pid"], facts["counters"]
        for name, value in (
            ("running_sequences", facts["running"]),
            ("waiting_sequences", facts["waiting"]),
            ("kv_pages", facts["num_pages"]),
            ("kv_free_pages", facts["free_pages"]),
        ):
            self._metrics.set(f"expertmesh_{name}", value, worker=worker)
        for name, total in (
            ("generated_tokens_total", facts["tokens_generated"]),
            ("worker_busy_seconds_total", counted["busy_s"]),
            ("worker_expert_seconds_total", counted["expert_s"]),
            ("retries_total", counted["num_retries"]),
            ("lost_links_total", counted["num_lost_links"]),
            ("dropped_pairs_total", facts["dropped_pairs"]),
        ):
            self._metrics.count(f"expertmesh_{name}", total, life=life, worker=worker)

    def _shard(self, facts: Mapping[str, Any]) -> None:
        if "counters" not in facts:
            return
        shard, life, counted = facts["id"], facts["pid"], facts["counters"]
        self._metrics.set("expertmesh_shard_slots", facts["num_slots"], shard=shard)
        self._metrics.set("expertmesh_shard_weight_bytes", facts["weight_bytes"], shard=shard)
        for name, total in (
            ("shard_packets_total", counted["num_packets"]),
            ("shard_busy_seconds_total", counted["busy_s"]),
            ("shard_queue_seconds_total", counted["queue_s"]),
        ):
            self._metrics.count(f"expertmesh_{name}", total, life=life, shard=shard)
        for source, total in (("shard", facts["experts_copied"]), ("checkpoint", facts["experts_read"])):
            self._metrics.count("expertmesh_replica_moves_total", total, life=life, shard=shard, source=source)

    def _count_work(self, counters: Facts, placement: Placement | None) -> None:
        """Count bytes and tokens of each worker, and what of them fell to each shard under the placement in force."""
        model = self._model
        back = "combine" if model.expert_tp == 1 else "reduce"
        for each in counters:
            worker, life = each["id"], each["life"]
            for kind, counted_L in (("dispatch", each["dispatch_bytes_L"]), (back, each["combine_bytes_L"])):
                self._metrics.count("expertmesh_link_bytes_total", sum(counted_L), life=life, worker=worker, kind=kind)
            # Every layer counts each token once for each slice of each expert that it chose.
            pairs = model.top_k * model.expert_tp
            total, decode = int(each["load_LE"][0].sum()) // pairs, int(each["decode_LE"][0].sum()) // pairs
            for phase, tokens in (("prefill", total - decode), ("decode", decode)):
                self._metrics.count(
                    "expertmesh_computed_tokens_total", max(0, tokens), life=life, worker=worker, phase=phase
                )
            if placement is not None:
                self._share_out(worker, life, each["load_LE"], placement)
        for shard, shared in self._tokens_of.items():
            self._metrics.count("expertmesh_shard_tokens_total", shared, shard=shard)

    def _share_out(self, worker: str, life: object, load_LE: Counts, placement: Placement) -> None:
        known_life, known_LE = self._seen.get(worker, (life, np.zeros_like(load_LE)))
        growth_LE = load_LE - known_LE if known_life == life else load_LE
        if (growth_LE < 0).any():
            return  # an answer that a later one has overtaken
        self._seen[worker] = life, load_LE
        load_S = shard_load_LS(growth_LE, placement).sum(axis=0)
        for slots, tokens in zip(placement.shards, load_S.tolist(), strict=True):
            self._tokens_of[slots.shard] = self._tokens_of.get(slots.shard, 0.0) + tokens

    def _hot(self, slow_LE: Counts) -> None:
        # Every slice of an expert computes for the same tokens.
        index_LK, ratio_LK = hottest_LK(slow_LE[:, :: self._model.expert_tp], self._hot_experts)
        for row, layer in enumerate(self._model.moe_layers):
            for rank, (index, ratio) in enumerate(zip(index_LK[row].tolist(), ratio_LK[row].tolist(), strict=True), 1):
                self._metrics.set("expertmesh_hot_expert_index", index, layer=layer, rank=rank)
                self._metrics.set("expertmesh_hot_expert_load_ratio", ratio, layer=layer, rank=rank)
