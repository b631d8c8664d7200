"""A stream that breaks is read on, one asked for twice is generated once, and what nobody reads any more ends."""

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest

from expertmesh.actors.gateway.kept_streams import KeptStreams
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.cluster.errors import NotFoundError
from expertmesh.cluster.requests import FinishReason
from expertmesh.cluster.settings import GrpcSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_DEADLINE,
    FINISH_REASON_LENGTH,
    CancelRequest,
    GenerateRequest,
    GenerateResponse,
    ReceivedSample,
    ResumeRequest,
)
from tests.unit.gateway_fakes import FakeWorker, fake_output, fake_text, save_tokenizer
from tests.unit.gateway_server import Running, error_of, request, running, sampling, until

PROMPT = (10, 20, 30)
SHORT = GrpcSettings(resume_s=0.3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def kept(max_tokens: int = 60, **fields: Any) -> GenerateRequest:
    return request(**{"max_tokens": max_tokens, "seed": 6, "request_id": "r", "idempotency_key": "k", **fields})


def tokens(responses: list[GenerateResponse], index: int = 0) -> list[int]:
    return [token for one in responses if one.index == index for token in one.token_ids]


def text(responses: list[GenerateResponse], index: int = 0) -> str:
    return "".join(one.text for one in responses if one.index == index)


async def all_of(call: Any) -> list[GenerateResponse]:
    return [one async for one in call]


async def broken_after(up: Running, what: GenerateRequest, num_messages: int, **options: Any) -> list[GenerateResponse]:
    """Read so many messages, then break the call off as a lost connection would."""
    call = up.inference.Generate(what, **options)
    got = [await call.read() for _ in range(num_messages)]
    call.cancel()
    return got


async def test_a_broken_stream_goes_on_with_each_token_and_all_text_once(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("a")
    async with running(worker, tokenizer=tokenizer) as up:
        got = await broken_after(up, kept(), 3)
        for _ in range(2):  # the second call breaks too
            call = up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[len(tokens(got))]))
            got.append(await call.read())
            call.cancel()
        rest = await all_of(up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[len(tokens(got))])))
    assert tokens(got + rest) == fake_output(PROMPT, sampling(6, 60))
    assert text(got + rest) == fake_text(PROMPT, sampling(6, 60))
    assert (rest[-1].finish_reason, rest[-1].usage.completion_tokens) == (FINISH_REASON_LENGTH, 60)
    assert len(worker.submitted) == 1
    assert not worker.cancelled


async def test_samples_are_resumed_each_from_its_own_position() -> None:
    async with running(FakeWorker("a")) as up:
        whole = await all_of(up.inference.Generate(kept(20, n=3)))
        first, second = len(whole[0].token_ids), whole[1]
        assert second.index == 1
        asked = ResumeRequest(request_id="r", tokens_received=[first if whole[0].index == 0 else 0], samples_ended=[2])
        rest = await all_of(up.inference.Resume(asked))
    assert tokens(rest, 0) == tokens(whole, 0)[first:]
    assert tokens(rest, 1) == tokens(whole, 1)
    assert not [one for one in rest if one.index == 2]


async def test_a_request_sent_twice_is_generated_once() -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        both = await asyncio.gather(*(all_of(up.inference.Generate(kept())) for _ in range(2)))
        later = await all_of(up.inference.Generate(kept()))
        once = await up.inference.GenerateOnce(kept())
    assert both[0] == both[1] == later
    assert list(once.outputs[0].token_ids) == tokens(later) == fake_output(PROMPT, sampling(6, 60))
    assert len(worker.submitted) == 1


async def test_a_repeated_request_without_seed_and_id_has_those_of_the_first() -> None:
    bare = request(max_tokens=5, idempotency_key="k")
    async with running(FakeWorker("a")) as up:
        first, second = [await all_of(up.inference.Generate(bare)) for _ in range(2)]
        other = await all_of(up.inference.Generate(request(max_tokens=5, idempotency_key="other")))
    assert first == second
    assert first[0].request_id != other[0].request_id


