"""Which call comes next for a request of which so much was received, and after what pause?"""

import uuid
from collections.abc import Sequence
from typing import Any, TypedDict

import grpc
from google.rpc import error_details_pb2, status_pb2

from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse, ResumeRequest, TokenIds

# Pauses grow from the first to the longest, doubling; 8 of them make some 8 s.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0


class Options(TypedDict, total=False):
    """The fields of GenerateRequest beside the prompt; see there."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    n: int
    request_id: str
    idempotency_key: str


def generate_request(prompt: str | Sequence[int], options: Options) -> GenerateRequest:
    """Return the request for a text or for token ids, with an id and a key of its own where none is given.

    Raises:
        ValueError, TypeError: an option is unknown or outside what a request can hold.
    """
    request = GenerateRequest(**options)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.CopyFrom(TokenIds(ids=prompt))
    if not request.HasField("request_id"):
        request.request_id = uuid.uuid4().hex
    if not request.HasField("idempotency_key"):
        request.idempotency_key = uuid.uuid4().hex
    return request


class Received:
    """What has come of a request."""

    def __init__(self, request: GenerateRequest) -> None:
        """Begin with nothing."""
        self._request_id = request.request_id
        self._num_tokens = [0] * (request.n if request.HasField("n") else 1)
        self._ended: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether the last message of each sample has come."""
        return len(self._ended) == len(self._num_tokens)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come: then the request itself is to be sent again, under its key."""
        return not any(self._num_tokens) and not self._ended

    def add(self, message: GenerateResponse) -> None:
        """Take in a message."""
        self._num_tokens[message.index] += len(message.token_ids)
        if message.finish_reason:
            self._ended.add(message.index)

    def rest(self) -> ResumeRequest:
        """Ask for what has not come."""
        return ResumeRequest(
            request_id=self._request_id, tokens_received=self._num_tokens, samples_ended=sorted(self._ended)
        )


def pause_s(error: grpc.RpcError, num_failures: int, retries: int) -> float | None:
    """Return the seconds to wait before the call is tried again; None: it is of no use.

    A server without room says itself how long (google.rpc.RetryInfo). One that is away is tried again, as is a broken
    connection.

    Args:
        error: of the call; an `RpcError` of grpc or of grpc.aio.
        num_failures: calls that failed on end, this one counted.
        retries: most of them after which one more is made.
    """
    if num_failures > retries:
        return None
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return float(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (num_failures - 1)))
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _retry_delay_s(error)
    return None


def _retry_delay_s(error: grpc.RpcError) -> float | None:
    trailers: Any = error.trailing_metadata() or ()
    packed = dict(trailers).get("grpc-status-details-bin")
    for detail in status_pb2.Status.FromString(packed).details if packed else ():
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return float(info.retry_delay.ToMilliseconds() / 1000)
    return None
