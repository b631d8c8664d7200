"""What asking shards costs beside their computing: the compiled exchange and packet server over memory of two ends."""

import contextlib
import ctypes
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from expertmesh.actors.cli.measure_cores import DenseHalf, make_experts
from expertmesh.actors.cli.measure_sizes import Sizes
from expertmesh.actors.cores import claim_cores, use_cores
from expertmesh.actors.links.base import IDLE_S, Link, open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK, LinkAddress
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.cluster.errors import UnavailableError
from expertmesh.kernels.cpu.exchange import Exchange, Memory
from expertmesh.kernels.cpu.packet_server import PacketServer

_HOST = "127.0.0.1"
_CPU = torch.device("cpu")
_TIMEOUT_S = 30.0
_BATCHES = 5  # of rounds, the median of which counts


def time_exchanges(half: DenseHalf, sizes: Sizes, num_shards: int) -> Iterator[tuple[int, int, float]]:
    """Yield (shards asked, rows to each, seconds beside what the slowest of them computes).

    Each shard runs one expert over the rows. Before each request the asking process computes the dense half of a layer
    on all cores, as a worker does: whoever waits has been asleep for as long, and finds its caches as they are then.

    Raises:
        UnavailableError: a shard's process did not come.
    """
    with contextlib.ExitStack() as stack:
        shards = [stack.enter_context(_shard(sizes, index)) for index in range(num_shards)]
        few, many = sizes.link_rows
        dense = half.run(1, sizes.attended[0])
        for asked, rows in ((1, few), (1, many), *(((num_shards, few),) if num_shards > 1 else ())):
            yield asked, rows, _beside_s(shards[:asked], rows, dense, sizes)


class _Shard:
    """Our ends of a shard's process: the link, and a pipe that asks how long it computed."""

    def __init__(self, link: Link, pipe: Connection) -> None:
        self.link, self.pipe = link, pipe

    def busy_s(self) -> float:
        """Return the seconds that it has computed."""
        self.pipe.send("busy_s")
        return float(self.pipe.recv())


def _beside_s(shards: list[_Shard], rows: int, dense: Any, sizes: Sizes) -> float:
    exchange = Exchange(len(shards))
    channels = [shard.link.channel() for shard in shards]
    assert all(channel is not None for channel in channels), "a link that shares no memory"
    exchange.set_shards(
        [channel.descriptor for channel in channels if channel],
        [(channel.outgoing, channel.incoming, channel.room_bytes) for channel in channels if channel],
        [shard.link.generation for shard in shards],
        0,
    )
    hidden_TH = torch.randn(rows, sizes.hidden_size).bfloat16()
    sum_TH, out_TH = torch.empty(hidden_TH.shape), torch.empty_like(hidden_TH)
    ids_TK = torch.zeros((rows, len(shards)), dtype=torch.int64)
    shard_TK = torch.arange(len(shards), dtype=torch.int32).repeat(rows, 1)
    weights_TK = torch.ones(ids_TK.shape)
    record: Any = exchange.lay_out(hidden_TH, ids_TK, weights_TK, shard_TK, sum_TH=sum_TH, out_TH=out_TH)
    beside, sequence, layer = [], 1, 0
    for batch in range(1 + _BATCHES):
        before = [shard.busy_s() for shard in shards]
        spent_s = 0.0
        for _ in range(sizes.rounds):
            dense()
            layer, sequence = (layer + 1) % sizes.num_layers, sequence + len(shards)
            record.layer, record.sequence = layer, sequence
            began_s = time.perf_counter()
            is_done = exchange.function(ctypes.byref(record))
            spent_s += time.perf_counter() - began_s
            if not is_done:
                raise UnavailableError("a shard of the measurement did not answer")
        slowest_s = max(shard.busy_s() - busy_s for shard, busy_s in zip(shards, before, strict=True))
        if batch:
            beside.append((spent_s - slowest_s) / sizes.rounds)
    return statistics.median(beside)


@contextlib.contextmanager
def _shard(sizes: Sizes, index: int) -> Iterator[_Shard]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    os.environ["OMP_NUM_THREADS"] = "1"  # a child reads it when it starts; this process has read its own
    process = context.Process(target=_serve, args=(theirs, sizes, index), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_TIMEOUT_S):
            raise UnavailableError(f"a shard of the measurement did not start within {_TIMEOUT_S:.0f} s")
        link = open_link("shared", _address(ours.recv(), WORKER_RANK, index), _CPU)
        yield _Shard(link, ours)
    except EOFError as error:
        raise UnavailableError("a shard of the measurement ended") from error
    finally:
        ours.close()
        process.kill()
        process.join()


def _serve(pipe: Connection, sizes: Sizes, index: int) -> None:
    """The shard's process: one expert a layer, as a shard that has a core of its own."""
    torch.set_num_threads(1)
    kept = claim_cores(1, f"measurement {os.getppid()}")  # the claim ends with the object
    use_cores(kept)
    server = PacketServer(sizes.num_layers)
    slot_E = torch.zeros(1, dtype=torch.int64)
    for layer, packed in enumerate(make_experts(sizes, sizes.num_layers, 1)):
        server.set_layer(layer, packed, slot_E)
    rendezvous = RendezvousServer(_HOST)

    def serve() -> None:
        link = open_link("shared", _address(rendezvous.port, SHARD_RANK, index), _CPU)
        channel = link.channel(IDLE_S)
        assert channel is not None, "a link that shares no memory"
        memory = Memory(channel.outgoing, channel.incoming, channel.room_bytes)
        with contextlib.suppress(OSError):  # the measurement is over
            server.serve(channel.descriptor, memory, link.generation)

    threading.Thread(target=serve, daemon=True).start()
    pipe.send(rendezvous.port)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(server.counters()[2])


def _address(port: int, rank: int, index: int) -> LinkAddress:
    return LinkAddress(
        host=_HOST,
        port=port,
        name=f"measurement {index}",
        generation=1,
        rank=rank,
        interface=_HOST,
        timeout_s=_TIMEOUT_S,
    )
