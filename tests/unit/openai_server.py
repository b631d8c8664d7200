"""The HTTP front over fake workers, behind a real HTTP server in this process. `host` is what the front believes."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
import openai
import uvicorn

from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.chat_template import ChatTemplate
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.openai_app import OpenAIFront, build_app
from expertmesh.actors.gateway.openai_requests import RequestReader
from expertmesh.models.tokenizer import Tokenizer
from tests.unit.gateway_fakes import MODEL, FakeWorker

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NOW_S = 1234


@dataclass
class Running:
    """A front that listens. `is_ready` may be changed."""

    url: str
    engine: Engine
    client: openai.AsyncOpenAI
    http: httpx2.AsyncClient
    readiness: list[bool] = field(default_factory=lambda: [True])


@asynccontextmanager
async def running(
    *workers: FakeWorker,
    tokenizer: Tokenizer | None = None,
    template: str | None = TEMPLATE,
    max_body_bytes: int = 1 << 20,
    keys: KeyBook | None = None,
    host: str = "127.0.0.1",
    max_unread_tokens: int = 1_000_000,
) -> AsyncIterator[Running]:
    """Serve while the block lasts; no request may be left then."""
    rng = random.Random(4)
    engine = Engine(tokenizer=tokenizer, rng=rng, max_requests=4, max_unread_tokens=max_unread_tokens)
    engine.pool.set_workers(workers)
    chat_template = None if template is None else ChatTemplate(template, {"eos_token": "<eos>"})
    reader = RequestReader(model=MODEL, tokenizer=tokenizer, template=chat_template, rng=rng)
    readiness = [True]
    access = Access(KeyBook() if keys is None else keys, host)
    front = OpenAIFront(
        engine=engine, reader=reader, is_ready=lambda: readiness[0], now_s=lambda: NOW_S + 0.5, access=access
    )
    app = build_app(front, max_body_bytes)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            async with (
                openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
                httpx2.AsyncClient(base_url=url) as http,
            ):
                yield Running(url, engine, client, http, readiness)
            assert engine.num_live_requests == 0
        finally:
            server.should_exit = True
            await serving
            await engine.pool.close()
