"""ExpertMesh as an application of Ray Serve, for clusters that are run by others: KubeRay's RayService names `build`.

The cluster's life is the fleet's: the gateways find the controller by its name, whichever comes first starts it and
through it shards and workers, and they all end with the cluster. The controller keeps the settings it began with.
"""

import asyncio
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from expertmesh.actors.cli.configuration import read_settings
from expertmesh.actors.controller.actor import find_or_start_controller
from expertmesh.actors.gateway.deployment import Gateway, call, gateway_deployment
from expertmesh.actors.gateway.node_end import until_node_ends
from expertmesh.actors.inspection import inspect, known_facts
from expertmesh.actors.logs import start_logs
from expertmesh.actors.runtime import actor_env, draining_nodes, node_id, on_this_node
from expertmesh.cluster.errors import ExpertMeshError, InputError
from expertmesh.cluster.model_info import CheckpointFacts, require_divisible
from expertmesh.cluster.settings import ServeSettings

# What Serve's own steps of a replica's end may take beside the streams' time.
STOP_S = 5.0


class ApplicationArguments(BaseModel):
    """What `args` of the application in Serve's configuration holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Path = Field(
        description="settings: a TOML file, or a folder of them, read in the order of their names; on every node"
    )
    secrets: Path | None = Field(default=None, description="likewise, of settings that are nobody's business")
    drain_s: float = Field(default=30.0, ge=0, description="how long running streams are given when a gateway ends")
    state_dir: Path = Field(
        default=Path("/tmp/expertmesh-state"),  # noqa: S108 - the node's own, beside Ray's
        description="folder of the embedded Redis on the controller's node, used when no `state` is set",
    )


def build(arguments: ApplicationArguments) -> serve.Application:
    """Return the application. Reads the files; whether the model can be served is found out by the gateway.

    Raises:
        InputError: a file cannot be read, or a setting is unknown or out of range.
    """
    secrets = {} if arguments.secrets is None else _read(arguments.secrets)
    # Where HTTP listens is in Serve's own options: it is taken for reachable, so that nobody administers without a key.
    http = {"http_host": "0.0.0.0"}  # noqa: S104 - nothing listens because of it
    settings = read_settings(None, {**_read(arguments.config), **secrets, **http})
    deployment = gateway_deployment(
        ApplicationGateway,
        with_http=settings.http,
        node_labels=settings.nodes.gateways,
        graceful_shutdown_timeout_s=arguments.drain_s + STOP_S,
    )
    return deployment.bind(settings, arguments.drain_s, arguments.state_dir)


class ApplicationGateway(Gateway):
    """A gateway that has the fleet started, and gives its streams time when Serve ends it."""

    async def __init__(self, settings: ServeSettings, drain_s: float, state_dir: Path) -> None:  # type: ignore[misc]
        start_logs(settings, "gateway", node_id())
        self._drain_s = drain_s
        settings = settings.model_copy(
            # Records of two clusters that run at once, as in an upgrade, are not each other's.
            update={"deployment": settings.deployment or ray.get_runtime_context().get_session_name()}
        )
        facts = await _facts(settings)
        require_divisible(facts.expert_width, settings.expert_tp)
        info = replace(facts.info, expert_tp=settings.expert_tp)
        controller = find_or_start_controller(settings, info, state_dir)
        differing = await call(controller.differing_settings.remote(settings))
        if differing:
            raise InputError(
                f"this cluster's fleet runs with other settings than now given: {', '.join(differing)}; they are those "
                "of a cluster from its beginning, so a new one is needed"
            )
        await call(controller.start.remote())
        await super().__init__(settings, info)
        self._ending: asyncio.Task[None] | None = None
        self._node_task = asyncio.create_task(self._end_with_node())

    async def _end_with_node(self) -> None:
        """Begin to end when Serve does. It waits first for what came over HTTP, a viewer of the live page say."""
        await until_node_ends(node_id(), self._drain_s + STOP_S, draining_nodes)
        await self._end()

    def _end(self) -> "asyncio.Task[None]":
        if self._ending is None:
            self._ending = asyncio.create_task(self.shut_down(self._drain_s))
        return self._ending

    async def __del__(self) -> None:
        """End in order. Serve calls and awaits it once when it stops a replica; see Gateway.shut_down."""
        if hasattr(self, "_node_task"):  # it came up
            await self._end()
            self._node_task.cancel()


async def _facts(settings: ServeSettings) -> CheckpointFacts:
    """Return the checkpoint's facts, from a process of its own on this node if they are not known.

    Raises:
        CheckpointError: it cannot be served.
    """
    known = await asyncio.to_thread(known_facts, settings)
    if known is not None:
        return known
    task = ray.remote(num_cpus=0, label_selector=on_this_node(), runtime_env={"env_vars": actor_env(1)})(inspect)
    found = await task.remote(settings)
    if isinstance(found, ExpertMeshError):
        raise found
    facts: CheckpointFacts = found
    return facts


def _read(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds, or all those of a folder, in which the last that names a key has it.

    Raises:
        InputError: a file cannot be read. The message says nothing of its content, which may not be for logs.
    """
    try:
        files = sorted(path.glob("*.toml")) if path.is_dir() else [path]
        values: dict[str, Any] = {}
        for file in files:
            values |= tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read as TOML ({type(error).__name__})") from None
    return values
