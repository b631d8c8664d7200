"""The attention worker: what its actor does, with the dense half, the dispatcher and the engine."""

import asyncio
import os
import threading
import time
from contextlib import ExitStack
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from expertmesh.actors.cores import yield_soon
from expertmesh.actors.giving_way import take_part
from expertmesh.actors.links.base import Link, open_link
from expertmesh.actors.links.ends import ShardPeer, calling_end, kind_for
from expertmesh.actors.logs import EventLog, reason_of, start_logs
from expertmesh.actors.machine_share import usable_memory
from expertmesh.actors.metrics import Metrics
from expertmesh.actors.runtime import CONTROLLER, NAMESPACE, link_end, node_address, node_id
from expertmesh.actors.token_stream import StreamAddress, TokenStreamServer
from expertmesh.actors.worker.dispatcher import Dispatcher
from expertmesh.actors.worker.engine import Engine
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.link_keeper import LinkKeeper
from expertmesh.actors.worker.outboxes import Outboxes
from expertmesh.actors.worker.step_log import open_step_log
from expertmesh.cluster.counters import CLOCK
from expertmesh.cluster.errors import CapacityError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.placement import Placement
from expertmesh.cluster.requests import SequenceRequest, TokenEvent
from expertmesh.cluster.scheduler import Scheduler, SchedulerConfig
from expertmesh.cluster.settings import ServeSettings
from expertmesh.kernels.cpu.threads import set_num_threads
from expertmesh.models import hooks
from expertmesh.models.architecture import Architecture, open_architecture
from expertmesh.models.deterministic import deterministic_math
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.runners import OwnCacheRunner, PagedRunner, StepRunner

_log = EventLog(__name__)
# Forming a link takes milliseconds within a host, and some twenty messages between hosts, any of which may be lost.
_JOIN_S = 5.0
# Part of the memory that is free when the model is loaded which the KV cache takes, unless kv_tokens says otherwise.
_KV_PART = {"cpu": 0.1, "cuda": 0.8}


