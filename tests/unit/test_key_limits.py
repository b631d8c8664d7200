"""What a key above its limits is told over gRPC and HTTP, and what a wait at the gateway is to a client."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from google.rpc import error_details_pb2, status_pb2

from expertmesh.client.requests import pause_s
from expertmesh.v1.inference_pb2 import CancelRequest, ResumeRequest
from tests.unit import openai_server
from tests.unit.api_keys import bearer, book, key, secret_of
from tests.unit.gateway_fakes import MODEL, FakeWorker, fake_output
from tests.unit.gateway_server import error_of, request, running, sampling, until

ASKED: dict[str, Any] = {"model": MODEL.name, "prompt": [10, 20, 30], "max_tokens": 5}


def delay_s(error: grpc.aio.AioRpcError) -> float:
    """Return the delay of RetryInfo, which is that of the trailer too."""
    trailers: Any = dict(error.trailing_metadata() or ())
    (detail,) = status_pb2.Status.FromString(trailers["grpc-status-details-bin"]).details
    retry = error_details_pb2.RetryInfo()
    assert detail.Unpack(retry)
    assert str(retry.retry_delay.ToMilliseconds()) == trailers["grpc-retry-pushback-ms"]
    return float(retry.retry_delay.ToMilliseconds() / 1000)


async def test_too_many_requests_are_told_when_to_come_back(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", requests_per_minute=2), key("bob"))
    async with running(FakeWorker("a"), keys=keys) as up:
        for _ in range(2):
            await up.inference.GenerateOnce(request(), metadata=bearer("alice"))
        errors = [
            await error_of(method(request(), metadata=bearer("alice")))
            for method in (up.inference.GenerateOnce, up.inference.Generate)
        ]
        await up.inference.GenerateOnce(request(), metadata=bearer("bob"))
        assert up.engine.meter.ended["RESOURCE_EXHAUSTED"] == 2
    for error in errors:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (error.details() or "").startswith("this API key may send 2 requests a minute; try again in ")
        # At 30 s a request, less what has passed.
        assert 0 < delay_s(error) <= 30
    assert pause_s(errors[0], 1, retries=3) == delay_s(errors[0])


async def test_a_stream_that_is_read_again_counts_once(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", requests_per_minute=1))
    kept = request(request_id="r", idempotency_key="k", seed=6)
    async with running(FakeWorker("a"), keys=keys) as up:
        again = ResumeRequest(request_id="r")
        for method, asked in (
            (up.inference.Generate, kept),
            (up.inference.Generate, kept),
            (up.inference.Resume, again),
        ):
            call = method(asked, metadata=bearer("alice"))
            got = [token async for message in call for token in message.token_ids]
            assert got == fake_output((10, 20, 30), sampling(6))
        assert (await error_of(up.inference.Generate(request(), metadata=bearer("alice")))).code() is (
            grpc.StatusCode.RESOURCE_EXHAUSTED
        )


async def test_a_request_above_the_limits_may_be_sent_again_under_its_idempotency_key(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", max_concurrent=1))
    async with running(FakeWorker("a"), keys=keys) as up:
        first = up.inference.Generate(request(max_tokens=500, request_id="r"), metadata=bearer("alice"))
        await first.read()
        kept = request(request_id="s", idempotency_key="k")
        error = await error_of(up.inference.Generate(kept, metadata=bearer("alice")))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        await until(lambda: up.engine.num_live_requests == 0)
        assert [message async for message in up.inference.Generate(kept, metadata=bearer("alice"))]


async def test_a_prompt_that_the_limits_never_allow_is_wrong_input(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", tokens_per_minute=2))
    async with running(FakeWorker("a"), keys=keys) as up:
        error = await error_of(up.inference.GenerateOnce(request(), metadata=bearer("alice")))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the prompt has 3 tokens; this API key may use 2 a minute"


async def test_openais_clients_are_told_of_their_limits(tmp_path: Path) -> None:
    keys = book(tmp_path, key("alice", requests_per_minute=2, tokens_per_minute=600), key("bob"), clock=lambda: 100.0)
    async with openai_server.running(FakeWorker("a"), keys=keys) as up:
        alice, bob = (up.client.with_options(api_key=secret_of(name)) for name in ("alice", "bob"))
        raw = await alice.completions.with_raw_response.create(**ASKED)
        assert raw.headers["x-ratelimit-limit-requests"] == "2"
        assert raw.headers["x-ratelimit-remaining-requests"] == "1"
        assert 0 < float(raw.headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 30
        assert raw.headers["x-ratelimit-limit-tokens"] == "600"
        assert 592 <= int(raw.headers["x-ratelimit-remaining-tokens"]) < 600
        async for _ in await alice.completions.create(**ASKED, stream=True):
            pass
        with pytest.raises(openai.RateLimitError) as caught:
            await alice.completions.create(**ASKED)
        free = await bob.completions.with_raw_response.create(**ASKED)
    assert caught.value.code == "rate_limit_exceeded"
    assert 0 < int(caught.value.response.headers["retry-after"]) <= 30
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]


async def test_a_deadline_that_passes_in_the_queue_leaves_it(tmp_path: Path) -> None:
    worker, keys = FakeWorker("a", step_s=0.01), book(tmp_path, key("alice"), key("bob"))
    async with running(worker, keys=keys, batch_sequences=1, max_requests=100) as up:
        long = [up.inference.Generate(request(max_tokens=500), metadata=bearer("alice")) for _ in range(2)]
        for call in long:
            await call.read()
        waiting = [
            up.inference.Generate(request(), metadata=bearer("bob"), timeout=0.3),
            up.inference.GenerateOnce(request(), metadata=bearer("bob"), timeout=0.3),
            up.inference.Generate(request(idempotency_key="k"), metadata=bearer("bob"), timeout=0.3),
        ]
        errors = await asyncio.gather(*(error_of(call) for call in waiting))
        assert [error.code() for error in errors] == [grpc.StatusCode.DEADLINE_EXCEEDED] * 3
        await until(lambda: up.engine.admission.num_waiting == 0)
        assert (len(worker.submitted), up.engine.num_live_requests) == (2, 2)
        for call in long:
            call.cancel()
        await until(lambda: up.engine.num_live_requests == 0)


async def test_cancel_ends_a_kept_stream_that_waits(tmp_path: Path) -> None:
    worker, keys = FakeWorker("a", step_s=0.01), book(tmp_path, key("alice"))
    async with running(worker, keys=keys, batch_sequences=1, max_requests=100) as up:
        long = [up.inference.Generate(request(max_tokens=500), metadata=bearer("alice")) for _ in range(2)]
        for call in long:
            await call.read()
        kept = up.inference.Generate(request(request_id="r", idempotency_key="k"), metadata=bearer("alice"))
        await until(lambda: up.engine.admission.num_waiting == 1)
        await up.inference.Cancel(CancelRequest(request_id="r"), metadata=bearer("alice"))
        assert (await kept.read()).finish_reason
        assert up.engine.admission.num_waiting == 0
        for call in long:
            call.cancel()
        await until(lambda: up.engine.num_live_requests == 0)


async def test_a_full_queue_is_resource_exhausted_at_once() -> None:
    worker = FakeWorker("a", step_s=0.01)
    async with running(worker, batch_sequences=1, max_requests=100, max_queue=2) as up:
        calls = [up.inference.Generate(request(max_tokens=500)) for _ in range(2)]
        for call in calls:
            await call.read()
        calls += [up.inference.Generate(request()) for _ in range(2)]
        await until(lambda: up.engine.admission.num_waiting == 2)
        error = await error_of(up.inference.Generate(request()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "2 sequences wait at this gateway and 1 more are asked for; 2 is the most"
        assert delay_s(error) >= 1
        for call in calls:
            call.cancel()
        await until(lambda: up.engine.num_live_requests == 0)


async def test_a_worker_is_never_given_more_than_it_takes() -> None:
    worker = FakeWorker("a", capacity=2)
    async with running(worker, batch_sequences=64, max_requests=100, max_queue=2) as up:
        answers = await asyncio.gather(*(up.inference.GenerateOnce(request(seed=seed)) for seed in range(4)))
    assert [list(answer.outputs[0].token_ids) for answer in answers] == [
        fake_output((10, 20, 30), sampling(seed)) for seed in range(4)
    ]
