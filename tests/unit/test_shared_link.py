"""Links that share memory: what lies where, and that nothing is overwritten before it was read."""

import os
import socket
import threading
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from expertmesh.actors.links.base import open_link
from expertmesh.actors.links.ends import SHARD_RANK, WORKER_RANK
from expertmesh.actors.links.rendezvous import RendezvousServer
from expertmesh.actors.links.shared import FRONT_BYTES, LEAST_BYTES, ROOM_BYTES, Memory, SharedLink
from expertmesh.cluster.errors import LinkError
from tests.fleet import CPU, HOST, link_address, link_pair
from tests.unit.test_links import header_of, pass_on, random_bytes


def written(link: object) -> int:
    """How many payloads this end has written to memory."""
    assert isinstance(link, SharedLink)
    return int(link._outgoing._counts[0])


@pytest.mark.parametrize(
    ("size", "in_memory"), [(LEAST_BYTES - 1, 0), (LEAST_BYTES, 1), (ROOM_BYTES, 1), (ROOM_BYTES + 1, 0)]
)
def test_payloads_of_a_size_worth_it_and_with_room_lie_in_memory(size: int, in_memory: int) -> None:
    with link_pair(kind="shared") as (worker, shard):
        for sender, receiver in ((worker, shard), (shard, worker)):
            sent = random_bytes(size)
            assert torch.equal(pass_on(sender, receiver, [sent]), sent)
            assert written(sender) == in_memory


def test_what_is_not_read_yet_is_not_overwritten() -> None:
    with link_pair(kind="shared") as (worker, shard):
        sent = [random_bytes(LEAST_BYTES + number) for number in range(8)]
        for payload in sent:
            worker.send(header_of(len(payload)), [payload])
        for payload in sent:
            assert torch.equal(shard.recv()[1], payload)
        assert written(worker) == 1, "the others found the memory taken"


@pytest.mark.parametrize("then", ["recv", "send", "channel"])
def test_a_payload_holds_until_the_next_call_and_then_there_is_room_again(then: str) -> None:
    with link_pair(kind="shared") as (worker, shard):
        first, second = random_bytes(LEAST_BYTES), random_bytes(2 * LEAST_BYTES)
        worker.send(header_of(len(first)), [first])
        _, held = shard.recv()
        worker.send(header_of(len(second)), [second])
        assert torch.equal(held, first)
        if then == "recv":
            assert torch.equal(shard.recv()[1], second)
        elif then == "send":
            shard.send(header_of())
        else:
            assert shard.channel() is not None
        worker.send(header_of(len(first)), [first])
        assert written(worker) == 2


def test_many_at_once_in_both_directions_arrive_as_they_were_sent() -> None:
    def exchange_all(link: SharedLink) -> None:
        # One thread an end: whoever sends has no more use for what came before.
        for payload in sent:
            link.send(header_of(len(payload)), [payload])
            assert torch.equal(link.recv()[1], payload)
        done.append(link)

    sent = [random_bytes(size) for size in (10, LEAST_BYTES, 300_000, 5, 2 * LEAST_BYTES, 70_000) * 20]
    done: list[SharedLink] = []
    with link_pair(kind="shared") as ends:
        threads = [threading.Thread(target=exchange_all, args=(end,)) for end in ends]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(done) == 2


def test_a_payload_in_memory_on_a_link_without_breaks_it() -> None:
    with link_pair(kind="local") as (worker, shard):
        worker._send(replace(header_of(LEAST_BYTES), in_memory=True), (), 0)  # type: ignore[attr-defined]
        with pytest.raises(LinkError, match="in shared memory, of which this link has none"):
            shard.recv()


def test_a_payload_larger_than_the_memory_breaks_the_link() -> None:
    with link_pair(kind="shared") as (worker, shard):
        header = replace(header_of(ROOM_BYTES + 1), in_memory=True)
        worker._send(header, (), 0)  # type: ignore[attr-defined]
        with pytest.raises(LinkError, match=f"{ROOM_BYTES + 1} bytes of payload in memory of {ROOM_BYTES}"):
            shard.recv()


def test_memory_that_could_be_made_smaller_is_refused() -> None:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, FRONT_BYTES + ROOM_BYTES)
        with pytest.raises(LinkError, match="not for good"):
            Memory.open(descriptor)
        os.ftruncate(descriptor, FRONT_BYTES)
        with pytest.raises(LinkError, match=f"memory of {FRONT_BYTES} bytes"):
            Memory.open(descriptor)
    finally:
        os.close(descriptor)


def test_nobody_can_make_it_smaller() -> None:
    memory, descriptor = Memory.create()
    try:
        with pytest.raises(PermissionError):
            os.ftruncate(descriptor, FRONT_BYTES)
        assert memory.is_free
    finally:
        os.close(descriptor)


def test_links_that_end_leave_no_memory_and_no_descriptor() -> None:
    def held() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), sum("expertmesh-link" in line for line in maps)

    before = held()
    for _ in range(5):
        with link_pair(kind="shared") as (worker, shard):
            pass_on(worker, shard, [random_bytes(LEAST_BYTES)])
            del worker, shard
    assert held() == before


def test_an_end_that_shares_no_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(rank: int) -> None:
        address = link_address("pair", rank, port=server.port, timeout_s=2.0)
        with pytest.raises(LinkError) as caught:
            open_link("shared", address, CPU)
        errors.append(str(caught.value))

    errors: list[str] = []
    monkeypatch.setattr(socket, "send_fds", lambda connection, buffers, descriptors: connection.send(buffers[0]))
    with closing(RendezvousServer(HOST)) as server:
        threads = [threading.Thread(target=form, args=(rank,)) for rank in (WORKER_RANK, SHARD_RANK)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
    assert errors == ["link pair: the other end did not come: it shares no memory"] * 2
