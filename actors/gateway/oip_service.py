"""The Open Inference Protocol: its messages to valid requests, pieces to tensors, errors to statuses or messages."""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from importlib.metadata import version as installed_version

import grpc

from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.grpc_access import ADMIT_AGAIN
from expertmesh.actors.gateway.oip_metadata import (
    BACKEND,
    is_served,
    model_config,
    model_metadata,
    require_served,
)
from expertmesh.actors.gateway.oip_requests import InferRequest, InferRequestReader
from expertmesh.actors.gateway.oip_responses import (
    empty_final_response,
    error_response,
    gathered,
    to_response,
    to_stream_response,
)
from expertmesh.actors.gateway.request_log import refusals_told
from expertmesh.actors.gateway.status_codes import Context, errors_to_status, message_of
from expertmesh.actors.tracing import TraceHeaders
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.oip import open_inference_pb2, open_inference_pb2_grpc
from expertmesh.oip.open_inference_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse

# A longer request is read in a thread: meanwhile the streams of the others go on.
LONG_REQUEST_BYTES = 8192
# Requests of one stream that are read before the first of them is answered; a client that sends more waits.
MAX_STREAM_REQUESTS = 1024
# By Triton's name: ModelConfig is served.
EXTENSIONS = ("model_configuration",)


class OpenInferenceService(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """Serves one gateway's clients. A client that cancels, or whose deadline passes, has its handler cancelled.

    is_ready is set by the server that it is part of.
    """

    def __init__(self, engine: Engine, model: ModelInfo, tokenizer: Tokenizer | None, rng: random.Random) -> None:
        """Serve `model` by `engine`; rng draws request ids and the seeds of requests that give none."""
        self.is_ready = False
        self._engine = engine
        self._model = model
        self._reader = InferRequestReader(model=model, tokenizer=tokenizer)
        self._rng = rng

    async def ServerLive(  # noqa: N802
        self, request: open_inference_pb2.ServerLiveRequest, context: Context
    ) -> open_inference_pb2.ServerLiveResponse:
        """Say that the server answers."""
        return open_inference_pb2.ServerLiveResponse(live=True)

    async def ServerReady(  # noqa: N802
        self, request: open_inference_pb2.ServerReadyRequest, context: Context
    ) -> open_inference_pb2.ServerReadyResponse:
        """Say whether requests are served now."""
        return open_inference_pb2.ServerReadyResponse(ready=self.is_ready)

    async def ModelReady(  # noqa: N802
        self, request: open_inference_pb2.ModelReadyRequest, context: Context
    ) -> open_inference_pb2.ModelReadyResponse:
        """Say whether requests for a model are served now."""
        ready = self.is_ready and is_served(self._model, request.name, request.version)
        return open_inference_pb2.ModelReadyResponse(ready=ready)

    async def ServerMetadata(  # noqa: N802
        self, request: open_inference_pb2.ServerMetadataRequest, context: Context
    ) -> open_inference_pb2.ServerMetadataResponse:
        """Describe the server."""
        version = installed_version("expertmesh")
        return open_inference_pb2.ServerMetadataResponse(name=BACKEND, version=version, extensions=EXTENSIONS)

    async def ModelMetadata(  # noqa: N802
        self, request: open_inference_pb2.ModelMetadataRequest, context: Context
    ) -> open_inference_pb2.ModelMetadataResponse:
        """Describe the tensors of the model."""
        async with errors_to_status(context, "ModelMetadata"):
            require_served(self._model, request.name, request.version)
        return model_metadata(self._model)

    async def ModelConfig(  # noqa: N802
        self, request: open_inference_pb2.ModelConfigRequest, context: Context
    ) -> open_inference_pb2.ModelConfigResponse:
        """Describe the model as Triton's clients expect it."""
        async with errors_to_status(context, "ModelConfig"):
            require_served(self._model, request.name, request.version)
        return open_inference_pb2.ModelConfigResponse(config=model_config(self._model))

    async def ModelInfer(self, request: ModelInferRequest, context: Context) -> ModelInferResponse:  # noqa: N802
        """Generate, and return all of it."""
        request_id = self._request_id(request)
        response = ModelInferResponse()
        async with errors_to_status(context, request_id):
            asked = await self._read(request, request_id, _trace(context), may_stream=False)
            async with aclosing(self._engine.generate(asked.valid)) as pieces:
                response = to_response(self._model.name, asked, await gathered(pieces))
        return response

    # gRPC accepts a coroutine that writes; unlike a generator it is left at once when it is cancelled between messages.
    async def ModelStreamInfer(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[ModelInferRequest], context: Context
    ) -> None:
        """Answer each request that comes; all run at once."""
        # One message is written at a time, as gRPC demands.
        writing = asyncio.Lock()
        room = asyncio.Semaphore(MAX_STREAM_REQUESTS)

        async def answer(request: ModelInferRequest) -> None:
            async with aclosing(self._answers(request, _trace(context))) as responses:
                async for response in responses:
                    async with writing:
                        if not await _is_written(context, response):
                            break
            room.release()

        async with asyncio.TaskGroup() as tasks:
            async for request in request_iterator:
                await room.acquire()
                tasks.create_task(answer(request))

    async def _answers(
        self, request: ModelInferRequest, trace: TraceHeaders
    ) -> AsyncGenerator[ModelStreamInferResponse, None]:
        """Yield the responses to one request of a stream, an error as the last of them."""
        request_id = self._request_id(request)
        try:
            ADMIT_AGAIN.get()()
            asked = await self._read(request, request_id, trace, may_stream=True)
            async with aclosing(self._engine.generate(asked.valid)) as pieces:
                if asked.stream:
                    async for piece in pieces:
                        is_final = piece.finish_reason is not None and not asked.empty_final_response
                        yield to_stream_response(to_response(self._model.name, asked, piece), is_final=is_final)
                else:
                    response = to_response(self._model.name, asked, await gathered(pieces))
                    yield to_stream_response(response, is_final=not asked.empty_final_response)
            if asked.empty_final_response:
                yield empty_final_response(self._model.name, asked)
        except Exception as error:  # noqa: BLE001 - what is no error of ours is logged, and the client told so
            yield error_response(request.id, message_of(error, request_id))

    async def _read(
        self, request: ModelInferRequest, request_id: str, trace: TraceHeaders, *, may_stream: bool
    ) -> InferRequest:
        def read() -> InferRequest:
            return self._reader.read(request, request_id=request_id, default_seed=seed)

        require_served(self._model, request.model_name, request.model_version)
        seed = self._rng.getrandbits(63)
        with self._engine.meter.refusals(), refusals_told(request_id):
            self._engine.require_room()
            asked = await asyncio.to_thread(read) if request.ByteSize() > LONG_REQUEST_BYTES else read()
            if asked.stream and not may_stream:
                raise InputError("stream: ModelInfer gives one response; use ModelStreamInfer", field="stream")
        return replace(asked, valid=replace(asked.valid, trace=trace))

    def _request_id(self, request: ModelInferRequest) -> str:
        return request.id or f"{self._rng.getrandbits(128):032x}"


async def _is_written(context: Context, response: ModelStreamInferResponse) -> bool:
    """Write a response; say False where the client has gone, before gRPC has cancelled the handler for it."""
    try:
        await context.write(response)
    except grpc.aio.InternalError:
        return False
    return True


def _trace(context: Context) -> TraceHeaders:
    return TraceHeaders.of(context.invocation_metadata() or ())
