"""The gateway's process: a Ray Serve replica with a gRPC server of its own."""

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Mapping
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError

from expertmesh.actors.controller.queues import Backlog
from expertmesh.actors.cores import step_back
from expertmesh.actors.gateway.access import Access
from expertmesh.actors.gateway.admin_service import AdminService
from expertmesh.actors.gateway.chat_template import open_chat_template
from expertmesh.actors.gateway.engine import Engine
from expertmesh.actors.gateway.inference_service import InferenceService
from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.actors.gateway.live_feed import LiveFeed
from expertmesh.actors.gateway.live_routes import live_routes
from expertmesh.actors.gateway.oip_service import OpenInferenceService
from expertmesh.actors.gateway.openai_app import OpenAIFront, build_app
from expertmesh.actors.gateway.openai_requests import RequestReader
from expertmesh.actors.gateway.request_trace import RequestTracer
from expertmesh.actors.gateway.server import GatewayServer, start_server
from expertmesh.actors.gateway.worker_client import WorkerClient
from expertmesh.actors.logs import EventLog, reason_of, start_logs
from expertmesh.actors.metrics import Metrics
from expertmesh.actors.runtime import CONTROLLER, GATEWAY_APP, NAMESPACE, actor_env, node_id, on_this_node
from expertmesh.actors.token_stream import StreamAddress, TokenStreamClient
from expertmesh.actors.tracing import open_tracing
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.requests import SequenceRequest, TokenEvent
from expertmesh.cluster.settings import ServeSettings
from expertmesh.models.tokenizer import open_tokenizer

_log = EventLog(__name__)
_VIEW_PERIOD_S = 0.5
_IDLE_PERIOD_S = 0.05
# For what is told at the end to reach who waits.
_LAST_WORDS_S = 1.0
# The controller answers in milliseconds; one that hangs is as good as away.
_VIEW_TIMEOUT_S = 2.0


class RayWorkerClient:
    """A worker as its gateway calls it; see WorkerClient."""

    def __init__(self, worker_id: str, handle: Any, gateway_id: str) -> None:
        self.worker_id = worker_id
        self._handle = handle
        self._gateway_id = gateway_id
        self._stream = TokenStreamClient(self._stream_address, gateway_id)

    async def submit(self, requests: list[SequenceRequest]) -> None:
        """See WorkerClient.submit."""
        await call(self._handle.submit.remote(self._gateway_id, requests))

    async def cancel(self, sequence_ids: list[str]) -> None:
        """See WorkerClient.cancel."""
        await call(self._handle.cancel.remote(sequence_ids))

    async def poll(self, after: int) -> tuple[int, list[TokenEvent]]:
        """See WorkerClient.poll."""
        return await self._stream.poll(after)

    async def _stream_address(self) -> StreamAddress:
        address: StreamAddress = await call(self._handle.stream_address.remote())
        return address


