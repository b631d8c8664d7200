"""How new tokens get from a worker to a gateway: polls over a TCP connection of their own.

A call through Ray costs a millisecond or two of processor time at each end, a message here a tenth of that, each step.

A message is its length (4 bytes, little-endian) and a msgpack value. The gateway begins with [secret, its id], then
asks with the number after which it wants events; the worker answers [number of the last, events].
"""

import asyncio
import hmac
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgpack

from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.requests import FinishReason, TokenEvent, TokenLogprob

_LENGTH_BYTES = 4
# A gateway says little; what a worker says is bounded by what it made.
_MAX_QUESTION_BYTES = 1024
# Whoever has not said by then who it is is no gateway.
_HELLO_S = 10.0
_log = EventLog(__name__)
Poll = Callable[[str, int], Awaitable[tuple[int, list[TokenEvent]]]]


class StreamAddress(NamedTuple):
    """Where a worker answers, and what it wants to hear from those that may ask."""

    host: str
    port: int
    secret: bytes


class TokenStreamServer:
    """The worker's end."""

    def __init__(self, server: asyncio.Server, address: StreamAddress) -> None:
        self._server = server
        self.address = address

    @classmethod
    async def start(cls, host: str, poll: Poll) -> "TokenStreamServer":
        """Listen on a free port of host's.

        Args:
            host: address of an interface.
            poll: see Outbox.poll, with the gateway's id before its arguments.
        """
        secret = secrets.token_bytes(32)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await _serve(reader, writer, secret, poll)
            except (OSError, EOFError, ValueError, TypeError, TimeoutError, UnavailableError) as error:
                _log.tell("gateway_gone", reason=repr(error))
            finally:
                writer.close()

        server = await asyncio.start_server(serve, host, 0)
        return cls(server, StreamAddress(host, server.sockets[0].getsockname()[1], secret))

    def close(self) -> None:
        """Listen no more."""
        self._server.close()


class TokenStreamClient:
    """The gateway's end: one poll at a time."""

    def __init__(self, find_address: Callable[[], Awaitable[StreamAddress]], gateway_id: str) -> None:
        """Make a client that connects when it is asked first, and anew after a failure.

        Args:
            find_address: asks the worker; raises UnavailableError.
            gateway_id: under which the worker keeps the events.
        """
        self._find_address = find_address
        self._gateway_id = gateway_id
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        """See WorkerClient.poll.

        Raises:
            UnavailableError: the worker is gone.
        """
        try:
            if self._streams is None:
                self._streams = await self._connect()
            reader, writer = self._streams
            writer.write(_frame(after))
            last, records = await _read(reader)
        except (OSError, EOFError, ValueError, TypeError) as error:
            self.close()
            raise UnavailableError(f"its token stream ended: {error!r}") from error
        except BaseException:
            self.close()  # an answer that comes now would be taken for the next one's
            raise
        return last, [_event_of(record) for record in records]

    def close(self) -> None:
        """Let go of the connection."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port, secret = await self._find_address()
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(_frame([secret, self._gateway_id]))
        return reader, writer


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes, poll: Poll) -> None:
    async with asyncio.timeout(_HELLO_S):
        said, gateway_id = await _read(reader, _MAX_QUESTION_BYTES)
    if not (isinstance(said, bytes) and isinstance(gateway_id, str) and hmac.compare_digest(said, secret)):
        raise ValueError("it does not know the secret")
    while True:
        after = await _read(reader, _MAX_QUESTION_BYTES)
        if not isinstance(after, int):
            raise ValueError("a question that is no number")
        last, events = await poll(gateway_id, after)
        writer.write(_frame([last, [_record_of(event) for event in events]]))
        await writer.drain()


async def _read(reader: asyncio.StreamReader, most_bytes: int | None = None) -> Any:
    """Read a message.

    Raises:
        EOFError, OSError: the other end is gone.
        ValueError: it is longer than most_bytes, or no message.
    """
    size = int.from_bytes(await reader.readexactly(_LENGTH_BYTES), "little")
    if most_bytes is not None and size > most_bytes:
        raise ValueError(f"a message of {size} bytes")
    return msgpack.unpackb(await reader.readexactly(size))


def _frame(value: Any) -> bytes:
    data: bytes = msgpack.packb(value)
    return len(data).to_bytes(_LENGTH_BYTES, "little") + data


def _record_of(event: TokenEvent) -> list[Any]:
    tops = [(top.token_id, top.logprob) for top in event.top_logprobs]
    reason = event.finish_reason
    shown = [event.sequence_id, event.index, event.token_id, event.logprob, tops, reason and reason.value]
    return [*shown, event.error, event.unavailable]


def _event_of(record: list[Any]) -> TokenEvent:
    sequence_id, index, token_id, logprob, tops, reason, error, unavailable = record
    return TokenEvent(
        sequence_id=sequence_id,
        index=index,
        token_id=token_id,
        logprob=logprob,
        top_logprobs=tuple(TokenLogprob(token_id=token, logprob=value) for token, value in tops),
        finish_reason=None if reason is None else FinishReason(reason),
        error=error,
        unavailable=unavailable,
    )
