"""Deterministic mode: tokens and logprobs equal to the bit, whatever else is in the batch and wherever experts run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from expertmesh.actors.links.base import Link
from expertmesh.cluster.requests import SamplingParams, SequenceRequest, TokenEvent
from tests.families import BATCHED, random_prompts, write_checkpoint
from tests.fleet import LocalFleet, break_link

NUM_TOKENS = 16
LENGTHS = (5, 33, 70, 1)
Stream = list[TokenEvent]


def requests() -> list[SequenceRequest]:
    """Return greedy and seeded requests of unlike lengths, all with logprobs."""
    greedy = SamplingParams(max_tokens=NUM_TOKENS, logprobs=3)
    seeded = replace(greedy, temperature=1.0, top_p=0.9, seed=7, repetition_penalty=1.2)
    samplings = (greedy, seeded, greedy, seeded)
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


def alone(fleet: LocalFleet) -> dict[str, Stream]:
    """Return each request's stream by itself."""
    return {name: stream for request in requests() for name, stream in streams(fleet, [request]).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", BATCHED)
def test_a_batch_changes_no_bit(family: str, dtype: str, tmp_path: Path) -> None:
    write_checkpoint(family, tmp_path)
    with LocalFleet(tmp_path, dtype=dtype, deterministic=True) as fleet:
        expected = alone(fleet)
    with LocalFleet(tmp_path, dtype=dtype, deterministic=True, shards=3, replicas=2, max_batch_tokens=23) as fleet:
        assert streams(fleet, requests()) == expected
