"""Deterministic mode: tokens and logprobs equal to the bit, whatever else is in the batch and wherever experts run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.actors.links.base import Link
from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
from tests.families import BATCHED, random_prompts, write_checkpoint
from tests.fleet import LocalFleet, break_link, greedy

NUM_TOKENS = 16
LENGTHS = (5, 33, 70, 1)
Stream = list[TokenEvent]


def requests() -> list[SequenceRequest]:
    """Return greedy and seeded requests of unlike lengths, all with logprobs."""
    likeliest = SamplingParams(max_tokens=NUM_TOKENS, logprobs=3)
    seeded = replace(likeliest, temperature=1.0, top_p=0.9, seed=7, repetition_penalty=1.2)
    samplings = (likeliest, seeded, likeliest, seeded)
    prompts = random_prompts(LENGTHS)
    return [
        SequenceRequest(sequence_id=str(i), prompt_ids=tuple(prompt), sampling=sampling)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]


def streams(fleet: LocalFleet, wanted: Sequence[SequenceRequest], *, break_at: int = 0) -> dict[str, Stream]:
    """Run requests together; return what each was sent. break_at: break shard-0's link at that step."""
    fleet.engine.submit(wanted)
    steps = 0
    while fleet.engine.num_running or fleet.engine.num_waiting:
        fleet.engine.step()
        steps += 1
        if steps == break_at:
            break_link(first_link(fleet))
    found: dict[str, Stream] = {request.sequence_id: [] for request in wanted}
    for event in fleet.events:
        assert not event.error, event.error
        found[event.sequence_id].append(event)
    fleet.events.clear()
    return found


def first_link(fleet: LocalFleet) -> Link:
    return next(iter(fleet.links.values()))


def tokens(stream: Stream) -> list[int]:
    return [event.token_id for event in stream if event.token_id is not None]


def alone(fleet: LocalFleet) -> dict[str, Stream]:
    """Return each request's stream by itself."""
    return {name: stream for request in requests() for name, stream in streams(fleet, [request]).items()}


@pytest.mark.parametrize(
    ("family", "dtype"), [(family, ("float32", "bfloat16")[number % 2]) for number, family in enumerate(BATCHED)]
)
def test_a_batch_changes_no_bit(family: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path)
    with LocalFleet(tmp_path, dtype=dtype, deterministic=True) as fleet:
        expected = alone(fleet)
    with LocalFleet(tmp_path, dtype=dtype, deterministic=True, shards=3, replicas=2, max_batch_tokens=23) as fleet:
        assert streams(fleet, requests()) == expected


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("qwen3_moe")
    write_checkpoint("qwen3_moe", directory)
    return directory


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def expected(request: pytest.FixtureRequest, qwen: Path) -> tuple[str, dict[str, Stream]]:
    """Return a dtype, and each request's stream by itself on one shard."""
    with LocalFleet(qwen, shards=1, dtype=request.param, deterministic=True) as fleet:
        return request.param, alone(fleet)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 200])
def test_chunks_and_order_change_no_bit(
    max_batch_tokens: int, qwen: Path, expected: tuple[str, dict[str, Stream]]
) -> None:
    dtype, by_itself = expected
    with LocalFleet(qwen, dtype=dtype, deterministic=True, max_batch_tokens=max_batch_tokens) as fleet:
        assert streams(fleet, requests()[::-1]) == by_itself
        # Once more, over the pages that the first time left behind.
        assert streams(fleet, requests()) == by_itself
        assert fleet.scheduler.num_reused_tokens


@pytest.mark.parametrize("num_sent", [1, 9, NUM_TOKENS - 1])
def test_a_resumed_request_goes_on_to_the_bit(
    num_sent: int, qwen: Path, expected: tuple[str, dict[str, Stream]]
) -> None:
    """As after the death of its worker: the prompt and what was sent are prefilled at another one."""
    dtype, by_itself = expected
    resumed = [replace(r, output_ids=tuple(tokens(by_itself[r.sequence_id])[:num_sent])) for r in requests()]
    with LocalFleet(qwen, dtype=dtype, deterministic=True, max_batch_tokens=50) as fleet:
        assert streams(fleet, resumed) == {name: stream[num_sent:] for name, stream in by_itself.items()}


@pytest.mark.parametrize("shards", [2, 3])
def test_a_shard_lost_on_the_way_changes_no_bit(
    shards: int, qwen: Path, expected: tuple[str, dict[str, Stream]]
) -> None:
    dtype, by_itself = expected
    with LocalFleet(qwen, dtype=dtype, deterministic=True, shards=shards, replicas=2) as fleet:
        assert streams(fleet, requests(), break_at=5) == by_itself
        assert not fleet.dispatcher.fleet.alive_S.all()  # type: ignore[union-attr]  # it has one


def test_slices_on_any_shards_give_the_same_bits(qwen: Path) -> None:
    """Other bits than whole experts: a sum over slices is rounded otherwise."""
    with LocalFleet(qwen, shards=2, deterministic=True, expert_tp=2) as fleet:
        by_itself = alone(fleet)
    with LocalFleet(qwen, shards=3, replicas=2, deterministic=True, expert_tp=2, max_batch_tokens=23) as fleet:
        assert streams(fleet, requests(), break_at=5) == by_itself


def test_preempted_sequences_change_no_bit(qwen: Path, expected: tuple[str, dict[str, Stream]]) -> None:
    dtype, by_itself = expected
    with LocalFleet(qwen, dtype=dtype, deterministic=True, num_pages=19) as fleet:
        for n in range(3):
            fleet.run([greedy(f"curt {n}", [5], 1)])  # so little is expected of all
        assert streams(fleet, requests()) == by_itself
        assert fleet.scheduler.num_preempted
