"""The dispatcher over shards that fail as told, and a whole fleet that loses a shard.

The shards are in memory, or at the other end of a Unix socket: over sockets compiled code sends and receives.

Shape suffixes: T tokens, H hidden, K choices a token, E experts, R rows that one shard gets.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.actors.links.base import Link
from expertmesh.actors.worker.dispatcher import Dispatcher
from expertmesh.actors.worker.fleet import Fleet
from expertmesh.actors.worker.step import Step
from expertmesh.cluster.capacity import kept_pairs
from expertmesh.cluster.dispatch_hash import identity_hash, token_keys
from expertmesh.cluster.errors import NoReplicaError, UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement
from tests.families import random_prompts, write_checkpoint
from tests.fleet import LocalFleet, break_link, greedy
from tests.memory_shards import EXPERTS_EHH, HIDDEN, LAYER, NUM_EXPERTS, MemoryShard, over_socket

# Sums of a token's at most four experts in another order.
TOLERANCE = 1e-5


class Batch:
    """A layer's input, and what must come out."""

    def __init__(self, num_tokens: int = 12, top_k: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden_TH = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
        self.ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
        self.weights_TK = torch.rand(num_tokens, top_k, generator=generator)
        self.num_decoded = 0  # that many tokens, the first, are generated ones

    def run(self, dispatcher: Dispatcher) -> Tensor:
        num_tokens = len(self.hidden_TH)
        dispatcher.begin_step(
            Step(1),
            token_keys(np.full(num_tokens, identity_hash("request"), dtype=np.uint64), np.arange(num_tokens)),
            np.arange(num_tokens) < self.num_decoded,
        )
        return dispatcher.run(LAYER, self.hidden_TH, self.ids_TK, self.weights_TK)

    def expected(self) -> Tensor:
        every_TKH = torch.einsum("th,tkhg->tkg", self.hidden_TH.float(), EXPERTS_EHH[self.ids_TK])
        return (every_TKH * self.weights_TK.unsqueeze(-1)).sum(dim=1)

    def load_of_experts(self) -> list[int]:
        return torch.bincount(self.ids_TK.flatten(), minlength=NUM_EXPERTS).tolist()

    def check(self, out_TH: Tensor) -> None:
        torch.testing.assert_close(out_TH, self.expected(), rtol=TOLERANCE, atol=TOLERANCE)


# How the links of the fleets in this file are made of their shards.
_connect: Callable[[MemoryShard], Link] = lambda shard: shard


@pytest.fixture(params=["memory", "socket"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with ExitStack() as stack:
        if request.param == "socket":
            monkeypatch.setattr(f"{__name__}._connect", lambda shard: over_socket(shard, stack))
        yield request.param


def placement_of(
    experts_of_shard: dict[str, set[int]], epoch: int = 1, weights: tuple[int, ...] | None = None
) -> Placement:
    return Placement(
        epoch=epoch,
        num_experts=NUM_EXPERTS,
        layers=(1, LAYER),
        shards=tuple(
            ShardSlots(shard=ShardId(name), experts=tuple(ExpertKey(LAYER, expert) for expert in sorted(experts)))
            for name, experts in experts_of_shard.items()
        ),
        weights={ExpertKey(LAYER, expert): weights for expert in range(NUM_EXPERTS)} if weights else {},
    )


def memory_fleet(
    experts_of_shard: dict[str, set[int]], weights: tuple[int, ...] | None = None
) -> tuple[Fleet, list[MemoryShard]]:
    shards = {ShardId(name): MemoryShard(experts) for name, experts in experts_of_shard.items()}
    links = {name: _connect(shard) for name, shard in shards.items()}
    return Fleet(placement_of(experts_of_shard, weights=weights), links), list(shards.values())


def dispatcher_of(
    fleet: Fleet, recovery_s: float = 0.1, *, by_pair: bool = False, capacity_factor: float | None = None
) -> Dispatcher:
    dispatcher = Dispatcher(
        (1, LAYER), NUM_EXPERTS, recovery_s=recovery_s, by_pair=by_pair, capacity_factor=capacity_factor
    )
    dispatcher.set_fleet(fleet)
    return dispatcher


def even_fleet(num_shards: int, replicas: int) -> tuple[Fleet, list[MemoryShard]]:
    names = [ShardId(f"shard-{n}") for n in range(num_shards)]
    placement = initial_placement((LAYER,), NUM_EXPERTS, names, replicas)
    return memory_fleet({slots.shard: {key.expert for key in slots.experts} for slots in placement.shards})


def experts_asked(shard: MemoryShard) -> list[set[int]]:
    return [set(dispatch.expert_P.tolist()) for dispatch in shard.asked]


EVERY = set(range(NUM_EXPERTS))
LOW, HIGH = {0, 1, 2, 3}, {4, 5, 6, 7}


@pytest.mark.parametrize(("num_shards", "replicas"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_the_result_is_that_of_a_local_computation(num_shards: int, replicas: int) -> None:
    fleet, shards = even_fleet(num_shards, replicas)
    dispatcher = dispatcher_of(fleet)
    for seed, num_tokens in enumerate([1, 2, 30]):
        batch = Batch(num_tokens, seed=seed)
        batch.check(batch.run(dispatcher))
    assert sum(len(shard.asked) > 0 for shard in shards) == num_shards
    assert dispatcher.num_retries == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_by_pair_the_sum_is_the_same_to_the_bit_whoever_computes(dtype: torch.dtype) -> None:
    """One shard; four; replicas; a link that breaks either way: a token's choices are added in their order."""
    batch = Batch(num_tokens=40, top_k=4, dtype=dtype)
    found = []
    for num_shards, replicas, fault in ((1, 1, ""), (4, 1, ""), (4, 2, ""), (4, 2, "recv"), (2, 2, "send")):
        fleet, shards = even_fleet(num_shards, replicas)
        shards[0].faults.append(fault)
        found.append(batch.run(dispatcher_of(fleet, by_pair=True)))
    assert all(torch.equal(out_TH, found[0]) for out_TH in found)
    tolerance = TOLERANCE if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found[0].float(), batch.expected(), rtol=tolerance, atol=tolerance)


def test_by_pair_an_answer_of_sums_is_refused() -> None:
    fleet, shards = even_fleet(2, 2)
    shards[0].faults.append("summed")
    batch = Batch()
    batch.check(batch.run(dispatcher_of(fleet, by_pair=True)))
    assert fleet.alive_S.tolist() == [False, True]


def test_each_row_travels_once_to_a_shard_and_each_pair_once_in_all() -> None:
    fleet, shards = even_fleet(2, 2)
    batch = Batch(30, top_k=4)
    batch.check(batch.run(dispatcher_of(fleet)))
    asked = [dispatch for shard in shards for dispatch in shard.asked]
    assert len(asked) == 2
    assert sum(len(dispatch.row_P) for dispatch in asked) == 30 * 4
    for dispatch in asked:
        assert len(torch.unique(dispatch.rows_RH, dim=0)) == len(dispatch.rows_RH) <= 30
        assert set(dispatch.row_P.tolist()) == set(range(len(dispatch.rows_RH)))


def test_the_result_has_the_dtype_of_the_hidden_states() -> None:
    batch = Batch(dtype=torch.bfloat16)
    out_TH = batch.run(dispatcher_of(even_fleet(2, 1)[0]))
    assert out_TH.dtype == torch.bfloat16
    # Each shard's sum is rounded to bfloat16 on the wire, then their sum is: three steps of 2**-8 at most.
    torch.testing.assert_close(out_TH.float(), batch.expected(), rtol=3 * 2**-8, atol=3 * 2**-8 * 8)


def test_loads_and_bytes_are_counted() -> None:
    fleet, shards = even_fleet(4, 2)
    dispatcher = dispatcher_of(fleet)
    batches = [Batch(7, seed=1), Batch(1, seed=2)]
    batches[0].num_decoded = 3
    batches[1].num_decoded = 1
    for batch in batches:
        batch.run(dispatcher)
    decoded = torch.cat([batches[0].ids_TK[:3].flatten(), batches[1].ids_TK.flatten()])
    assert dispatcher.decode_LE[1].tolist() == torch.bincount(decoded, minlength=NUM_EXPERTS).tolist()
    assert dispatcher.expert_s > 0
    loads = [batch.load_of_experts() for batch in batches]
    assert dispatcher.load_LE.tolist() == [[0] * NUM_EXPERTS, [a + b for a, b in zip(*loads, strict=True)]]
    assert dispatcher.dispatch_bytes_L.tolist() == [0, sum(shard.num_bytes_in for shard in shards)]
    assert dispatcher.combine_bytes_L.tolist() == [0, sum(shard.num_bytes_out for shard in shards)]
    assert dispatcher.combine_bytes_L[1] > 0


@pytest.mark.parametrize("fault", ["send", "recv", "failed", "sequence", "kind", "no_rows", "narrow"])
@pytest.mark.parametrize("num_tokens", [1, 12])
def test_the_pairs_of_a_lost_shard_go_to_the_replica(fault: str, num_tokens: int) -> None:
    # A replica of weight 0 gets nothing while the other lives.
    fleet, (a, b) = memory_fleet({"a": EVERY, "b": EVERY}, weights=(1, 0))
    dispatcher = dispatcher_of(fleet)
    a.faults.append(fault)
    batch = Batch(num_tokens, top_k=NUM_EXPERTS)
    batch.check(batch.run(dispatcher))
    assert fleet.alive_S.tolist() == [False, True]
    num_asked = 0 if fault == "send" else 1
    assert (len(a.asked), len(b.asked)) == (num_asked, 1)
    # It is asked no more, and what was sent twice is counted once.
    batch.check(batch.run(dispatcher))
    assert (len(a.asked), len(b.asked)) == (num_asked, 2)
    assert dispatcher.num_retries == 1
    assert dispatcher.load_LE[1].tolist() == [2 * load for load in batch.load_of_experts()]


def test_both_replicas_lost_in_turn() -> None:
    fleet, (a, b, c) = memory_fleet({"a": EVERY, "b": EVERY, "c": EVERY})
    a.faults.append("recv")
    b.faults.extend(["", "send"])
    batch = Batch(30)
    batch.check(batch.run(dispatcher_of(fleet)))
    assert fleet.alive_S.tolist() == [False, False, True]
    assert len(c.asked) >= 2


def test_no_replica_is_an_error_after_the_time_for_recovery() -> None:
    fleet, (_, b) = memory_fleet({"a": LOW, "b": HIGH})
    b.faults.append("send")
    started_s = time.monotonic()
    with pytest.raises(NoReplicaError, match=f"expert L{LAYER}E[4-7] has no live replica"):
        Batch().run(dispatcher_of(fleet, recovery_s=0.2))
    assert 0.2 <= time.monotonic() - started_s < 2.0


def test_a_shard_without_a_link_is_dead_from_the_start() -> None:
    experts_of_shard = {"a": EVERY, "b": EVERY}
    b = MemoryShard(EVERY)
    fleet = Fleet(placement_of(experts_of_shard), {ShardId("b"): b})
    batch = Batch()
    batch.check(batch.run(dispatcher_of(fleet)))
    assert len(b.asked) == 1


def test_a_fleet_published_while_a_step_waits_is_used() -> None:
    fleet, (a, b) = memory_fleet({"a": LOW, "b": HIGH})
    b.faults.append("recv")
    dispatcher = dispatcher_of(fleet, recovery_s=10.0)
    newer, (c, d) = memory_fleet({"c": LOW, "d": HIGH})
    publisher = threading.Timer(0.1, dispatcher.set_fleet, [newer])
    publisher.start()
    batch = Batch()
    started_s = time.monotonic()
    batch.check(batch.run(dispatcher))
    assert 0.05 < time.monotonic() - started_s < 5.0
    publisher.join()
    # What shard a had answered is not asked for again.
    assert (len(a.asked), len(c.asked), len(d.asked)) == (1, 0, 1)
    assert experts_asked(d)[0] <= HIGH
    assert dispatcher.fleet is newer
    assert dispatcher.load_LE[1].tolist() == batch.load_of_experts()


def test_not_here_waits_for_a_new_fleet_and_sends_only_those_pairs() -> None:
    fleet, (a, b) = memory_fleet({"a": LOW, "b": HIGH})
    b.faults.append("not_here")
    dispatcher = dispatcher_of(fleet, recovery_s=10.0)
    newer, (c, d) = memory_fleet({"c": {0, 1, 2, 3, 4, 5}, "d": {6, 7}})
    publisher = threading.Timer(0.1, dispatcher.set_fleet, [newer])
    publisher.start()
    batch = Batch(30)
    batch.check(batch.run(dispatcher))
    publisher.join()
    assert fleet.alive_S.all(), "a shard that does not host an expert is not lost"
    assert experts_asked(a) == [LOW]
    assert experts_asked(b) == [HIGH]
    assert experts_asked(c) == [{4, 5}]
    assert experts_asked(d) == [{6, 7}]
    assert dispatcher.load_LE[1].tolist() == batch.load_of_experts()


def test_not_here_without_a_new_fleet_is_an_error() -> None:
    fleet, (a, _) = memory_fleet({"a": EVERY, "b": EVERY})
    a.faults.append("not_here")
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match="a shard does not host what epoch 1 says"):
        Batch().run(dispatcher_of(fleet, recovery_s=0.2))
    assert 0.2 <= time.monotonic() - started_s < 2.0


def test_what_is_done_needs_no_replica_in_a_newer_fleet() -> None:
    """The shard whose answer has come may be gone while another's pairs are sent again."""
    fleet, (_, b) = memory_fleet({"a": LOW, "b": HIGH})
    b.faults.append("not_here")
    dispatcher = dispatcher_of(fleet, recovery_s=5.0)
    newer = Fleet(placement_of({"a": LOW, "b": HIGH}, epoch=2), {ShardId("b"): MemoryShard(HIGH)})
    publisher = threading.Timer(0.1, dispatcher.set_fleet, [newer])
    publisher.start()
    batch = Batch(30)
    batch.check(batch.run(dispatcher))
    publisher.join()


def without_what_is_dropped(batch: Batch, factor: float) -> tuple[Batch, list[int]]:
    """Return the batch with weights of 0 for what a capacity factor drops, and the dropped pairs by expert."""
    kept_TK = kept_pairs(batch.ids_TK.numpy(), batch.weights_TK.numpy(), NUM_EXPERTS, factor)
    lighter = Batch(len(batch.hidden_TH))
    lighter.hidden_TH, lighter.ids_TK = batch.hidden_TH, batch.ids_TK
    lighter.weights_TK = batch.weights_TK * torch.from_numpy(kept_TK)
    return lighter, np.bincount(batch.ids_TK.numpy()[~kept_TK], minlength=NUM_EXPERTS).tolist()


@pytest.mark.parametrize("fault", ["", "recv", "send"])
def test_a_capacity_factor_drops_pairs_and_counts_them(fault: str) -> None:
    """What is kept keeps its weight, and is sent again if a shard is lost; what is dropped never is."""
    fleet, shards = even_fleet(2, 2)
    shards[0].faults.append(fault)
    dispatcher = dispatcher_of(fleet, capacity_factor=0.5)
    batch = Batch(30)
    lighter, dropped_E = without_what_is_dropped(batch, 0.5)
    lighter.check(batch.run(dispatcher))
    assert sum(dropped_E) > 30
    assert dispatcher.dropped_LE.tolist() == [[0] * NUM_EXPERTS, dropped_E]
    # The balancer is to see what was wanted, not what was done.
    assert dispatcher.load_LE[1].tolist() == batch.load_of_experts()
    sent = sum(len(dispatch.row_P) for shard in shards for dispatch in shard.asked)
    assert sent >= 30 * 3 - sum(dropped_E)
    assert fault or sent == 30 * 3 - sum(dropped_E)
    batch.run(dispatcher)
    assert dispatcher.dropped_LE[1].tolist() == [2 * count for count in dropped_E]


def test_a_wide_capacity_factor_drops_nothing() -> None:
    batch = Batch(30)
    for factor in (None, NUM_EXPERTS / 3):
        dispatcher = dispatcher_of(even_fleet(2, 1)[0], capacity_factor=factor)
        batch.check(batch.run(dispatcher))
        assert not dispatcher.dropped_LE.any()


def test_tokens_that_lose_all_their_experts_get_zeros() -> None:
    batch = Batch(30, top_k=1)
    batch.ids_TK[:] = 5
    batch.weights_TK[:, 0] = torch.arange(30)
    out_TH = batch.run(dispatcher_of(even_fleet(2, 1)[0], capacity_factor=1.0))
    assert not out_TH[:26].any()
    assert out_TH[26:].any(dim=1).all()


def test_a_failure_is_logged_with_the_shards_reason(caplog: pytest.LogCaptureFixture) -> None:
    fleet, (a, _) = memory_fleet({"a": EVERY, "b": EVERY})
    a.faults.append("failed")
    with caplog.at_level(logging.WARNING):
        Batch().run(dispatcher_of(fleet))
    assert "shard a is lost: the shard failed: no memory" in caplog.text


def test_one_token_runs_before_the_first_step_and_more_do_not() -> None:
    """A runner learns the layers' shapes with one token, of which no step has told."""
    dispatcher = dispatcher_of(even_fleet(2, 2)[0])
    batch = Batch(1)
    batch.check(dispatcher.run(LAYER, batch.hidden_TH, batch.ids_TK, batch.weights_TK))
    more = Batch(2)
    with pytest.raises(AssertionError, match="told of 1 tokens, layer 3 has 2"):
        dispatcher.run(LAYER, more.hidden_TH, more.ids_TK, more.weights_TK)


def test_the_output_does_not_depend_on_the_fleet(tmp_path: Path) -> None:
    write_checkpoint("qwen3_moe", tmp_path)
    requests = [greedy(str(n), prompt, 12) for n, prompt in enumerate(random_prompts((5, 19, 40)))]
    outputs = []
    for num_shards, replicas in [(1, 1), (2, 1), (4, 2)]:
        with LocalFleet(tmp_path, shards=num_shards, replicas=replicas) as fleet:
            outputs.append(fleet.run(requests))
    with LocalFleet(tmp_path, shards=2, replicas=2) as fleet:
        fleet.engine.submit(requests)
        for _ in range(4):
            fleet.engine.step()
        break_link(fleet.links[ShardId("shard-0")])
        outputs.append(fleet.finish(requests))
        assert fleet.dispatcher.fleet is not None
        assert fleet.dispatcher.fleet.alive_S.tolist() == [False, True]
    assert all(output == outputs[0] for output in outputs)
