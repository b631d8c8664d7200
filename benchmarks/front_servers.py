"""The two servers of benchmarks.front, each a process of its own: a bare grpc.aio server, and the gateway's."""

import asyncio
import contextlib
import cProfile
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.requests import FinishReason, SequenceRequest, TokenEvent
from expertmesh.v1 import inference_pb2, inference_pb2_grpc
from expertmesh.v1.inference_pb2 import GenerateOnceResponse, GenerateRequest, GenerateResponse

HOST = "127.0.0.1"
MODEL_DIR = Path(__file__).resolve().parents[1] / "examples" / "pocket-moe"
NEXT_ID = 1000


@dataclass(frozen=True)
class Server:
    """A running server."""

    address: str
    pid: int


@contextlib.contextmanager
def running_server(kind: str, profile: str | None = None) -> Iterator[Server]:
    """Run a server in a process of its own while the block lasts.

    Args:
        kind: bare or gateway.
        profile: where it writes at its end what cProfile says of it.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(kind, theirs, profile), daemon=True)
    process.start()
    theirs.close()
    assert process.pid is not None
    try:
        yield Server(f"{HOST}:{ours.recv()}", process.pid)
    finally:
        ours.close()
        process.join(30)


def _run(kind: str, pipe: Connection, profile: str | None) -> None:
    serve = {"bare": _serve_bare, "gateway": _serve_gateway}[kind]
    with cProfile.Profile() if profile else contextlib.nullcontext() as measured:
        asyncio.run(serve(pipe))
    if measured is not None:
        measured.dump_stats(profile)


async def _until_closed(pipe: Connection) -> None:
    """Wait until the other end is closed."""
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(pipe.fileno(), closed.set)
    await closed.wait()


class Echo(inference_pb2_grpc.InferenceServicer):
    """Answers with as many messages as are asked for, all alike."""

    async def Generate(  # type: ignore[override]  # noqa: N802  # as the gateway's does
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Stream them."""
        for _ in range(request.max_tokens):
            await context.write(GenerateResponse(request_id="0" * 32, text=" word", token_ids=[NEXT_ID]))

    async def GenerateOnce(  # noqa: N802
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> GenerateOnceResponse:
        """Return one."""
        output = inference_pb2.Output(text=" word", token_ids=[NEXT_ID])
        usage = inference_pb2.Usage(prompt_tokens=3, completion_tokens=request.max_tokens)
        return GenerateOnceResponse(request_id="0" * 32, outputs=[output], usage=usage)


async def _serve_bare(pipe: Connection) -> None:
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServicer_to_server(Echo(), server)
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    pipe.send(port)
    await _until_closed(pipe)
    await server.stop(0)


class InstantWorker:
    """A worker without a model: each sequence gets a token a step, and a step is made when the last is on its way."""

    worker_id = "worker-0"

    def __init__(self) -> None:
        self.engine: Any = None
        self._live: dict[str, tuple[SequenceRequest, int]] = {}
        self._arrived = asyncio.Event()

    async def submit(self, requests: list[SequenceRequest]) -> None:
        """See WorkerClient.submit."""
        self._live.update({request.sequence_id: (request, 0) for request in requests})
        self._arrived.set()

    async def cancel(self, sequence_ids: list[str]) -> None:
        """See WorkerClient.cancel."""
        for sequence_id in sequence_ids:
            self._live.pop(sequence_id, None)

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        """See WorkerClient.poll."""
        while not self._live:
            self._arrived.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), 1.0)
        await asyncio.sleep(0)
        while any(not live.inbox.empty() for live in self.engine._journal):  # noqa: ASYNC110
            await asyncio.sleep(0)
        events = []
        for sequence_id, (request, index) in list(self._live.items()):
            is_last = index + 1 == request.sampling.max_tokens
            events.append(
                TokenEvent(
                    sequence_id=sequence_id,
                    index=index,
                    token_id=NEXT_ID,
                    finish_reason=FinishReason.LENGTH if is_last else None,
                )
            )
            if is_last:
                del self._live[sequence_id]
            else:
                self._live[sequence_id] = (request, index + 1)
        return after + 1, events


async def _serve_gateway(pipe: Connection) -> None:
    from expertmesh.actors.gateway.admin_service import AdminService
    from expertmesh.actors.gateway.engine import Engine
    from expertmesh.actors.gateway.inference_service import InferenceService
    from expertmesh.actors.gateway.server import start_server
    from expertmesh.models.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(MODEL_DIR)
    assert tokenizer is not None
    engine, worker = Engine(tokenizer=tokenizer, rng=random.Random(1)), InstantWorker()
    worker.engine = engine
    service = InferenceService(engine, _model(), tokenizer, random.Random(2))
    nobody: Any = None  # asks for the fleet here
    server = await start_server(host=HOST, port=0, inference=service, admin=AdminService(nobody, nobody, nobody))
    engine.pool.set_workers([worker])
    pipe.send(server.port)
    await _until_closed(pipe)
    await server.stop(0)
    await service.close()
    await engine.pool.close()


def _model() -> ModelInfo:
    return ModelInfo(
        name=MODEL_DIR.name,
        architecture="Qwen3MoeForCausalLM",
        dtype="bfloat16",
        num_layers=4,
        moe_layers=(0, 1, 2, 3),
        num_experts=8,
        top_k=2,
        hidden_size=256,
        vocab_size=2048,
        max_context=4096,
        eos_token_ids=(0,),
        has_tokenizer=True,
    )
