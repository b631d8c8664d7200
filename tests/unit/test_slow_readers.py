"""Readers that take nothing while tokens come: what waits for them is bounded, and nobody else is disturbed."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from expertmesh.actors.gateway.engine import NOT_READ
from expertmesh.v1.inference_pb2 import GenerateRequest, ResumeRequest
from tests.unit.gateway_fakes import FakeWorker, fake_output
from tests.unit.gateway_server import Running, error_of, request, running, sampling, until
from tests.unit.http2 import Http2Client
from tests.unit.openai_server import running as running_http

PROMPT = (10, 20, 30)
MAX_UNREAD = 1500


def long(**fields: Any) -> GenerateRequest:
    """A request of more tokens than may wait: its samples are as long as the context."""
    return request(*PROMPT, **{"max_tokens": 500, "n": 16, "seed": 6, **fields})


@asynccontextmanager
async def deaf(up: Running, what: GenerateRequest) -> AsyncIterator[Http2Client]:
    """A client that sends a request, allows the server one byte of answer, and reads nothing."""
    client = Http2Client(up.server.port, initial_window=1)
    with client:
        client.generate(what)
        yield client


async def good_stream(up: Running, num_tokens: int = 200) -> list[int]:
    got = up.inference.Generate(request(*PROMPT, seed=8, max_tokens=num_tokens))
    return [token async for message in got for token in message.token_ids]


async def test_a_reader_that_takes_nothing_is_ended_and_others_go_on() -> None:
    worker = FakeWorker("a")
    async with running(worker, max_unread_tokens=MAX_UNREAD) as up, deaf(up, long()) as client:
        most = 0

        def has_ended() -> bool:
            nonlocal most
            most = max(most, up.engine.unread.num_held)
            return bool(worker.cancelled)

        good, _ = await asyncio.gather(good_stream(up), until(has_ended))
        assert good == fake_output(PROMPT, sampling(8, 200))
        assert MAX_UNREAD - 200 < most <= MAX_UNREAD
        assert up.engine.unread.num_held == 0
        assert not worker.live_ids
        client.allow(1 << 20)
        assert await asyncio.to_thread(client.trailers) == ("8", NOT_READ)  # RESOURCE_EXHAUSTED
        await until(lambda: up.engine.num_live_requests == 0)


async def test_a_kept_stream_that_grows_too_large_is_ended_and_forgotten() -> None:
    worker = FakeWorker("a")
    async with running(worker, max_unread_tokens=MAX_UNREAD) as up:
        error = await error_of(up.inference.Generate(long(request_id="r", idempotency_key="k")))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, NOT_READ)
        error = await error_of(up.inference.Resume(ResumeRequest(request_id="r")))
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert (up.engine.unread.num_held, up.engine.num_live_requests, worker.live_ids) == (0, 0, [])
        # The key may be used again.
        got = up.inference.Generate(request(*PROMPT, seed=8, max_tokens=20, request_id="r", idempotency_key="k"))
        assert [token async for one in got for token in one.token_ids] == fake_output(PROMPT, sampling(8, 20))


async def test_ended_streams_make_room_for_one_that_runs() -> None:
    async with running(FakeWorker("a"), max_unread_tokens=MAX_UNREAD) as up:
        for number in range(4):
            kept = request(*PROMPT, seed=8, max_tokens=450, request_id=f"r{number}", idempotency_key=f"k{number}")
            assert len([token async for one in up.inference.Generate(kept) for token in one.token_ids]) == 450
        assert up.engine.unread.num_held == 3 * 450
        found = [
            [
                token
                async for one in up.inference.Resume(ResumeRequest(request_id=f"r{number}"))
                for token in one.token_ids
            ]
            for number in range(1, 4)
        ]
        assert found == [fake_output(PROMPT, sampling(8, 450))] * 3
        assert (await error_of(up.inference.Resume(ResumeRequest(request_id="r0")))).code() is grpc.StatusCode.NOT_FOUND


async def test_what_is_read_as_it_comes_never_waits() -> None:
    async with running(FakeWorker("a"), max_unread_tokens=1000) as up:
        for _ in range(3):
            assert len(await good_stream(up, 500)) == 500
        assert up.engine.unread.num_held == 0


async def test_a_client_that_vanishes_in_the_middle_of_a_message_is_no_defect(caplog: pytest.LogCaptureFixture) -> None:
    worker = FakeWorker("a")
    with caplog.at_level(logging.WARNING):
        async with running(worker) as up:
            async with deaf(up, long()):
                await until(lambda: up.engine.unread.num_held > 100)
            await until(lambda: up.engine.num_live_requests == 0)
            await until(lambda: not worker.live_ids)
            assert up.engine.unread.num_held == 0
    assert not caplog.records


async def test_an_http_answer_that_is_not_read_waits_in_the_engine_and_is_ended_there() -> None:
    worker = FakeWorker("a")
    async with running_http(worker, max_unread_tokens=MAX_UNREAD) as up:
        body = '{"model": "fake", "prompt": [10, 20, 30], "max_tokens": 500, "n": 64, "stream": true, "logprobs": 5}'
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", int(up.url.rpartition(":")[2])))
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            client.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            await until(lambda: bool(worker.cancelled))
            assert up.engine.unread.num_held <= MAX_UNREAD
        await until(lambda: up.engine.num_live_requests == 0)
