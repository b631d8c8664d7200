"""The client for asyncio; see sync.py."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from expertmesh.client.requests import (
    DEFAULT_RETRIES,
    DEFAULT_TIMEOUT_S,
    Options,
    Received,
    generate_request,
    pause_s,
)
from expertmesh.v1.admin_pb2 import GetStatusRequest, StatusResponse
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import (
    CancelRequest,
    DetokenizeRequest,
    GenerateOnceResponse,
    GenerateResponse,
    TokenizeRequest,
)
from expertmesh.v1.inference_pb2_grpc import InferenceStub

CANCEL_TIMEOUT_S = 2.0


class AsyncClient:
    """Calls one server. Make and use it inside one event loop; close it, or use it as an asynchronous context manager.

    All calls raise grpc.RpcError when the server refuses them, stays away for longer than the retries last, or the
    deadline passes.
    """

    def __init__(self, address: str, *, timeout_s: float = DEFAULT_TIMEOUT_S, retries: int = DEFAULT_RETRIES) -> None:
        """Connect at the first call.

        Args:
            address: host:port of the server.
            timeout_s: longest time of a call, its retries counted.
            retries: how often in a row a call is tried again when the server is away or has no room.
        """
        self._timeout_s = timeout_s
        self._retries = retries
        self._channel = grpc.aio.insecure_channel(address)
        self._inference: Any = InferenceStub(self._channel)
        self._admin: Any = AdminStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    async def generate(
        self, prompt: str | Sequence[int], **options: Unpack[Options]
    ) -> AsyncGenerator[GenerateResponse, None]:
        """Yield the messages of a stream as they come. A broken one is resumed: no token is missing, none comes twice.

        Close the generator to end the request before its time.
        """
        request = generate_request(prompt, options)
        received, deadline_s, num_failures = Received(request), time.monotonic() + self._timeout_s, 0
        try:
            while not received.is_over:
                left_s = max(0.0, deadline_s - time.monotonic())
                if received.is_empty:
                    call = self._inference.Generate(request, timeout=left_s)
                else:
                    call = self._inference.Resume(received.rest(), timeout=left_s)
                try:
                    async for message in call:
                        received.add(message)
                        num_failures = 0
                        yield message
                except grpc.RpcError as error:
                    num_failures += 1
                    await self._pause(error, num_failures, deadline_s)
        except (GeneratorExit, asyncio.CancelledError):
            # A server that does not hear of it ends the request itself, a while after its reader left.
            with suppress(grpc.RpcError):
                await self._inference.Cancel(CancelRequest(request_id=request.request_id), timeout=CANCEL_TIMEOUT_S)
            raise

    async def generate_once(self, prompt: str | Sequence[int], **options: Unpack[Options]) -> GenerateOnceResponse:
        """Return all samples when they have ended. A request that is sent again is not generated twice."""
        request = generate_request(prompt, options)
        answer: GenerateOnceResponse = await self._retried(self._inference.GenerateOnce, request)
        return answer

    async def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list((await self._retried(self._inference.Tokenize, TokenizeRequest(text=text))).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str((await self._retried(self._inference.Detokenize, DetokenizeRequest(token_ids=token_ids))).text)

    async def status(self) -> StatusResponse:
        """Return what runs where."""
        answer: StatusResponse = await self._retried(self._admin.GetStatus, GetStatusRequest())
        return answer

    async def _retried(self, call: Callable[..., Any], request: Any) -> Any:
        deadline_s, num_failures = time.monotonic() + self._timeout_s, 0
        while True:
            try:
                return await call(request, timeout=max(0.0, deadline_s - time.monotonic()))
            except grpc.RpcError as error:
                num_failures += 1
                await self._pause(error, num_failures, deadline_s)

    async def _pause(self, error: grpc.RpcError, num_failures: int, deadline_s: float) -> None:
        """Wait until the next attempt; raise the error if there is to be none."""
        seconds = pause_s(error, num_failures, self._retries)
        if seconds is None or time.monotonic() + seconds >= deadline_s:
            raise error
        await asyncio.sleep(seconds)