class Worker:
    """Runs the dense half of the model for its sequences, and has the experts run by the shards."""

    def __init__(self, worker_id: WorkerId, settings: ServeSettings, threads: int) -> None:
        start_logs(settings, worker_id, node_id())
        # The compiled kernels are few and long. Torch's operators beside them are many and short: handing out their
        # work, to threads that wait passively, costs more than it gains.
        set_num_threads(threads)
        torch.set_num_threads(max(1, threads // 2))
        yield_soon()
        # Kept: what it replaces stays replaced as long as the process lives.
        self._math = ExitStack()
        if settings.deterministic:
            self._math.enter_context(deterministic_math())
        self._id = worker_id
        self._settings = settings
        self._host = settings.link_host or node_address()
        self._device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._link_keeper: LinkKeeper | None = None
        self._generation = 0
        self._outboxes = Outboxes(time.monotonic)
        self._engine: Engine | None = None
        self._dispatcher: Dispatcher | None = None
        self._architecture: Architecture | None = None
        self._dense_bytes = 0
        self._num_pages = 0
        self._num_lost_links = 0
        self._metrics = Metrics()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stream: TokenStreamServer | None = None
        # A controller that comes back asks again for what its former life may have asked for a moment ago.
        self._starting = asyncio.Lock()
        self._opening = asyncio.Lock()

    async def load(self) -> None:
        """Read the dense half. Asking again changes nothing.

        Raises:
            CheckpointError: it cannot be read.
        """
        async with self._starting:
            if self._architecture is not None:
                return
            self._link_keeper = LinkKeeper(self._join, self._use, self._report_lost, self._settings.dispatch)
            await asyncio.to_thread(self._load)

    async def join(self, peers: dict[ShardId, ShardPeer]) -> None:
        """Form links to shards that a coming placement needs."""
        assert self._link_keeper is not None, "join() before load()"
        await self._link_keeper.prepare(peers)

    async def set_fleet(self, placement_record: bytes, peers: dict[ShardId, ShardPeer]) -> int:
        """Use a placement from the next layer on; see `LinkKeeper.follow`.

        Returns:
            The epoch now in use.
        """
        assert self._link_keeper is not None, "set_fleet() before load()"
        return await self._link_keeper.follow(Placement.from_bytes(placement_record), peers)

    async def start(self) -> None:
        """Begin to serve. Asking again changes nothing."""
        async with self._starting:
            if self._engine is not None:
                return
            self._loop = asyncio.get_running_loop()
            self._engine = await asyncio.to_thread(self._make_engine)
            take_part()
            threading.Thread(target=_run, args=(self._engine,), name="engine", daemon=True).start()

    async def submit(self, gateway_id: str, requests: list[SequenceRequest]) -> None:
        """See WorkerClient.submit."""
        if self._engine is None:
            raise UnavailableError(f"{self._id} is still loading")
        sequence_ids = [request.sequence_id for request in requests]
        self._outboxes.assign(gateway_id, sequence_ids)
        try:
            self._engine.submit(requests)
        except Exception:
            self._outboxes.release(sequence_ids)
            raise

    async def cancel(self, sequence_ids: list[str]) -> None:
        """See WorkerClient.cancel."""
        if self._engine is not None:
            self._engine.cancel(sequence_ids)
        self._outboxes.release(sequence_ids)

    async def stream_address(self) -> StreamAddress:
        """Return where gateways get their new tokens."""
        async with self._opening:
            if self._stream is None:
                self._stream = await TokenStreamServer.start(self._host, self._poll)
        return self._stream.address

    async def _poll(self, gateway_id: str, after: int) -> tuple[int, list[TokenEvent]]:
        return await self._outboxes.poll(gateway_id, after, self._settings.worker_timeout_s / 2)

    async def describe(self) -> dict[str, Any]:
        """Return what `status` shows of a worker. Being asked again and again, give up gateways that are gone."""
        engine = self._engine
        if abandoned := self._outboxes.give_up_silent():
            await self.cancel(abandoned)
        self._metrics.observe("expertmesh_queue_seconds", engine.take_queue_times() if engine else ())
        return {
            "id": self._id,
            "pid": os.getpid(),
            "node": node_id(),
            "address": self._host,
            "state": "ready" if engine else "loading",
            "dense_bytes": self._dense_bytes,
            "running": engine.num_running if engine else 0,
            "waiting": engine.num_waiting if engine else 0,
            "free_pages": engine.num_free_pages if engine else 0,
            "num_pages": self._num_pages,
            "tokens_generated": engine.num_tokens if engine else 0,
            "lost_shards": self._lost_shards(),
            "epoch": self._epoch(),
            "outstanding_tokens": engine.num_outstanding_tokens if engine else 0,
            "dropped_pairs": int(self._dispatcher.dropped_LE.sum()) if self._dispatcher else 0,
            "counters": {
                CLOCK: time.monotonic(),
                "busy_s": engine.busy_s if engine else 0.0,
                "expert_s": self._dispatcher.expert_s if self._dispatcher else 0.0,
                "num_tokens": engine.num_tokens if engine else 0,
                "num_retries": self._dispatcher.num_retries if self._dispatcher else 0,
                "num_lost_links": self._num_lost_links,
            },
        }

    async def counters(self) -> dict[str, Any]:
        """Return what was counted since this process began: see Dispatcher. "life" tells processes apart."""
        assert self._dispatcher is not None, "counters() before load()"
        return {
            "id": self._id,
            "life": os.getpid(),
            "load_LE": self._dispatcher.load_LE.copy(),
            "decode_LE": self._dispatcher.decode_LE.copy(),
            "dropped_LE": self._dispatcher.dropped_LE.copy() if self._settings.capacity_factor else None,
            "expert_s": self._dispatcher.expert_s,
            "dispatch_bytes_L": self._dispatcher.dispatch_bytes_L.tolist(),
            "combine_bytes_L": self._dispatcher.combine_bytes_L.tolist(),
        }

    def _load(self) -> None:
        began_s = time.monotonic()
        architecture = open_architecture(self._settings.model, self._settings.dtype)
        model = CheckpointWeights(architecture).load_dense(self._device)
        parameters = {p.data_ptr(): p for p in model.parameters()}
        self._dense_bytes = sum(p.numel() * p.element_size() for p in parameters.values())
        self._dispatcher = Dispatcher(
            architecture.moe_layers,
            architecture.num_experts * self._settings.expert_tp,
            expert_tp=self._settings.expert_tp,
            recovery_s=self._settings.recovery_s,
            on_lost=self._link_broke,
            by_pair=self._settings.deterministic,
            capacity_factor=self._settings.capacity_factor,
        )
        hooks.attach_experts(architecture.experts_by_layer, self._dispatcher.run, self._dispatcher)
        self._architecture = architecture
        _log.tell("model_loaded", dense_bytes=self._dense_bytes, duration_s=time.monotonic() - began_s)

    async def _join(self, shard: ShardId, peer: ShardPeer) -> Link:
        # Of this link for good: others are formed meanwhile.
        generation = self._generation = self._generation + 1
        # The process id keeps a restarted worker from meeting a shard's end of its former life.
        name = f"{self._id}.{os.getpid()}/{shard}/{generation}"
        kind = kind_for(link_end(), peer, self._settings.links)
        async with asyncio.timeout(_JOIN_S):
            try:
                met = await peer.handle.accept_link.remote(name, generation, kind)
            except RayError as error:
                raise UnavailableError(f"{shard}: {type(error).__name__}") from error
            address = calling_end(met, name, generation, self._host, self._settings.link_timeout_s)
            link = await asyncio.to_thread(open_link, kind, address, self._device)
        _log.tell("link_made", shard=shard, kind=kind, generation=generation)
        return link

    def _use(self, fleet: Fleet) -> None:
        assert self._dispatcher is not None
        self._dispatcher.set_fleet(fleet)

    def _link_broke(self, shard: ShardId, link: Link) -> None:
        assert self._link_keeper is not None
        self._link_keeper.lost(shard, link)

    def _report_lost(self, shard: ShardId) -> None:
        """Tell the controller, if it is there; it looks by itself now and then."""
        self._num_lost_links += 1
        try:
            ray.get_actor(CONTROLLER, NAMESPACE).report_lost.remote(self._id, shard)
        except (ValueError, RayError) as error:
            _log.tell("loss_unheard", shard=shard, reason=reason_of(error))

    def _make_engine(self) -> Engine:
        architecture, dispatcher, settings = self._architecture, self._dispatcher, self._settings
        assert architecture is not None, "start() before load()"
        assert dispatcher is not None
        runner: StepRunner
        max_context = settings.max_context or architecture.max_context
        if architecture.uses_own_cache:
            runner, page_size = OwnCacheRunner(architecture.model, self._device), 0
        else:
            page_size = settings.page_size
            runner = PagedRunner(architecture.model, page_size, self._device, deterministic=settings.deterministic)
            self._num_pages = self._choose_num_pages(runner.bytes_per_token, max_context)
            runner.allocate(self._num_pages)
        scheduler = Scheduler(
            SchedulerConfig(
                max_batch_tokens=settings.max_batch_tokens,
                max_sequences=settings.max_sequences,
                num_pages=self._num_pages,
                page_size=page_size,
                max_context=max_context,
            )
        )

        def counters() -> tuple[float, int]:
            return dispatcher.expert_s, dispatcher.num_retries

        return Engine(
            scheduler,
            runner,
            max_queue=settings.max_queue,
            begin_step=dispatcher.begin_step,
            on_events=self._hand_out,
            log=open_step_log(settings, self._id, node_id(), counters),
        )

    def _choose_num_pages(self, bytes_per_token: int, max_context: int) -> int:
        settings = self._settings
        if settings.kv_tokens:
            return max(1, settings.kv_tokens // settings.page_size)
        free_bytes = usable_memory().available_bytes
        if self._device.type == "cuda":
            free_bytes = torch.cuda.mem_get_info(self._device)[0]
        tokens = int(free_bytes * _KV_PART[self._device.type]) // bytes_per_token
        if tokens < settings.page_size:
            raise CapacityError(
                f"{self._id}: {free_bytes / 2**30:.2f} GiB are free, too little for a KV page of "
                f"{settings.page_size * bytes_per_token} bytes"
            )
        return min(tokens, settings.max_sequences * max_context) // settings.page_size

    def _lost_shards(self) -> list[ShardId]:
        fleet = self._dispatcher.fleet if self._dispatcher else None
        return [] if fleet is None else [s for s, alive in zip(fleet.shards, fleet.alive_S, strict=True) if not alive]

    def _epoch(self) -> int:
        fleet = self._dispatcher.fleet if self._dispatcher else None
        return fleet.placement.epoch if fleet else 0

    def _hand_out(self, events: list[TokenEvent]) -> None:
        """Pass a step's events to the event loop; called from the engine's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._outboxes.put, events)


def _run(engine: Engine) -> None:
    """Run the engine. A defect that stops it ends the process, and its sequences go on elsewhere."""
    try:
        engine.run_forever()
    except BaseException as error:  # noqa: BLE001 - the process ends
        _log.tell("engine_stopped", error)
        os._exit(1)
