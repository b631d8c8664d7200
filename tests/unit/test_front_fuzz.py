"""What no well-behaved client sends, to the gRPC port: answered or cut off, nothing left behind, nobody else disturbed.

Seeded, and bounded in time. While each attempt runs, a good client's streams run too; their tokens must be the usual
ones. Afterwards no request is alive, and descriptors and memory are as before.
"""

import asyncio
import gc
import random
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc
import hpack
import psutil
import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertmesh.cluster.settings import GrpcSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1.inference_pb2 import GenerateRequest, GetModelRequest, ReceivedSample, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.in_a_thread import in_a_thread
from tests.unit import http2
from tests.unit.gateway_fakes import FakeWorker, fake_output, save_tokenizer
from tests.unit.gateway_server import Running, request, running, sampling, until
from tests.unit.http2 import Http2Client, frame, grpc_message

PROMPT = (10, 20, 30)
MAX_MEMORY_BYTES = 64 << 20
LIMITS = GrpcSettings(max_message_bytes=1 << 16)
BODY = request(*PROMPT, max_tokens=5).SerializeToString()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


async def good_stream(up: Running) -> None:
    """A stream of a client that does nothing wrong, on a connection of its own."""
    async with grpc.aio.insecure_channel(up.server.address) as channel:
        stream = InferenceStub(channel).Generate(request(*PROMPT, seed=6, max_tokens=50), timeout=60)
        got = [token async for message in stream for token in message.token_ids]
    assert got == fake_output(PROMPT, sampling(6, 50))


@asynccontextmanager
async def undisturbed(up: Running) -> AsyncIterator[None]:
    """Run good streams while the block lasts, and look afterwards at what is left of it."""
    process = psutil.Process()
    await good_stream(up)  # what the first one opens stays open, as does the server's own channel
    await up.inference.GetModel(GetModelRequest())
    gc.collect()
    num_files, memory_bytes = process.num_fds(), process.memory_info().rss
    over = asyncio.Event()

    async def streams() -> None:
        while not over.is_set():
            await good_stream(up)

    running_streams = asyncio.create_task(streams())
    try:
        yield
    finally:
        over.set()
        await running_streams
    await until(lambda: up.engine.num_live_requests == 0)
    assert up.engine.unread.num_held == 0
    await until(lambda: process.num_fds() <= num_files)
    gc.collect()
    assert process.memory_info().rss - memory_bytes < MAX_MEMORY_BYTES


def random_bytes(rng: random.Random) -> Iterator[bytes]:
    for size in (0, 1, 9, 24, 100, 5000, 100_000):
        yield rng.randbytes(size)
    yield b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
    yield b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(500)  # as TLS begins


def garbage_after_the_preface(rng: random.Random) -> Iterator[bytes]:
    start = http2.PREFACE + frame(http2.SETTINGS)
    yield http2.PREFACE[:10]
    yield http2.PREFACE + rng.randbytes(2000)
    for _ in range(40):
        kind, flags, stream = rng.randrange(256), rng.randrange(256), rng.choice([0, 1, 2, 3, 1 << 31, 0xFFFFFFFF])
        yield start + frame(kind, flags, stream, rng.randbytes(rng.randrange(60)))
    yield start + frame(http2.SETTINGS, length=0xFFFFFF)
    yield start + frame(http2.SETTINGS, payload=b"\0\5" + b"\xff" * 4)
    yield start + frame(http2.WINDOW_UPDATE, payload=bytes(4))
    yield start + frame(http2.DATA, 0, 1, b"to no stream")
    yield start + frame(http2.HEADERS, http2.END_HEADERS, 1, rng.randbytes(300))
    yield start + frame(http2.HEADERS, 0, 1, b"\x82") + frame(http2.PING, payload=bytes(8))
    # An integer of RFC 7541 without end, and an index that there is not.
    yield start + frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff" * 100)
    yield start + frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\x80\x80\x01")


@pytest.mark.parametrize("sent", [random_bytes, garbage_after_the_preface])
async def test_bytes_that_are_no_http2_are_cut_off(sent: Callable[[random.Random], Iterator[bytes]]) -> None:
    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        for data in sent(random.Random(5)):
            reader, writer = await asyncio.open_connection("127.0.0.1", up.server.port)
            with suppress(ConnectionError):
                writer.write(data)
                await writer.drain()
                with suppress(TimeoutError):  # who says too little is waited for
                    await asyncio.wait_for(reader.read(), 0.02)
            writer.close()


