"""The HTTP front: OpenAI's paths, health and readiness, and the description of all of them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.http_access import HttpAccess
from expertmesh.actors.gateway.http_intake import HttpIntake
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.openai_answer import Answer
from expertmesh.actors.gateway.openai_errors import ErrorBody, HttpError, malformed, to_http_error
from expertmesh.actors.gateway.openai_logprobs import TokenNames
from expertmesh.actors.gateway.openai_requests import RequestReader
from expertmesh.actors.gateway.openai_responses import AnswerFormat, ChatFormat, CompletionFormat
from expertmesh.actors.gateway.openai_schema import ChatBody, CompletionBody, SamplingBody
from expertmesh.actors.gateway.request_log import refusals_told, tell_refusal
from expertmesh.actors.gateway.validation import ValidRequest
from expertmesh.actors.tracing import TraceHeaders
from expertmesh.cluster.settings import ServeSettings

# A longer body is read in a thread: meanwhile the streams of the others go on.
LONG_BODY_BYTES = 8192
DEFAULT_MAX_BODY_BYTES: int = ServeSettings.model_fields["max_body_bytes"].default

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


@dataclass(frozen=True, kw_only=True)
class OpenAIFront:
    """What the paths answer from.

    is_ready: what the gRPC health service says. now_s: Unix time. access: says who may call.
    """

    engine: Engine
    reader: RequestReader
    is_ready: Callable[[], bool]
    now_s: Callable[[], float]
    access: Access = field(default_factory=lambda: Access(KeyBook(), "localhost"))

    async def completion(self, body: CompletionBody, num_bytes: int, trace: TraceHeaders) -> Response:
        """Answer /v1/completions."""
        answer_id = self._new_id("cmpl")
        return await self._answer(
            body,
            answer_id,
            num_bytes,
            trace,
            read=lambda: self.reader.completion(body, answer_id),
            kind=CompletionFormat,
            with_logprobs=body.logprobs is not None,
        )

    async def chat(self, body: ChatBody, num_bytes: int, trace: TraceHeaders) -> Response:
        """Answer /v1/chat/completions."""
        answer_id = self._new_id("chatcmpl")
        return await self._answer(
            body,
            answer_id,
            num_bytes,
            trace,
            read=lambda: self.reader.chat(body, answer_id),
            kind=ChatFormat,
            with_logprobs=bool(body.logprobs),
        )

    def models(self) -> list[dict[str, object]]:
        """Return the models: the one that is served."""
        return [{"id": self.reader.model.name, "object": "model", "created": 0, "owned_by": "expertmesh"}]

    async def _answer(
        self,
        body: SamplingBody,
        answer_id: str,
        num_bytes: int,
        trace: TraceHeaders,
        *,
        read: Callable[[], list[ValidRequest]],
        kind: type[AnswerFormat],
        with_logprobs: bool,
    ) -> Response:
        try:
            with self.engine.meter.refusals(), refusals_told(answer_id):
                self._require_ready()
                requests = await asyncio.to_thread(read) if num_bytes > LONG_BODY_BYTES else read()
        except Exception as error:
            raise to_http_error(error, answer_id) from error
        operation = "chat" if kind is ChatFormat else "text_completion"
        requests = [replace(request, trace=trace, operation=operation) for request in requests]
        writer = kind(
            answer_id=answer_id,
            created_s=int(self.now_s()),
            model=self.reader.model.name,
            names=TokenNames(self.reader.tokenizer),
            with_logprobs=with_logprobs,
        )
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return Answer(self.engine, requests, writer, stream=bool(body.stream), include_usage=include_usage)

    def _require_ready(self) -> None:
        if not self.is_ready():
            raise HttpError(503, "not ready: an expert or every worker is away", code="not_ready")

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}-{self.reader.rng.getrandbits(128):032x}"


def build_app(front: OpenAIFront, max_body_bytes: int = DEFAULT_MAX_BODY_BYTES) -> FastAPI:
    """Return the ASGI app of a front; a longer body is refused."""
    app = FastAPI(title="ExpertMesh", description="OpenAI's completions and chats; docs/openai.md says what differs.")

    @app.post("/v1/completions", responses=_ERRORS)
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on after a prompt, or after several."""
        return await front.completion(body, len(await request.body()), _trace(request))

    @app.post("/v1/chat/completions", responses=_ERRORS)
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Write the next message of a chat."""
        return await front.chat(body, len(await request.body()), _trace(request))

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        """List the model that is served."""
        return {"object": "list", "data": front.models()}

    @app.get("/v1/models/{model:path}", responses=_ERRORS)
    async def model(model: str) -> dict[str, object]:
        """Describe a model."""
        for known in front.models():
            if known["id"] == model:
                return known
        raise HttpError(404, f"The model '{model}' does not exist", param="model", code="model_not_found")

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say that this process is alive."""
        return {"status": "ok"}

    @app.get("/ready", responses=_ERRORS)
    async def ready() -> dict[str, str]:
        """Say whether requests are served now, as the gRPC health service does."""
        if not front.is_ready():
            raise HttpError(503, "not ready: an expert or every worker is away", code="not_ready")
        return {"status": "ready"}

    async def on_malformed(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        refused = malformed(error.errors())
        front.engine.meter.refused(refused)
        tell_refusal("-", refused)
        return await _on_http_error(request, refused)

    app.add_middleware(HttpIntake, engine=front.engine, max_body_bytes=max_body_bytes)
    app.add_exception_handler(HttpError, _on_http_error)
    app.add_exception_handler(RequestValidationError, on_malformed)
    app.add_exception_handler(HTTPException, _on_unknown_path)
    # The last that is added comes first.
    app.add_middleware(HttpAccess, access=front.access)
    return app


def _trace(request: Request) -> TraceHeaders:
    return TraceHeaders.of(request.headers.items())


async def _on_http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_unknown_path(request: Request, error: Exception) -> Response:
    """Answer for a path or method that there is not."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail} ({request.method} {request.url.path})"
    return await _on_http_error(request, HttpError(error.status_code, message, code="unknown_url"))
