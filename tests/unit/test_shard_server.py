"""The shard's server over real links: answers, batches, and workers that send nonsense, do not listen, or die.

Shape suffixes: R rows, H hidden, P (row, expert) pairs.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.shard.server import ShardServer
from expertmesh.actors.wire import read_combine
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.packets import PacketHeader, PacketKind
from expertmesh.kernels.cpu.build import load_expert_mlp
from expertmesh.kernels.dispatch import ShardPairs
from expertmesh.kernels.grouped_mlp import SlotWeights, reference_mlp
from expertmesh.models.architecture import expert_math, open_architecture
from expertmesh.models.deterministic import deterministic_math
from expertmesh.models.expert_slots import ExpertSlots, LayerSlots
from expertmesh.models.loading import CheckpointWeights
from tests.families import write_checkpoint
from tests.fleet import CPU, break_link, link_pair, served_link
from tests.packets import dispatch_packet

EPOCH = 11
HIDDEN = 32
HERE = range(6)  # of the 8 experts of each of the layers 0 to 2
# Matrix products of more rows at a time may sum in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> CheckpointWeights:
    directory: Path = tmp_path_factory.mktemp("mixtral")
    write_checkpoint("mixtral", directory)
    return CheckpointWeights(open_architecture(directory))


@pytest.fixture
def server(weights: CheckpointWeights) -> ShardServer:
    keys = [ExpertKey(layer, expert) for layer in range(3) for expert in HERE]
    return ShardServer(ExpertSlots(weights, keys, CPU), EPOCH)


class Request:
    """Rows for some experts of a layer, and what they should give."""

    def __init__(self, seed: int, experts: list[int], *, layer: int = 1, hidden: int = HIDDEN) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer = layer
        self.sequence = 100 + seed
        self.rows_RH = torch.randn(3, hidden, generator=generator)
        row_P = np.arange(len(experts), dtype=np.int32) % 3
        weight_P = torch.rand(len(experts), generator=generator).numpy()
        self.pairs = ShardPairs(
            num_rows=3, token_R=None, row_P=row_P, expert_P=np.array(experts, dtype=np.int32), weight_P=weight_P
        )

    def send(self, link: Link, *, by_pair: bool = False) -> None:
        numbers = {"layer": self.layer, "generation": 1, "sequence": self.sequence, "epoch": EPOCH}
        link.send(*dispatch_packet(self.rows_RH, self.pairs, **numbers, by_pair=by_pair))

    def expected(self, weights: CheckpointWeights) -> Tensor:
        experts = [weights.load_expert(ExpertKey(self.layer, expert)) for expert in range(8)]
        return reference_mlp(
            self.rows_RH,
            row_P=torch.from_numpy(self.pairs.row_P),
            slot_P=torch.from_numpy(self.pairs.expert_P),
            weight_P=torch.from_numpy(self.pairs.weight_P),
            slots=SlotWeights(
                up_SUH=torch.stack([e["gate_up_proj"] for e in experts]),
                down_SHW=torch.stack([e["down_proj"] for e in experts]),
            ),
            math=expert_math(weights.architecture.experts_by_layer[self.layer]),
        )

    def check_answer(self, link: Link, weights: CheckpointWeights, *, timeout_s: float = 3.0) -> None:
        header, payload = link.recv(timeout_s)
        assert header.kind is PacketKind.COMBINE, bytes(payload.numpy())
        assert (header.sequence, header.layer, header.epoch) == (self.sequence, self.layer, EPOCH)
        torch.testing.assert_close(
            read_combine(header, payload), self.expected(weights), rtol=TOLERANCE, atol=TOLERANCE
        )


class Gate:
    """Holds the server's computations until it is opened, and notes the rows of each."""

    def __init__(self, server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self._server = server
        self._open = threading.Event()
        self._run: Callable[..., Tensor] = LayerSlots.run
        self.num_rows: list[int] = []
        # A function, not a bound method: it gets the layer's slots first.
        monkeypatch.setattr(LayerSlots, "run", lambda *arguments: self._wait_and_run(*arguments))

    def open_when_waiting(self, count: int) -> None:
        """Open the gate when the computation has begun and `count` packets wait for the next."""
        self.await_waiting(count)
        self._open.set()

    def await_waiting(self, count: int) -> None:
        deadline_s = time.monotonic() + 5
        while not self.num_rows or len(self._server._waiting) < count:
            assert time.monotonic() < deadline_s, f"{len(self._server._waiting)} packets wait, not {count}"
            time.sleep(0.002)

    def open(self) -> None:
        self._open.set()

    def _wait_and_run(self, slots: LayerSlots, rows_RH: Tensor, *pairs: Tensor) -> Tensor:
        self.num_rows.append(len(rows_RH))
        assert self._open.wait(5), "the gate was never opened"
        return self._run(slots, rows_RH, *pairs)


@pytest.fixture
def gate(server: ShardServer, monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(server, monkeypatch)


@contextmanager
def workers(server: ShardServer, count: int) -> Iterator[list[Link]]:
    with ExitStack() as stack:
        yield [stack.enter_context(served_link(server, f"worker-{n}")) for n in range(count)]


def failure(link: Link, sequence: int) -> str:
    header, payload = link.recv(3.0)
    assert (header.kind, header.sequence) == (PacketKind.FAILED, sequence)
    return bytes(payload.numpy()).decode()


def test_answers_equal_the_reference(server: ShardServer, weights: CheckpointWeights) -> None:
    with served_link(server) as link:
        for seed, experts in enumerate([[0], [5, 5, 5], [0, 1, 2, 3, 4, 5, 0]]):
            for layer in range(3):
                request = Request(seed, experts, layer=layer)
                request.send(link)
                request.check_answer(link, weights)
    assert (server.counted.num_packets, server.counted.num_batches) == (9, 9)


def test_packets_of_a_layer_that_wait_are_computed_together(
    server: ShardServer, weights: CheckpointWeights, gate: Gate
) -> None:
    requests = [Request(n, [n, n + 1], layer=1 if n < 4 else 2) for n in range(5)]
    with workers(server, 5) as links:
        requests[0].send(links[0])
        gate.await_waiting(0)
        for request, link in zip(requests[1:], links[1:], strict=True):
            request.send(link)
        gate.open_when_waiting(4)
        for request, link in zip(requests, links, strict=True):
            request.check_answer(link, weights)
    # The first alone, the three of its layer that came meanwhile, and the one of another layer.
    assert sorted(gate.num_rows) == [3, 3, 9]
    assert (server.counted.num_packets, server.counted.num_batches) == (5, 3)


@pytest.mark.skipif(load_expert_mlp() is None, reason="deterministic mode needs a C++ compiler; there is none")
def test_pairs_are_answered_by_themselves_and_the_same_whoever_waits(
    server: ShardServer, weights: CheckpointWeights, gate: Gate
) -> None:
    held, summed, *requests = [Request(n, [n, 2, n + 1, 2]) for n in range(5)]
    with deterministic_math(), workers(server, 5) as links:
        alone = []
        for request in requests:
            request.send(links[0], by_pair=True)
            alone.append(read_combine(*links[0].recv(3.0)).clone())  # the link reuses its buffer
        before = server.counted.num_batches
        held.send(links[0])
        gate.await_waiting(0)
        summed.send(links[1])
        for request, link in zip(requests, links[2:], strict=True):
            request.send(link, by_pair=True)
        gate.open_when_waiting(4)
        held.check_answer(links[0], weights)
        summed.check_answer(links[1], weights)
        for request, link, expected_PH in zip(requests, links[2:], alone, strict=True):
            header, payload = link.recv(3.0)
            assert header.by_pair
            out_PH = read_combine(header, payload)
            assert torch.equal(out_PH, expected_PH)
            out_RH = torch.zeros(3, HIDDEN)
            out_RH.index_add_(
                0, torch.from_numpy(request.pairs.row_P), out_PH * torch.from_numpy(request.pairs.weight_P).unsqueeze(1)
            )
            torch.testing.assert_close(out_RH, request.expected(weights), rtol=TOLERANCE, atol=TOLERANCE)
    # The one held, the one that is summed, and the three others together.
    assert server.counted.num_batches - before == 3


def test_an_expert_that_is_not_hosted_is_not_here(server: ShardServer, weights: CheckpointWeights) -> None:
    with served_link(server) as link:
        for request in (Request(0, [0, 6]), Request(1, [7]), Request(2, [0], layer=5)):
            request.send(link)
            header, _ = link.recv(3.0)
            assert (header.kind, header.sequence, header.epoch) == (PacketKind.NOT_HERE, request.sequence, EPOCH)
        request = Request(3, [0])
        request.send(link)
        request.check_answer(link, weights)


def test_not_here_is_for_one_worker_of_a_batch(server: ShardServer, weights: CheckpointWeights, gate: Gate) -> None:
    first, here, not_here = Request(0, [0]), Request(1, [1]), Request(2, [7])
    with workers(server, 3) as links:
        first.send(links[0])
        gate.await_waiting(0)
        here.send(links[1])
        not_here.send(links[2])
        gate.open_when_waiting(2)
        first.check_answer(links[0], weights)
        here.check_answer(links[1], weights)
        assert links[2].recv(3.0)[0].kind is PacketKind.NOT_HERE


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ValueError("a wrong number"), IndexError("far off")])
def test_a_computation_that_fails_is_answered(
    server: ShardServer, weights: CheckpointWeights, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_args: object) -> Tensor:
        raise error

    request = Request(0, [0])
    with served_link(server) as link:
        with monkeypatch.context() as patch:
            patch.setattr(LayerSlots, "run", fail)
            request.send(link)
            assert failure(link, request.sequence) == str(error)
        request.send(link)
        request.check_answer(link, weights)


