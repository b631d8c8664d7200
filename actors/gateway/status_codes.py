"""Which gRPC status, with which details, does a client get for an error?"""

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
    InputError,
    NotFoundError,
    UnavailableError,
)

_log = EventLog(__name__)

RETRY_DELAY_MS = 1000
# Where gRPC puts google.rpc.Status, https://github.com/grpc/grpc/blob/master/doc/statuscodes.md and grpcio-status.
DETAILS_KEY = "grpc-status-details-bin"

Context = grpc.aio.ServicerContext[Any, Any]


@asynccontextmanager
async def errors_to_status(context: Context, call: str) -> AsyncIterator[None]:
    """Abort the call with the status code of the error raised inside, with details as google.rpc messages.

    InputError is INVALID_ARGUMENT with a BadRequest that names the field, CapacityError RESOURCE_EXHAUSTED with
    RetryInfo, ConflictError FAILED_PRECONDITION, NotFoundError NOT_FOUND, UnavailableError UNAVAILABLE.
    All else is INTERNAL: the client is told `call` (a request id, say) to look for, the log has the traceback.
    """
    try:
        yield
    except (InputError, CapacityError, ConflictError, NotFoundError, UnavailableError) as error:
        code, trailers = status_of(error)
        await context.abort(code, str(error), trailers)
    except Exception as error:  # noqa: BLE001 - it is logged, and the client is told where
        _log.tell("request_failed", error, request_id=call)
        await context.abort(grpc.StatusCode.INTERNAL, f"internal error; look for {call} in the gateway's log")


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
        retry.retry_delay.FromMilliseconds(RETRY_DELAY_MS)
        details = _details(grpc.StatusCode.RESOURCE_EXHAUSTED, error, retry)
        return grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", str(RETRY_DELAY_MS)), details)
    if isinstance(error, ConflictError):
        return grpc.StatusCode.FAILED_PRECONDITION, ()
    if isinstance(error, NotFoundError):
        return grpc.StatusCode.NOT_FOUND, ()
    assert isinstance(error, UnavailableError), error
    return grpc.StatusCode.UNAVAILABLE, ()


def _details(code: grpc.StatusCode, error: ExpertMeshError, detail: Message) -> tuple[str, bytes]:
    packed = AnyMessage()
    packed.Pack(detail)
    status = status_pb2.Status(code=code.value[0], message=str(error), details=[packed])
    return DETAILS_KEY, status.SerializeToString()
