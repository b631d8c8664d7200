"""Errors as Kubernetes answers them: objects of kind Status, with its codes and reasons."""

from dataclasses import dataclass, field
from typing import Any

Manifest = dict[str, Any]
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}


@dataclass
class ApiError(Exception):
    """A refused request. The reason is the code's usual one unless another is given."""

    code: int
    message: str
    reason: str = ""
    details: Manifest = field(default_factory=dict)

    def body(self) -> Manifest:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason or REASONS[self.code],
            "details": self.details,
            "code": self.code,
        }


def qualified(plural: str, group: str) -> str:
    """Return a resource as messages name it."""
    return f"{plural}.{group}" if group else plural


def not_found(plural: str, group: str, name: str) -> ApiError:
    details = {"name": name, "group": group, "kind": plural}
    return ApiError(404, f'{qualified(plural, group)} "{name}" not found', details=details)


def already_exists(plural: str, group: str, name: str) -> ApiError:
    details = {"name": name, "group": group, "kind": plural}
    return ApiError(409, f'{qualified(plural, group)} "{name}" already exists', "AlreadyExists", details)


def conflict(plural: str, group: str, name: str) -> ApiError:
    told = f'Operation cannot be fulfilled on {qualified(plural, group)} "{name}"'
    told += ": the object has been modified; please apply your changes to the latest version and try again"
    return ApiError(409, told, details={"name": name, "group": group, "kind": plural})


def invalid(kind: str, group: str, name: str, causes: list[tuple[str, str]]) -> ApiError:
    """Refuse an object; causes are fields and what is wrong with each."""
    told = ", ".join(f"{place}: {what}" for place, what in causes)
    listed = [{"reason": "FieldValueInvalid", "message": what, "field": place} for place, what in causes]
    details = {"name": name, "group": group, "kind": kind, "causes": listed}
    return ApiError(422, f'{qualified(kind, group)} "{name}" is invalid: {told}', details=details)


def quota_exceeded(plural: str, name: str, quota: str, told: str) -> ApiError:
    details = {"name": name, "kind": plural}
    return ApiError(403, f'{plural} "{name}" is forbidden: exceeded quota: {quota}, {told}', details=details)
