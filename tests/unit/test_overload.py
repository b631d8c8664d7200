"""A gateway that is full: who is refused, how soon, what is said, and what it is counted as."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from google.rpc import error_details_pb2, status_pb2

from expertmesh.actors.gateway.engine import MOST_EVENTS, Engine, Piece
from expertmesh.actors.gateway.metrics import RequestMeter
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.service_rate import ServiceRate
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest
from tests.unit import openai_server
from tests.unit.gateway_fakes import MODEL, FakeWorker, fake_output, save_tokenizer
from tests.unit.gateway_server import Running, error_of, request, running, sampling, until
from tests.unit.test_gateway_failover import running as engine_running
from tests.unit.test_gateway_failover import valid


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@contextlib.asynccontextmanager
async def occupied(up: Running, num: int) -> AsyncIterator[list[Any]]:
    """Have so many streams run while the block lasts."""
    calls = [up.inference.Generate(request(max_tokens=400)) for _ in range(num)]
    for call in calls:
        await call.read()
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()
        await until(lambda: up.engine.num_live_requests == 0)


def retry_s(error: Any) -> float:
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    return float(info.retry_delay.ToMilliseconds() / 1000)


async def test_a_full_gateway_refuses_before_it_reads_the_prompt(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(FakeWorker("a"), tokenizer=tokenizer) as up, occupied(up, 4):
        monkeypatch.setattr(type(tokenizer), "encode", lambda *_: pytest.fail("the prompt was tokenised"))
        error = await error_of(up.inference.Generate(GenerateRequest(text="a" * 100_000, max_tokens=4)))
        assert error.code().name == "RESOURCE_EXHAUSTED"
        assert error.details() == "4 requests are alive at this gateway, as many as it allows"
        assert up.engine.meter.ended["RESOURCE_EXHAUSTED"] == 1


async def test_full_workers_are_not_asked() -> None:
    worker = FakeWorker("a")
    async with running(worker, max_queue=2) as up, occupied(up, 2):
        error = await error_of(up.inference.GenerateOnce(request()))
        assert error.code().name == "RESOURCE_EXHAUSTED"
        assert error.details() == "2 sequences are live at 1 workers, 2 is the most"
        assert len(worker.submitted) == 2
    async with running(FakeWorker("a"), FakeWorker("b"), max_queue=2) as up, occupied(up, 3):
        await up.inference.GenerateOnce(request())


async def test_a_request_that_is_kept_is_not_refused() -> None:
    worker = FakeWorker("a", hang_after=5)
    async with running(worker, max_queue=1) as up:
        asked = request(max_tokens=30, seed=6, idempotency_key="mine")
        first = aiter(up.inference.Generate(asked))
        await anext(first)
        assert (await error_of(up.inference.Generate(request()))).code().name == "RESOURCE_EXHAUSTED"
        again = aiter(up.inference.Generate(asked))
        tokens = [*(await anext(again)).token_ids]
        worker.hang_after = None
        await worker.submit([])  # goes on
        tokens += [token_id async for message in again for token_id in message.token_ids]
        assert tokens == fake_output((10, 20, 30), sampling(seed=6, max_tokens=30))
        assert len(worker.submitted) == 1


async def test_the_delay_follows_the_queue() -> None:
    """Served at 2 a second, with 9 that wait: the tenth has its turn in 5 s."""
    now_s = [100.0]
    meter = RequestMeter(lambda: now_s[0])
    for _ in range(8):
        with meter.request() as times:
            times.tokens_came(0)
        now_s[0] += 0.5
    with contextlib.ExitStack() as waiting:
        for _ in range(9):
            waiting.enter_context(meter.request())
        with pytest.raises(CapacityError) as caught, meter.refusals():
            raise CapacityError("full")
        assert caught.value.retry_after_s == pytest.approx((9 + 1) * 4.0 / 8)
    assert meter.num_waiting == 0


def test_an_error_that_says_when_itself_is_left_as_it_is() -> None:
    with pytest.raises(CapacityError) as caught, RequestMeter().refusals():
        raise CapacityError("too many a minute", retry_after_s=17.0)
    assert caught.value.retry_after_s == 17.0


async def test_the_delay_is_told_over_grpc_and_http(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServiceRate, "wait_s", lambda *_: 7.25)
    async with running(FakeWorker("a", capacity=0)) as up:
        error = await error_of(up.inference.Generate(request()))
        assert retry_s(error) == 7.25
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "7250"
    async with openai_server.running(FakeWorker("a", capacity=0), tokenizer=tokenizer) as up_http:
        body = {"model": MODEL.name, "prompt": [1], "max_tokens": 4}
        answer = await up_http.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "8")


HEAD = "POST /v1/completions HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n"


async def answer_to(up: openai_server.Running, *parts: str) -> str:
    """Send parts of a request one after the other as they are, and return all that is answered until the end."""
    host, port = up.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for part in parts:
        writer.write(part.encode())
        await writer.drain()
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    return answer.decode()


async def test_a_body_that_is_too_large_is_refused_before_it_comes(tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer, max_body_bytes=1000) as up:
        answer = await answer_to(up, HEAD + "content-length: 1001\r\n\r\n")
        assert answer.startswith("HTTP/1.1 413 ")
        assert '"code":"request_too_large"' in answer
        assert '"type":"invalid_request_error"' in answer
        assert up.engine.meter.ended["INVALID_ARGUMENT"] == 1


async def test_a_body_of_no_declared_length_is_read_as_far_as_is_allowed(tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer, max_body_bytes=1000) as up:
        chunk = "1f5\r\n" + "x" * 501 + "\r\n"
        answer = await answer_to(up, HEAD + "transfer-encoding: chunked\r\n\r\n", chunk, chunk)
        assert answer.startswith("HTTP/1.1 413 ")
        assert up.engine.meter.ended["INVALID_ARGUMENT"] == 1
        body = {"model": MODEL.name, "prompt": "a" * 400, "max_tokens": 4}
        assert (await up.http.post("/v1/completions", json=body)).status_code == 200


async def test_a_full_gateway_refuses_over_http_before_the_body_comes(tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer) as up:
        async with contextlib.AsyncExitStack() as streams:
            for _ in range(4):
                pieces = await streams.enter_async_context(contextlib.aclosing(up.engine.generate(valid())))
                await anext(pieces)
            answer = await answer_to(up, HEAD + "content-length: 100000\r\n\r\n")
        assert answer.startswith("HTTP/1.1 429 ")
        assert "retry-after: " in answer
        assert up.engine.meter.ended["RESOURCE_EXHAUSTED"] == 1


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": "another"}, 404, "INVALID_ARGUMENT"),
        ({"stop_token_ids": [5000]}, 400, "INVALID_ARGUMENT"),
        ({"temperature": "hot"}, 400, "INVALID_ARGUMENT"),
    ],
)
async def test_what_http_refuses_is_counted(
    fields: dict[str, Any], status: int, code: str, tokenizer: Tokenizer
) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer) as up:
        body = {"model": MODEL.name, "prompt": [1], "max_tokens": 4, **fields}
        assert (await up.http.post("/v1/completions", json=body)).status_code == status
        assert {name: count for name, count in up.engine.meter.ended.items() if count} == {code: 1}


async def test_what_is_not_ready_is_counted_and_what_is_looked_at_is_not(tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer) as up:
        up.readiness[0] = False
        body = {"model": MODEL.name, "prompt": [1], "max_tokens": 4}
        assert (await up.http.post("/v1/completions", json=body)).status_code == 503
        assert (await up.http.get("/v1/models/another")).status_code == 404
        assert (await up.http.get("/ready")).status_code == 503
        assert {name: count for name, count in up.engine.meter.ended.items() if count} == {"UNAVAILABLE": 1}


@pytest.mark.parametrize(
    ("fields", "param"), [({"prompt": [5000]}, "prompt"), ({"stop_token_ids": [5000]}, "stop_token_ids")]
)
async def test_the_field_that_is_wrong_is_named(fields: dict[str, Any], param: str, tokenizer: Tokenizer) -> None:
    async with openai_server.running(FakeWorker("a"), tokenizer=tokenizer) as up:
        body = {"model": MODEL.name, "prompt": [1], "max_tokens": 4, **fields}
        answer = await up.http.post("/v1/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_what_a_slow_reader_left_is_one_piece_and_no_token_is_lost() -> None:
    async with engine_running([FakeWorker("a")]) as engine:
        asked = valid(max_tokens=400)
        pieces: list[Piece] = []
        async with contextlib.aclosing(engine.generate(asked)) as coming:
            async for piece in coming:
                pieces.append(piece)
                if len(pieces) == 1:
                    await until(lambda: at_its_end(engine))
        assert [event.token_id for piece in pieces for event in piece.tokens] == fake_output(
            asked.prompt_ids, asked.sampling[0]
        )
        assert len(pieces) <= 5
        assert max(len(piece.tokens) for piece in pieces) <= 2 * MOST_EVENTS


def at_its_end(engine: Engine) -> bool:
    """Say whether the one live request has all its tokens in its inbox."""
    (live,) = engine._journal
    waiting = list(live.inbox._queue)  # type: ignore[attr-defined]
    return bool(waiting) and waiting[-1][-1].finish_reason is not None
