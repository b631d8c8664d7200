"""The way of new tokens from a worker to a gateway, over real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.actors import token_stream
from expertmesh.actors.token_stream import StreamAddress, TokenStreamClient, TokenStreamServer
from expertmesh.actors.worker.outbox import Outbox
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.requests import FinishReason, TokenEvent, TokenLogprob

HOST = "127.0.0.1"


def event(index: int) -> TokenEvent:
    return TokenEvent(sequence_id="s", index=index, token_id=index + 100)


class Worker:
    """A worker's end: an outbox for each gateway."""

    def __init__(self) -> None:
        self.outboxes: dict[str, Outbox] = {}
        self.asked: list[tuple[str, int]] = []
        self.wait_s = 5.0

    async def poll(self, gateway_id: str, after: int) -> tuple[int, list[TokenEvent]]:
        self.asked.append((gateway_id, after))
        return await self.outbox(gateway_id).poll(after, self.wait_s)

    def outbox(self, gateway_id: str) -> Outbox:
        return self.outboxes.setdefault(gateway_id, Outbox())


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def server(worker: Worker) -> AsyncIterator[TokenStreamServer]:
    server = await TokenStreamServer.start(HOST, worker.poll)
    yield server
    server.close()


Connect = Callable[..., TokenStreamClient]


@pytest.fixture
async def connect(server: TokenStreamServer) -> AsyncIterator[Connect]:
    clients: list[TokenStreamClient] = []

    def make(gateway_id: str = "g", address: StreamAddress = server.address) -> TokenStreamClient:
        async def find() -> StreamAddress:
            return address

        clients.append(TokenStreamClient(find, gateway_id))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


async def test_each_gateway_gets_its_own_events_in_order(worker: Worker, connect: Connect) -> None:
    first, second = connect("a"), connect("b")
    worker.outbox("a").put([event(0), event(1)])
    worker.outbox("b").put([event(7)])
    assert await first.poll(0) == (1, [event(0), event(1)])
    assert await second.poll(0) == (1, [event(7)])
    worker.outbox("a").put([event(2)])
    assert await first.poll(1) == (2, [event(2)])
    assert worker.asked == [("a", 0), ("b", 0), ("a", 1)]


async def test_a_poll_waits_for_the_next_event(worker: Worker, connect: Connect) -> None:
    waiting = asyncio.create_task(connect().poll(0))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    worker.outbox("g").put([event(0)])
    assert await asyncio.wait_for(waiting, 2) == (1, [event(0)])


EVENTS = st.builds(
    TokenEvent,
    sequence_id=st.text(max_size=5),
    index=st.integers(0, 2**31),
    token_id=st.none() | st.integers(0, 2**31),
    logprob=st.none() | st.floats(allow_nan=False),
    top_logprobs=st.lists(
        st.builds(TokenLogprob, token_id=st.integers(0, 2**31), logprob=st.floats(allow_nan=False)), max_size=3
    ).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    error=st.text(max_size=5),
    unavailable=st.booleans(),
)


@settings(deadline=None, max_examples=50)
@given(st.lists(EVENTS, min_size=1, max_size=4))
def test_events_arrive_as_they_were(events: list[TokenEvent]) -> None:
    async def run() -> None:
        worker = Worker()
        worker.outbox("g").put(events)
        server = await TokenStreamServer.start(HOST, worker.poll)

        async def find() -> StreamAddress:
            return server.address

        client = TokenStreamClient(find, "g")
        assert await client.poll(0) == (1, events)
        client.close()
        server.close()

    asyncio.run(run())


async def test_a_poll_that_is_given_up_does_not_answer_the_next(worker: Worker, connect: Connect) -> None:
    client = connect()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await client.poll(0)
    worker.outbox("g").put([event(0)])
    assert await client.poll(0) == (1, [event(0)])
    worker.outbox("g").put([event(1)])
    assert await client.poll(1) == (2, [event(1)])


async def test_a_worker_that_is_gone_is_noticed_at_once_and_found_again(worker: Worker) -> None:
    address: StreamAddress | None = None

    async def find() -> StreamAddress:
        if address is None:
            raise UnavailableError("no such worker")
        return address

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.close()

    dying = await asyncio.start_server(answer_once, HOST, 0)
    client = TokenStreamClient(find, "g")
    with pytest.raises(UnavailableError, match="no such worker"):
        await client.poll(0)
    address = StreamAddress(HOST, dying.sockets[0].getsockname()[1], b"")
    with pytest.raises(UnavailableError, match="its token stream ended"):
        await asyncio.wait_for(client.poll(0), 2)
    dying.close()
    with pytest.raises(UnavailableError, match="its token stream ended: ConnectionRefusedError"):
        await client.poll(0)
    server = await TokenStreamServer.start(HOST, worker.poll)
    address = server.address
    worker.outbox("g").put([event(0)])
    assert await client.poll(0) == (1, [event(0)])
    client.close()
    server.close()


async def test_who_does_not_know_the_secret_hears_nothing(
    worker: Worker, server: TokenStreamServer, connect: Connect
) -> None:
    worker.outbox("g").put([event(0)])
    stranger = connect(address=server.address._replace(secret=b"x" * 32))
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(stranger.poll(0), 2)
    assert worker.asked == []
    assert await connect().poll(0) == (1, [event(0)])


def framed(value: object) -> bytes:
    data: bytes = msgpack.packb(value)
    return len(data).to_bytes(4, "little") + data


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff\xff\xff\xff",
        framed("hello"),
        framed([1, 2]),
        framed([None, "g"]),
        framed([b"", "g"]),
        framed({}),
        framed(5),
        (3).to_bytes(4, "little") + b"\xc1\xc1\xc1",
        (9).to_bytes(4, "little"),
    ],
)
async def test_noise_is_cut_off_and_harms_nobody(
    said: bytes, worker: Worker, server: TokenStreamServer, connect: Connect
) -> None:
    reader, writer = await asyncio.open_connection(HOST, server.address.port)
    writer.write(said)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
    worker.outbox("g").put([event(0)])
    assert await connect().poll(0) == (1, [event(0)])
    assert worker.asked == [("g", 0)]


@pytest.mark.parametrize("question", ["0", None, [0], "x" * 2000])
async def test_a_question_that_is_no_number_ends_the_connection(question: object, server: TokenStreamServer) -> None:
    reader, writer = await asyncio.open_connection(HOST, server.address.port)
    writer.write(framed([server.address.secret, "g"]) + framed(question))
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()


async def test_who_says_nothing_is_not_waited_for(server: TokenStreamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "_HELLO_S", 0.1)
    reader, writer = await asyncio.open_connection(HOST, server.address.port)
    assert await asyncio.wait_for(reader.read(), 2) == b""
    writer.close()
