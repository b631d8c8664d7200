"""The controller: what its actor does, which answers for the deployment. Its absence loses no token.

`start` is idempotent: shards and workers are named and detached, so a controller that Ray restarts finds them again and
goes on.
"""

import os
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from expertmesh.actors.controller.autoscaling import Autoscaling
from expertmesh.actors.controller.balancing import Balancing
from expertmesh.actors.controller.keeper import Keeper
from expertmesh.actors.controller.live_view import LiveView
from expertmesh.actors.controller.loads import LoadCollector
from expertmesh.actors.controller.metrics import FleetMeter
from expertmesh.actors.controller.node_watch import NodeWatch
from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.controller.queues import Backlog
from expertmesh.actors.controller.records import FleetRecords
from expertmesh.actors.controller.status_fields import drops, layer_traffic, shown
from expertmesh.actors.controller.tiers import Tier
from expertmesh.actors.cores import step_back
from expertmesh.actors.giving_way import take_part
from expertmesh.actors.logs import EventLog, reason_of, start_logs
from expertmesh.actors.machine_share import num_usable_cores
from expertmesh.actors.runtime import draining_nodes, node_id
from expertmesh.actors.shard.actor import ShardActor
from expertmesh.actors.state import EmbeddedRedis, StateStore, open_client
from expertmesh.actors.worker.actor import WorkerActor
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.errors import InputError, StateError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.load_windows import Load
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.settings import ServeSettings
from expertmesh.cluster.watchdog import Watchdog
from expertmesh.v1.admin_pb2 import ShardStatus, WorkerStatus

_log = EventLog(__name__)
_CALL_TIMEOUT_S = 5.0
_AGAIN_S = 1.0


