"""A client without room is told when to come back, over gRPC and HTTP alike."""

import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from expertmesh.actors.gateway.openai_errors import to_http_error
from expertmesh.actors.gateway.status_codes import DETAILS_KEY, status_of
from expertmesh.cluster.errors import CapacityError, RateLimitError


def told(error: CapacityError) -> tuple[str, int]:
    """Return the delay of the trailer and of the details, in milliseconds."""
    code, trailers = status_of(error)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = dict(trailers)
    retry = error_details_pb2.RetryInfo()
    packed = found[DETAILS_KEY]
    assert isinstance(packed, bytes)
    (detail,) = status_pb2.Status.FromString(packed).details
    assert detail.Unpack(retry)
    return str(found["grpc-retry-pushback-ms"]), retry.retry_delay.ToMilliseconds()


@pytest.mark.parametrize(
    ("retry_after_s", "delay_ms", "header"), [(None, 1000, "1"), (0.25, 250, "1"), (12.0001, 12001, "13")]
)
def test_the_delay_is_what_the_error_says(retry_after_s: float | None, delay_ms: int, header: str) -> None:
    error = RateLimitError("too many", retry_after_s=retry_after_s)
    assert told(error) == (str(delay_ms), delay_ms)
    assert to_http_error(error, "r").headers == {"retry-after": header}


def test_a_limit_of_a_key_is_told_from_a_full_server() -> None:
    codes = [to_http_error(error, "r").fields.code for error in (RateLimitError("a"), CapacityError("b"))]
    assert codes == ["rate_limit_exceeded", "overloaded"]


def test_the_delay_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(RateLimitError("full", retry_after_s=2.5)))  # noqa: S301 - our own bytes
    assert (str(error), error.retry_after_s) == ("full", 2.5)
