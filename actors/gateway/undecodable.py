"""A message that is no request of its method is the client's fault: INVALID_ARGUMENT, and no traceback in the log."""

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from expertmesh.actors.gateway.status_codes import Context


@dataclass(frozen=True)
class Undecodable:
    """In place of a request: why there is none."""

    problem: str


class Requests:
    """A stream of requests, which ends before the first that is none; then `problem` says why."""

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        """Read from gRPC's own stream."""
        self._requests = requests
        self.problem = ""

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            async for request in self._requests:
                yield request
        except DecodeError as error:
            self.problem = str(error)


class RefuseUndecodable(grpc.aio.ServerInterceptor):
    """Stands before all methods. Without it gRPC answers UNKNOWN, and logs an exception for each such message."""

    def __init__(self) -> None:
        """Know no method yet."""
        self._guarded: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """Return the method's handler, guarded."""
        method = handler_call_details.method
        if method not in self._guarded:
            handler = await continuation(handler_call_details)
            if handler is None:  # there is no such method; names that a client makes up are not kept
                return None
            self._guarded[method] = _guarded(handler)
        return self._guarded[method]


def _guarded(handler: Any) -> Any:
    kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
    kind, behavior = next((kind, own) for kind in kinds if (own := getattr(handler, kind)) is not None)
    guard = _guarded_generator if inspect.isasyncgenfunction(behavior) else _guarded_coroutine
    if handler.request_streaming:
        return handler._replace(**{kind: guard(behavior, Requests)})
    return handler._replace(
        **{kind: guard(behavior, lambda request: request), "request_deserializer": _lenient(handler)}
    )


def _lenient(handler: Any) -> Callable[[bytes], Any]:
    decode = handler.request_deserializer

    def decode_or_say_why(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return decode_or_say_why


def _guarded_coroutine(
    behavior: Callable[..., Awaitable[Any]], read: Callable[[Any], Any]
) -> Callable[..., Awaitable[Any]]:
    async def call(asked: Any, context: Context) -> Any:
        asked = read(asked)
        await _refuse(asked, context)
        response = await behavior(asked, context)
        await _refuse(asked, context)
        return response

    return call


def _guarded_generator(
    behavior: Callable[..., AsyncIterator[Any]], read: Callable[[Any], Any]
) -> Callable[..., AsyncIterator[Any]]:
    async def call(asked: Any, context: Context) -> AsyncIterator[Any]:
        asked = read(asked)
        await _refuse(asked, context)
        async for response in behavior(asked, context):
            yield response
        await _refuse(asked, context)

    return call


async def _refuse(asked: Any, context: Context) -> None:
    """End the call if what was asked could not be read, or not to its end."""
    if isinstance(asked, Undecodable | Requests) and asked.problem:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, asked.problem)
