"""How is a server called: over which channel, with which key, how often again?"""

import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any, TypedDict

import grpc

from expertmesh.client.requests import LONGEST_PAUSE_S, Received, pause_s
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import CancelRequest, GenerateRequest, ResumeRequest
from expertmesh.v1.inference_pb2_grpc import InferenceStub

DEFAULT_RETRIES = 16
DEFAULT_TIMEOUT_S = 600.0
CANCEL_TIMEOUT_S = 2.0
# A server that vanished without closing its connections is missed after this silence and this wait; servers allow pings
# each 10 s. Whoever waits for one that is away asks about as often as the retries do.
KEEPALIVE_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0

Metadata = tuple[tuple[str, str], ...]


class ConnectionOptions(TypedDict, total=False):
    """How both clients call a server.

    timeout_s: longest time of a call, its retries counted; 600.
    retries: how often in a row a call is tried again when the server is away or has no room; 16.
    credentials: of grpc.ssl_channel_credentials; None: plaintext.
    api_key: sent with each call as `authorization: Bearer KEY`; empty: none.
    api_key_in_clear: let the key go over plaintext to another machine, where whoever is between can read it.
    """

    timeout_s: float
    retries: int
    credentials: grpc.ChannelCredentials | None
    api_key: str
    api_key_in_clear: bool


def key_metadata(address: str, options: ConnectionOptions) -> Metadata:
    """Return what is sent with each call.

    Raises:
        ValueError: the key would go over plaintext to another machine, or holds what a header cannot. The message does
            not show it.
    """
    key = options.get("api_key", "")
    if not key:
        return ()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the API key has a space, or a character that is not printable ASCII")
    is_encrypted = options.get("credentials") is not None
    if not (is_encrypted or _is_local(address) or options.get("api_key_in_clear", False)):
        raise ValueError(f"the API key is not sent to {address} over plaintext, where others may read it; TLS hides it")
    return (("authorization", f"Bearer {key}"),)


def _is_local(address: str) -> bool:
    """Whether host:port is this machine; of names it is known of localhost alone."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or address.startswith("unix:")


class Attempts:
    """The time and the failures of one call. Each success begins a new row of failures."""

    def __init__(self, timeout_s: float, retries: int) -> None:
        """Begin now."""
        self._deadline_s = time.monotonic() + timeout_s
        self._retries = retries
        self._num_failures = 0

    @property
    def left_s(self) -> float:
        """Seconds until the call is given up."""
        return max(0.0, self._deadline_s - time.monotonic())

    def succeed(self) -> None:
        """Note that the server answered."""
        self._num_failures = 0

    def fail(self, error: grpc.RpcError) -> float:
        """Return the seconds to wait before the next attempt; raise the error if there is to be none."""
        self._num_failures += 1
        seconds = pause_s(error, self._num_failures, self._retries)
        if seconds is None or seconds >= self.left_s:
            raise error
        return seconds


def channel_options() -> list[tuple[str, int]]:
    """Name how a channel notices that its server is gone, as gRPC does: see its grpc_arg_keys."""
    return [
        ("grpc.keepalive_time_ms", round(KEEPALIVE_S * 1000)),
        ("grpc.keepalive_timeout_ms", round(KEEPALIVE_TIMEOUT_S * 1000)),
        ("grpc.max_reconnect_backoff_ms", round(LONGEST_PAUSE_S * 1000)),
    ]


class Connection:
    """What both clients have: a channel, and calls that carry the key. What a call returns is the channel's kind's."""

    def __init__(
        self,
        address: str,
        options: ConnectionOptions,
        plaintext: Callable[..., Any],
        encrypted: Callable[..., Any],
    ) -> None:
        """Connect at the first call, over one of these kinds of channel."""
        self._timeout_s = options.get("timeout_s", DEFAULT_TIMEOUT_S)
        self._retries = options.get("retries", DEFAULT_RETRIES)
        self._metadata = key_metadata(address, options)
        credentials = options.get("credentials")
        how = channel_options()
        self._channel = plaintext(address, how) if credentials is None else encrypted(address, credentials, how)
        self._inference: Any = InferenceStub(self._channel)
        self._admin: Any = AdminStub(self._channel)

    def _attempts(self) -> Attempts:
        return Attempts(self._timeout_s, self._retries)

    def _call(self, method: Callable[..., Any], message: Any, timeout_s: float) -> Any:
        return method(message, timeout=timeout_s, metadata=self._metadata)

    def _stream(self, received: Received, timeout_s: float) -> Any:
        """Ask for what has not come of a request."""
        message = received.next_call()
        is_known = isinstance(message, ResumeRequest)
        return self._call(self._inference.Resume if is_known else self._inference.Generate, message, timeout_s)

    def _cancel(self, request: GenerateRequest) -> Any:
        """End a request. A server that does not hear of it ends it itself, a while after its reader left."""
        return self._call(self._inference.Cancel, CancelRequest(request_id=request.request_id), CANCEL_TIMEOUT_S)
