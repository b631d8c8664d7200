"""What an HTTP request is refused for before its body is read: its size, and a server that is full."""

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.openai_errors import HttpError, to_http_error
from expertmesh.actors.gateway.request_log import refusals_told, tell_refusal
from expertmesh.cluster.errors import CapacityError

GENERATING_PATHS = ("/v1/completions", "/v1/chat/completions")


class HttpIntake:
    """ASGI middleware. Refuses requests to the paths that generate, and counts these refusals."""

    def __init__(self, app: ASGIApp, *, engine: Engine, max_body_bytes: int) -> None:
        """Pass on to `app` what there is room for.

        Args:
            app: reads and answers.
            engine: says whether there is room.
            max_body_bytes: largest body that is read.
        """
        self._app = app
        self._engine = engine
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in GENERATING_PATHS:
            await self._app(scope, receive, send)
            return
        try:
            with self._engine.meter.refusals(), refusals_told("-"):
                if _declared_bytes(scope) > self._max_body_bytes:
                    raise self._too_large()
                self._engine.require_room()
        except (HttpError, CapacityError) as error:
            await _answer(to_http_error(error, ""), scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, and count the bytes of its body as they come: its length may not have been declared."""
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
            # Whoever reads the body is told that there is no more to come, and what it says to that is not sent.
            return {"type": "http.disconnect"} if num_bytes > self._max_body_bytes else message

        async def unless_too_large(message: Message) -> None:
            if num_bytes <= self._max_body_bytes:
                await send(message)

        await self._app(scope, counting, unless_too_large)
        if num_bytes > self._max_body_bytes:
            error = self._too_large()
            self._engine.meter.refused(error)
            tell_refusal("-", error)
            await _answer(error, scope, receive, send)

    def _too_large(self) -> HttpError:
        message = f"the body is larger than the {self._max_body_bytes} bytes allowed"
        return HttpError(413, message, code="request_too_large")


def _declared_bytes(scope: Scope) -> int:
    """Return the length that the client declares; 0 where it declares none, or no number: the server refuses that."""
    declared = dict(scope["headers"]).get(b"content-length", b"")
    return int(declared) if declared.isdigit() else 0


async def _answer(error: HttpError, scope: Scope, receive: Receive, send: Send) -> None:
    # What is not read of the body would have to be read before the connection can be used again.
    headers = {**error.headers, "connection": "close"}
    await JSONResponse(error.body, status_code=error.status, headers=headers)(scope, receive, send)
