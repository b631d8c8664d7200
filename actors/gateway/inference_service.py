"""The Inference service: messages to valid requests, pieces to messages, errors to status codes."""

import asyncio
import hashlib
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

import grpc

from expertmesh.actors.gateway.callers import caller_name
from expertmesh.actors.gateway.engine import Engine, Piece
from expertmesh.actors.gateway.kept_streams import KeptStreams
from expertmesh.actors.gateway.request_log import refusals_told
from expertmesh.actors.gateway.status_codes import Context, errors_to_status
from expertmesh.actors.gateway.validation import ValidRequest, require_in_vocabulary, validate_request
from expertmesh.actors.tracing import TraceHeaders
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.requests import FinishReason, TokenEvent
from expertmesh.cluster.settings import GrpcSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.v1 import inference_pb2, inference_pb2_grpc
from expertmesh.v1.inference_pb2 import GenerateOnceResponse, GenerateRequest, GenerateResponse

# A longer prompt is tokenised in a thread: meanwhile the streams of the others go on.
LONG_PROMPT_CHARS = 8192
# A larger request is checked there too: its prompt is long, or much was received of it.
LONG_REQUEST_BYTES = 8192
DEFAULTS = GrpcSettings()

FINISH_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
}


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Serves one gateway's clients. A client that cancels, or whose deadline passes, has its handler cancelled."""

    def __init__(
        self,
        engine: Engine,
        model: ModelInfo,
        tokenizer: Tokenizer | None,
        rng: random.Random,
        settings: GrpcSettings = DEFAULTS,
    ) -> None:
        """Serve `model` by `engine`; rng draws request ids and the seeds of requests that give none."""
        self._kept = KeptStreams(engine, resume_s=settings.resume_s, max_ended=settings.max_ended_streams)
        self._engine = engine
        self._model = model
        self._tokenizer = tokenizer
        self._rng = rng

    # gRPC accepts a coroutine that writes; unlike a generator it is left at once when it is cancelled between messages.
    async def Generate(  # type: ignore[override]  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> None:
        """Stream the pieces of all samples."""
        request_id = self._request_id(request)
        async with errors_to_status(context, request_id):
            valid, pieces = await self._begin(request, request_id, context)
            await _write(context, valid, pieces)

    async def Resume(  # type: ignore[override]  # noqa: N802  # see Generate
        self, request: inference_pb2.ResumeRequest, context: Context
    ) -> None:
        """Stream what was not received."""
        async with errors_to_status(context, request.request_id):
            stream = self._kept.find(request.request_id, owner=caller_name())
            received, ended = request.tokens_received, request.samples_ended
            pieces = stream.read(received, ended, time_left=context.time_remaining)
            await _write(context, stream.request, pieces)

    async def Cancel(  # noqa: N802
        self, request: inference_pb2.CancelRequest, context: Context
    ) -> inference_pb2.CancelResponse:
        """End a kept stream."""
        async with errors_to_status(context, "Cancel"):
            self._kept.find(request.request_id, owner=caller_name()).end()
        return inference_pb2.CancelResponse()

    async def GenerateOnce(self, request: GenerateRequest, context: Context) -> GenerateOnceResponse:  # noqa: N802
        """Gather the pieces of all samples."""
        request_id = self._request_id(request)
        response = GenerateOnceResponse()
        async with errors_to_status(context, request_id):
            if request.received:
                raise InputError("received is of Generate alone; GenerateOnce returns whole samples", field="received")
            valid, begun = await self._begin(request, request_id, context)
            response.request_id = valid.request_id
            texts: list[list[str]] = [[] for _ in valid.sampling]
            for index in range(len(valid.sampling)):
                response.outputs.add(index=index)
            response.usage.prompt_tokens = len(valid.prompt_ids)
            async with aclosing(begun) as pieces:
                async for piece in pieces:
                    output = response.outputs[piece.index]
                    texts[piece.index].append(piece.text)
                    output.token_ids.extend(_token_ids(piece))
                    output.logprobs.extend(_logprobs(valid, piece))
                    if piece.finish_reason is not None:
                        output.finish_reason = FINISH_REASONS[piece.finish_reason]
                        response.usage.completion_tokens += piece.num_output_tokens
            for output, parts in zip(response.outputs, texts, strict=True):
                output.text = "".join(parts)
        return response

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Return the tokens of a text."""
        response = inference_pb2.TokenizeResponse()
        async with errors_to_status(context, "Tokenize"):
            tokenizer = self._require_tokenizer("text")
            is_long = len(request.text) > LONG_PROMPT_CHARS
            encode = tokenizer.encode
            response.token_ids.extend(
                await asyncio.to_thread(encode, request.text) if is_long else encode(request.text)
            )
        return response

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Return the text of tokens."""
        response = inference_pb2.DetokenizeResponse()
        async with errors_to_status(context, "Detokenize"):
            tokenizer, ids = self._require_tokenizer("token_ids"), request.token_ids
            require_in_vocabulary(ids, "token id", self._model, field="token_ids")
            is_long = len(ids) > LONG_PROMPT_CHARS
            response.text = await asyncio.to_thread(tokenizer.decode, ids) if is_long else tokenizer.decode(ids)
        return response

    async def GetModel(  # noqa: N802
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.Model:
        """Return what a client must know of the model."""
        names = inference_pb2.Model.DESCRIPTOR.fields_by_name
        return inference_pb2.Model(**{name: getattr(self._model, name) for name in names})

    def _require_tokenizer(self, field: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InputError(f"{self._model.name} has no tokenizer", field=field)
        return self._tokenizer

    def _request_id(self, request: GenerateRequest) -> str:
        return request.request_id if request.HasField("request_id") else f"{self._rng.getrandbits(128):032x}"

    async def close(self) -> None:
        """End what goes on without a call."""
        await self._kept.close()

    async def _begin(
        self, request: GenerateRequest, request_id: str, context: Context
    ) -> tuple[ValidRequest, AsyncGenerator[Piece, None]]:
        """Return the request that is generated, an earlier one under the same key, and its pieces."""
        if not (request.HasField("idempotency_key") and self._kept.has(request.idempotency_key, owner=caller_name())):
            with self._engine.meter.refusals(), refusals_told(request_id):
                self._engine.require_room()
        valid = await self._validate(request, request_id)
        valid = replace(valid, trace=TraceHeaders.of(context.invocation_metadata() or ()))
        if not request.HasField("idempotency_key"):
            return valid, self._engine.generate(valid)
        stream = self._kept.open(valid, request.idempotency_key, _fingerprint(request), owner=caller_name())
        received = [len(one.token_ids) for one in valid.so_far]
        ended = [index for index, one in enumerate(valid.so_far) if one.has_ended]
        return stream.request, stream.read(received, ended, time_left=context.time_remaining)

    async def _validate(self, request: GenerateRequest, request_id: str) -> ValidRequest:
        def validate() -> ValidRequest:
            return validate_request(
                request, model=self._model, tokenizer=self._tokenizer, request_id=request_id, default_seed=seed
            )

        seed = self._rng.getrandbits(63)
        with self._engine.meter.refusals(), refusals_told(request_id):
            return await asyncio.to_thread(validate) if request.ByteSize() > LONG_REQUEST_BYTES else validate()


def _fingerprint(request: GenerateRequest) -> bytes:
    """Return what is equal for equal requests, whatever was received of them."""
    bare = GenerateRequest()
    bare.CopyFrom(request)
    bare.ClearField("received")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


async def _write(context: Context, valid: ValidRequest, begun: AsyncGenerator[Piece, None]) -> None:
    async with aclosing(begun) as pieces:
        async for piece in pieces:
            response = _response(valid, piece)
            try:
                await context.write(response)
            except grpc.aio.InternalError as error:
                # What gRPC raises where the client went away in the middle of a message, before it cancels the handler.
                raise asyncio.CancelledError from error


def _response(valid: ValidRequest, piece: Piece) -> GenerateResponse:
    response = GenerateResponse(
        request_id=valid.request_id,
        index=piece.index,
        text=piece.text,
        token_ids=_token_ids(piece),
        logprobs=_logprobs(valid, piece),
    )
    if piece.finish_reason is not None:
        response.finish_reason = FINISH_REASONS[piece.finish_reason]
        response.usage.prompt_tokens = len(valid.prompt_ids)
        response.usage.completion_tokens = piece.num_output_tokens
    return response


def _token_ids(piece: Piece) -> list[int]:
    return [event.token_id for event in piece.tokens if event.token_id is not None]


def _logprobs(valid: ValidRequest, piece: Piece) -> list[inference_pb2.TokenLogprob]:
    if valid.sampling[piece.index].logprobs is None:
        return []
    return [_token_logprob(event) for event in piece.tokens]


def _token_logprob(event: TokenEvent) -> inference_pb2.TokenLogprob:
    assert event.token_id is not None
    assert event.logprob is not None, f"{event.sequence_id}: the worker sent no logprob of token {event.index}"
    return inference_pb2.TokenLogprob(
        token_id=event.token_id,
        logprob=event.logprob,
        top=[inference_pb2.TopLogprob(token_id=top.token_id, logprob=top.logprob) for top in event.top_logprobs],
    )