class Gateway:
    """Serves gRPC to clients. Goes on with the workers that it knows while the controller is away."""

    async def __init__(self, settings: ServeSettings, model: ModelInfo) -> None:  # type: ignore[misc]  # Serve awaits it
        step_back()
        self._id = f"gateway-{uuid.uuid4().hex[:8]}"
        start_logs(settings, self._id, node_id())
        self._tracing = open_tracing(settings, self._id, node_id())
        tokenizer = open_tokenizer(settings.model)
        self._controller = ray.get_actor(CONTROLLER, NAMESPACE)
        self._model = model
        template = open_chat_template(settings.model)
        self._reader = RequestReader(model=model, tokenizer=tokenizer, template=template, rng=random.Random())
        self._engine = Engine(
            tokenizer=tokenizer,
            rng=random.Random(),
            max_requests=settings.max_requests,
            batch_sequences=settings.max_sequences,
            max_queue=settings.max_queue,
            call_timeout_s=settings.worker_timeout_s,
            max_unread_tokens=settings.max_unread_tokens,
            tracer=RequestTracer(self._tracing, model.name),
        )
        self._max_body_bytes = settings.max_body_bytes
        self._metrics = Metrics()
        self._keys = KeyBook(settings.keys)
        self._engine.admission.set_keys(self._keys.names)
        self._clients: dict[str, tuple[Any, WorkerClient]] = {}
        self._is_alone = False  # the controller did not answer last
        self._inference = InferenceService(self._engine, model, tokenizer, random.Random(), settings.grpc)
        self._server: GatewayServer = await start_server(
            host=settings.grpc_host,
            port=settings.grpc_port,
            inference=self._inference,
            open_inference=OpenInferenceService(self._engine, model, tokenizer, random.Random()),
            admin=AdminService(self._status, self._loads, _Operations(self._controller)),
            settings=settings.grpc,
            tls=settings.tls,
            keys=self._keys,
        )
        self._http_access = Access(self._keys, settings.http_host)
        self._live = LiveFeed(model, self._engine, self._live_view, is_serving=lambda: self._server.is_serving)
        await self._look()
        self._watch_task = asyncio.create_task(self._watch())

    def __serve_build_asgi_app__(self) -> FastAPI:  # Serve's name for it; asked for where HTTP is served
        server = self._server
        front = OpenAIFront(
            engine=self._engine,
            reader=self._reader,
            is_ready=lambda: server.is_serving,
            now_s=time.time,
            access=self._http_access,
        )
        app = build_app(front, self._max_body_bytes)
        app.include_router(live_routes(self._live))
        return app

    async def address(self) -> str:
        """Look at the fleet, and return host:port of the gRPC server."""
        await self._look()
        return self._server.address

    async def shut_down(self, grace_s: float) -> None:
        """Take no new requests and give the running ones grace_s seconds; what is left then fails as UNAVAILABLE."""
        self._watch_task.cancel()
        await self._live.close()
        await asyncio.gather(self._server.stop(grace_s), self._until_idle(grace_s))
        await self._inference.close()
        self._engine.end()
        await self._until_idle(_LAST_WORDS_S)
        await self._engine.pool.close()
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)

    async def _until_idle(self, timeout_s: float) -> None:
        """Wait for requests that came over HTTP, which the gRPC server does not know of."""
        end_s = time.monotonic() + timeout_s
        while self._engine.num_live_requests and time.monotonic() < end_s:  # noqa: ASYNC110 - each may be the last
            await asyncio.sleep(_IDLE_PERIOD_S)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_VIEW_PERIOD_S)
            if self._keys.look():
                self._engine.admission.set_keys(self._keys.names)
            self._keys.report(self._metrics)
            self._engine.report(self._metrics)
            try:
                async with asyncio.timeout(_VIEW_TIMEOUT_S):
                    await self._look()
            except (UnavailableError, TimeoutError) as error:
                self._live.events.unheard(str(error) or type(error).__name__)
                if not self._is_alone:
                    _log.tell("controller_away", num_workers=len(self._clients), reason=reason_of(error))
                self._is_alone = True
                # Those that were lost to a passing fault are tried again.
                self._engine.pool.set_workers([client for _, client in self._clients.values()])
            else:
                if self._is_alone:
                    _log.tell("controller_back")
                self._is_alone = False

    async def _look(self) -> None:
        """Ask the controller for workers and readiness."""
        admission = self._engine.admission
        backlog = Backlog(admission.num_waiting, admission.waiting_tokens)
        view = await call(self._controller.gateway_view.remote(self._id, backlog))
        if not view["started"]:
            return  # a controller that has just come back knows less than this gateway
        for worker_id, handle in view["workers"].items():
            known = self._clients.get(worker_id)
            if known is None or known[0]._actor_id != handle._actor_id:
                self._clients[worker_id] = (handle, RayWorkerClient(worker_id, handle, self._id))
        self._clients = {w: known for w, known in self._clients.items() if w in view["workers"]}
        self._engine.pool.set_workers([client for _, client in self._clients.values()])
        for worker_id in view["leaving"]:
            self._engine.pool.evacuate(worker_id)
        if view["ready"] != self._server.is_serving:
            _log.tell("readiness_changed", ready=view["ready"], reason=view["reason"] or None)
        await self._server.set_serving(view["ready"])
        self._live.events.heard(view["ready"], view["reason"])

    async def _status(self) -> dict[str, object]:
        status = await call(self._controller.status.remote())
        model = {name: getattr(self._model, name) for name in self._model.__slots__}
        return {
            **status,
            "grpc_address": self._server.address,
            "model": {name: list(value) if isinstance(value, tuple) else value for name, value in model.items()},
        }

    async def _live_view(self, epoch: int, after: int, life: int) -> dict[str, Any]:
        view: dict[str, Any] = await call(self._controller.live_view.remote(epoch, after, life))
        return view

    async def _loads(self) -> list[dict[str, object]]:
        loads: list[dict[str, object]] = await call(self._controller.loads.remote())
        return loads


