"""What the client commands share: the way to a server, its errors, and messages as plain values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message

from expertmesh.cluster.errors import CapacityError, ConflictError, ExpertMeshError, InputError, UnavailableError

DEFAULT_URL = "localhost:50051"

UrlOption = Annotated[str, typer.Option("--url", metavar="HOST:PORT", help="Address of the server.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def open_channel(url: str) -> Iterator[grpc.Channel]:
    """Connect to host:port for the length of a block; gRPC errors raised inside become ours.

    Raises:
        InputError: `url` is not host:port, or the server refused the request as wrong.
        CapacityError: the server has no room now.
        UnavailableError: the server cannot be reached, is not ready, or did not answer in time.
        ExpertMeshError: any other failure of the call.
    """
    host, _, port = url.rpartition(":")
    if not host or not port.isdecimal() or "/" in url:
        raise InputError(f"--url {url!r} is not of the form host:port")
    try:
        with grpc.insecure_channel(url) as channel:
            yield channel
    except grpc.RpcError as error:
        raise _as_our_error(url, error) from error


def to_dict(message: Message) -> dict[str, Any]:
    """Return a message as plain values by field name, ready for JSON; what is optional and absent is None.

    protobuf's own JSON writes 64-bit numbers as strings and leaves zeros out.
    """
    return {field.name: _value(message, field) for field in message.DESCRIPTOR.fields}


def _value(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    is_message = field.message_type is not None
    if field.is_repeated:
        return [to_dict(item) if is_message else item for item in value]
    # A message that is not marked optional is always there, if empty.
    is_optional = field.containing_oneof is not None if is_message else field.has_presence
    if is_optional and not message.HasField(field.name):
        return None
    return to_dict(value) if is_message else value


def _as_our_error(url: str, error: grpc.RpcError) -> ExpertMeshError:
    code, details = error.code(), error.details() or "no details"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CapacityError(f"{url} has no room: {details}")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return ConflictError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"{url} did not finish in time; --timeout-s sets how long to wait")
    if code is grpc.StatusCode.UNAVAILABLE:
        return UnavailableError(f"no answer from {url}: {details}")
    return ExpertMeshError(f"{url} answered {code.name}: {details}")
