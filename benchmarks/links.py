"""A link's round trip beside a bare socket and a Ray actor call, two processes of this machine, interleaved.

usage: python benchmarks/links.py [--rounds N] [--keep]
"""

import argparse
import contextlib
import multiprocessing
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch

from benchmarks.record import keep
from expertmesh.actors.links.base import open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK, LinkAddress
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.ray_env import secure_local_ray
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.packets import PacketHeader, PacketKind

HOST = "127.0.0.1"
SIZES = (2 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)


def main() -> int:
    """Time them side by side and print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_peer, args=(theirs,), daemon=True)
    peer.start()
    bare_port: int = ours.recv()
    rendezvous = RendezvousServer(HOST)
    ours.send(rendezvous.port)
    calls = {
        "link (Gloo)": _link_call("gloo", rendezvous.port),
        "link (local)": _link_call("local", rendezvous.port),
        "link (shared)": _link_call("shared", rendezvous.port),
        "bare socket": _socket_call(bare_port),
        "Ray actor": _ray_call(),
    }
    rows = []
    print(f"{'round trip, us':>16} | " + " | ".join(f"{name:>22}" for name in calls))
    for size in SIZES:
        times: dict[str, list[float]] = {name: [] for name in calls}
        payload = torch.zeros(size, dtype=torch.uint8)
        for number in range(arguments.rounds + 20):
            for name, call in calls.items():
                started_s = time.perf_counter()
                call(payload)
                if number >= 20:
                    times[name].append((time.perf_counter() - started_s) * 1e6)
        row = {name: (statistics.median(t), sorted(t)[len(t) * 99 // 100]) for name, t in times.items()}
        rows.append({"bytes": size, **{name: {"p50_us": p50, "p99_us": p99} for name, (p50, p99) in row.items()}})
        cells = " | ".join(f"p50 {p50:7.0f} p99 {p99:6.0f}" for p50, p99 in row.values())
        print(f"{size:>16} | {cells}", flush=True)
    if arguments.keep:
        print(f"kept in {keep('links', {'rounds': arguments.rounds, 'rows': rows})}")
    return 0


def _address(kind: str, port: int, rank: int) -> LinkAddress:
    return LinkAddress(host=HOST, port=port, name=kind, generation=1, rank=rank, interface=HOST, timeout_s=30)


def _link_call(kind: str, port: int) -> Callable[[torch.Tensor], None]:
    torch.set_num_threads(1)
    link = open_link(kind, _address(kind, port, WORKER_RANK), torch.device("cpu"))

    def call(payload: torch.Tensor) -> None:
        link.send(_header(payload.numel()), [payload])
        link.recv()

    return call


def _socket_call(port: int) -> Callable[[torch.Tensor], None]:
    connection = socket.create_connection((HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(max(SIZES))

    def call(payload: torch.Tensor) -> None:
        size = payload.numel()
        connection.sendall(size.to_bytes(8, "little"))
        connection.sendall(payload.numpy().data)
        _read(connection, memoryview(buffer)[:size])

    return call


def _ray_call() -> Callable[[torch.Tensor], None]:
    secure_local_ray()
    import ray

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")

    class Echo:
        def call(self, data: bytes) -> bytes:
            return data

    echo = ray.remote(Echo).remote()

    def call(payload: torch.Tensor) -> None:
        ray.get(echo.call.remote(payload.numpy().tobytes()))

    return call


def _peer(pipe: Connection) -> None:
    """The other process: echoes on a socket and on a link of each kind, a thread each."""
    import threading

    listener = socket.create_server((HOST, 0))
    pipe.send(listener.getsockname()[1])
    torch.set_num_threads(1)
    port: int = pipe.recv()
    threading.Thread(target=_echo_socket, args=(listener,), daemon=True).start()
    for kind in ("gloo", "shared"):
        threading.Thread(target=_echo_link, args=(kind, port), daemon=True).start()
    _echo_link("local", port)


def _echo_link(kind: str, port: int) -> None:
    link = open_link(kind, _address(kind, port, SHARD_RANK), torch.device("cpu"))
    with contextlib.suppress(LinkError):  # the benchmark is over
        while True:
            header, payload = link.recv(3600)
            link.send(header, [payload])


def _echo_socket(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    size_bytes, buffer = bytearray(8), bytearray(max(SIZES))
    while True:
        _read(connection, memoryview(size_bytes))
        view = memoryview(buffer)[: int.from_bytes(size_bytes, "little")]
        _read(connection, view)
        connection.sendall(view)


def _read(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if count == 0:
            sys.exit()
        view = view[count:]


def _header(size: int) -> PacketHeader:
    return PacketHeader(kind=PacketKind.DISPATCH, generation=1, sequence=1, epoch=1, payload_bytes=size)


if __name__ == "__main__":
    sys.exit(main())
