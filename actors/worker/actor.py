"""The attention worker's process as others call it: a Ray actor.

Whoever holds an actor's handle imports its class, hence this file, which imports nothing that computes.
"""

from typing import Any

from expertmesh.actors.links.ends import ShardPeer
from expertmesh.actors.token_stream import StreamAddress
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.requests import SequenceRequest
from expertmesh.cluster.settings import ServeSettings


class WorkerActor:
    """A Worker in a process of its own."""

    def __init__(self, worker_id: WorkerId, settings: ServeSettings, threads: int) -> None:
        from expertmesh.actors.worker.worker import Worker

        self._worker = Worker(worker_id, settings, threads)

    async def load(self) -> None:
        """See Worker.load."""
        await self._worker.load()

    async def join(self, peers: dict[ShardId, ShardPeer]) -> None:
        """See Worker.join."""
        await self._worker.join(peers)

    async def set_fleet(self, placement_record: bytes, peers: dict[ShardId, ShardPeer]) -> int:
        """See Worker.set_fleet."""
        return await self._worker.set_fleet(placement_record, peers)

    async def start(self) -> None:
        """See Worker.start."""
        await self._worker.start()

    async def submit(self, gateway_id: str, requests: list[SequenceRequest]) -> None:
        """See WorkerClient.submit."""
        await self._worker.submit(gateway_id, requests)

    async def cancel(self, sequence_ids: list[str]) -> None:
        """See WorkerClient.cancel."""
        await self._worker.cancel(sequence_ids)

    async def stream_address(self) -> StreamAddress:
        """See Worker.stream_address."""
        return await self._worker.stream_address()

    async def describe(self) -> dict[str, Any]:
        """See Worker.describe."""
        return await self._worker.describe()

    async def counters(self) -> dict[str, Any]:
        """See Worker.counters."""
        return await self._worker.counters()
