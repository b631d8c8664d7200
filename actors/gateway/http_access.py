"""Which HTTP paths need which role, and the middleware that holds them to it and tells callers of their limits."""

import math
from collections.abc import Iterator

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.callers import CALLER, Caller
from expertmesh.actors.gateway.openai_errors import HttpError
from expertmesh.cluster.api_keys import Role
from expertmesh.cluster.errors import ForbiddenError, UnauthenticatedError
from expertmesh.cluster.rate_limits import RateLimiter

# By path or, after that, by its first part with both slashes; None: open to everybody. What is not here needs admin.
NEEDED_ROLES: dict[str, Role | None] = {
    "/": None,  # the live page; what it shows is under /live/
    "/page/": None,  # its files
    "/health": None,
    "/ready": None,
    "/docs": None,
    "/docs/oauth2-redirect": None,
    "/redoc": None,
    "/openapi.json": None,
    "/v1/": Role.INFERENCE,
    "/live/": Role.ADMIN,
}


def needed_role(path: str) -> Role | None:
    """Return the role that a path needs; None: open to everybody."""
    return NEEDED_ROLES.get(path, NEEDED_ROLES.get(path[: path.find("/", 1) + 1], Role.ADMIN))


class HttpAccess:
    """ASGI middleware: lets a request in before its body is read, or answers 401 or 403 with OpenAI's error body."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        """Stand before `app` and ask `access`."""
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Go on as the caller, or refuse."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket: there are none
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        try:
            caller = self._access.admit(
                needed_role(scope["path"]), headers.get("authorization"), named_host=_host_name(headers.get("host"))
            )
        except (UnauthenticatedError, ForbiddenError) as error:
            failure = to_http_error(error)
            await JSONResponse(failure.body, failure.status, failure.headers)(scope, receive, send)
            return
        CALLER.set(caller)
        await self._app(scope, receive, _with_limits(send, caller))


def to_http_error(error: UnauthenticatedError | ForbiddenError) -> HttpError:
    """Return the answer for a caller that was not let in."""
    if isinstance(error, UnauthenticatedError):
        return HttpError(401, str(error), code="invalid_api_key")
    return HttpError(403, str(error), code="insufficient_permissions")


def _host_name(header: str | None) -> str | None:
    """Return the host of a Host header, without port and without the brackets of an IPv6 address."""
    if header is None:
        return None
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _with_limits(send: Send, caller: Caller) -> Send:
    """Return a `send` that adds OpenAI's headers of limits to the answer, where the caller has limits."""
    limits = caller.limiter.limits
    if limits.requests_per_minute is None and limits.tokens_per_minute is None:
        return send

    async def send_with_limits(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(dict(limit_headers(caller.limiter, caller.clock())))
        await send(message)

    return send_with_limits


def limit_headers(limiter: RateLimiter, now_s: float) -> Iterator[tuple[str, str]]:
    """Yield x-ratelimit-limit-*, -remaining-* and -reset-* (seconds until all may be used), as OpenAI names them."""
    for what, bucket in (("requests", limiter.requests), ("tokens", limiter.tokens)):
        if bucket is not None:
            yield f"x-ratelimit-limit-{what}", f"{bucket.capacity:.0f}"
            yield f"x-ratelimit-remaining-{what}", str(max(0, math.floor(bucket.level(now_s))))
            yield f"x-ratelimit-reset-{what}", f"{bucket.wait_s(bucket.capacity, now_s):.3f}s"
