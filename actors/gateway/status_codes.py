"""Which gRPC status, with which details, does a client get for an error?"""

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import (
    CapacityError,
    ConflictError,
    ExpertMeshError,
    ForbiddenError,
    InputError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)

_log = EventLog(__name__)

# Where an error does not say when to try again.
RETRY_AFTER_S = 1.0
# Where gRPC puts google.rpc.Status, https://github.com/grpc/grpc/blob/master/doc/statuscodes.md and grpcio-status.
DETAILS_KEY = "grpc-status-details-bin"

Context = grpc.aio.ServicerContext[Any, Any]

# What is the client's to handle; all else is a fault of the server.
_TOLD = (
    InputError,
    CapacityError,
    ConflictError,
    NotFoundError,
    UnauthenticatedError,
    ForbiddenError,
    UnavailableError,
)


@asynccontextmanager
async def errors_to_status(context: Context, call: str) -> AsyncIterator[None]:
    """Abort the call with the status code of the error raised inside, with details as google.rpc messages.

    InputError is INVALID_ARGUMENT with a BadRequest that names the field, CapacityError RESOURCE_EXHAUSTED with
    RetryInfo, ConflictError FAILED_PRECONDITION, NotFoundError NOT_FOUND, UnavailableError UNAVAILABLE.
    All else is INTERNAL: the client is told `call` (a request id, say) to look for, the log has the traceback.
    """
    try:
        yield
    except _TOLD as error:
        code, trailers = status_of(error)
        await context.abort(code, str(error), trailers)
    except Exception as error:  # noqa: BLE001 - message_of logs it
        await context.abort(grpc.StatusCode.INTERNAL, message_of(error, call))


def message_of(error: Exception, call: str) -> str:
    """Return what a client is told of an error. Of a fault it is `call` to look for; the log has the traceback."""
    if isinstance(error, _TOLD):
        return str(error)
    _log.tell("request_failed", error, request_id=call)
    return f"internal error; look for {call} in the gateway's log"


def status_of(error: ExpertMeshError) -> tuple[grpc.StatusCode, tuple[tuple[str, str | bytes], ...]]:
    """Return the status code of an error that is the client's to handle, and the trailers that go with it."""
    if isinstance(error, InputError):
        if not error.field:
            return grpc.StatusCode.INVALID_ARGUMENT, ()
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=str(error))
        detail = error_details_pb2.BadRequest(field_violations=[violation])
        return grpc.StatusCode.INVALID_ARGUMENT, (_details(grpc.StatusCode.INVALID_ARGUMENT, error, detail),)
    if isinstance(error, CapacityError):
        retry = error_details_pb2.RetryInfo()
        delay_ms = math.ceil(1000 * (RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s))
        retry.retry_delay.FromMilliseconds(delay_ms)
        details = _details(grpc.StatusCode.RESOURCE_EXHAUSTED, error, retry)
        return grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", str(delay_ms)), details)
    if isinstance(error, ConflictError):
        return grpc.StatusCode.FAILED_PRECONDITION, ()
    if isinstance(error, NotFoundError):
        return grpc.StatusCode.NOT_FOUND, ()
    if isinstance(error, UnauthenticatedError):
        return grpc.StatusCode.UNAUTHENTICATED, ()
    if isinstance(error, ForbiddenError):
        return grpc.StatusCode.PERMISSION_DENIED, ()
    assert isinstance(error, UnavailableError), error
    return grpc.StatusCode.UNAVAILABLE, ()


def _details(code: grpc.StatusCode, error: ExpertMeshError, detail: Message) -> tuple[str, bytes]:
    packed = AnyMessage()
    packed.Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=str(error), details=[packed])
    return DETAILS_KEY, status.SerializeToString()
