"""What no OpenAI client sends, over HTTP: a clear 4xx, no defect in the log, nothing left behind."""

import asyncio
import json
import random
from collections.abc import Iterator
from contextlib import suppress

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.in_a_thread import in_a_thread
from tests.unit.gateway_fakes import FakeWorker
from tests.unit.openai_server import Running, running

PATHS = ("/v1/completions", "/v1/chat/completions")
GOOD = {"model": "fake", "prompt": [10, 20, 30], "max_tokens": 5, "seed": 6}
DEEP = 60_000
BAD_BODIES: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "a list without end": b"[" * DEEP,
    "objects without end": b'{"prompt":' * DEEP,
    "a deep list": b'{"model": "fake", "prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "a deep field that is unknown": b'{"model": "fake", "prompt": [1], "x": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "null": b"null",
    "a number": b"5",
    "NaN": b'{"model": "fake", "prompt": [1], "temperature": NaN}',
    "infinity": b'{"model": "fake", "prompt": [1], "temperature": 1e999}',
    "a number of many digits": b'{"model": "fake", "prompt": [1], "max_tokens": ' + b"9" * 5000 + b"}",
    "half a surrogate": b'{"model": "fake", "prompt": "\\ud800"}',
}


async def answers(up: Running) -> bool:
    response = await up.http.post(PATHS[0], json=GOOD)
    return response.status_code == 200 and len(response.json()["choices"]) == 1


@pytest.mark.parametrize("path", PATHS)
async def test_a_body_that_is_none_is_refused(path: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running(FakeWorker("a")) as up:
        for what, body in BAD_BODIES.items():
            response = await up.http.post(path, content=body, headers={"content-type": "application/json"})
            assert 400 <= response.status_code < 500, (what, response.status_code, response.text[:200])
            assert response.json()["error"]["message"], what
            assert len(response.text) < 2000, what
        assert await answers(up)
    assert [r for r in caplog.records if r.name.startswith("expertmesh")] == []


RAW: dict[str, bytes] = {
    "random bytes": random.Random(3).randbytes(5000),
    "a line without end": b"GET /" + b"a" * 200_000,
    "headers without end": b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 50_000,
    "a version that there is not": b"GET / HTTP/9.9\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nabcdef",
    "a negative length": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
    "length and chunks": b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk of no length": b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "as HTTP/2 begins": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100),
    "as TLS begins": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300),
    "half a request": b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{",
}


async def test_bytes_that_are_no_http_are_cut_off_and_disturb_nobody() -> None:
    async with running(FakeWorker("a")) as up:
        port = int(up.url.rpartition(":")[2])
        for data in RAW.values():
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
                with suppress(TimeoutError):  # who says too little is waited for
                    first = await asyncio.wait_for(reader.read(12), 0.05)
                    assert first in (b"", b"HTTP/1.1 400", b"HTTP/1.1 404", b"HTTP/1.1 405", b"HTTP/1.1 431"), data[:50]
            assert await answers(up)
            writer.transport.abort()


LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=10)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
NAMES = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "logprobs", "seed", "stream"]


@pytest.fixture(scope="module")
def http() -> Iterator[httpx2.Client]:
    """To a server in a thread of its own."""
    with in_a_thread(running(FakeWorker("a"))) as up, httpx2.Client(base_url=up.url, timeout=60) as client:
        yield client


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(PATHS), body=st.dictionaries(st.sampled_from([*NAMES, "x"]), VALUES, max_size=6))
def test_a_body_of_any_fields_is_served_or_refused(http: httpx2.Client, path: str, body: dict[str, object]) -> None:
    content = json.dumps({"model": "fake", "max_tokens": 3, **body}).encode()
    response = http.post(path, content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200 or 400 <= response.status_code < 500, (content, response.text)