@pytest.mark.parametrize("bad", [Request(9, [3, 99]), Request(9, [3], hidden=HIDDEN + 1)], ids=["expert", "width"])
def test_a_bad_packet_fails_alone(server: ShardServer, weights: CheckpointWeights, gate: Gate, bad: Request) -> None:
    first, good = Request(0, [0]), Request(1, [3])
    with workers(server, 3) as links:
        first.send(links[0])
        gate.await_waiting(0)
        bad.send(links[1])
        good.send(links[2])
        gate.open_when_waiting(2)
        first.check_answer(links[0], weights)
        good.check_answer(links[2], weights)
        assert failure(links[1], bad.sequence)


def test_close_ends_serving(server: ShardServer) -> None:
    with link_pair() as (worker_end, shard_end):
        thread = threading.Thread(target=server.serve, args=(shard_end,))
        thread.start()
        worker_end.close()
        thread.join(timeout=2.0)
        assert not thread.is_alive()


def test_a_broken_link_ends_serving(server: ShardServer) -> None:
    with link_pair() as (worker_end, shard_end):
        thread = threading.Thread(target=server.serve, args=(shard_end,))
        thread.start()
        break_link(worker_end)
        thread.join(timeout=2.0)
        assert not thread.is_alive()


def test_a_packet_that_no_worker_sends_ends_serving(server: ShardServer) -> None:
    request = Request(0, [0])
    sound, parts = dispatch_packet(request.rows_RH, request.pairs, layer=1, generation=1, sequence=1, epoch=EPOCH)
    answer = PacketHeader(kind=PacketKind.COMBINE, generation=1, sequence=1, epoch=EPOCH)
    damaged = replace(sound, num_pairs=sound.num_pairs + 1)
    for header, payload in ((answer, []), (damaged, parts)):
        with link_pair() as (worker_end, shard_end):
            thread = threading.Thread(target=server.serve, args=(shard_end,))
            thread.start()
            worker_end.send(header, payload)
            thread.join(timeout=2.0)
            assert not thread.is_alive()
    assert server.counted.num_packets == 0


