"""Sixteen live streams behind a test's back: undisturbed first, then while the test breaks things, compared at the end.

And how a test waits for what should come of it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.actors.cli.chaos_streams import Record, Streams, mismatches
from expertmesh.v1.admin_pb2 import StatusResponse
from tests.integration.conftest import Server

NUM_STREAMS = 16
NUM_TOKENS = 100


class LiveStreams:
    """The streams of one server: half greedy, half sampled with a seed."""

    def __init__(self, server: Server, num_tokens: int = NUM_TOKENS) -> None:
        self._streams = Streams(server.address, server.status().model, NUM_STREAMS, num_tokens, server.metadata)
        self._calm = Record()
        asyncio.run(self._streams.run_calm(self._calm))
        assert not self._calm.errors

    @contextmanager
    def running(self) -> Iterator[Record]:
        """Run them while the block lasts, again and again; no request may fail, and every token is compared."""
        rough, done, loop = Record(), asyncio.Event(), asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=(self._streams.run_until(done, rough),))
        thread.start()
        try:
            yield rough
        finally:
            loop.call_soon_threadsafe(done.set)
            thread.join(150)
            assert not thread.is_alive(), "streams hang"
            loop.close()
        assert not rough.errors, rough.errors
        assert len(rough.outputs) == NUM_STREAMS
        assert not (different := mismatches(self._calm, rough)), different


def is_serving(server: Server) -> bool:
    """Say what the health service says."""
    with server.channel() as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def member_pids(status: StatusResponse) -> dict[str, int]:
    """Return the process of each shard and worker."""
    return {**{shard.id: shard.pid for shard in status.shards}, **{worker.id: worker.pid for worker in status.workers}}


def is_whole(status: StatusResponse) -> bool:
    """Say whether everything is ready, and every shard holds as much as the others."""
    slots = {shard.num_slots for shard in status.shards}
    return (
        status.ready
        and {*(s.state for s in status.shards), *(w.state for w in status.workers)} == {"ready"}
        and max(slots) - min(slots) <= 4  # one in each layer of the pocket model
    )


def status_when(
    server: Server, condition: Callable[[StatusResponse], bool] = is_whole, timeout_s: float = 120
) -> StatusResponse:
    """Wait until the status is as it should be, and return it."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        status = None
        with suppress(grpc.RpcError):  # the controller may be away
            status = server.status()
            if condition(status):
                return status
        assert time.monotonic() < deadline_s, f"{status}\n{server.log.read_text()}"
        time.sleep(0.2)