NO_ANSWER = "none"
BAD_MESSAGES: dict[str, tuple[bytes, str]] = {
    "a message of 4 GiB": (grpc_message(BODY, length=0xFFFFFFFF), "8"),
    "above the limit": (grpc_message(bytes(1 << 17)), "8"),
    # gRPC's own answer, as its protocol says.
    "compressed, it says": (grpc_message(BODY, compressed=1), "13"),
    "two messages": (grpc_message(BODY) * 2, "0"),
    "shorter than it is": (grpc_message(BODY, length=3), "3"),
    "a truncated message": (grpc_message(BODY[:-3]), "3"),
    "no protobuf": (grpc_message(b"\xff" * 40), "3"),
    "a string that is not UTF-8": (grpc_message(b"\x0a\x02\xff\xfe"), "3"),
    "a group that never ends": (grpc_message(b"\x0b" * 200), "3"),
    # gRPC answers these not at all: they wait until their client leaves.
    "longer than it is": (grpc_message(BODY, length=len(BODY) + 50), NO_ANSWER),
    "a flag that there is not": (grpc_message(BODY, compressed=7), NO_ANSWER),
    "no frame": (b"\0\0", NO_ANSWER),
    "nothing": (b"", NO_ANSWER),
}


async def test_a_message_that_is_none_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def send(body: bytes, status: str) -> str:
        with Http2Client(up.server.port) as client:
            stream = client.headers()
            client.send(frame(http2.DATA, http2.END_STREAM, stream, body[: 1 << 14]))
            if status == NO_ANSWER:
                client.ping()
                return NO_ANSWER
            return client.trailers()[0]

    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        found = {what: await asyncio.to_thread(send, *case) for what, case in BAD_MESSAGES.items()}
    assert found == {what: status for what, (_, status) in BAD_MESSAGES.items()}
    assert not caplog.records


async def test_metadata_without_end_is_cut_off() -> None:
    """Headers beyond any limit: as one call, and as continuation frames that never end."""

    def flood() -> int:
        with Http2Client(up.server.port) as client:
            stream = client.headers(flags=0)
            filler = http2.literal_header("x-filler", "y" * 8000)
            num_sent = 0
            with suppress(OSError):
                for _ in range(2000):
                    client.send(frame(http2.CONTINUATION, 0, stream, filler))
                    num_sent += len(filler)
            return num_sent

    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await up.inference.GenerateOnce(request(*PROMPT), metadata=[("x-filler", "y" * 100_000)], timeout=20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await asyncio.to_thread(flood)


async def on_a_connection(up: Running, act: Callable[[Http2Client], None]) -> None:
    """Act on a connection of one's own, until it is over or cut off; then leave."""

    def connected() -> None:
        with Http2Client(up.server.port) as client, suppress(OSError):
            act(client)

    await asyncio.to_thread(connected)


async def test_thousands_of_calls_on_one_connection() -> None:
    def act(client: Http2Client) -> None:
        for _ in range(3000):
            client.generate(request(*PROMPT, max_tokens=5))
        client.ping()

    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        await on_a_connection(up, act)


async def test_calls_that_are_reset_at_once() -> None:
    def act(client: Http2Client) -> None:
        for _ in range(3000):
            stream = client.generate(request(*PROMPT, max_tokens=50))
            client.send(frame(http2.RST_STREAM, 0, stream, struct.pack(">I", 8)))
        client.ping()

    worker = FakeWorker("a")
    async with running(worker, settings=LIMITS, max_requests=64) as up, undisturbed(up):
        await on_a_connection(up, act)
    assert not worker.live_ids


async def test_half_open_calls_cost_nobody_else_anything() -> None:
    """Calls that begin and say nothing more, and messages that stop in the middle."""

    def act(client: Http2Client) -> None:
        for number in range(1500):
            stream = client.headers()
            if number % 2:
                client.send(frame(http2.DATA, 0, stream, grpc_message(BODY)[:7]))
        client.ping()

    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        await on_a_connection(up, act)


async def test_floods_of_control_frames() -> None:
    floods = [
        frame(http2.PING, payload=bytes(8)),
        frame(http2.SETTINGS, payload=struct.pack(">HI", 0x4, 1000)),
        frame(http2.WINDOW_UPDATE, payload=struct.pack(">I", 1)),
        frame(0x55, payload=bytes(100)),
    ]

    def act(flood: bytes, client: Http2Client) -> None:
        for _ in range(200):
            client.send(flood * 100)

    async with running(FakeWorker("a"), settings=LIMITS, max_requests=64) as up, undisturbed(up):
        for flood in floods:
            await on_a_connection(up, partial(act, flood))


async def test_a_connection_that_says_nothing_is_closed() -> None:
    async with running(FakeWorker("a"), settings=GrpcSettings(handshake_timeout_s=1)) as up, undisturbed(up):
        pairs = [await asyncio.open_connection("127.0.0.1", up.server.port) for _ in range(50)]
        async with asyncio.timeout(60):
            await asyncio.gather(*(reader.read() for reader, _ in pairs))
        for _, writer in pairs:
            writer.close()


async def test_clients_that_vanish() -> None:
    async def come_and_go(number: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", up.server.port)
        headers = hpack.Encoder().encode(http2.request_headers(), huffman=False)
        body = frame(
            http2.DATA, http2.END_STREAM, 1, grpc_message(request(*PROMPT, max_tokens=400).SerializeToString())
        )
        data = http2.PREFACE + frame(http2.SETTINGS) + frame(http2.HEADERS, http2.END_HEADERS, 1, headers) + body
        writer.write(data[: len(data) - number % 40])
        await writer.drain()
        writer.transport.abort()

    worker = FakeWorker("a")
    async with running(worker, settings=LIMITS, max_requests=64) as up, undisturbed(up):
        for first in range(0, 200, 20):
            await asyncio.gather(*(come_and_go(first + number) for number in range(20)))
    await until(lambda: not worker.live_ids)


@pytest.fixture(scope="module")
def channel(tokenizer: Tokenizer) -> Iterator[grpc.Channel]:
    """To a server in a thread of its own."""
    with (
        in_a_thread(running(FakeWorker("a"), tokenizer=tokenizer, settings=LIMITS)) as up,
        grpc.insecure_channel(up.server.address) as channel,
    ):
        yield channel


RECEIVED = st.builds(
    ReceivedSample,
    token_ids=st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 260), max_size=20),
    has_ended=st.booleans(),
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "text": st.text(max_size=40),
        "max_tokens": st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 20),
        "temperature": st.floats(),
        "top_k": st.integers(-(2**31), 2**31 - 1),
        "top_p": st.floats() | st.floats(0, 1),
        "min_p": st.floats() | st.floats(0, 1),
        "repetition_penalty": st.floats(),
        "seed": st.integers(0, 2**64 - 1),
        "stop": st.lists(st.text(max_size=5), max_size=20),
        "stop_token_ids": st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 300), max_size=5),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 21),
        "n": st.integers(-(2**31), 2**31 - 1) | st.integers(-1, 4),
        "request_id": st.text(max_size=140),
        "idempotency_key": st.text(max_size=140),
        "received": st.lists(RECEIVED, max_size=3),
    },
)
IDS = st.none() | st.lists(st.integers(0, 2**32 - 1) | st.integers(0, 260), max_size=30)
ALLOWED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
QUICK = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


