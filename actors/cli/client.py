"""What the client commands share: the way to a server, its errors, and messages as plain values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import grpc
import typer
from google.protobuf.message import Message

from expertmesh.actors.cli.server_options import Server
from expertmesh.client import Client, ConnectionOptions
from expertmesh.client.connection import Metadata, key_metadata
from expertmesh.cluster.errors import CapacityError, ConflictError, ExpertMeshError, InputError, UnavailableError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@contextmanager
def open_channel(server: Server) -> Iterator[grpc.Channel]:
    """Connect for the length of a block; gRPC errors raised inside become ours.

    Raises:
        InputError: the address or a file is of no use, the key is not to be sent there, or the server refused the
            request as wrong.
        CapacityError: the server has no room now.
        UnavailableError: the server cannot be reached, is not ready, or did not answer in time.
        ExpertMeshError: any other failure of the call.
    """
    with errors_of(server):
        options = server.connection_options()
        metadata, credentials, url = key_metadata(server.url, options), options["credentials"], server.url
        with grpc.insecure_channel(url) if credentials is None else grpc.secure_channel(url, credentials) as channel:
            yield grpc.intercept_channel(channel, _KeySender(metadata)) if metadata else channel


@contextmanager
def open_client(server: Server, *, timeout_s: float, retries: int) -> Iterator[Client]:
    """Have a client of the server for the length of a block, with the errors of open_channel."""
    with errors_of(server):
        options: ConnectionOptions = {**server.connection_options(), "timeout_s": timeout_s, "retries": retries}
        with Client(server.url, **options) as client:
            yield client


@contextmanager
def errors_of(server: Server) -> Iterator[None]:
    """Let errors of gRPC become ours; see open_channel."""
    try:
        yield
    except grpc.RpcError as error:
        raise _as_our_error(server, error) from error


class _KeySender(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Sends the key with each call of a channel."""

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._with_key(client_call_details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), *self._metadata))


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


def _as_our_error(server: Server, error: grpc.RpcError) -> ExpertMeshError:
    url, code, details = server.url, error.code(), error.details() or "no details"
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return InputError(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return CapacityError(f"{url} has no room: {details}")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return ConflictError(details)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(f"{url} did not finish in time; --timeout-s sets how long to wait")
    if code is grpc.StatusCode.UNAVAILABLE:
        # What a server with TLS does to plaintext.
        hint = "; --tls-ca is for a server with TLS" if server.tls_ca is None and "Socket closed" in details else ""
        return UnavailableError(f"no answer from {url}: {details}{hint}")
    return ExpertMeshError(f"{url} answered {code.name}: {details}")
