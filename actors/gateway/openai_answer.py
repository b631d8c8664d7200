"""One request's answer over ASGI: a body, or server-sent events. A client that goes away frees its sequences."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from expertmesh.actors.gateway.engine import Engine, Piece
from expertmesh.actors.gateway.openai_errors import to_http_error
from expertmesh.actors.gateway.openai_responses import AnswerFormat, Fields, Part, usage_fields
from expertmesh.actors.gateway.validation import ValidRequest

_MAX_WAITING = 16  # pieces between the requests of an answer and what sends it


class Answer(Response):
    """Runs requests while it is sent, so that whatever ends the sending ends them."""

    media_type = "text/event-stream"

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[ValidRequest],
        writer: AnswerFormat,
        *,
        stream: bool = False,
        include_usage: bool = False,
    ) -> None:
        """Prepare an answer.

        Args:
            engine: runs the requests.
            requests: of one client's request; choices are numbered through them.
            writer: of the answer's kind.
            stream: whether the client takes it piece by piece.
            include_usage: whether a stream ends with a count of tokens.
        """
        super().__init__(headers={"cache-control": "no-cache"})
        # Chunks are of a length that nobody knows yet.
        del self.headers["content-length"]
        self._engine = engine
        self._requests = requests
        self._writer = writer
        self._is_stream = stream
        self._include_usage = include_usage
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or as much of it as the client waits for."""
        await unless_disconnected(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with aclosing(merged(self._engine, self._requests)) as pieces:
                if self._is_stream:
                    await self._stream(pieces, send)
                else:
                    body = JSONResponse(await self._gather(pieces))
                    await body(scope, receive, send)
        except Exception as error:  # noqa: BLE001 - what is no error of ours is logged, and the client told so
            failure = to_http_error(error, self._requests[0].request_id)
            if not self._has_begun:
                response = JSONResponse(failure.body, status_code=failure.status, headers=failure.headers)
                await response(scope, receive, send)
                return
            await _send_event(send, _to_json(failure.body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _gather(self, pieces: AsyncIterator[tuple[int, Piece]]) -> Fields:
        parts = [Part() for request in self._requests for _ in request.sampling]
        texts: list[list[str]] = [[] for _ in parts]
        num_output_tokens = 0
        async for index, piece in pieces:
            texts[index].append(piece.text)
            parts[index].tokens.extend(piece.tokens)
            if piece.finish_reason is not None:
                parts[index].finish_reason = piece.finish_reason
                num_output_tokens += piece.num_output_tokens
        for part, text in zip(parts, texts, strict=True):
            part.text = "".join(text)
        return self._writer.whole(parts, self._usage(num_output_tokens))

    async def _stream(self, pieces: AsyncIterator[tuple[int, Piece]], send: Send) -> None:
        """Send chunks; headers only with the first piece, as until then it may turn out to be an error."""
        num_output_tokens = 0
        pending: Fields | None = {} if self._include_usage else None
        async for index, piece in pieces:
            if not self._has_begun:
                self._has_begun = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                for choice in self._writer.opening(sum(len(request.sampling) for request in self._requests)):
                    await _send_event(send, _to_json(self._writer.chunk(choice, pending)))
            part = Part(text=piece.text, tokens=list(piece.tokens), finish_reason=piece.finish_reason)
            chunk = self._writer.chunk(self._writer.delta(index, part), pending)
            await _send_event(send, _to_json(chunk))
            if piece.finish_reason is not None:
                num_output_tokens += piece.num_output_tokens
        if self._include_usage:
            await _send_event(send, _to_json(self._writer.closing(self._usage(num_output_tokens))))
        await _send_event(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _usage(self, num_output_tokens: int) -> Fields:
        return usage_fields(sum(len(request.prompt_ids) for request in self._requests), num_output_tokens)


async def merged(engine: Engine, requests: Sequence[ValidRequest]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Run requests at once; yield their pieces as they come, each with the number of its choice among all.

    Raises:
        ExpertMeshError: of the first that fails; the others are ended.
    """
    # Of a bounded length: what is not read then waits in the engine, where it is counted.
    queue: asyncio.Queue[tuple[int, Piece] | Exception | None] = asyncio.Queue(maxsize=_MAX_WAITING)

    async def run(request: ValidRequest, first: int) -> None:
        try:
            async with aclosing(engine.generate(request)) as pieces:
                async for piece in pieces:
                    await queue.put((first + piece.index, piece))
            await queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again by whoever reads
            await queue.put(error)

    firsts = [sum(len(before.sampling) for before in requests[:index]) for index in range(len(requests))]
    tasks = [asyncio.create_task(run(request, first)) for request, first in zip(requests, firsts, strict=True)]
    try:
        num_running = len(tasks)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        await _end(tasks)


def _to_json(fields: Fields) -> str:
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


async def _send_event(send: Send, data: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})


async def unless_disconnected(receive: Receive, work: Coroutine[None, None, None]) -> None:
    """Do the work; leave it when the client goes away, or when this is cancelled.

    Args:
        receive: of an ASGI application.
        work: what is done meanwhile.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        await _end([working, leaving])


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(tasks: "Sequence[asyncio.Task[None]]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