INFERENCE = ["Generate", "GenerateOnce", "Resume", "Cancel", "Tokenize", "Detokenize", "GetModel"]
METHODS = [
    *(f"/expertmesh.v1.Inference/{name}" for name in INFERENCE),
    *(f"/inference.GRPCInferenceService/{name}" for name in ("ModelInfer", "ModelStreamInfer", "ModelReady")),
    "/expertmesh.v1.Admin/Drain",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
]


def refusal(call: Callable[[], object]) -> grpc.RpcError | None:
    """Make a call; return the error that it ends with."""
    try:
        call()
    except grpc.RpcError as error:
        return error
    return None


@QUICK
@given(fields=FIELDS, ids=IDS)
def test_a_request_of_any_fields_is_served_or_refused(
    channel: grpc.Channel, fields: dict[str, Any], ids: Sequence[int] | None
) -> None:
    what = GenerateRequest(**fields)
    if ids is not None:
        what.token_ids.CopyFrom(TokenIds(ids=ids))
    stub = InferenceStub(channel)
    error = refusal(
        lambda: list(stub.Generate(what, timeout=60)) if what.received else stub.GenerateOnce(what, timeout=60)
    )
    if error is not None:
        assert error.code() in ALLOWED, (error, text_format.MessageToString(what))
        assert error.details()


@QUICK
@given(
    method=st.sampled_from(METHODS),
    data=st.binary(max_size=60) | st.builds(lambda cut: BODY[:cut], st.integers(0, len(BODY))),
)
def test_a_message_of_any_bytes_is_served_or_refused(channel: grpc.Channel, method: str, data: bytes) -> None:
    raw: Any = channel.unary_stream(method)
    error = refusal(lambda: list(raw(data, timeout=60)))
    if error is not None:
        assert error.code() in (*ALLOWED, grpc.StatusCode.NOT_FOUND), error
        assert error.details()
