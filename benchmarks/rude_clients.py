"""Clients that do not wait for the end: they cancel, run out of time, close their sockets in the middle, or are killed.

`python -m benchmarks.rude_clients ADDRESS [HTTP_URL]` is one that is to be killed: it opens streams, says "ready" once
each has a token or is refused, and reads no more.
"""

import asyncio
import contextlib
import json
import random
import socket
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import grpc

from expertmesh.v1.admin_pb2 import GetStatusRequest, ModelStatus
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub

NUM_PROMPT, NUM_NEW, MANY_NEW = 24, 48, 400
KILLED_STREAMS = 4
READY = "ready"
Client = Callable[[random.Random], Awaitable[str]]


class RudeClients:
    """One kind a method. Each does its thing once, and returns what it saw."""

    def __init__(self, address: str, http_url: str, model: ModelStatus, stub: Any) -> None:
        """Talk to a server; without http_url over gRPC alone."""
        self._address = address
        self._http_url = http_url
        self._model = model
        self._stub = stub
        self.seen: Counter[str] = Counter()

    @property
    def kinds(self) -> dict[str, Client]:
        """The kinds of clients by name."""
        grpc_kinds: dict[str, Client] = {
            "reads to the end": self.read,
            "calls once": self.call_once,
            "cancels": self.cancel,
            "runs out of time": self.run_out_of_time,
            "is killed": self.be_killed,
        }
        http_kinds: dict[str, Client] = {
            "HTTP, reads to the end": self.http_read,
            "HTTP, closes": self.http_close,
            "HTTP, resets": self.http_reset,
            "HTTP, stops reading": self.http_stop_reading,
        }
        return {**grpc_kinds, **(http_kinds if self._http_url else {})}

    async def run(self, kind: str, rng: random.Random) -> None:
        """Have a client of a kind do its thing, and note what it saw."""
        try:
            seen = await self.kinds[kind](rng)
        except grpc.aio.AioRpcError as error:
            seen = error.code().name
        except OSError as error:
            seen = type(error).__name__
        self.seen[f"{kind}: {seen}"] += 1

    async def read(self, rng: random.Random) -> str:
        """Read a stream to its end."""
        got = 0
        async for message in self._stub.Generate(self._request(rng, NUM_NEW)):
            got += len(message.token_ids)
        return "all" if got == NUM_NEW else f"{got} of {NUM_NEW} tokens"

    async def call_once(self, rng: random.Random) -> str:
        """Wait for a whole answer."""
        answer = await self._stub.GenerateOnce(self._request(rng, NUM_NEW))
        return "all" if len(answer.outputs[0].token_ids) == NUM_NEW else "not all"

    async def cancel(self, rng: random.Random) -> str:
        """Cancel a stream after some of its tokens, at times before the first."""
        call = self._stub.Generate(self._request(rng, MANY_NEW))
        for _ in range(rng.randrange(6)):
            await call.read()
        call.cancel()
        return "cancelled"

    async def run_out_of_time(self, rng: random.Random) -> str:
        """Give a deadline that is too near."""
        async for _ in self._stub.Generate(self._request(rng, MANY_NEW), timeout=rng.uniform(0.01, 0.5)):
            pass
        return "all"

    async def be_killed(self, _rng: random.Random) -> str:
        """Have a process open streams, and kill it."""
        command = [sys.executable, "-m", "benchmarks.rude_clients", self._address, self._http_url]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        said = (await process.stdout.readline()).decode().strip()
        if process.returncode is None:
            process.kill()
        await process.wait()
        return "killed" if said == READY else f"ended by itself: {said}"

    async def http_read(self, rng: random.Random) -> str:
        """Read a stream of events to its end."""
        reader, writer = await self._http(rng, NUM_NEW)
        answer = (await reader.read()).decode()
        writer.close()
        return "all" if "data: [DONE]" in answer else answer.partition("\r\n")[0]

    async def http_close(self, rng: random.Random) -> str:
        """Close the connection in the middle."""
        reader, writer = await self._http(rng, MANY_NEW)
        await reader.read(500)
        writer.close()
        return "closed"

    async def http_reset(self, rng: random.Random) -> str:
        """Reset the connection in the middle: to linger for no time is to send RST."""
        reader, writer = await self._http(rng, MANY_NEW)
        await reader.read(500)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        return "reset"

    async def http_stop_reading(self, rng: random.Random) -> str:
        """Read nothing for a while, then go."""
        _, writer = await self._http(rng, MANY_NEW)
        writer.transport.pause_reading()  # type: ignore[attr-defined]  # of the transports that asyncio makes
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        writer.close()
        return "gone"

    async def _http(self, rng: random.Random, num_new: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        fields = {"model": self._model.name, "prompt": self._prompt(rng), "max_tokens": num_new}
        return await send_http(self._http_url, {**fields, "ignore_eos": True, "stream": True})

    def _request(self, rng: random.Random, num_new: int) -> GenerateRequest:
        return GenerateRequest(token_ids=TokenIds(ids=self._prompt(rng)), max_tokens=num_new, ignore_eos=True)

    def _prompt(self, rng: random.Random) -> list[int]:
        return [rng.randrange(self._model.vocab_size) for _ in range(NUM_PROMPT)]


async def send_http(url: str, fields: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Post a completion on a connection of its own, which the server closes after the answer."""
    place, body = urlsplit(url), json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {place.netloc}\r\nconnection: close\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def open_and_wait(address: str, http_url: str) -> None:
    """Open streams, say so, and wait for the end."""
    async with grpc.aio.insecure_channel(address) as channel:
        status = await AdminStub(channel).GetStatus(GetStatusRequest(), timeout=60)
        clients, rng = RudeClients(address, http_url, status.model, InferenceStub(channel)), random.Random()
        calls = [clients._stub.Generate(clients._request(rng, MANY_NEW)) for _ in range(KILLED_STREAMS)]
        for call in calls:
            with contextlib.suppress(grpc.aio.AioRpcError):  # refused, as others may be
                await call.read()
        if http_url:
            reader, _writer = await clients._http(rng, MANY_NEW)
            await reader.read(100)
        print(READY, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(open_and_wait(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
