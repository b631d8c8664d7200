"""The live page over HTTP: its files, what is known as JSON, and what happens as server-sent events."""

from collections.abc import Mapping
from contextlib import aclosing
from importlib import resources

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from expertmesh.actors.gateway.live_feed import LiveFeed
from expertmesh.actors.gateway.openai_answer import unless_disconnected
from expertmesh.actors.gateway.openai_errors import HttpError, to_http_error
from expertmesh.cluster.errors import CapacityError, UnavailableError

# What the page may do: load its own files and talk to its own server. Source of the names: W3C, CSP Level 3.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_INDEX = "index.html"


def live_routes(feed: LiveFeed) -> APIRouter:
    """Return the page's paths: `/` and `/page/` are files, `/live/` is what they show."""
    router = APIRouter()
    # All of them are in memory: a path that is none of their names leads nowhere.
    files = _page_files()

    @router.get("/", include_in_schema=False)
    async def index() -> Response:
        return _file_response(_INDEX, files[_INDEX])

    @router.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files or name == _INDEX:
            raise HttpError(404, f"the live page has no file {name!r}", code="unknown_url")
        return _file_response(name, files[name])

    @router.get("/live/state")
    async def state() -> Response:
        """Say all that the live page shows, once; docs/live.md has the fields."""
        headers = {**HEADERS, "cache-control": "no-store"}
        return Response(await feed.state(), media_type="application/json", headers=headers)

    @router.get("/live/events")
    async def events() -> Response:
        """Say it as server-sent events: all of it first, then each second what is new."""
        return _EventStream(feed)

    return router


class _EventStream(Response):
    """The feed, as long as the viewer stays."""

    media_type = "text/event-stream"

    def __init__(self, feed: LiveFeed) -> None:
        # A proxy that gathers answers would hold events back.
        super().__init__(headers={**HEADERS, "cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await unless_disconnected(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._feed.watch()) as frames:
            try:
                frame = await anext(frames)
            except (CapacityError, UnavailableError) as error:
                failure = to_http_error(error, "live/events")
                response = JSONResponse(failure.body, status_code=failure.status, headers=failure.headers)
                await response(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": frame, "more_body": True})
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _page_files() -> Mapping[str, bytes]:
    folder = resources.files("expertmesh.actors.gateway") / "page"
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.is_file() and "." + entry.name.rpartition(".")[2] in _MEDIA_TYPES
    }


def _file_response(name: str, content: bytes) -> Response:
    media_type = _MEDIA_TYPES["." + name.rpartition(".")[2]]
    return Response(content, media_type=media_type, headers={**HEADERS, "cache-control": "no-cache"})
