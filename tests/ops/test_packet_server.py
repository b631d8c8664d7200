"""A shard's compiled loop against the same shard's answers in Python, over real sockets.

Shape suffixes: R rows, H hidden, P (row, expert) pairs.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.shard.server import ShardServer
from expertmesh.actors.wire import read_combine
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketHeader, PacketKind, first_sequence
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.dispatch import ShardPairs
from expertmesh.models.architecture import open_architecture
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights
from tests.fleet import CPU, served_link
from tests.log_lines import logged
from tests.packets import dispatch_packet

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)

POCKET = Path(__file__).resolve().parents[2] / "examples" / "pocket-moe"
HIDDEN, EPOCH, LAYER = 128, 7, 1
HERE = (0, 2, 3, 5)  # of 16 experts


@pytest.fixture(scope="module")
def weights() -> CheckpointWeights:
    return CheckpointWeights(open_architecture(POCKET, "bfloat16"))


@pytest.fixture
def server(weights: CheckpointWeights) -> ShardServer:
    server = ShardServer(ExpertSlots(weights, [ExpertKey(LAYER, e) for e in HERE], CPU), EPOCH)
    assert server._compiled is not None, "these experts are not packed"
    return server


@pytest.fixture(params=["local", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of the link under test."""
    return str(request.param)


@pytest.fixture
def link(server: ShardServer, kind: str) -> Iterator[Link]:
    with served_link(server, kind=kind) as worker_end:
        yield worker_end


class Asked:
    """A packet, and what the server's slots give for it."""

    def __init__(self, seed: int, num_rows: int, experts: tuple[int, ...] = HERE, hidden: int = HIDDEN) -> None:
        rng = np.random.default_rng(seed)
        num_pairs = int(rng.integers(1, 3 * num_rows + 1))
        self.sequence = seed
        self.rows_RH = torch.from_numpy(rng.standard_normal((num_rows, hidden), dtype=np.float32)).bfloat16()
        self.pairs = ShardPairs(
            num_rows=num_rows,
            token_R=None,
            row_P=rng.integers(0, num_rows, num_pairs).astype(np.int32),
            expert_P=rng.choice(experts, num_pairs).astype(np.int32),
            weight_P=rng.random(num_pairs, dtype=np.float32),
        )

    def packet(self, *, by_pair: bool = False, layer: int = LAYER) -> tuple[PacketHeader, list[Tensor]]:
        numbers = {"layer": layer, "generation": 1, "sequence": self.sequence, "epoch": EPOCH - 1}
        return dispatch_packet(self.rows_RH, self.pairs, **numbers, by_pair=by_pair)

    def expected(self, server: ShardServer) -> Tensor:
        held = server.slots.layer(LAYER)
        assert held is not None
        slot_P = held.slots_of(torch.from_numpy(self.pairs.expert_P).long())
        assert slot_P is not None
        row_P, weight_P = torch.from_numpy(self.pairs.row_P).long(), torch.from_numpy(self.pairs.weight_P)
        return held.run(self.rows_RH, row_P, slot_P, weight_P).bfloat16()

    def check(self, server: ShardServer, header: PacketHeader, payload: Tensor) -> None:
        assert header.kind is PacketKind.COMBINE, bytes(payload.numpy())
        assert (header.sequence, header.layer, header.epoch) == (self.sequence, LAYER, server.epoch)
        assert torch.equal(read_combine(header, payload), self.expected(server))


def test_answers_are_those_of_the_kernel_to_the_bit(server: ShardServer, link: Link) -> None:
    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 70))
    def check(seed: int, num_rows: int) -> None:
        asked = Asked(seed, num_rows)
        link.send(*asked.packet())
        asked.check(server, *link.recv())

    before = server.counted
    check()
    assert server._counted == (0, 0, 0.0, 0.0), "Python answered"
    after = server.counted
    assert after.num_packets - before.num_packets == after.num_batches - before.num_batches >= 40
    assert 0 < after.busy_s < 60
    assert 0 <= after.queue_s < after.busy_s


def test_a_packet_larger_than_what_is_read_at_once(server: ShardServer, link: Link) -> None:
    asked = Asked(1, 24_000)  # more than 4 MiB
    assert asked.packet()[0].payload_bytes > 5 << 20
    sending = threading.Thread(target=lambda: link.send(*asked.packet()))
    sending.start()
    asked.check(server, *link.recv())
    sending.join()
    small = Asked(2, 3)
    link.send(*small.packet())
    small.check(server, *link.recv())


def test_packets_that_are_sent_without_waiting_are_answered_in_turn(server: ShardServer, link: Link) -> None:
    several = [Asked(seed, 5) for seed in range(12)]
    for asked in several:
        link.send(*asked.packet())
    for asked in several:
        asked.check(server, *link.recv())


