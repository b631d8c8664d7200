"""The link of two processes on one GPU: its steps with memory of the host in the GPU's place, and the real one.

With the host's memory: what is announced was written first, and what is released was read. On a GPU: two processes.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import open_link
from expertmesh.actors.links.ends import WORKER_RANK
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.links.shared import LEAST_BYTES, ROOM_BYTES
from expertmesh.cluster.errors import LinkError
from expertmesh.kernels.gpu import ipc
from tests.fleet import CPU, HOST, link_address, link_pair
from tests.unit.test_links import ECHO, header_of, pass_on, random_bytes


class HostBytes:
    """In place of ipc.DeviceBytes, for two ends in one process."""

    by_handle: dict[bytes, Tensor] = {}  # noqa: RUF012  # one for all, as the GPU is
    numbers = itertools.count()
    num_open = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        HostBytes.num_open += 1

    @classmethod
    def allocate(cls, num_bytes: int, _device: torch.device) -> "tuple[HostBytes, bytes]":
        handle = next(cls.numbers).to_bytes(ipc.HANDLE_BYTES, "little")
        cls.by_handle[handle] = torch.zeros(num_bytes, dtype=torch.uint8)
        return cls(cls.by_handle[handle]), handle

    @classmethod
    def open(cls, handle: bytes, num_bytes: int, _device: torch.device) -> "HostBytes":
        assert len(cls.by_handle[handle]) == num_bytes
        return cls(cls.by_handle[handle])

    def close(self) -> None:
        HostBytes.num_open -= 1


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How often the GPU was waited for."""
    waits: list[str] = []
    HostBytes.by_handle = {}
    HostBytes.num_open = 0
    monkeypatch.setattr(ipc, "DeviceBytes", HostBytes)
    monkeypatch.setattr(ipc, "finish", lambda _: waits.append("wait"))
    yield waits
    HostBytes.by_handle = {}


@pytest.mark.parametrize("size", [0, 1, LEAST_BYTES - 1, LEAST_BYTES, 1_000_001, ROOM_BYTES, ROOM_BYTES + 1])
def test_the_very_bytes_arrive(size: int, finished: list[str]) -> None:
    with link_pair(kind="cuda_ipc") as (worker, shard):
        for sender, receiver in ((worker, shard), (shard, worker)):
            sent = random_bytes(size)
            assert torch.equal(pass_on(sender, receiver, [sent[: size // 3], sent[size // 3 :]]), sent)


def test_payloads_are_written_to_the_gpu_and_waited_for(finished: list[str]) -> None:
    with link_pair(kind="cuda_ipc") as (worker, shard):
        sent = random_bytes(LEAST_BYTES)
        worker.send(header_of(len(sent)), [sent])
        assert finished == ["wait"], "it was announced before the GPU had written it"
        _, held = shard.recv()
        assert any(held.data_ptr() == memory.data_ptr() for memory in HostBytes.by_handle.values())
        assert finished == ["wait"]
        shard.send(header_of())
        assert finished == ["wait"] * 2, "it was released before the GPU had read it"
        shard.send(header_of())
        assert finished == ["wait"] * 2


def test_what_is_not_read_yet_is_not_overwritten(finished: list[str]) -> None:
    with link_pair(kind="cuda_ipc") as (worker, shard):
        sent = [random_bytes(LEAST_BYTES + number) for number in range(5)]
        for payload in sent:
            worker.send(header_of(len(payload)), [payload])
        for payload in sent:
            assert torch.equal(shard.recv()[1], payload)


def test_memory_goes_with_the_link(finished: list[str]) -> None:
    with link_pair(kind="cuda_ipc") as (worker, shard):
        assert HostBytes.num_open == 4
        del worker, shard
    assert HostBytes.num_open == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), "did not come: cudaErrorMemoryAllocation"),
        (ImportError("No module named 'cupy'"), r"link echo needs CuPy \(pip install 'expertmesh\[gpu\]'\)"),
    ],
)
def test_what_the_gpu_lacks_is_said(
    error: Exception, said: str, finished: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocate(num_bytes: int, device: torch.device) -> None:
        raise error

    monkeypatch.setattr(HostBytes, "allocate", allocate)
    with (
        closing(RendezvousServer(HOST)) as server,
        subprocess.Popen([sys.executable, "-c", ECHO, HOST, str(server.port), "shared"]) as process,
    ):
        try:
            with pytest.raises(LinkError, match=said):
                open_link("cuda_ipc", link_address("echo", WORKER_RANK, port=server.port, timeout_s=20), CPU)
        finally:
            process.kill()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_two_processes_on_one_gpu() -> None:
    gpu = torch.device("cuda", 0)
    echo = ECHO.replace('torch.device("cpu")', 'torch.device("cuda", 0)')
    with (
        closing(RendezvousServer(HOST)) as server,
        subprocess.Popen([sys.executable, "-c", echo, HOST, str(server.port), "cuda_ipc"]) as process,
    ):
        try:
            link = open_link("cuda_ipc", link_address("echo", WORKER_RANK, port=server.port, timeout_s=60), gpu)
            for size in (3, LEAST_BYTES, 1_000_001, ROOM_BYTES):
                sent = random_bytes(size).to(gpu)
                link.send(header_of(size), [sent])
                payload = link.recv()[1]
                assert payload.device == gpu
                assert torch.equal(payload, sent)
        finally:
            process.kill()
            process.wait(timeout=10)
