"""A real gRPC server over fake workers, and what its tests share."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from expertmesh.actors.gateway.admin_service import AdminService
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.inference_service import InferenceService
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.oip_service import OpenInferenceService
from expertmesh.actors.gateway.server import GatewayServer, start_server
from expertmesh.cluster.requests import SamplingParams
from expertmesh.cluster.settings import GrpcSettings, TlsSettings
from expertmesh.models.tokenizer import Tokenizer
from expertmesh.oip.open_inference_pb2_grpc import GRPCInferenceServiceStub
from expertmesh.v1.admin_pb2_grpc import AdminStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from expertmesh.v1.inference_pb2_grpc import InferenceStub
from tests.unit.gateway_fakes import MODEL, STATUS, FakeOperations, FakeWorker


async def get_status() -> dict[str, object]:
    return STATUS


async def get_loads() -> list[dict[str, object]]:
    return [
        {"layer": 0, "tokens": [1, 2, 3, 4], "decode_tokens": 5},
        {"layer": 1, "tokens": [0, 0, 0, 2**40], "decode_tokens": 2**39},
    ]


@dataclass
class Running:
    server: GatewayServer
    engine: Engine
    channel: grpc.aio.Channel

    @property
    def inference(self) -> Any:
        return InferenceStub(self.channel)

    @property
    def open_inference(self) -> Any:
        return GRPCInferenceServiceStub(self.channel)

    @property
    def admin(self) -> Any:
        return AdminStub(self.channel)


@asynccontextmanager
async def running(
    *workers: FakeWorker,
    tokenizer: Tokenizer | None = None,
    status: Callable[[], Any] = get_status,
    loads: Callable[[], Any] = get_loads,
    settings: GrpcSettings = GrpcSettings(),  # noqa: B008 - frozen
    tls: TlsSettings | None = None,
    keys: KeyBook | None = None,
    host: str = "127.0.0.1",
    **options: int | None,
) -> AsyncIterator[Running]:
    """Serve while the block lasts; options are the engine's."""
    rng = random.Random(4)
    engine = Engine(tokenizer=tokenizer, rng=rng, **{"max_requests": 4, **options})  # type: ignore[arg-type]
    engine.admission.set_keys([] if keys is None else keys.names)
    inference = InferenceService(engine, MODEL, tokenizer, rng, settings)
    server = await start_server(
        host=host,
        port=0,
        inference=inference,
        open_inference=OpenInferenceService(engine, MODEL, tokenizer, rng),
        admin=AdminService(status, loads, FakeOperations()),
        settings=settings,
        keys=keys,
        tls=tls,
    )
    engine.pool.set_workers(workers)
    try:
        async with grpc.aio.insecure_channel(server.address) as channel:
            yield Running(server, engine, channel)
    finally:
        await server.stop(grace_s=0)
        await inference.close()
        await engine.pool.close()


def request(*token_ids: int, **fields: Any) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=token_ids or (10, 20, 30)), **{"max_tokens": 12, **fields})


def sampling(seed: int, max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, seed=seed)


async def error_of(call: Any) -> grpc.aio.AioRpcError:
    async def finish() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                continue
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return caught.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the fakes tell nobody
            await asyncio.sleep(0.001)
