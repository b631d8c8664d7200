"""The controller's process as others call it: a detached Ray actor.

Whoever holds an actor's handle imports its class, hence this file, which imports little.
"""

from pathlib import Path
from typing import Any

import ray

from expertmesh.actors.controller.queues import Backlog
from expertmesh.actors.cores import python_that_gives_way
from expertmesh.actors.runtime import CONTROLLER, NAMESPACE, actor_env, on_this_node
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.settings import ServeSettings


class ControllerActor:
    """A Controller in a process of its own."""

    def __init__(self, settings: ServeSettings, model: ModelInfo, state_dir: str) -> None:
        from expertmesh.actors.controller.controller import Controller

        self._controller = Controller(settings, model, state_dir)

    def start(self) -> None:
        """See Controller.start."""
        self._controller.start()

    def differing_settings(self, settings: ServeSettings) -> list[str]:
        """See Controller.differing_settings."""
        return self._controller.differing_settings(settings)

    def report_lost(self, worker: WorkerId, shard: ShardId) -> None:
        """See Controller.report_lost."""
        self._controller.report_lost(worker, shard)

    def progress(self, after: int) -> list[str]:
        """See Controller.progress."""
        return self._controller.progress(after)

    def gateway_view(self, gateway_id: str, backlog: Backlog) -> dict[str, Any]:
        """See Controller.gateway_view."""
        return self._controller.gateway_view(gateway_id, backlog)

    def scale(self, shards: int | None, workers: int | None) -> dict[str, Any]:
        """See Controller.scale."""
        return self._controller.scale(shards, workers)

    def drain(self, member: str) -> dict[str, Any]:
        """See Controller.drain."""
        return self._controller.drain(member)

    def rebalance(self, dry_run: bool) -> dict[str, Any]:
        """See Controller.rebalance."""
        return self._controller.rebalance(dry_run)

    def placement_record(self) -> bytes:
        """See Controller.placement_record."""
        return self._controller.placement_record()

    def load_placement(self, record: bytes) -> dict[str, Any]:
        """See Controller.load_placement."""
        return self._controller.load_placement(record)

    def operations(self, operation_id: str) -> list[dict[str, Any]]:
        """See Controller.operations."""
        return self._controller.operations(operation_id)

    def status(self) -> dict[str, Any]:
        """See Controller.status."""
        return self._controller.status()

    def live_view(self, epoch: int, after: int, life: int) -> dict[str, Any]:
        """See Controller.live_view."""
        return self._controller.live_view(epoch, after, life)

    def loads(self) -> list[dict[str, Any]]:
        """See Controller.loads."""
        return self._controller.loads()

    def stop(self) -> None:
        """See Controller.stop."""
        self._controller.stop()


def start_controller(settings: ServeSettings, model: ModelInfo, state_dir: Path) -> Any:
    """Start the detached controller actor and return its handle.

    It stays on this node, where its Redis has its files, and which does not go when its shards have gone; the
    deployment ends with this process in any case.
    """
    return _controller(on_this_node()).remote(settings, model, str(state_dir))


def find_or_start_controller(settings: ServeSettings, model: ModelInfo, state_dir: Path) -> Any:
    """Return the cluster's controller, started where the settings' labels say if there is none.

    state_dir is on the controller's node.
    """
    controller = _controller(settings.nodes.controller, get_if_exists=True)
    return controller.remote(settings, model, str(state_dir))


def _controller(label_selector: dict[str, str], *, get_if_exists: bool = False) -> Any:
    return ray.remote(ControllerActor).options(
        name=CONTROLLER,
        namespace=NAMESPACE,
        lifetime="detached",
        max_restarts=-1,
        max_concurrency=16,
        get_if_exists=get_if_exists,
        num_cpus=0,
        label_selector=label_selector,
        # Tokens flow without a controller: one that is started again gives way to them until it is ready.
        runtime_env={"env_vars": actor_env(1), "py_executable": python_that_gives_way()},
    )
