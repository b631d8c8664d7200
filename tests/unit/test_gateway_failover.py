"""Workers come, die, hang and fill up under live requests; clients see the same tokens, once each."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest

from expertmesh.actors.gateway.engine import Engine, Piece
from expertmesh.actors.gateway.router import MIN_AFFINITY_TOKENS, choose_worker
from expertmesh.actors.gateway.validation import ValidRequest, validate_request
from expertmesh.actors.gateway.worker_client import WorkerClient
from expertmesh.cluster.errors import CapacityError, ExpertMeshError, InputError
from expertmesh.cluster.requests import FinishReason, SamplingParams
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from tests.unit.gateway_fakes import EOS_ID, MODEL, FakeWorker, fake_output, fake_text, save_tokenizer

PROMPT = (10, 20, 30)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def running(
    workers: Sequence[WorkerClient], tokenizer: Tokenizer | None = None, *, call_timeout_s: float = 20.0
) -> AsyncIterator[Engine]:
    engine = Engine(tokenizer=tokenizer, rng=random.Random(1), max_requests=16, call_timeout_s=call_timeout_s)
    engine.pool.set_workers(workers)
    try:
        yield engine
        assert engine.num_live_requests == 0
    finally:
        await engine.pool.close()


def valid(prompt_ids: Sequence[int] = PROMPT, *, tokenizer: Tokenizer | None = None, **fields: object) -> ValidRequest:
    request = GenerateRequest(token_ids=TokenIds(ids=prompt_ids), **{"max_tokens": 20, **fields})  # type: ignore[arg-type]
    return validate_request(request, model=MODEL, tokenizer=tokenizer, request_id="r", default_seed=3)


async def collect(engine: Engine, request: ValidRequest) -> list[Piece]:
    async with asyncio.timeout(10), aclosing(engine.generate(request)) as pieces:
        return [piece async for piece in pieces]


def token_ids(pieces: Sequence[Piece], index: int = 0) -> list[int | None]:
    return [event.token_id for piece in pieces if piece.index == index for event in piece.tokens]


def text(pieces: Sequence[Piece], index: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.index == index)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the fakes tell nobody
            await asyncio.sleep(0.001)


async def test_tokens_text_and_counts_of_an_undisturbed_request(tokenizer: Tokenizer) -> None:
    async with running([FakeWorker("a")], tokenizer) as engine:
        request = valid()
        pieces = await collect(engine, request)
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])
    assert text(pieces) == fake_text(PROMPT, request.sampling[0])
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert (pieces[-1].finish_reason, pieces[-1].num_output_tokens) == (FinishReason.LENGTH, 20)


@pytest.mark.parametrize("die_after", [0, 1, 7, 19])
async def test_a_worker_that_dies_at_any_point_costs_no_token_and_repeats_none(
    die_after: int, tokenizer: Tokenizer
) -> None:
    dying, survivor = FakeWorker("a", die_after=die_after), FakeWorker("b")
    async with running([dying], tokenizer) as engine:
        request = valid()
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: dying.dead)
        engine.pool.set_workers([dying, survivor])
        pieces = await reading
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])
    assert text(pieces) == fake_text(PROMPT, request.sampling[0])
    (resumed,) = survivor.submitted
    assert list(resumed.output_ids) == fake_output(PROMPT, request.sampling[0])[: len(resumed.output_ids)]
    assert len(resumed.output_ids) >= die_after - 1
    assert resumed.prompt_ids == PROMPT
    assert resumed.sampling == request.sampling[0]


async def test_failover_survives_a_chain_of_deaths() -> None:
    workers = [FakeWorker(f"w{index}", die_after=4) for index in range(6)]
    async with running([*workers, FakeWorker("last")]) as engine:
        request = valid(max_tokens=60)
        pieces = await collect(engine, request)
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])


async def test_a_hung_worker_is_left_at_the_call_timeout() -> None:
    hanging, survivor = FakeWorker("a", hang_after=5), FakeWorker("b")
    async with running([hanging], call_timeout_s=0.2) as engine:
        request = valid()
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: hanging.hung)
        engine.pool.set_workers([hanging, survivor])
        await until(lambda: bool(survivor.submitted))
        # It wakes: what now runs elsewhere must leave its batch.
        hanging.hang_after = None
        await until(lambda: hanging.cancelled == [hanging.submitted[0].sequence_id])
        assert not hanging.live_ids
        pieces = await reading
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])


async def test_a_worker_that_hung_gets_requests_again_only_after_it_has_answered() -> None:
    hanging, other = FakeWorker("a", hang_after=0), FakeWorker("b")
    async with running([hanging], call_timeout_s=0.3) as engine:
        await until(lambda: not engine.pool.routable)
        engine.pool.set_workers([hanging])
        assert not engine.pool.routable
        waiting = asyncio.create_task(collect(engine, valid()))
        await asyncio.sleep(0.05)
        assert not hanging.submitted
        engine.pool.set_workers([hanging, other])
        await waiting
        assert [link.worker_id for link in engine.pool.routable] == ["b"]
        hanging.hang_after = None
        await asyncio.sleep(0.4)
        engine.pool.set_workers([hanging])
        await collect(engine, valid())
    assert (len(hanging.submitted), len(other.submitted)) == (1, 1)


async def test_a_worker_whose_poll_breaks_in_an_unknown_way_is_left(caplog: pytest.LogCaptureFixture) -> None:
    broken, survivor = FakeWorker("a", poll_error=ValueError("nonsense")), FakeWorker("b")
    async with running([broken, survivor]) as engine:
        request = valid()
        pieces = await collect(engine, request)
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])
    assert "nonsense" in caplog.text


async def test_a_restarted_worker_under_the_same_id_takes_its_requests_up_again() -> None:
    first, second = FakeWorker("a", hang_after=6), FakeWorker("a")
    async with running([first]) as engine:
        request = valid()
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: first.hung)
        engine.pool.set_workers([second])
        pieces = await reading
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])
    assert second.submitted[0].sequence_id != first.submitted[0].sequence_id


async def test_without_a_worker_a_request_waits_for_one() -> None:
    async with running([]) as engine:
        request = valid()
        reading = asyncio.create_task(collect(engine, request))
        await asyncio.sleep(0.05)
        assert not reading.done()
        engine.pool.set_workers([FakeWorker("late")])
        pieces = await reading
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])


async def test_a_worker_that_is_no_longer_named_keeps_its_requests_and_gets_no_new_ones() -> None:
    leaving, staying = FakeWorker("a"), FakeWorker("b")
    async with running([leaving]) as engine:
        request = valid(max_tokens=100)
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: bool(leaving.submitted))
        engine.pool.set_workers([staying])
        await collect(engine, valid(max_tokens=3))
        pieces = await reading
        assert [link.worker_id for link in engine.pool.routable] == ["b"]
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])
    assert (len(leaving.submitted), len(staying.submitted)) == (1, 1)


async def test_a_client_that_goes_away_is_cancelled_at_the_worker_at_once() -> None:
    worker = FakeWorker("a")
    async with running([worker]) as engine:
        reading = asyncio.create_task(collect(engine, valid(max_tokens=400, n=3)))
        await until(lambda: bool(worker.live_ids))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        await until(lambda: not worker.live_ids)
    assert sorted(worker.cancelled) == sorted(request.sequence_id for request in worker.submitted)


async def test_a_client_that_goes_away_while_there_is_no_worker_leaves_nothing() -> None:
    async with running([]) as engine:
        reading = asyncio.create_task(collect(engine, valid()))
        await asyncio.sleep(0.01)
        assert engine.num_live_requests == 1
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_concurrent_streams_over_dying_workers_do_not_mix() -> None:
    workers = [FakeWorker("a", die_after=9), FakeWorker("b", die_after=15), FakeWorker("c")]
    async with running(workers) as engine:
        requests = [valid((index, index + 1), max_tokens=30 + index) for index in range(12)]
        answers = await asyncio.gather(*(collect(engine, request) for request in requests))
        assert engine.pool.num_failovers > 0
    for request, pieces in zip(requests, answers, strict=True):
        assert token_ids(pieces) == fake_output(request.prompt_ids, request.sampling[0])


async def test_new_requests_go_where_fewer_tokens_are_outstanding() -> None:
    busy, idle = FakeWorker("a"), FakeWorker("b")
    async with running([busy]) as engine, aclosing(engine.generate(valid(max_tokens=400))) as pieces:
        await anext(pieces)
        engine.pool.set_workers([busy, idle])
        for _ in range(8):
            await collect(engine, valid(max_tokens=2))
    assert (len(busy.submitted), len(idle.submitted)) == (1, 8)


async def test_samples_have_their_own_seeds_and_survive_a_death_together() -> None:
    dying, survivor = FakeWorker("a", die_after=6), FakeWorker("b")
    async with running([dying]) as engine:
        request = valid(n=4, seed=5)
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: dying.dead)
        engine.pool.set_workers([survivor])
        pieces = await reading
    outputs = [token_ids(pieces, index) for index in range(4)]
    assert outputs == [fake_output(PROMPT, sampling) for sampling in request.sampling]
    assert len({tuple(output) for output in outputs}) == 4
    assert [sequence.sequence_id.split("~")[0] for sequence in survivor.submitted] == [
        f"r#{index}" for index in range(4)
    ]


async def test_a_stop_string_cuts_the_text_and_ends_the_sequence_at_the_worker(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a")
    request = valid(tokenizer=tokenizer, max_tokens=400)
    whole = fake_text(PROMPT, request.sampling[0])
    stop = whole[8:11]
    cut = whole.index(stop)
    async with running([worker], tokenizer) as engine:
        pieces = await collect(engine, valid(tokenizer=tokenizer, max_tokens=400, stop=["\x00", stop]))
        await until(lambda: worker.cancelled == [worker.submitted[0].sequence_id])
    assert text(pieces) == whole[:cut]
    assert pieces[-1].finish_reason is FinishReason.STOP
    assert pieces[-1].num_output_tokens == cut + len(stop) == len(token_ids(pieces))


async def test_text_held_back_for_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    request = valid()
    whole = fake_text(PROMPT, request.sampling[0])
    async with running([FakeWorker("a")], tokenizer) as engine:
        pieces = await collect(engine, valid(tokenizer=tokenizer, stop=[whole[-2:] + "\x00"]))
    assert text(pieces) == whole
    assert pieces[-1].finish_reason is FinishReason.LENGTH


async def test_an_eos_token_is_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    def token(prompt_ids: Sequence[int], sampling: SamplingParams, position: int) -> int:
        return EOS_ID if position == 4 else fake_output(prompt_ids, sampling)[position]

    request = valid()
    async with running([FakeWorker("a", token=token)], tokenizer) as engine:
        pieces = await collect(engine, request)
    assert token_ids(pieces) == [*fake_output(PROMPT, request.sampling[0])[:4], EOS_ID]
    assert text(pieces) == fake_text(PROMPT, request.sampling[0])[:4]
    assert (pieces[-1].finish_reason, pieces[-1].num_output_tokens) == (FinishReason.STOP, 5)


async def test_logprobs_come_with_their_tokens() -> None:
    async with running([FakeWorker("a")]) as engine:
        pieces = await collect(engine, valid(logprobs=2, max_tokens=3))
    tokens = [event for piece in pieces for event in piece.tokens]
    assert [event.logprob for event in tokens] == [0.0, -0.25, -0.5]
    assert [len(event.top_logprobs) for event in tokens] == [2, 2, 2]


async def test_a_failed_sequence_fails_its_request_alone() -> None:
    async with running([FakeWorker("a", failed="expert lost")]) as engine:
        with pytest.raises(ExpertMeshError, match=r"r#0~\w+ failed at its worker: expert lost"):
            await collect(engine, valid())


async def test_a_full_worker_passes_a_request_on_and_all_full_ones_refuse_it() -> None:
    full, free = FakeWorker("a", capacity=0), FakeWorker("b", capacity=1)
    async with running([full, free]) as engine:
        reading = asyncio.create_task(collect(engine, valid(max_tokens=200)))
        await until(lambda: bool(free.live_ids))
        with pytest.raises(CapacityError, match="is full"):
            await collect(engine, valid())
        await reading


async def test_a_resumed_request_waits_for_room() -> None:
    dying, busy = FakeWorker("a", die_after=5), FakeWorker("b", capacity=0)
    async with running([dying]) as engine:
        request = valid()
        reading = asyncio.create_task(collect(engine, request))
        await until(lambda: dying.dead)
        engine.pool.set_workers([busy])
        await asyncio.sleep(0.05)
        assert not reading.done()
        busy.capacity = 1
        pieces = await reading
    assert token_ids(pieces) == fake_output(PROMPT, request.sampling[0])


async def test_the_gateway_takes_no_more_requests_than_it_allows() -> None:
    async with running([]) as engine:
        waiting = [asyncio.create_task(collect(engine, valid())) for _ in range(16)]
        await until(lambda: engine.num_live_requests == 16)
        with pytest.raises(CapacityError, match="16 requests"):
            await collect(engine, valid())
        engine.pool.set_workers([FakeWorker("a")])
        await asyncio.gather(*waiting)


async def test_a_request_that_no_worker_can_run_is_told_why() -> None:
    async with running([FakeWorker("a", submit_error=InputError("needs 90 pages of 64"))]) as engine:
        with pytest.raises(InputError, match="90 pages of 64"):
            await collect(engine, valid())


async def test_a_cancel_that_fails_is_logged_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker("a", cancel_error=ValueError("nonsense"))
    async with running([worker]) as engine:
        async with aclosing(engine.generate(valid(max_tokens=400))) as pieces:
            await anext(pieces)
        await until(lambda: "nonsense" in caplog.text)
        assert (await collect(engine, valid()))[-1].finish_reason is FinishReason.LENGTH


def test_the_router_takes_the_less_loaded_of_two() -> None:
    rng = random.Random(0)
    assert {choose_worker((1,), {"a": 9, "b": 10}, rng) for _ in range(20)} == {"a"}
    assert choose_worker((1,), {"only": 10**9}, rng) == "only"


def test_the_router_never_takes_the_most_loaded_of_three_and_spreads_equal_ones() -> None:
    rng = random.Random(0)
    assert {choose_worker((1,), {"a": 5, "b": 99, "c": 5}, rng) for _ in range(50)} == {"a", "c"}


def test_prompts_that_begin_alike_go_to_one_worker_until_it_is_ahead_by_their_length() -> None:
    rng = random.Random(0)
    prefix = list(range(64))
    idle = {f"w{index}": 0 for index in range(5)}
    homes = {choose_worker([*prefix, tail], idle, rng) for tail in range(30)}
    assert len(homes) == 1
    (home,) = homes
    assert choose_worker(prefix, {**idle, home: len(prefix)}, rng) == home
    assert choose_worker(prefix, {**idle, home: len(prefix) + 1}, rng) != home
    others = {choose_worker([start] * MIN_AFFINITY_TOKENS, idle, rng) for start in range(50)}
    assert others == set(idle)