class _Operations:
    """The controller's operations; see admin_service.Operations."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    async def scale(self, shards: int | None, workers: int | None) -> dict[str, object]:
        """See Operations.scale."""
        return _plain(await call(self._controller.scale.remote(shards, workers)))

    async def drain(self, member: str) -> dict[str, object]:
        """See Operations.drain."""
        return _plain(await call(self._controller.drain.remote(member)))

    async def rebalance(self, dry_run: bool) -> dict[str, object]:
        """See Operations.rebalance."""
        fields = await call(self._controller.rebalance.remote(dry_run))
        if "operation" in fields:
            fields["operation"] = _plain(fields["operation"])
        return dict(fields)

    async def placement_record(self) -> bytes:
        """See Operations.placement_record."""
        return bytes(await call(self._controller.placement_record.remote()))

    async def load_placement(self, record: bytes) -> dict[str, object]:
        """See Operations.load_placement."""
        return _plain(await call(self._controller.load_placement.remote(record)))

    async def operations(self, operation_id: str) -> list[dict[str, object]]:
        """See Operations.operations."""
        return [_plain(fields) for fields in await call(self._controller.operations.remote(operation_id))]


def _plain(fields: dict[str, object]) -> dict[str, object]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


async def call(reference: Any) -> Any:
    """Await an actor's answer; what ExpertMesh raised there is raised here, a dead actor is UnavailableError."""
    try:
        return await reference
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ExpertMeshError):
            raise cause from None
        raise
    except RayActorError as error:
        raise UnavailableError(str(error).splitlines()[0]) from error
    except RayError as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from error


def gateway_deployment(
    gateway: type[Gateway], *, with_http: bool, node_labels: Mapping[str, str], graceful_shutdown_timeout_s: float
) -> serve.Deployment:
    """Return a deployment of one gateway on nodes with these labels, at most one a node: its port is the node's."""
    return serve.deployment(
        serve.ingress()(gateway) if with_http else gateway,
        name="gateway",
        num_replicas=1,
        max_replicas_per_node=1,
        # Above what the engine takes: it refuses what is too much, Serve would let it wait.
        max_ongoing_requests=10_000,
        ray_actor_options={
            "num_cpus": 0,
            "label_selector": dict(node_labels),
            # Else a line for each handshake that fails: whoever reaches the port could fill the disk.
            "runtime_env": {"env_vars": {**actor_env(1), "GRPC_VERBOSITY": "ERROR"}},
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=graceful_shutdown_timeout_s,
        logging_config={"log_level": "WARNING"},
    )


def deploy_gateway(settings: ServeSettings, model: ModelInfo, http_port: int | None) -> Any:
    """Run the gateway on Ray Serve, on this node: its address was checked here, clients look for it here.

    Args:
        settings: what to serve and how.
        model: the model served.
        http_port: that Serve's proxies listen on; None: there are none.

    Raises:
        UnavailableError: it did not come up.
    """
    deployment = gateway_deployment(
        Gateway, with_http=http_port is not None, node_labels=on_this_node(), graceful_shutdown_timeout_s=5
    )
    # Serve reports each of its own steps; what matters of them is said by ours.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        # Of every node: on the head and here, where the gateway is.
        proxy_location="Disabled" if http_port is None else "EveryNode",
        http_options=None if http_port is None else _http_options(settings, http_port),
        logging_config={"log_level": "ERROR"},
    )
    prefix = None if http_port is None else "/"
    try:
        return serve.run(deployment.bind(settings, model), name=GATEWAY_APP, route_prefix=prefix)
    except RuntimeError as error:
        raise UnavailableError(f"the gateway did not come up: {error}") from error


def _http_options(settings: ServeSettings, port: int) -> dict[str, object]:
    options: dict[str, object] = {"host": settings.http_host, "port": port}
    if settings.tls is not None:
        options |= {"ssl_certfile": str(settings.tls.cert_file), "ssl_keyfile": str(settings.tls.key_file)}
    return options
