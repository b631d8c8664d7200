"""The worker's compiled way to the shards and back: what the fleets of test_dispatcher.py do not show.

Shape suffixes: T tokens, H hidden, K choices a token.
"""

import time
from contextlib import ExitStack

import pytest
import torch

from expertmesh.actors.links.base import Link
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.cluster.errors import NoReplicaError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.packets import HEADER_BYTES, PacketHeader, PacketKind, WireDtype, first_sequence
from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.exchange import Exchange
from tests.fleet import link_pair
from tests.memory_shards import MemoryShard, over_socket
from tests.unit.test_dispatcher import EVERY, Batch, dispatcher_of, placement_of

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)

SPLIT = {"a": {0, 2, 4, 6}, "b": {1, 3, 5, 7}}


@pytest.fixture
def exchanges(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each compiled exchange was finished."""
    finished: list[bool] = []
    run = Exchange.run

    def watched(self: Exchange, *arguments: object, **numbers: object) -> object:
        out = run(self, *arguments, **numbers)  # type: ignore[arg-type]
        finished.append(out is not None)
        return out

    monkeypatch.setattr(Exchange, "run", watched)
    return finished


@pytest.mark.parametrize("kind", ["local", "shared"])
@pytest.mark.parametrize("num_tokens", [1, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_is_that_of_the_other_path_to_the_bit(
    dtype: torch.dtype, num_tokens: int, kind: str, exchanges: list[bool]
) -> None:
    batch = Batch(num_tokens=num_tokens, dtype=dtype)
    results = []
    for is_compiled in (False, True):
        with ExitStack() as stack:
            shards = {ShardId(name): MemoryShard(experts) for name, experts in SPLIT.items()}
            links: dict[ShardId, Link] = dict(shards)
            if is_compiled:
                links = {name: over_socket(shard, stack, kind) for name, shard in shards.items()}
            dispatcher = dispatcher_of(Fleet(placement_of(SPLIT), links))
            results.append(batch.run(dispatcher))
            counted = dispatcher.dispatch_bytes_L.sum(), dispatcher.combine_bytes_L.sum()
            assert counted == (
                sum(shard.num_bytes_in for shard in shards.values()),
                sum(shard.num_bytes_out for shard in shards.values()),
            )
    assert exchanges == [True]
    assert torch.equal(*results)


def test_other_dtypes_go_the_other_way(exchanges: list[bool]) -> None:
    with ExitStack() as stack:
        links = {ShardId(name): over_socket(MemoryShard(experts), stack) for name, experts in SPLIT.items()}
        batch = Batch(dtype=torch.float16)
        out_TH = batch.run(dispatcher_of(Fleet(placement_of(SPLIT), links)))
        torch.testing.assert_close(out_TH.float(), batch.expected(), rtol=1e-2, atol=1e-2)
    assert not exchanges


def test_a_shard_that_hangs_is_lost_at_the_deadline_and_its_replica_asked(exchanges: list[bool]) -> None:
    with ExitStack() as stack:
        hung, _ = stack.enter_context(link_pair("hung", timeout_s=0.3, kind="local"))
        shards = {"a": EVERY, "b": EVERY}
        links = {ShardId("a"): hung, ShardId("b"): over_socket(MemoryShard(EVERY), stack)}
        fleet = Fleet(placement_of(shards), links)
        batch = Batch()
        began_s = time.monotonic()
        batch.check(batch.run(dispatcher_of(fleet)))
        assert 0.25 < time.monotonic() - began_s < 3
        assert fleet.alive_S.tolist() == [False, True]
    assert exchanges == [False]


def test_a_shard_that_has_gone_is_lost_at_once(exchanges: list[bool]) -> None:
    with ExitStack() as stack:
        gone, other_end = stack.enter_context(link_pair("gone", kind="local"))
        other_end.close()
        fleet = Fleet(placement_of({"a": EVERY}), {ShardId("a"): gone})
        with pytest.raises(NoReplicaError):
            Batch().run(dispatcher_of(fleet))
        assert fleet.alive_S.tolist() == [False]
    assert exchanges == [False]


def test_the_header_is_that_of_the_packets_module() -> None:
    seen: list[PacketHeader] = []

    class Looking(MemoryShard):
        def send(self, header: PacketHeader, parts: object = ()) -> None:
            seen.append(header)
            super().send(header, parts)  # type: ignore[arg-type]

    with ExitStack() as stack:
        links = {ShardId("a"): over_socket(Looking(EVERY), stack)}
        batch = Batch(num_tokens=5, top_k=2, dtype=torch.bfloat16)
        dispatcher = dispatcher_of(Fleet(placement_of({"a": EVERY}, epoch=2**40), links))
        batch.run(dispatcher)
    rows_bytes = 5 * batch.hidden_TH.shape[1] * 2
    assert seen == [
        PacketHeader(
            kind=PacketKind.DISPATCH,
            generation=1,
            sequence=first_sequence(1) + 1,
            epoch=2**40,
            layer=3,
            num_rows=5,
            num_pairs=10,
            hidden=batch.hidden_TH.shape[1],
            dtype=WireDtype.BFLOAT16,
            payload_bytes=rows_bytes + 10 * 12,
        )
    ]
    assert len(seen[0].pack()) == HEADER_BYTES
