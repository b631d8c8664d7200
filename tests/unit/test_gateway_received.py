"""A request that comes with what was received of it elsewhere gives the rest: as if the stream had not broken."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh.actors.gateway import engine as engine_module
from expertmesh.actors.gateway.engine import Engine, Piece
from expertmesh.actors.gateway.validation import ValidRequest, validate_request
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.requests import FinishReason, SamplingParams, TokenEvent
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, ReceivedSample, TokenIds
from tests.log_lines import logged
from tests.recorded_metrics import Recorded
from tests.unit.gateway_fakes import EOS_ID, MODEL, FakeWorker, save_tokenizer

PROMPT = (10, 20, 30)
# Of one to four bytes: a token is a byte, so that a cut may be in the middle of a character.
ALPHABET = "ab\u00e9\u20ac\U0001f600"
TEXT = "a\u00e9b\u20aca\U0001f600b\u00e9a\u20acb"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


class Script(FakeWorker):
    """A worker that writes a text over and over, sample 1 from its second token on, and tells of one token at a time.

    eos_at: position of an end-of-sequence token.
    """

    def __init__(self, tokenizer: Tokenizer, text: str, eos_at: int | None = None) -> None:
        ids = tokenizer.encode(text)

        def token(_prompt: Sequence[int], sampling: SamplingParams, position: int) -> int:
            return EOS_ID if position == eos_at else ids[(position + (sampling.seed != 0)) % len(ids)]

        super().__init__("a", step_s=0, token=token)

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        _, events = await super().poll(after)
        return after + len(events[:1]), events[:1]


@asynccontextmanager
async def running(worker: FakeWorker, tokenizer: Tokenizer | None) -> AsyncIterator[Engine]:
    engine = Engine(tokenizer=tokenizer, rng=random.Random(1), max_requests=16)
    engine.pool.set_workers([worker])
    try:
        yield engine
        assert engine.num_live_requests == 0
    finally:
        await engine.pool.close()


async def collect(
    engine: Engine, tokenizer: Tokenizer | None, received: Sequence[ReceivedSample], **fields: Any
) -> list[Piece]:
    async with asyncio.timeout(30), aclosing(engine.generate(valid(tokenizer, received, **fields))) as pieces:
        return [piece async for piece in pieces]


def valid(tokenizer: Tokenizer | None, received: Sequence[ReceivedSample] = (), **fields: Any) -> ValidRequest:
    request = GenerateRequest(token_ids=TokenIds(ids=PROMPT), received=received, **{"seed": 0, **fields})
    return validate_request(request, model=MODEL, tokenizer=tokenizer, request_id="r", default_seed=3)


def received_in(pieces: Sequence[Piece], num_samples: int) -> list[ReceivedSample]:
    """Return what a client has after these pieces."""
    samples = [ReceivedSample() for _ in range(num_samples)]
    for piece in pieces:
        samples[piece.index].token_ids.extend(token_ids(pieces=[piece], index=piece.index))
        samples[piece.index].has_ended |= piece.finish_reason is not None
    return samples


def token_ids(pieces: Sequence[Piece], index: int = 0) -> list[int]:
    events = [event for piece in pieces if piece.index == index for event in piece.tokens]
    return [event.token_id for event in events if event.token_id is not None]


@dataclass(frozen=True)
class Whole:
    """What a client has in the end of one sample."""

    text: str
    tokens: list[tuple[int, int | None, float | None, int]]
    ends: list[tuple[FinishReason | None, int]]

    @classmethod
    def of(cls, pieces: Sequence[Piece], index: int) -> "Whole":
        own = [piece for piece in pieces if piece.index == index]
        return cls(
            text="".join(piece.text for piece in own),
            tokens=[(e.index, e.token_id, e.logprob, len(e.top_logprobs)) for piece in own for e in piece.tokens],
            ends=[(piece.finish_reason, piece.num_output_tokens) for piece in own if piece.finish_reason],
        )


async def check_cuts(
    worker: FakeWorker, tokenizer: Tokenizer | None, cuts: Sequence[float] | None = None, **fields: Any
) -> list[Piece]:
    """Compare an undisturbed run with runs that are broken off after each piece, or at these parts of all pieces."""
    num_samples = fields.get("n", 1)
    async with running(worker, tokenizer) as engine:
        whole = await collect(engine, tokenizer, (), **fields)
        places = range(len(whole)) if cuts is None else [round(cut * (len(whole) - 1)) for cut in cuts]
        for place in places:
            before = whole[:place]
            received = received_in(before, num_samples)
            rest = await collect(engine, tokenizer, received, **fields)
            for index in range(num_samples):
                assert Whole.of(before + rest, index) == Whole.of(whole, index), f"cut after {place} pieces"
            assert not [piece for piece in rest if received[piece.index].has_ended]
    return whole


async def test_every_cut_of_two_samples_with_their_logprobs(tokenizer: Tokenizer) -> None:
    worker = Script(tokenizer, TEXT)
    whole = await check_cuts(worker, tokenizer, max_tokens=40, n=2, logprobs=2)
    assert {piece.finish_reason for piece in whole} == {None, FinishReason.LENGTH}
    for sequence in worker.submitted:
        assert list(sequence.output_ids) == token_ids(whole, sequence.sampling.seed != 0)[: len(sequence.output_ids)]
        assert sequence.sampling.max_tokens == 40


async def test_every_cut_before_an_end_token(tokenizer: Tokenizer) -> None:
    whole = await check_cuts(Script(tokenizer, TEXT, eos_at=17), tokenizer, max_tokens=40)
    assert (whole[-1].finish_reason, whole[-1].num_output_tokens) == (FinishReason.STOP, 18)


async def test_every_cut_in_a_stop_string(tokenizer: Tokenizer) -> None:
    whole = await check_cuts(Script(tokenizer, TEXT), tokenizer, max_tokens=60, stop=["zz", "b\u00e9a\u20acba\u00e9"])
    assert whole[-1].finish_reason is FinishReason.STOP
    assert "".join(piece.text for piece in whole) == TEXT[: TEXT.index("b\u00e9a")]


async def test_every_cut_without_a_tokenizer(tokenizer: Tokenizer) -> None:
    await check_cuts(Script(tokenizer, TEXT), None, max_tokens=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(ALPHABET, min_size=1, max_size=12),
    stop=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3),
    eos_at=st.none() | st.integers(0, 30),
    max_tokens=st.integers(1, 40),
    n=st.integers(1, 2),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
)
def test_any_request_cut_anywhere(
    tokenizer: Tokenizer,
    text: str,
    stop: list[str],
    eos_at: int | None,
    max_tokens: int,
    n: int,
    cuts: list[float],
) -> None:
    worker = Script(tokenizer, text, eos_at)
    asyncio.run(check_cuts(worker, tokenizer, cuts, stop=stop, max_tokens=max_tokens, n=n, ignore_eos=False))


@pytest.mark.parametrize(
    ("num_received", "fields", "finish_reason"),
    [
        (6, {"max_tokens": 6}, FinishReason.LENGTH),
        (6, {"max_tokens": 9, "stop_token_ids": [None]}, FinishReason.STOP),
        (6, {"max_tokens": 9, "stop": ["\u20ac"]}, FinishReason.STOP),
    ],
)
async def test_a_sample_that_had_all_its_tokens_is_told_its_end_alone(
    tokenizer: Tokenizer, num_received: int, fields: dict[str, Any], finish_reason: FinishReason
) -> None:
    ids = tokenizer.encode("ab\u00e9\u20acb")[:7]
    received = ids[: num_received + 1] if "stop" in fields else ids[:num_received]
    fields = {name: [received[-1]] if value == [None] else value for name, value in fields.items()}
    worker = Script(tokenizer, TEXT)
    async with running(worker, tokenizer) as engine:
        (last,) = await collect(engine, tokenizer, [ReceivedSample(token_ids=received)], **fields)
    assert (last.tokens, last.finish_reason, last.num_output_tokens) == ((), finish_reason, len(received))
    # Half a character was held back, and is shown as what it is.
    assert last.text == ("\N{REPLACEMENT CHARACTER}" if "stop" not in fields else "")
    assert not worker.submitted


async def test_nothing_is_sent_where_all_samples_have_ended(tokenizer: Tokenizer) -> None:
    worker = Script(tokenizer, TEXT)
    received = [ReceivedSample(token_ids=[1], has_ended=True), ReceivedSample(has_ended=True)]
    async with running(worker, tokenizer) as engine:
        assert await collect(engine, tokenizer, received, n=2, max_tokens=9) == []
    assert not worker.submitted


async def test_samples_left_out_begin_at_their_beginning(tokenizer: Tokenizer) -> None:
    worker = Script(tokenizer, TEXT)
    async with running(worker, tokenizer) as engine:
        whole = await collect(engine, tokenizer, (), n=2, max_tokens=9)
        rest = await collect(engine, tokenizer, [ReceivedSample(token_ids=token_ids(whole)[:4])], n=2, max_tokens=9)
    assert token_ids(rest, 0) == token_ids(whole, 0)[4:]
    assert Whole.of(rest, 1) == Whole.of(whole, 1)


@pytest.mark.parametrize(
    ("received", "message"),
    [
        ([[1], [1], [1]], "received has 3 samples; n is 2"),
        ([[1] * 10], "received of sample 0 has 10 tokens; max_tokens is 9"),
        ([[1], [1, 257]], "received of sample 1: token id 257 is outside the vocabulary of 257 tokens"),
        ([[1, EOS_ID, 1]], "received of sample 0 goes on after its token 1, which ends the sample"),
        ([[1, 7, 1]], "received of sample 0 goes on after its token 1, which ends the sample"),
    ],
)
def test_what_cannot_have_been_received_is_refused(received: list[list[int]], message: str) -> None:
    samples = [ReceivedSample(token_ids=ids) for ids in received]
    with pytest.raises(InputError, match=message) as caught:
        valid(None, samples, n=2, max_tokens=9, stop_token_ids=[7])
    assert caught.value.field == "received"


async def test_what_goes_on_after_a_stop_string_is_refused(tokenizer: Tokenizer) -> None:
    worker = Script(tokenizer, TEXT)
    received = [ReceivedSample(token_ids=tokenizer.encode("abab"))]
    async with running(worker, tokenizer) as engine:
        with pytest.raises(InputError, match="goes on after its token 1, which ends the sample") as caught:
            await collect(engine, tokenizer, received, stop=["b"], max_tokens=9)
    assert caught.value.field == "received"
    assert not worker.submitted


async def test_the_text_of_many_tokens_is_taken_up_in_a_thread(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "MANY_TOKENS", 2)
    await check_cuts(Script(tokenizer, TEXT), tokenizer, max_tokens=12, stop=["zz"])


async def test_the_log_tells_of_it_and_counts_what_is_new(tokenizer: Tokenizer) -> None:
    async with running(Script(tokenizer, TEXT), tokenizer) as engine:
        whole = await collect(engine, tokenizer, (), max_tokens=9)
        with logged() as lines:
            await collect(engine, tokenizer, received_in(whole[:4], 1), max_tokens=9)
        recorded = Recorded()
        engine.report(recorded.metrics)
    (taken_up,), (ended,) = lines.of("request_taken_up"), lines.of("request_ended")
    assert (taken_up["former_tokens"], ended["output_tokens"]) == (4, 5)
    assert recorded.value("key_tokens_total", key="-", kind="output") == 9 + 5


async def test_what_waits_is_counted_by_what_is_left(tokenizer: Tokenizer) -> None:
    engine = Engine(tokenizer=tokenizer, rng=random.Random(1), batch_sequences=1)  # and no worker
    received = [ReceivedSample(token_ids=[1] * 5), ReceivedSample(token_ids=[1] * 2, has_ended=True)]
    waiting = asyncio.create_task(collect(engine, tokenizer, received, n=2, max_tokens=20))
    while not engine.admission.num_waiting:  # noqa: ASYNC110 - nobody is told
        await asyncio.sleep(0)
    assert (engine.admission.num_waiting, engine.admission.waiting_tokens) == (1, 15)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await engine.pool.close()
