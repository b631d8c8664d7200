"""A whole fleet in one process, without Ray: real shard servers on threads, real Gloo links, the real engine."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import torch

from expertmesh.actors.links.base import Link, open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK, LinkAddress
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.shard.server import ShardServer
from expertmesh.actors.worker.dispatcher import Dispatcher
from expertmesh.actors.worker.engine import Engine
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
from expertmesh.cluster.scheduler import Scheduler, SchedulerConfig
from expertmesh.models import hooks
from expertmesh.models.architecture import open_architecture
from expertmesh.models.deterministic import deterministic_math
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights
from expertmesh.models.runners import OwnCacheRunner, PagedRunner, StepRunner

HOST = "127.0.0.1"
CPU = torch.device("cpu")


def link_address(name: str, rank: int, *, port: int = 0, generation: int = 1, timeout_s: float = 5.0) -> LinkAddress:
    """Return the address of one end on loopback; the port is that of a RendezvousServer."""
    return LinkAddress(
        host=HOST, port=port, name=name, generation=generation, rank=rank, interface=HOST, timeout_s=timeout_s
    )


@contextmanager
def link_pair(
    name: str = "pair", generation: int = 1, timeout_s: float = 5.0, *, kind: str = "gloo"
) -> Iterator[tuple[Link, Link]]:
    """Yield the worker's and the shard's end of a link within this process."""
    ends: dict[int, Link] = {}

    def form(rank: int) -> None:
        address = link_address(name, rank, port=server.port, generation=generation, timeout_s=timeout_s)
        ends[rank] = open_link(kind, address, CPU)

    with closing(RendezvousServer(HOST)) as server:
        other = threading.Thread(target=form, args=(SHARD_RANK,))
        other.start()
        form(WORKER_RANK)
        other.join()
    try:
        yield ends[WORKER_RANK], ends[SHARD_RANK]
    finally:
        break_link(ends[WORKER_RANK])


def break_link(link: Link) -> None:
    """Break a link, both ends of it, as a passed deadline does. Nobody may be receiving at this end."""
    with suppress(LinkError):
        link.recv(timeout_s=0.001)


@contextmanager
def served_link(
    server: ShardServer, name: str = "pair", *, timeout_s: float = 5.0, kind: str = "gloo"
) -> Iterator[Link]:
    """Yield the worker's end of a link that a shard's server answers on a thread of its own."""
    with link_pair(name, timeout_s=timeout_s, kind=kind) as (worker_end, shard_end):
        thread = threading.Thread(target=server.serve, args=(shard_end,), name=name, daemon=True)
        thread.start()
        try:
            yield worker_end
        finally:
            worker_end.close()
            # A thread that is inside a link when the interpreter ends would abort the process.
            thread.join(timeout=10)
            assert not thread.is_alive(), f"the server goes on with link {name}, which was closed"


class LocalFleet:
    """Shards, a dispatcher and an engine for one checkpoint."""

    def __init__(
        self,
        directory: Path,
        *,
        shards: int = 2,
        replicas: int = 1,
        num_pages: int = 128,
        max_batch_tokens: int = 48,
        dtype: str = "auto",
        deterministic: bool = False,
        link_kind: str = "gloo",
        layer_by_layer: bool = False,
        expert_tp: int = 1,
        capacity_factor: float | None = None,
    ) -> None:
        architecture = open_architecture(directory, dtype)
        weights = CheckpointWeights(architecture, expert_tp)
        names = [ShardId(f"shard-{i}") for i in range(shards)]
        self.placement: Placement = initial_placement(
            architecture.moe_layers, weights.num_slices, names, replicas, epoch=1
        )
        self.architecture = architecture
        self.weights = weights
        self.servers = {
            s.shard: ShardServer(ExpertSlots(weights, s.experts, CPU), self.placement.epoch)
            for s in self.placement.shards
        }
        self.events: list[TokenEvent] = []
        self.links: dict[ShardId, Link] = {}
        self._contexts = ExitStack()
        for name in names:
            link = served_link(self.servers[name], f"worker/{name}", kind=link_kind)
            self.links[name] = self._contexts.enter_context(link)
        self.model = weights.load_dense(CPU)
        self.dispatcher = Dispatcher(
            architecture.moe_layers,
            weights.num_slices,
            expert_tp=expert_tp,
            recovery_s=0.2,
            by_pair=deterministic,
            capacity_factor=capacity_factor,
        )
        self.dispatcher.set_fleet(Fleet(self.placement, self.links))
        carrier = None if layer_by_layer else self.dispatcher
        hooks.attach_experts(architecture.experts_by_layer, self.dispatcher.run, carrier)
        if deterministic:
            self._contexts.enter_context(deterministic_math())
        self.engine = self._make_engine(num_pages, max_batch_tokens, deterministic)

    def __enter__(self) -> "LocalFleet":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._contexts.close()

    def run(self, requests: list[SequenceRequest]) -> dict[str, list[int]]:
        """Run sequences to their end, all at once, and return each one's tokens."""
        self.engine.submit(requests)
        return self.finish(requests)

    def finish(self, requests: list[SequenceRequest]) -> dict[str, list[int]]:
        """Run these sequences, which were submitted, to their end, and return each one's tokens."""
        while self.engine.num_running or self.engine.num_waiting:
            self.engine.step()
        tokens: dict[str, list[int]] = {request.sequence_id: list(request.output_ids) for request in requests}
        for event in self.events:
            assert not event.error, event.error
            if event.token_id is not None:
                tokens[event.sequence_id].append(event.token_id)
        self.events.clear()
        return tokens

    def _make_engine(self, num_pages: int, max_batch_tokens: int, deterministic: bool) -> Engine:
        runner: StepRunner
        page_size = 8
        if self.architecture.uses_own_cache:
            runner, num_pages, page_size = OwnCacheRunner(self.model, CPU), 0, 0
        else:
            runner = PagedRunner(self.model, page_size, CPU, deterministic=deterministic)
            runner.allocate(num_pages)
        config = SchedulerConfig(
            max_batch_tokens=max_batch_tokens,
            max_sequences=16,
            num_pages=num_pages,
            page_size=page_size,
            max_context=256,
        )
        self.scheduler = Scheduler(config)
        return Engine(
            self.scheduler,
            runner,
            max_queue=64,
            begin_step=self.dispatcher.begin_step,
            on_events=self.events.extend,
        )


def greedy(sequence_id: str, prompt_ids: list[int], max_tokens: int) -> SequenceRequest:
    """Return a request for greedy decoding."""
    return SequenceRequest(
        sequence_id=sequence_id, prompt_ids=tuple(prompt_ids), sampling=SamplingParams(max_tokens=max_tokens)
    )