async def test_a_key_of_another_request_is_refused() -> None:
    async with running(FakeWorker("a")) as up:
        await all_of(up.inference.Generate(kept(5)))
        error = await error_of(up.inference.Generate(kept(6)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "idempotency_key was used for another request"


@pytest.mark.parametrize("key", ["", "x" * 129, "a\nb"])
async def test_a_key_that_is_no_name_is_refused(key: str) -> None:
    async with running(FakeWorker("a")) as up:
        error = await error_of(up.inference.Generate(kept(idempotency_key=key)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "idempotency_key has" in (error.details() or "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens_received": [6]}, "tokens_received of sample 0 is 6; no message of it ended there"),
        ({"tokens_received": [0, 0]}, "tokens_received has 2 numbers; the request has 1 samples"),
        ({"samples_ended": [1]}, "samples_ended has 1; the request has 1 samples"),
    ],
)
async def test_a_position_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    async with running(FakeWorker("a")) as up:
        await all_of(up.inference.Generate(kept(5)))
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r", **fields)))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, message)


async def test_what_is_not_kept_is_not_found() -> None:
    async with running(FakeWorker("a")) as up:
        await all_of(up.inference.Generate(request(request_id="r")))
        for call in (
            up.inference.Resume(ResumeRequest(request_id="r")),
            up.inference.Cancel(CancelRequest(request_id="r")),
        ):
            assert (await error_of(call)).code() is grpc.StatusCode.NOT_FOUND


async def test_cancel_ends_the_samples_and_leaves_the_batch() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker) as up:
        call = up.inference.Generate(kept(500, n=2))
        got = []
        async for message in call:
            got.append(message)
            if len(got) == 1:
                await up.inference.Cancel(CancelRequest(request_id="r"))
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
    last = {one.index: one for one in got if one.finish_reason}
    assert [last[index].finish_reason for index in (0, 1)] == [FINISH_REASON_CANCELLED] * 2
    assert last[0].usage.completion_tokens == len(tokens(got))


async def test_who_reads_in_the_moment_of_the_cancel_gets_the_end_too() -> None:
    async with running(FakeWorker("a")) as up:
        kept_streams = KeptStreams(up.engine, resume_s=30, max_ended=1)
        valid = ValidRequest(request_id="r", prompt_ids=PROMPT, sampling=(sampling(6, 500),), stop=())
        stream = kept_streams.open(valid, "k", b"", owner="")
        reader = stream.read()
        await anext(reader)
        stream.end()
        while not stream.task.done():  # noqa: ASYNC110 - the moment after is what is tested
            await asyncio.sleep(0)
        rest = [piece async for piece in reader]
        await kept_streams.close()
    assert [piece.finish_reason for piece in rest if piece.finish_reason] == [FinishReason.CANCELLED]


async def test_a_stream_without_a_reader_ends_in_time() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker, settings=SHORT) as up:
        await broken_after(up, kept(500), 1)
        await asyncio.sleep(0.1)
        assert worker.live_ids
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
        # Whoever comes back later is told that it is gone, not that it is whole.
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_who_comes_in_the_moment_in_which_it_is_given_up_begins_anew() -> None:
    async with running(FakeWorker("a")) as up:
        kept_streams = KeptStreams(up.engine, resume_s=0.05, max_ended=1)
        valid = ValidRequest(request_id="r", prompt_ids=PROMPT, sampling=(sampling(6, 500),), stop=())
        stream = kept_streams.open(valid, "k", b"", owner="")
        while not stream.is_abandoned:  # noqa: ASYNC110 - the moment before it is forgotten is what is tested
            await asyncio.sleep(0)
        assert not stream.task.done()
        with pytest.raises(NotFoundError):
            kept_streams.find("r", owner="")
        assert kept_streams.open(valid, "k", b"", owner="") is not stream
        await kept_streams.close()


async def test_a_deadline_ends_the_stream_of_its_only_reader() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker) as up:
        error = await error_of(up.inference.Generate(kept(500), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: not worker.live_ids and up.engine.num_live_requests == 0)
        rest = await all_of(up.inference.Resume(ResumeRequest(request_id="r")))
    assert rest[-1].finish_reason == FINISH_REASON_DEADLINE


async def test_an_ended_stream_is_kept_for_a_time_and_up_to_a_number() -> None:
    async with running(FakeWorker("a"), settings=GrpcSettings(resume_s=1.0, max_ended_streams=1)) as up:
        for name in ("r", "s"):
            await all_of(up.inference.Generate(kept(5, request_id=name, idempotency_key=name)))
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert len(tokens(await all_of(up.inference.Resume(ResumeRequest(request_id="s"))))) == 5
        await asyncio.sleep(1.1)
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="s")))
        assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_a_request_for_which_there_was_no_room_may_be_sent_again() -> None:
    worker = FakeWorker("a", capacity=0)
    async with running(worker) as up:
        error = await error_of(up.inference.Generate(kept(5)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        worker.capacity = None
        assert tokens(await all_of(up.inference.Generate(kept(5)))) == fake_output(PROMPT, sampling(6, 5))


async def test_a_failure_amid_a_stream_is_told_to_each_who_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker) as up:
        messages = aiter(up.inference.Generate(kept(500)))
        await anext(messages)  # what fails before that is not kept
        worker.failed = "secret cause"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in messages:
                pass
        resumed = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
        for error in (failed.value, resumed):
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in (error.details() or "")
    assert "secret cause" in caplog.text


async def test_what_failed_as_a_part_was_away_is_not_kept() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker) as up:
        messages = aiter(up.inference.Generate(kept(500)))
        await anext(messages)
        worker.failed, worker.unavailable = "an expert has no replica", True
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in messages:
                pass
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def received(*token_ids: Sequence[int]) -> dict[str, Any]:
    return {"received": [ReceivedSample(token_ids=ids) for ids in token_ids]}