def test_a_worker_that_dies_while_its_answer_is_computed_disturbs_nobody(
    server: ShardServer, weights: CheckpointWeights, gate: Gate
) -> None:
    requests = [Request(n, [n]) for n in range(3)]
    with workers(server, 3) as links:
        requests[0].send(links[0])
        gate.await_waiting(0)
        requests[1].send(links[1])
        requests[2].send(links[2])
        gate.await_waiting(2)
        break_link(links[0])
        break_link(links[1])
        gate.open()
        requests[2].check_answer(links[2], weights)
        requests[2].send(links[2])
        requests[2].check_answer(links[2], weights)
        with pytest.raises(LinkError):
            links[0].recv(1.0)


def test_a_worker_that_takes_no_answer_holds_up_nobody(server: ShardServer, weights: CheckpointWeights) -> None:
    deaf, other = Request(0, [0]), Request(1, [1])
    with workers(server, 2) as links:
        deaf.send(links[0])
        for _ in range(3):
            other.send(links[1])
            other.check_answer(links[1], weights, timeout_s=1.0)
        deaf.check_answer(links[0], weights)


def test_an_answer_is_in_the_dtype_of_its_request(tmp_path: Path) -> None:
    write_checkpoint("mixtral", tmp_path)
    half = CheckpointWeights(open_architecture(tmp_path, "bfloat16"))
    server = ShardServer(ExpertSlots(half, [ExpertKey(1, expert) for expert in HERE], CPU), EPOCH)
    request = Request(0, [0, 1, 2])
    request.rows_RH = request.rows_RH.to(torch.bfloat16)
    with served_link(server) as link:
        request.send(link)
        header, payload = link.recv(3.0)
        assert header.kind is PacketKind.COMBINE
        answer_RH = read_combine(header, payload)
    assert answer_RH.dtype == torch.bfloat16
    assert torch.equal(answer_RH, request.expected(half).to(torch.bfloat16))


def test_rows_of_another_dtype_than_the_weights_fail(server: ShardServer) -> None:
    request = Request(0, [0])
    request.rows_RH = request.rows_RH.to(torch.float16)
    with served_link(server) as link:
        request.send(link)
        assert "dtype" in failure(link, request.sequence)
