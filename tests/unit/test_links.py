"""Gloo and local links: two ends in one process, and ends in other processes that are killed or stopped.

All are real links over loopback and Unix sockets; a wait that should fail is given less than two seconds.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import psutil
import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import Link, open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK, LinkEnd, link_kind
from expertmesh.actors.links.gloo import INLINE_BYTES
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.cluster.errors import LinkError, UnknownNameError
from expertmesh.cluster.packets import PacketHeader, PacketKind
from tests.fleet import CPU, HOST, link_address, link_pair

# A process that answers each message with the same message, until its link ends.
ECHO = """
import sys
import torch
from expertmesh.actors.links.base import open_link
from expertmesh.actors.links.ends import SHARD_RANK, LinkAddress
from expertmesh.cluster.errors import LinkError
address = LinkAddress(
    host=sys.argv[1], port=int(sys.argv[2]), name="echo", generation=1, rank=SHARD_RANK, interface=sys.argv[1],
    timeout_s=60.0,
)
try:
    link = open_link(sys.argv[3], address, torch.device("cpu"))
    while True:
        header, payload = link.recv()
        link.send(header, [payload])
except LinkError:
    sys.exit(0)
"""


@pytest.fixture(params=["gloo", "local", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the link under test."""
    return str(request.param)


def header_of(payload_bytes: int = 0, *, generation: int = 1, sequence: int = 7) -> PacketHeader:
    return PacketHeader(
        kind=PacketKind.DISPATCH, generation=generation, sequence=sequence, epoch=3, payload_bytes=payload_bytes
    )


def random_bytes(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def pass_on(sender: Link, receiver: Link, parts: list[Tensor], *, sequence: int = 7) -> Tensor:
    """Send and receive one message; return a copy of the payload."""
    size = sum(part.numel() * part.element_size() for part in parts)
    # A link may wait with a large message until the peer takes it.
    sending = threading.Thread(target=sender.send, args=(header_of(size, sequence=sequence), parts))
    sending.start()
    header, payload = receiver.recv(timeout_s=2.0)
    sending.join(timeout=2.0)
    assert not sending.is_alive()
    assert header == header_of(size, sequence=sequence)
    return payload.clone()


def seconds_to_break(call: Callable[[], object], match: str | None = None) -> float:
    started_s = time.monotonic()
    with pytest.raises(LinkError, match=match):
        call()
    return time.monotonic() - started_s


@contextmanager
def echo_process(kind: str, timeout_s: float = 30.0) -> Iterator[tuple[Link, subprocess.Popen[bytes]]]:
    """Yield a link to a process that echoes, and that process; both are proved to work."""
    with (
        closing(RendezvousServer(HOST)) as server,
        subprocess.Popen([sys.executable, "-c", ECHO, HOST, str(server.port), kind]) as process,
    ):
        try:
            link = open_link(kind, link_address("echo", WORKER_RANK, port=server.port, timeout_s=timeout_s), CPU)
            link.send(header_of(3), [random_bytes(3)])
            assert torch.equal(link.recv()[1], random_bytes(3))
            yield link, process
        finally:
            process.kill()
            process.wait(timeout=10)


@contextmanager
def undisturbed_traffic(kind: str) -> Iterator[None]:
    """Pass messages over another link of this process all the while, and check that they went on to the end."""
    with link_pair("bystander", kind=kind) as (sender, receiver):
        done, numbers = threading.Event(), list[int]()
        errors: list[LinkError] = []

        def run() -> None:
            try:
                while not done.is_set():
                    pass_on(sender, receiver, [random_bytes(100)], sequence=len(numbers))
                    numbers.append(len(numbers))
                    time.sleep(0.001)
            except LinkError as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
            num_before = len(numbers)
            time.sleep(0.1)
        finally:
            done.set()
            thread.join(timeout=5.0)
        assert not errors
        assert len(numbers) > num_before > 0


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES - 1, INLINE_BYTES, INLINE_BYTES + 1, 2 * INLINE_BYTES + 3])
def test_the_very_bytes_arrive(kind: str, size: int) -> None:
    with link_pair(kind=kind) as (worker, shard):
        sent = random_bytes(size)
        assert torch.equal(pass_on(worker, shard, [sent]), sent)
        assert torch.equal(pass_on(shard, worker, [sent]), sent)


