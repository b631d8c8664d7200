"""Which call comes next for a request of which so much was received, and after what pause?"""

import secrets
import uuid
from collections.abc import Sequence
from typing import Any, TypedDict

import grpc
from google.rpc import error_details_pb2, status_pb2

from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse, ReceivedSample, ResumeRequest, TokenIds

# Pauses grow from the first to the longest, doubling; 16 of them make some 25 s, in which a gateway that died is there again.
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
SEED_BITS = 63


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
    """Return the request for a text or for token ids, with what it needs to go on at another gateway.

    It gets an id and a key of its own where none is given, and a seed if it samples: tokens drawn elsewhere then are
    those that would have come.

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
    if request.temperature > 0 and not request.HasField("seed"):
        request.seed = secrets.randbits(SEED_BITS)
    return request


class Received:
    """What has come of a request: all its token ids, for a gateway that does not know it."""

    def __init__(self, request: GenerateRequest) -> None:
        """Begin with nothing."""
        self._request = request
        self._samples = [ReceivedSample() for _ in range(max(1, request.n))]
        self._was_sent = False
        # One gateway has the request, and all that came is from there.
        self._has_one_keeper = False

    @property
    def is_over(self) -> bool:
        """Whether the last message of each sample has come."""
        return all(sample.has_ended for sample in self._samples)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has come."""
        return not any(sample.has_ended or sample.token_ids for sample in self._samples)

    def add(self, message: GenerateResponse) -> None:
        """Take in a message."""
        sample = self._samples[message.index]
        sample.token_ids.extend(message.token_ids)
        sample.has_ended = sample.has_ended or bool(message.finish_reason)

    def next_call(self) -> GenerateRequest | ResumeRequest:
        """Return what is to be asked for next.

        The gateway that has the stream is told how much came of it. It may be gone, and nobody knows which gateway is
        asked next: when one does not know the request, or may have it from an attempt of which nothing came, the
        request is sent again with what was received elsewhere, from then on each time.
        """
        if self._has_one_keeper and not self.is_empty:
            return ResumeRequest(
                request_id=self._request.request_id,
                tokens_received=[len(sample.token_ids) for sample in self._samples],
                samples_ended=[index for index, sample in enumerate(self._samples) if sample.has_ended],
            )
        self._has_one_keeper = not self._was_sent
        self._was_sent = True
        request = GenerateRequest()
        request.CopyFrom(self._request)
        if not self.is_empty:
            request.received.extend(self._samples)
        return request

    def is_unknown(self, error: grpc.RpcError) -> bool:
        """Take in how a call failed; return whether the gateway did not know the request, and is to be sent it."""
        if not self._has_one_keeper or error.code() is not grpc.StatusCode.NOT_FOUND:
            return False
        self._has_one_keeper = False
        return True


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
