"""Real shard servers behind real links of each kind, one of which delays, truncates or repeats its answers.

Whatever it does, the layer's result is that of an undisturbed run, computed on the other shard.

Shape suffixes: T tokens, H hidden, K choices a token.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.links.gloo import INLINE_BYTES, GlooLink
from expertmesh.actors.links.local import LocalLink
from expertmesh.actors.shard.server import ShardServer
from expertmesh.actors.worker.dispatcher import Dispatcher
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.dispatch_hash import identity_hash, token_keys
from expertmesh.cluster.errors import LinkError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.packets import PacketHeader
from expertmesh.cluster.placement import Placement, ShardSlots
from expertmesh.models.architecture import open_architecture
from expertmesh.models.expert_slots import ExpertSlots
from expertmesh.models.loading import CheckpointWeights
from tests.families import write_checkpoint
from tests.fleet import CPU, break_link, link_pair

A, B = ShardId("shard-a"), ShardId("shard-b")
LAYER, NUM_EXPERTS, HIDDEN = 1, 8, 32
DEADLINE_S = 30.0
# Of a link whose next answer does not come, so that the test need not wait longer.
SHORT_DEADLINE_S = 0.3
KEYS = tuple(ExpertKey(LAYER, expert) for expert in range(NUM_EXPERTS))
# Everything goes to shard a as long as its link stands.
PLACEMENT = Placement(
    epoch=1,
    num_experts=NUM_EXPERTS,
    layers=(LAYER,),
    shards=(ShardSlots(shard=A, experts=KEYS), ShardSlots(shard=B, experts=KEYS)),
    weights=dict.fromkeys(KEYS, (1, 0)),
)


class FaultyLink(Link):
    """A shard's end of a link whose next answers go wrong as told; "" is a sound one."""

    def __init__(self, inner: Link) -> None:
        super().__init__(inner.generation)
        self._inner = inner
        self._former: tuple[PacketHeader, list[Tensor]] | None = None
        self.faults: deque[str] = deque()
        self.num_answers = 0

    def send(self, header: PacketHeader, parts: Sequence[Tensor] = ()) -> None:
        fault = self.faults.popleft() if self.faults else ""
        self.num_answers += 1
        former, self._former = self._former, (header, [part.clone() for part in parts])
        if fault == "slow":
            time.sleep(SHORT_DEADLINE_S)
        elif fault == "late":
            time.sleep(SHORT_DEADLINE_S * 3)
        elif fault == "truncated":
            self._send_a_part(header, parts)
            return
        elif fault == "another generation":
            header, parts = replace(header, generation=header.generation - 1), [torch.full_like(p, 7) for p in parts]
        elif fault == "a former answer":
            assert former is not None, "the first answer has none before it"
            header, parts = former
        self._inner.send(header, parts)

    def recv(self, timeout_s: float | None = None) -> tuple[PacketHeader, Tensor]:
        return self._inner.recv(timeout_s)

    def close(self) -> None:
        self._inner.close()

    def _send_a_part(self, header: PacketHeader, parts: Sequence[Tensor]) -> None:
        """Send the beginning of a message, as one does that dies or is cut off in the middle of it."""
        if isinstance(self._inner, LocalLink):
            payload = torch.cat([part.reshape(-1).view(torch.uint8) for part in parts])
            try:
                self._inner._socket.sendall(header.pack() + payload[: len(payload) // 2].numpy().tobytes())
            except OSError as error:  # the other end may have given up already
                raise LinkError(str(error)) from error
        else:
            # Gloo knows the size of each message; only one that is sent in two can lack its second half.
            assert isinstance(self._inner, GlooLink)
            self._inner.send_header(replace(header, payload_bytes=INLINE_BYTES + 1))


class TwoShards:
    """A dispatcher with two shards that both host every expert; the answers of the first can be spoiled."""

    def __init__(self, weights: CheckpointWeights, kind: str) -> None:
        self._kind = kind
        self._servers = {shard: ShardServer(ExpertSlots(weights, KEYS, CPU), epoch=1) for shard in (A, B)}
        self._stack = ExitStack()
        self._generation = 4
        self._steps = count(1)
        self.lost: list[ShardId] = []
        self.dispatcher = Dispatcher(
            (LAYER,), NUM_EXPERTS, recovery_s=0.1, on_lost=lambda shard, _: self.lost.append(shard)
        )

    def __enter__(self) -> "TwoShards":
        self._link_b, _ = self._serve(B)
        self.join_a()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def join_a(self) -> None:
        """Form the link to shard a, anew if there was one, and use it."""
        self._generation += 1
        self._link_a, self.a = self._serve(A)
        self.dispatcher.set_fleet(Fleet(PLACEMENT, {A: self._link_a, B: self._link_b}))

    def spoil(self, fault: str) -> None:
        """Have the next answer of shard a go wrong."""
        self.a.faults.append(fault)
        if fault in ("late", "truncated"):
            self._link_a._timeout_s = SHORT_DEADLINE_S  # type: ignore[attr-defined]  # each kind has it

    def run(self, seed: int = 0) -> Tensor:
        """Run the layer for twelve tokens."""
        generator = torch.Generator().manual_seed(seed)
        hidden_TH = torch.randn(12, HIDDEN, generator=generator)
        ids_TK = torch.rand(12, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :2]
        keys_T = token_keys(np.full(12, identity_hash("request"), dtype=np.uint64), np.arange(12))
        self.dispatcher.begin_step(Step(next(self._steps)), keys_T, np.ones(12, dtype=np.bool_))
        return self.dispatcher.run(LAYER, hidden_TH, ids_TK, torch.rand(12, 2, generator=generator))

    @property
    def num_packets(self) -> tuple[int, int]:
        """Packets that each shard has computed."""
        return self._servers[A].counted.num_packets, self._servers[B].counted.num_packets

    def _serve(self, shard: ShardId) -> tuple[Link, FaultyLink]:
        pair = link_pair(f"{shard}/{self._generation}", self._generation, DEADLINE_S, kind=self._kind)
        worker_end, shard_end = self._stack.enter_context(pair)
        faulty = FaultyLink(shard_end)
        self._stack.enter_context(_serving(self._servers[shard], worker_end, faulty))
        return worker_end, faulty


@contextmanager
def _serving(server: ShardServer, worker_end: Link, shard_end: Link) -> Iterator[None]:
    thread = threading.Thread(target=server.serve, args=(shard_end,))
    thread.start()
    try:
        yield
    finally:
        break_link(worker_end)
        thread.join(10)
        assert not thread.is_alive(), "the server goes on with a link that is broken"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> CheckpointWeights:
    directory: Path = tmp_path_factory.mktemp("mixtral")
    write_checkpoint("mixtral", directory)
    return CheckpointWeights(open_architecture(directory))


@pytest.fixture(params=["gloo", "local", "shared"])
def shards(request: pytest.FixtureRequest, weights: CheckpointWeights) -> Iterator[TwoShards]:
    with TwoShards(weights, request.param) as both:
        yield both


def test_a_slow_link_only_slows(shards: TwoShards) -> None:
    expected = shards.run()
    shards.spoil("slow")
    assert torch.equal(shards.run(), expected)
    assert not shards.lost
    assert shards.num_packets == (2, 0)


@pytest.mark.parametrize("fault", ["late", "truncated", "another generation", "a former answer"])
def test_a_spoiled_answer_is_not_used_and_the_link_is_formed_anew(shards: TwoShards, fault: str) -> None:
    expected = shards.run(seed=1)
    shards.run(seed=0)  # the former answer is to other tokens, in a packet of the same size
    shards.spoil(fault)
    assert torch.equal(shards.run(seed=1), expected), "shard b computed it"
    assert shards.lost == [A]
    assert shards.num_packets[1] == 1
    assert torch.equal(shards.run(seed=1), expected)
    assert shards.num_packets[1] == 2, "the broken link is left alone"

    shards.join_a()  # it was only slow, or confused: under another generation it is used again
    assert torch.equal(shards.run(seed=1), expected)
    assert shards.num_packets[1] == 2
    assert shards.lost == [A]


def test_a_link_that_spoils_every_answer_changes_no_result(shards: TwoShards) -> None:
    expected = [shards.run(seed) for seed in range(8)]
    for seed, fault in enumerate(["slow", "another generation", "a former answer", "truncated", "", "slow"]):
        if shards.lost:
            shards.lost.clear()
            shards.join_a()
            shards.run(seed=7)
        shards.spoil(fault)
        assert torch.equal(shards.run(seed), expected[seed]), fault
        assert bool(shards.lost) == (fault not in ("", "slow")), fault
