"""The controller: starts shards and workers, publishes placements, watches over both. Its absence loses no token.

`start` is idempotent: actors are named and detached, so a controller that Ray restarts finds them again and goes on.
"""

import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import ray
from ray.exceptions import RayError

from expertmesh.actors.runtime import CONTROLLER, NAMESPACE, actor_env, node_address, pinned_options
from expertmesh.actors.shard.actor import ShardActor
from expertmesh.actors.state import EmbeddedRedis, StateStore, connect
from expertmesh.actors.worker.actor import WorkerActor
from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.errors import ExpertMeshError, StateError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.settings import ServeSettings

_log = logging.getLogger(__name__)
_WATCH_PERIOD_S = 0.5
_CALL_TIMEOUT_S = 5.0
_Id = TypeVar("_Id", bound=str)  # ShardId or WorkerId


class Controller:
    """One deployment's controller. Calls may come on several threads."""

    def __init__(self, settings: ServeSettings, model: ModelInfo, state_dir: str) -> None:
        """Connect to the state store.

        Args:
            settings: what to serve and how.
            model: what the model is.
            state_dir: folder for the embedded Redis, used when settings.state is empty.
        """
        self._settings = settings
        self._model = model
        self._host = node_address()
        self._redis = None if settings.state else EmbeddedRedis(Path(state_dir))
        url = settings.state or (self._redis.url if self._redis else "")
        self._store = StateStore(connect(url), model.name)
        self._shards: dict[ShardId, Any] = {}
        self._workers: dict[WorkerId, Any] = {}
        self._shard_facts: dict[ShardId, dict[str, Any]] = {}
        self._worker_facts: dict[WorkerId, dict[str, Any]] = {}
        self._placement: Placement | None = None
        self._progress: list[str] = []
        self._started = False
        self._stopping = threading.Event()
        if _was_restarted():
            threading.Thread(target=self.start, name="restart", daemon=True).start()

    def start(self) -> None:
        """Bring up shards and workers, place the experts, join the two. Asking again changes nothing.

        Raises:
            ExpertMeshError: the first thing that went wrong; nothing is left half-started but idle actors.
        """
        settings = self._settings
        shard_ids = [ShardId(f"shard-{i}") for i in range(settings.shards)]
        worker_ids = [WorkerId(f"worker-{i}") for i in range(settings.workers)]
        self._note(f"starting {len(shard_ids)} expert shards and {len(worker_ids)} attention workers")
        # Shards of a step compute at the same time, so they share the cores. A worker takes turns with them; half of
        # the cores measured best: threads that wait passively cost more to wake than they gain on a small layer.
        cores = psutil.cpu_count() or 1
        shard_threads = settings.shard_threads or max(1, cores // len(shard_ids))
        worker_threads = settings.worker_threads or max(1, cores // (2 * len(worker_ids)))
        self._shards = {s: self._actor(ShardActor, s, shard_threads) for s in shard_ids}
        self._workers = {w: self._actor(WorkerActor, w, worker_threads) for w in worker_ids}
        placement = self._first_placement(shard_ids)
        record = placement.to_bytes()
        self._note("loading experts into the shards and the dense half into the workers")
        loads = [s.load.remote(record) for s in self._shards.values()]
        loads += [w.load.remote() for w in self._workers.values()]
        self._wait(loads)
        self._store.save_placement(placement)
        self._placement = placement
        self._note(f"joining workers and shards, epoch {placement.epoch}")
        self._shard_facts = dict(
            zip(shard_ids, self._wait([s.describe.remote() for s in self._shards.values()]), strict=True)
        )
        ends = {shard: facts["link_end"] for shard, facts in self._shard_facts.items()}
        self._wait([w.set_fleet.remote(record, self._shards, ends) for w in self._workers.values()])
        self._wait([w.start.remote() for w in self._workers.values()])
        self._started = True
        self._watch_once()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        self._note("ready")

    def progress(self, after: int) -> list[str]:
        """Return what `start` has said so far, from line number `after` on."""
        return self._progress[after:]

    def gateway_view(self) -> dict[str, Any]:
        """Return what a gateway needs: workers that can take requests, and whether each expert has a live replica."""
        reason = self._not_ready_reason()
        ready = {w: self._workers[w] for w, facts in self._worker_facts.items() if facts["state"] == "ready"}
        return {"started": self._started, "workers": ready, "ready": not reason, "reason": reason}

    def status(self) -> dict[str, Any]:
        """Return what StatusResponse shows, grpc_address excepted."""
        reason = self._not_ready_reason()
        return {
            "plan": self._plan_name(),
            "epoch": self._placement.epoch if self._placement else 0,
            "balancedness": self._balancedness(),
            "controller": {"pid": os.getpid(), "node": self._host},
            "shards": [_without(f, "link_end") for f in self._shard_facts.values()],
            "workers": [_without(f, "lost_shards") for f in self._worker_facts.values()],
            "layer_traffic": self._traffic(),
            "ready": not reason,
            "not_ready_reason": reason,
        }

    def loads(self) -> dict[int, list[int]]:
        """Return the tokens of each expert since start, by layer."""
        load_LE = sum((np.array(c["load_LE"], dtype=np.int64) for c in self._counters()), self._no_load())
        return {layer: load_LE[row].tolist() for row, layer in enumerate(self._model.moe_layers)}

    def stop(self) -> None:
        """End workers, shards and the embedded Redis, and free what was reserved for them."""
        self._stopping.set()
        for handle in (*self._workers.values(), *self._shards.values()):
            ray.kill(handle)
        for name in (*self._workers, *self._shards):
            ray.util.remove_placement_group(ray.util.get_placement_group(f"pg-{name}"))
        if self._redis is not None:
            self._redis.close()

    def _actor(self, cls: type, name: str, threads: int) -> Any:
        """Return the named actor, started if it is not there."""
        try:
            return ray.get_actor(name, NAMESPACE)
        except ValueError:
            pass  # it does not exist yet
        settings = self._settings
        resources = ray.cluster_resources()
        use_gpu = settings.device == "cuda" or (settings.device == "auto" and resources.get("GPU", 0) > 0)
        actors = settings.shards + settings.workers
        options = pinned_options(
            name,
            num_cpus=max(0.01, min(1.0, round(0.9 * resources.get("CPU", 1) / actors - 0.005, 2))),
            num_gpus=1 if use_gpu else 0,
            env=actor_env(threads),
            timeout_s=60.0,
        )
        return (
            ray.remote(cls)
            .options(max_concurrency=1000 if cls is WorkerActor else 4, **options)
            .remote(name, settings, threads)
        )

    def _first_placement(self, shard_ids: list[ShardId]) -> Placement:
        """Return the stored placement if it is of this fleet, else a new one in the next epoch."""
        epoch = 1
        try:
            stored = self._store.load_placement()
        except StateError as error:
            _log.warning("the stored placement is unusable and will be replaced: %s", error)
            stored = None
        if stored is not None:
            fits = stored.layers == self._model.moe_layers and stored.num_experts == self._model.num_experts
            if fits and [s.shard for s in stored.shards] == shard_ids and self._shard_states() == {"ready"}:
                return stored
            epoch = stored.epoch + 1
        return initial_placement(
            self._model.moe_layers, self._model.num_experts, shard_ids, self._settings.replicas, epoch=epoch
        )

    def _shard_states(self) -> set[str]:
        return {facts["state"] for facts in self._wait([s.describe.remote() for s in self._shards.values()])}

    def _wait(self, references: list[Any]) -> list[Any]:
        """Wait for all calls; raise the first failure as it was raised there."""
        try:
            results: list[Any] = ray.get(references, timeout=self._settings.start_timeout_s)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, ExpertMeshError) else UnavailableError(str(error))) from error
        except RayError as error:
            raise UnavailableError(f"an actor could not be started: {error}") from error
        return results

    def _watch(self) -> None:
        while not self._stopping.wait(_WATCH_PERIOD_S):
            try:
                self._watch_once()
            except Exception:  # noqa: BLE001  whatever went wrong is logged, and the watch goes on
                _log.exception("watching failed; the next round is in %.1f s", _WATCH_PERIOD_S)

    def _watch_once(self) -> None:
        """Ask every shard and worker how it is; one that does not answer in time is named so."""
        _ask_all(self._shards, self._shard_facts)
        _ask_all(self._workers, self._worker_facts)

    def _not_ready_reason(self) -> str:
        if not self._started or self._placement is None:
            return "starting"
        lost = {shard for facts in self._worker_facts.values() for shard in facts.get("lost_shards", ())}
        live = {s for s, facts in self._shard_facts.items() if facts["state"] == "ready" and s not in lost}
        missing = self._placement.missing(live)
        if missing:
            return f"{len(missing)} experts have no live replica, {missing[0]} among them"
        if not any(facts["state"] == "ready" for facts in self._worker_facts.values()):
            return "no attention worker is ready"
        return ""

    def _counters(self) -> list[dict[str, Any]]:
        handles = [self._workers[w] for w, facts in self._worker_facts.items() if facts["state"] == "ready"]
        references = [handle.counters.remote() for handle in handles]
        try:
            return list(ray.get(references, timeout=_CALL_TIMEOUT_S))
        except RayError as error:
            raise UnavailableError(f"a worker does not answer: {error}") from error

    def _no_load(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.zeros((len(self._model.moe_layers), self._model.num_experts), dtype=np.int64)

    def _balancedness(self) -> float | None:
        if self._placement is None:
            return None
        load_LE = sum((np.array(c["load_LE"], dtype=np.int64) for c in self._counters()), self._no_load())
        return float(balancedness(shard_load_LS(load_LE, self._placement))) if load_LE.any() else None

    def _traffic(self) -> list[dict[str, int]]:
        counters = self._counters()
        return [
            {
                "layer": layer,
                "dispatch_bytes": sum(c["dispatch_bytes_L"][row] for c in counters),
                "combine_bytes": sum(c["combine_bytes_L"][row] for c in counters),
                "reduce_bytes": 0,
            }
            for row, layer in enumerate(self._model.moe_layers)
        ]

    def _plan_name(self) -> str:
        settings = self._settings
        return f"experts ep={settings.shards} x {settings.replicas} replicas, attention dp={settings.workers}"

    def _note(self, line: str) -> None:
        _log.info(line)
        self._progress.append(line)


def start_controller(settings: ServeSettings, model: ModelInfo, state_dir: Path) -> Any:
    """Start the detached controller actor on this Ray cluster and return its handle."""
    return (
        ray.remote(Controller)
        .options(
            name=CONTROLLER,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            max_concurrency=16,
            num_cpus=0,
            runtime_env={"env_vars": actor_env(1)},
        )
        .remote(settings, model, str(state_dir))
    )


def _ask_all(handles: dict[_Id, Any], facts: dict[_Id, dict[str, Any]]) -> None:
    """Ask the actors of one tier how they are and put their answers into facts."""
    asked = {actor_id: handle.describe.remote() for actor_id, handle in handles.items()}
    deadline_s = time.monotonic() + _CALL_TIMEOUT_S
    for actor_id, reference in asked.items():
        try:
            facts[actor_id] = ray.get(reference, timeout=max(0.01, deadline_s - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            facts[actor_id] = {**facts.get(actor_id, {"id": actor_id}), "state": "unresponsive"}
        except RayError:
            facts[actor_id] = {**facts.get(actor_id, {"id": actor_id}), "state": "dead"}


def _was_restarted() -> bool:
    """Say whether Ray has started this actor again: then nobody calls `start`."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def _without(facts: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != key}
