"""Which HTTP status and which of OpenAI's error bodies does a client get for an error?"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from expertmesh.actors.logs import EventLog
from expertmesh.cluster.errors import (
    CapacityError,
    CorruptCheckpointError,
    InputError,
    RateLimitError,
    UnavailableError,
)

_log = EventLog(__name__)

# Where an error does not say when to try again.
RETRY_AFTER_S = 1.0
# Fields of a gRPC request that have another name in OpenAI's.
_PARAMS = {"text": "prompt", "token_ids": "prompt"}
_MAX_SHOWN = 4


class ErrorFields(BaseModel):
    """What went wrong; param names the field of the request."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorFields


class HttpError(Exception):
    """An answer other than success."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = RETRY_AFTER_S if retry_after_s is None else retry_after_s
        self.fields = ErrorFields(message=message, type=_type_of(status), param=param, code=code)

    @property
    def body(self) -> dict[str, object]:
        """The answer's JSON."""
        return {"error": self.fields.model_dump()}

    @property
    def headers(self) -> dict[str, str]:
        """When to try again, where that may help, and what else belongs to a status."""
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": str(math.ceil(self.retry_after_s))} if self.status in (429, 503) else {}


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def to_http_error(error: Exception, request_id: str) -> HttpError:
    """Return the answer for an error; of a defect the client is told the request id, the log has the traceback."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, InputError):
        return HttpError(400, str(error), param=_PARAMS.get(error.field, error.field) or None)
    if isinstance(error, CapacityError):
        code = "rate_limit_exceeded" if isinstance(error, RateLimitError) else "overloaded"
        return HttpError(429, str(error), code=code, retry_after_s=error.retry_after_s)
    if isinstance(error, UnavailableError):
        return HttpError(503, str(error), code="unavailable")
    if isinstance(error, CorruptCheckpointError):
        return HttpError(500, str(error))
    _log.tell("request_failed", error, request_id=request_id)
    return HttpError(500, f"internal error; look for {request_id} in the gateway's log")


def malformed(errors: Sequence[Mapping[str, Any]]) -> HttpError:
    """Return the answer for a body that is not as its schema says: the first field that is wrong, and all about it.

    Args:
        errors: of pydantic, as FastAPI passes them on: `loc` begins with "body".
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return HttpError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    path = [part for part in first["loc"] if part != "body"]
    if not path:
        return HttpError(400, f"the body must be a JSON object sent as application/json: {first['msg']}")
    name = str(path[0])
    if first["type"] == "extra_forbidden":
        param = ".".join(str(part) for part in path)
        return HttpError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if first["type"] == "missing" and len(path) == 1:
        return HttpError(400, f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    said = dict.fromkeys(str(error["msg"]) for error in errors if error["loc"][1:2] == first["loc"][1:2])
    return HttpError(
        400, f"Invalid value for '{name}': {'; or: '.join(list(said)[:_MAX_SHOWN])}.", param=name, code="invalid_value"
    )