class Controller:
    """One deployment's controller. Calls may come on several threads."""

    def __init__(self, settings: ServeSettings, model: ModelInfo, state_dir: str) -> None:
        """Connect to the state store.

        Args:
            settings: what to serve and how.
            model: what the model is.
            state_dir: folder for the embedded Redis, used when settings.state is empty.
        """
        start_logs(settings, "controller", node_id())
        self._settings = settings
        self._model = model
        self._redis = None if settings.state else EmbeddedRedis(Path(state_dir))
        url = settings.state or (self._redis.url if self._redis else "")
        # Shards of a step compute at the same time, so they share the cores. A worker takes turns with them.
        cores, reserved = num_usable_cores(), int(settings.member_cpus)
        shard_threads = settings.shard_threads or reserved or max(1, cores // settings.shards)
        worker_threads = settings.worker_threads or reserved or max(1, cores // settings.workers)
        self._shards = Tier[ShardId](
            ShardActor, settings, node_labels=settings.nodes.shards, threads=shard_threads, concurrency=8
        )
        self._workers = Tier[WorkerId](
            WorkerActor, settings, node_labels=settings.nodes.workers, threads=worker_threads, concurrency=1000
        )
        store = StateStore(open_client(url), settings.deployment or model.name)
        self._watchdog = Watchdog()
        records = FleetRecords(store, model)
        self._keeper = Keeper(settings, model, records, self._shards, self._workers, self._note, self._watchdog)
        self._collector = LoadCollector(model, store, self._workers)
        self._meter = FleetMeter(model, hot_experts=settings.hot_experts)
        self._balancing = Balancing(self._keeper, self._collector, settings, self._watchdog, self._report)
        self._operator = Operator(self._keeper, store, room_timeout_s=settings.room_timeout_s, note=self._note)
        self._node_watch = NodeWatch(draining_nodes, self._operator.evacuations.hear, self._watchdog)
        self._autoscaling = (
            Autoscaling(self._keeper, self._operator, settings.autoscale, model, self._watchdog)
            if settings.autoscale
            else None
        )
        self._live = LiveView(model, self._keeper, self._collector, self._operator, spare_slots=settings.spare_slots)
        self._keeper.on_asked, self._keeper.on_moved = self._live.look, self._moved
        self._operator.book.on_noted = self._live.operation
        self._keeper.each_round = self._operator.step
        self._keeper.succeeded = lambda: self._operator.evacuations.moving
        if self._redis is not None:
            records.ensure_store = self._redis.ensure
        self._progress: list[str] = []
        self._started = False
        self._starting = threading.Lock()
        if _was_restarted():
            threading.Thread(target=self._come_back, name="come back", daemon=True).start()

    def start(self) -> None:
        """Bring up shards and workers, place the experts, join the two. Who asks meanwhile waits; again: no change.

        Raises:
            ExpertMeshError: the first thing that went wrong; nothing is left half-started but idle actors.
        """
        settings = self._settings
        with self._starting:
            if self._started:
                return
            self._note(f"starting {settings.shards} expert shards and {settings.workers} attention workers")
            self._keeper.bring_up(*_first_members(settings))
            self._begin()

    def _come_back(self) -> None:
        """Take up what a former controller left. Nobody waits for it, so whatever goes wrong is tried again."""
        while not self._started:
            try:
                with self._starting:
                    if not self._started:
                        self._keeper.take_up(*_first_members(self._settings))
                        self._begin()
            except Exception as error:  # noqa: BLE001  it is told and tried again
                _log.tell("take_up_failed", error, delay_s=_AGAIN_S)
                time.sleep(_AGAIN_S)

    def _begin(self) -> None:
        self._operator.resume()
        self._live.remember()
        take_part()
        step_back()
        self._note("ready")
        self._started = True
        threading.Thread(target=self._keeper.run, name="keeper", daemon=True).start()
        threading.Thread(target=self._node_watch.run, name="node watch", daemon=True).start()
        threading.Thread(target=self._balancing.run, name="balancing", daemon=True).start()
        if self._autoscaling is not None:
            threading.Thread(target=self._autoscaling.run, name="autoscaling", daemon=True).start()

    def differing_settings(self, settings: ServeSettings) -> list[str]:
        """Return the names of the settings that are not those of this fleet."""
        own = self._settings.model_dump()
        return [name for name, value in settings.model_dump().items() if own[name] != value]

    def report_lost(self, worker: WorkerId, shard: ShardId) -> None:
        """Hear from a worker that its link to a shard broke."""
        _log.tell("link_lost_reported", worker=worker, shard=shard)
        self._live.lost_link(worker, shard)
        self._keeper.report_lost()

    def progress(self, after: int) -> list[str]:
        """Return what `start` has said so far, from line number `after` on."""
        return self._progress[after:]

    def gateway_view(self, gateway_id: str, backlog: Backlog) -> dict[str, Any]:
        """Hear what waits at a gateway.

        Returns:
            What it needs: workers that can take requests, and whether each expert has a live replica.
        """
        if self._autoscaling is not None:
            self._autoscaling.queues.hear(gateway_id, backlog, time.monotonic())
        reason = self._not_ready_reason()
        handles = dict(self._workers.handles)
        ready = {w: handles[w] for w in self._workers.ready if w in handles}
        leaving = self._operator.leaving_workers
        self._operator.handover.inform(gateway_id, leaving, time.monotonic())
        ready = {worker: handle for worker, handle in ready.items() if worker not in leaving}
        return {
            "started": self._started,
            "workers": ready,
            "leaving": leaving,
            "ready": not reason,
            "reason": reason,
        }

    def scale(self, shards: int | None, workers: int | None) -> dict[str, Any]:
        """See Operator.scale and Autoscaling.require_allowed. Returns the operation's fields."""
        self._require_started()
        if self._autoscaling is not None:
            self._autoscaling.require_allowed(shards, workers)
        return self._operator.scale(shards, workers).facts()

    def drain(self, member: str) -> dict[str, Any]:
        """See Operator.drain. Returns the operation's fields."""
        self._require_started()
        return self._operator.drain(member).facts()

    def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """Plan, and unless it is a dry run begin to carry out. Returns the plan's fields and those of an operation."""
        self._require_started()
        plan = self._balancing.plan()
        operation = None
        if not dry_run and plan.is_worthwhile:
            operation = self._operator.go_to(plan.placement, "rebalance").facts()
        return {
            "moves": [
                {"layer": m.key.layer, "expert": m.key.expert, "source": m.source or "", "target": m.target}
                for m in plan.moves
            ],
            "bytes_moved": plan.bytes_moved,
            "balancedness_before": plan.balancedness_before,
            "balancedness_after": plan.balancedness_after,
            "gain_s": plan.gain_s,
            "cost_s": plan.cost_s,
            "is_worthwhile": plan.is_worthwhile,
            "reason": plan.reason,
            **({"operation": operation} if operation else {}),
        }

    def placement_record(self) -> bytes:
        """Return the placement in force, as `Placement.to_bytes` packs it."""
        self._require_started()
        placement = self._keeper.placement
        assert placement is not None
        return placement.to_bytes()

    def load_placement(self, record: bytes) -> dict[str, Any]:
        """Begin to put a placement in force that was saved. Returns the operation's fields.

        Raises:
            InputError: it is damaged, or does not fit; see Operator.go_to.
        """
        self._require_started()
        try:
            target = Placement.from_bytes(record)
        except StateError as error:
            raise InputError(str(error)) from error
        return self._operator.go_to(target, f"load placement {zlib.crc32(record):08x}").facts()

    def operations(self, operation_id: str) -> list[dict[str, Any]]:
        """Return one operation, or all, the newest last, when the id is empty.

        Raises:
            InputError: there is none of that id.
            UnavailableError: a controller that came back does not know them yet.
        """
        self._require_started()
        chosen = [self._operator.get(operation_id)] if operation_id else self._operator.all()
        return [operation.facts() for operation in chosen]

    def status(self) -> dict[str, Any]:
        """Return what StatusResponse shows, grpc_address excepted."""
        if self._started:
            try:
                self._collector.collect(time.time())
            except UnavailableError as error:
                _log.tell("loads_stale", reason=reason_of(error))
        reason = self._not_ready_reason()
        return {
            "plan": self._plan_name(),
            "epoch": self._keeper.placement.epoch if self._keeper.placement else 0,
            "balancedness": self._balancedness(self._collector.slow(time.time())),
            "recent_balancedness": self._balancedness(self._collector.fast(time.time())),
            "controller": {"pid": os.getpid(), "node": node_id()},
            "shards": [shown(f, ShardStatus) for f in self._shards.in_order()],
            "workers": [shown(f, WorkerStatus) for f in self._workers.in_order()],
            "layer_traffic": layer_traffic(self._model, self._collector.latest()),
            **drops(self._model, self._settings.capacity_factor, self._collector),
            "ready": not reason,
            "not_ready_reason": reason,
            "warnings": [
                *self._watchdog.stalled(time.monotonic()),
                *self._exposed(),
                *self._operator.evacuations.warnings(time.time()),
            ],
            "autoscaler": self._autoscaling.status(time.monotonic()) if self._autoscaling else None,
        }

    def live_view(self, epoch: int, after: int, life: int) -> dict[str, Any]:
        """Return what the live page shows; see LiveView.view."""
        return self._live.view(self.status(), epoch, after, life)

    def loads(self) -> list[dict[str, Any]]:
        """Return the fields of LayerLoad of each layer: what was counted since start."""
        counters = self._counters()
        load_LE, decode_LE = (sum((c[kind] for c in counters), self._no_load()) for kind in ("load_LE", "decode_LE"))
        # Every slice of an expert computes for the same tokens.
        load_LE, decode_LE = (counted_LE[:, :: self._model.expert_tp] for counted_LE in (load_LE, decode_LE))
        return [
            {"layer": layer, "tokens": load_LE[row].tolist(), "decode_tokens": int(decode_LE[row].sum())}
            for row, layer in enumerate(self._model.moe_layers)
        ]

    def stop(self) -> None:
        """End workers, shards and the embedded Redis, and free what was reserved for them."""
        if self._autoscaling is not None:
            self._autoscaling.stop()
        self._node_watch.stop()
        self._balancing.stop()
        self._keeper.stop()
        for worker in tuple(self._workers.handles):
            self._workers.dismiss(worker)
        for shard in tuple(self._shards.handles):
            self._shards.dismiss(shard)
        if self._redis is not None:
            self._redis.close()

    def _report(self) -> None:
        """Hand on the metrics. On the thread of the balancing loops."""
        now_s = time.time()
        self._meter.report_loops(self._watchdog, time.monotonic())
        self._meter.report(
            shards=self._shards.in_order(),
            workers=self._workers.in_order(),
            counters=self._collector.latest(),
            placement=self._keeper.placement,
            is_ready=not self._not_ready_reason(),
            slow=self._collector.slow(now_s),
            recent=self._collector.fast(now_s),
        )

    def _moved(self, duration_s: float, why: str) -> None:
        self._meter.placement_changed(duration_s)
        self._live.moved(duration_s, why)

    def _require_started(self) -> None:
        if not self._started:
            raise UnavailableError("the deployment is still starting")

    def _not_ready_reason(self) -> str:
        return self._keeper.not_ready_reason() if self._started else "starting"

    def _counters(self) -> list[dict[str, Any]]:
        handles = dict(self._workers.handles)
        references = [handles[w].counters.remote() for w in self._workers.ready if w in handles]
        try:
            return list(ray.get(references, timeout=_CALL_TIMEOUT_S))
        except RayError as error:
            raise UnavailableError(f"a worker does not answer: {error}") from error

    def _no_load(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.zeros((len(self._model.moe_layers), self._model.num_slices), dtype=np.int64)

    def _balancedness(self, load: Load) -> float | None:
        placement = self._keeper.placement
        if placement is None:
            return None
        load_LE = load.prefill_LE + load.decode_LE
        return float(balancedness(shard_load_LS(load_LE, placement))) if load_LE.any() else None

    def _exposed(self) -> list[str]:
        """Say what the loss of a node would cost in spite of replicas."""
        placement, nodes = self._keeper.placement, self._shards.nodes
        if placement is None or self._keeper.replicas == 1 or len(set(nodes.values())) == 1:
            return []
        exposed = placement.on_one_node(nodes)
        return (
            [f"{len(exposed)} experts have all their replicas on one node, {exposed[0]} among them"] if exposed else []
        )

    def _plan_name(self) -> str:
        keeper = self._keeper
        replicas = min(keeper.replicas, max(1, len(keeper.shard_ids)))
        shards, expert_tp = len(keeper.shard_ids), self._model.expert_tp
        experts = f"ep={shards}" if expert_tp == 1 else f"tp={expert_tp} over {shards} shards"
        return f"experts {experts} x {replicas} replicas, attention dp={len(keeper.worker_ids)}"

    def _note(self, line: str) -> None:
        _log.tell("fleet_progress", line=line)
        self._live.note(line)
        if not self._started:
            self._progress.append(line)


def _first_members(settings: ServeSettings) -> tuple[list[ShardId], list[WorkerId]]:
    return (
        [ShardId(f"shard-{i}") for i in range(settings.shards)],
        [WorkerId(f"worker-{i}") for i in range(settings.workers)],
    )


def _was_restarted() -> bool:
    """Say whether Ray has started this actor again: then nobody calls `start`."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)
