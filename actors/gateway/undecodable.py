"""A message that is no request of its method is the client's fault: INVALID_ARGUMENT, and no traceback in the log."""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from expertmesh.actors.gateway.status_codes import Context


@dataclass(frozen=True)
class Undecodable:
    """In place of a request: why there is none."""

    message: str


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
    for name in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        behavior = getattr(handler, name)
        if behavior is not None:
            guard = _guarded_generator if inspect.isasyncgenfunction(behavior) else _guarded_coroutine
            # Of a stream of requests each is read inside the method, where the error is caught; a sole one before.
            decode = handler.request_deserializer if handler.request_streaming else _lenient(handler)
            return handler._replace(**{name: guard(behavior), "request_deserializer": decode})
    raise AssertionError(f"{handler} has no method")


def _lenient(handler: Any) -> Callable[[bytes], Any]:
    def decode(data: bytes) -> Any:
        try:
            return handler.request_deserializer(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return decode


def _guarded_coroutine(behavior: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: Context) -> Any:
        if isinstance(request, Undecodable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.message)
        try:
            return await behavior(request, context)
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    return call


def _guarded_generator(behavior: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, Undecodable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.message)
        try:
            async for response in behavior(request, context):
                yield response
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    return call