@pytest.mark.parametrize("large", [False, True])
def test_several_parts_arrive_as_one_payload(kind: str, large: bool) -> None:
    rows = torch.randn(3, INLINE_BYTES // 8 if large else 5)
    parts = [rows.to(torch.bfloat16), random_bytes(7), rows, torch.zeros(0), torch.arange(4)]
    expected = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
    with link_pair(kind=kind) as (worker, shard):
        assert torch.equal(pass_on(worker, shard, parts), expected)


def test_a_message_holds_nothing_of_the_one_before(kind: str) -> None:
    with link_pair(kind=kind) as (worker, shard):
        for sequence, size in enumerate([5000, 10, INLINE_BYTES + 9, 0, 11]):
            sent = random_bytes(size)
            assert torch.equal(pass_on(worker, shard, [sent], sequence=sequence), sent)


def test_a_deadline_breaks_this_link_and_no_other(kind: str) -> None:
    with undisturbed_traffic(kind), link_pair(kind=kind) as (worker, shard):
        assert 0.2 <= seconds_to_break(lambda: worker.recv(timeout_s=0.2), "receive failed") < 1.5
        assert seconds_to_break(lambda: worker.recv(timeout_s=5.0)) < 1.0
        assert seconds_to_break(lambda: worker.send(header_of())) < 1.0
        assert seconds_to_break(lambda: shard.recv(timeout_s=5.0)) < 1.0
        worker.close()
        shard.close()


@pytest.mark.parametrize("size", [1 << 20, INLINE_BYTES + 1])
def test_messages_that_nobody_takes_end_a_send_at_the_deadline(kind: str, size: int) -> None:
    def send_on() -> None:
        while True:
            worker.send(header_of(size), parts)

    def recv_on() -> None:
        while True:
            shard.recv(timeout_s=5.0)

    with link_pair(timeout_s=0.3, kind=kind) as (worker, shard):
        parts = [random_bytes(size)]
        assert 0.2 <= seconds_to_break(send_on, "link pair: send failed") < 1.5
        assert seconds_to_break(recv_on) < 1.0  # once it has taken what was on the way


def test_a_packet_of_another_generation_is_refused(kind: str) -> None:
    with link_pair(generation=5, kind=kind) as (worker, shard):
        worker.send(header_of(generation=4))
        with pytest.raises(LinkError, match="a packet of generation 4 on generation 5"):
            shard.recv(timeout_s=2.0)


def test_a_payload_of_another_size_than_the_header_says_is_never_sent(kind: str) -> None:
    with link_pair(timeout_s=0.3, kind=kind) as (worker, _), pytest.raises(AssertionError, match="2 bytes of payload"):
        worker.send(header_of(3), [random_bytes(2)])


def test_close_tells_the_other_end(kind: str) -> None:
    with link_pair(generation=9, kind=kind) as (worker, shard):
        thread = threading.Thread(target=worker.close)
        thread.start()
        header, payload = shard.recv(timeout_s=2.0)
        thread.join(timeout=2.0)
        assert not thread.is_alive()
    assert (header.kind, header.generation, payload.numel()) == (PacketKind.CLOSE, 9, 0)


def test_close_does_not_wait_long_for_a_busy_peer(kind: str) -> None:
    with link_pair(timeout_s=30.0, kind=kind) as (worker, shard):
        started_s = time.monotonic()
        worker.close()
        assert time.monotonic() - started_s < 2.0
        # CLOSE, if a buffer on the way took it, and then nothing more.
        assert seconds_to_break(lambda: [shard.recv(timeout_s=5.0) for _ in range(2)]) < 1.0


def test_the_kind_of_link_is_looked_up() -> None:
    with pytest.raises(UnknownNameError, match="link kind 'pigeon' is not one of cuda_ipc, gloo, local, nccl, shared"):
        open_link("pigeon", link_address("alone", WORKER_RANK), CPU)


@pytest.mark.parametrize(
    ("worker", "shard", "expected"),
    [
        (LinkEnd(node="a"), LinkEnd(node="a"), "shared"),
        (LinkEnd(node="a"), LinkEnd(node="b"), "gloo"),
        (LinkEnd(node="a", gpu="0"), LinkEnd(node="a", gpu="1"), "nccl"),
        (LinkEnd(node="a", gpu="0"), LinkEnd(node="b", gpu="0"), "nccl"),
        (LinkEnd(node="a", gpu="0"), LinkEnd(node="a", gpu="0"), "cuda_ipc"),  # NCCL refuses two ranks on one GPU
        (LinkEnd(node="a", gpu="0"), LinkEnd(node="a"), "shared"),
        (LinkEnd(node="a"), LinkEnd(node="b", gpu="0"), "gloo"),
    ],
)
def test_the_kind_follows_from_where_the_ends_are(worker: LinkEnd, shard: LinkEnd, expected: str) -> None:
    assert link_kind(worker, shard) == expected


@pytest.mark.parametrize("rank", [WORKER_RANK, SHARD_RANK])
def test_the_other_end_never_comes(kind: str, rank: int) -> None:
    with closing(RendezvousServer(HOST)) as server:
        address = link_address("alone", rank, port=server.port, timeout_s=0.3)
        waited_s = seconds_to_break(lambda: open_link(kind, address, CPU), "link alone: the other end did not come")
    assert 0.2 <= waited_s < 2.0


def test_nobody_listens_at_the_address(kind: str) -> None:
    with socket.create_server((HOST, 0)) as listener:
        port = listener.getsockname()[1]
    address = link_address("alone", WORKER_RANK, port=port, timeout_s=0.3)
    assert seconds_to_break(lambda: open_link(kind, address, CPU), "link alone: the other end did not come") < 2.0


def test_a_local_link_is_not_formed_with_another_users_process(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[str] = []

    def form(rank: int) -> None:
        address = link_address("pair", rank, port=server.port, timeout_s=0.5)
        with pytest.raises(LinkError) as caught:
            open_link("local", address, CPU)
        errors.append(str(caught.value))

    other_uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other_uid)
    with closing(RendezvousServer(HOST)) as server:
        threads = [threading.Thread(target=form, args=(rank,)) for rank in (WORKER_RANK, SHARD_RANK)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=5.0)
    assert sorted(errors) == [
        "link pair: the other end did not come: another user's process listens there",
        "link pair: the other end did not come: timed out",
    ]


def test_a_killed_peer_breaks_its_link_at_once_and_no_other(kind: str) -> None:
    with undisturbed_traffic(kind), echo_process(kind) as (link, process):
        killer = threading.Timer(0.2, process.kill)
        killer.start()
        assert seconds_to_break(link.recv) < 2.0
        killer.join()
        assert process.wait(timeout=5) == -signal.SIGKILL
        assert seconds_to_break(lambda: link.send(header_of())) < 1.0


def test_a_stopped_peer_breaks_its_link_at_the_deadline_and_no_other(kind: str) -> None:
    with undisturbed_traffic(kind), echo_process(kind) as (link, process):
        psutil.Process(process.pid).suspend()
        assert 0.5 <= seconds_to_break(lambda: link.recv(timeout_s=0.5)) < 2.0
        psutil.Process(process.pid).resume()
        # It finds its own end broken, and goes on.
        assert process.wait(timeout=10) == 0