async def test_another_gateway_goes_on_with_the_rest_alone(tokenizer: Tokenizer) -> None:
    worker = FakeWorker("b")
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up:
        whole = await all_of(up.inference.Generate(kept(logprobs=1)))
    former, asked = tokens(whole[:5]), kept(logprobs=1)
    async with running(worker, tokenizer=tokenizer) as up:
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[len(former)])))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        asked.received.add(token_ids=former)
        rest = await all_of(up.inference.Generate(asked))
    assert former + tokens(rest) == tokens(whole) == fake_output(PROMPT, sampling(6, 60))
    assert text(whole[:5]) + text(rest) == text(whole)
    assert [one.token_id for message in rest for one in message.logprobs] == tokens(rest)
    assert (rest[-1].finish_reason, rest[-1].usage.completion_tokens) == (FINISH_REASON_LENGTH, 60)
    assert [list(sequence.output_ids) for sequence in worker.submitted] == [former]


async def test_a_stream_that_was_taken_up_is_resumed_like_any_other() -> None:
    worker = FakeWorker("a")
    former = fake_output(PROMPT, sampling(6, 60))[:20]
    async with running(worker) as up:
        got = await broken_after(up, kept(**received(former)), 3)
        count = len(former) + len(tokens(got))
        rest = await all_of(up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[count])))
        again = await all_of(up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[20])))
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
    assert former + tokens(got) + tokens(rest) == former + tokens(again) == fake_output(PROMPT, sampling(6, 60))
    assert error.details() == "tokens_received of sample 0 is 0; no message of it ended there"
    assert len(worker.submitted) == 1


async def test_the_gateway_that_has_the_stream_goes_on_with_it() -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        got = await broken_after(up, kept(), 3)
        rest = await all_of(up.inference.Generate(kept(**received(tokens(got)))))
    assert tokens(got) + tokens(rest) == fake_output(PROMPT, sampling(6, 60))
    assert len(worker.submitted) == 1


async def test_what_differs_from_the_stream_that_is_kept_is_taken_up_anew() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker) as up:
        got = await broken_after(up, kept(500), 2)
        first = list(worker.live_ids)
        former = [*tokens(got)[:-1], 1]  # of a gateway whose sums were rounded otherwise
        other = aiter(up.inference.Generate(kept(500, **received(former))))
        await anext(other)
        await until(lambda: worker.cancelled == first)
        assert [list(sequence.output_ids) for sequence in worker.submitted] == [[], former]
        count = len(former)
        resumed = up.inference.Resume(ResumeRequest(request_id="r", tokens_received=[count]))
        assert (await resumed.read()).token_ids[0] == fake_output(PROMPT, sampling(6, 500))[count]
        await up.inference.Cancel(CancelRequest(request_id="r"))
        last = [one async for one in other][-1]
    assert last.finish_reason == FINISH_REASON_CANCELLED
    assert last.usage.completion_tokens > len(former)


async def test_who_still_reads_a_stream_that_was_replaced_gets_all_of_it() -> None:
    worker = FakeWorker("a")
    async with running(worker) as up:
        call = aiter(up.inference.Generate(kept()))
        got = [await anext(call)]
        other = await all_of(up.inference.Generate(kept(**received([1, 2, 3]))))
        got += [one async for one in call]
    assert tokens(got) == fake_output(PROMPT, sampling(6, 60))
    assert tokens(other) == fake_output(PROMPT, sampling(6, 60))[3:]


async def test_a_stream_that_has_ended_is_replaced_too() -> None:
    async with running(FakeWorker("a"), settings=GrpcSettings(max_ended_streams=1)) as up:
        await all_of(up.inference.Generate(kept()))
        for former in ([1], [2], [3]):
            rest = await all_of(up.inference.Generate(kept(**received(former))))
            assert tokens(rest) == fake_output(PROMPT, sampling(6, 60))[1:]


async def test_limits_hold_for_what_is_taken_up() -> None:
    worker = FakeWorker("a", capacity=0)
    async with running(worker) as up:
        error = await error_of(up.inference.Generate(kept(**received([1, 2]))))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        error = await error_of(up.inference.Generate(kept(3, **received([1] * 4))))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "received of sample 0 has 4 tokens; max_tokens is 3",
        )
        error = await error_of(up.inference.GenerateOnce(kept(**received([1]))))
        assert (error.code(), error.details()) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "received is of Generate alone; GenerateOnce returns whole samples",
        )