def test_what_it_cannot_answer_is_answered_by_python_and_then_it_goes_on(server: ShardServer, link: Link) -> None:
    plain = Asked(1, 4)
    for number in range(3):
        link.send(*Asked(10 + number, 4, experts=(1, 4)).packet())
        header, _ = link.recv()
        assert (header.kind, header.sequence, header.epoch) == (PacketKind.NOT_HERE, 10 + number, EPOCH)
        link.send(*plain.packet(layer=2))
        assert link.recv()[0].kind is PacketKind.NOT_HERE
        link.send(*plain.packet(by_pair=True))
        header, _ = link.recv()
        assert (header.kind, header.by_pair, header.num_rows) == (PacketKind.COMBINE, True, len(plain.pairs.row_P))
        link.send(*Asked(20, 4, experts=(99,)).packet())
        assert link.recv()[0].kind is PacketKind.FAILED
        link.send(*Asked(30, 4, hidden=64).packet())
        assert link.recv()[0].kind is PacketKind.FAILED
        link.send(*plain.packet())
        plain.check(server, *link.recv())


def test_a_large_packet_that_it_cannot_answer_is_handed_on_whole(server: ShardServer, link: Link) -> None:
    asked = Asked(1, 24_000, experts=(0, 1))  # expert 1 is not here, as it finds when it has read all
    sending = threading.Thread(target=lambda: link.send(*asked.packet()))
    sending.start()
    assert link.recv()[0].kind is PacketKind.NOT_HERE
    sending.join()
    small = Asked(2, 3)
    link.send(*small.packet())
    small.check(server, *link.recv())


@pytest.mark.parametrize("row", [-1, 4])
def test_a_row_that_was_not_sent_ends_the_link(server: ShardServer, link: Link, row: int) -> None:
    asked = Asked(1, 4)
    asked.pairs.row_P[0] = row
    link.send(*asked.packet())
    with pytest.raises(LinkError):
        link.recv(2.0)


def test_a_packet_of_another_generation_ends_the_link(link: Link) -> None:
    header, parts = Asked(1, 4).packet()
    link.send(replace(header, generation=2), parts)
    with pytest.raises(LinkError):
        link.recv(2.0)


def test_workers_at_once_each_get_their_own(server: ShardServer, kind: str) -> None:
    def ask(link: Link, worker: int) -> None:
        for number in range(40):
            asked = Asked(1000 * worker + number, 1 + number % 9)
            link.send(*asked.packet())
            asked.check(server, *link.recv())
            done[worker] += 1

    done = [0, 0, 0, 0]
    with ExitStack() as stack:
        links = [stack.enter_context(served_link(server, f"worker-{n}", kind=kind)) for n in range(4)]
        threads = [threading.Thread(target=ask, args=(link, n)) for n, link in enumerate(links)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert done == [40] * 4
    assert server.counted.num_packets == 160
    assert server.counted.num_batches <= 160


def test_experts_that_come_and_go_are_followed(server: ShardServer, weights: CheckpointWeights, link: Link) -> None:
    def change() -> None:
        for _ in range(20):
            server.slots.add(LAYER, [1, 7], weights.load_expert)
            server.slots.keep([ExpertKey(LAYER, e) for e in HERE])

    server.epoch = EPOCH + 1
    changing = threading.Thread(target=change)
    changing.start()
    number = 0
    while changing.is_alive() or number < 50:
        asked = Asked(number, 6)
        link.send(*asked.packet())
        asked.check(server, *link.recv())
        number += 1
    changing.join()
    server.slots.add(LAYER, [1], weights.load_expert)
    asked = Asked(5, 6, experts=(1,))
    link.send(*asked.packet())
    asked.check(server, *link.recv())
    server.slots.keep([])
    link.send(*asked.packet())
    assert link.recv()[0].kind is PacketKind.NOT_HERE


def test_it_tells_of_a_links_last_packet_and_of_slow_ones(weights: CheckpointWeights, kind: str) -> None:
    keys = [ExpertKey(LAYER, e) for e in HERE]
    for slow_log_s, num_told in ((1e-9, 3), (1000.0, 0)):
        server = ShardServer(ExpertSlots(weights, keys, CPU), EPOCH, slow_log_s)
        with logged() as lines, served_link(server, kind=kind) as link:
            for step in (5, 6, 7):
                asked = Asked(first_sequence(step) + 1, 4)
                link.send(*asked.packet())
                asked.check(server, *link.recv())
        assert [line["step"] for line in lines.of("packet_slow")] == [5, 6, 7][:num_told]
        assert [line["step"] for line in lines.of("peer_gone")] == [7]
