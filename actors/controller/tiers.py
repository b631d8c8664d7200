"""The named, detached actors of one tier: started, found again, asked how they are, ended."""

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group_table

from expertmesh.actors.runtime import NAMESPACE, actor_env, pinned_options
from expertmesh.cluster.errors import ExpertMeshError, InputError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.settings import ServeSettings

_log = logging.getLogger(__name__)
_ROOM_TIMEOUT_S = 60.0
# On CPUs a member reserves its share of a fleet this many times as large, so that one can scale up.
_ROOM_TO_GROW = 4
Id = TypeVar("Id", ShardId, WorkerId)


class Tier(Generic[Id]):
    """Shards or workers. Any thread may call; an id is started or ended by one thread at a time.

    facts: the last answer of each to `describe`; its "state" is "unresponsive" or "dead" where none came.
    """

    def __init__(self, actor: type, settings: ServeSettings, *, threads: int, concurrency: int) -> None:
        """Make an empty tier.

        Args:
            actor: the class, whose constructor takes (id, settings, threads) and which has `describe`.
            settings: of the deployment.
            threads: each computes with.
            concurrency: calls that an actor may work on at once.
        """
        self._actor = actor
        self._settings = settings
        self._threads = threads
        self._concurrency = concurrency
        self.handles: dict[Id, Any] = {}
        self.facts: dict[Id, dict[str, Any]] = {}

    @property
    def ready(self) -> list[Id]:
        """The members that said they were ready when last asked, in order of id."""
        return sorted((i for i, facts in self.facts.items() if facts["state"] == "ready"), key=_natural)

    def in_order(self) -> list[dict[str, Any]]:
        """Return the facts in order of id."""
        return [facts for _, facts in sorted(self.facts.items(), key=lambda item: _natural(item[0]))]

    @property
    def dead(self) -> list[Id]:
        """The members whose process is gone."""
        return [i for i, facts in self.facts.items() if facts["state"] == "dead"]

    def create(self, actor_id: Id) -> Any:
        """Return the actor of that name, started if it is not there; it is no member yet.

        Raises:
            CapacityError: the cluster has no room for it.
            InputError: it would compute deterministically on a GPU.
        """
        try:
            return ray.get_actor(actor_id, NAMESPACE)
        except ValueError:
            pass  # it does not exist yet
        settings = self._settings
        resources = ray.cluster_resources()
        use_gpu = settings.device == "cuda" or (settings.device == "auto" and resources.get("GPU", 0) > 0)
        if use_gpu and settings.deterministic:
            raise InputError("deterministic mode computes on CPUs: set device to cpu, or leave the GPUs out of Ray")
        share = 0.9 * resources.get("CPU", 1) / (settings.shards + settings.workers) / _ROOM_TO_GROW
        options = pinned_options(
            actor_id,
            f"{_group_prefix(actor_id)}{uuid.uuid4().hex[:8]}",
            num_cpus=max(0.01, min(1.0, round(share - 0.005, 2))),
            num_gpus=1 if use_gpu else 0,
            env=actor_env(self._threads),
            timeout_s=_ROOM_TIMEOUT_S,
        )
        return (
            ray.remote(self._actor)
            .options(max_concurrency=self._concurrency, **options)
            .remote(actor_id, settings, self._threads)
        )

    def admit(self, actor_id: Id, handle: Any) -> None:
        """Make a created actor a member."""
        self.handles[actor_id] = handle
        self.facts[actor_id] = {"id": actor_id, "state": "starting"}

    def dismiss(self, actor_id: Id) -> None:
        """End a member, or what is left of it, and free what was reserved for it."""
        handle = self.handles.pop(actor_id, None)
        self.facts.pop(actor_id, None)
        try:
            # One that a former controller started is known by its name alone.
            ray.kill(handle or ray.get_actor(actor_id, NAMESPACE))
        except ValueError:
            _log.info("%s is gone already", actor_id)
        for group in placement_group_table().values():
            if group["name"].startswith(_group_prefix(actor_id)) and group["state"] != "REMOVED":
                ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))

    def ask(self, timeout_s: float) -> None:
        """Ask all members how they are, together at most timeout_s."""
        asked = {actor_id: handle.describe.remote() for actor_id, handle in tuple(self.handles.items())}
        deadline_s = time.monotonic() + timeout_s
        for actor_id, reference in asked.items():
            try:
                answer: dict[str, Any] = ray.get(reference, timeout=max(0.01, deadline_s - time.monotonic()))
            except GetTimeoutError:
                answer = {**self.facts.get(actor_id, {"id": actor_id}), "state": "unresponsive"}
            except RayActorError:
                answer = {**self.facts.get(actor_id, {"id": actor_id}), "state": "dead"}
            if actor_id in self.handles:
                self.facts[actor_id] = answer


def wait_for(references: Sequence[Any], timeout_s: float) -> list[Any]:
    """Wait for all calls; raise the first failure as it was raised there.

    Raises:
        UnavailableError: an actor died or did not answer within timeout_s.
    """
    try:
        results: list[Any] = ray.get(list(references), timeout=timeout_s)
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, ExpertMeshError) else UnavailableError(str(error))) from error
    except RayError as error:
        raise UnavailableError(f"an actor did not do its part: {error}") from error
    return results


def _group_prefix(actor_id: str) -> str:
    return f"pg-{actor_id}~"


def _natural(actor_id: str) -> tuple[int, str]:
    """Order shard-10 after shard-9."""
    return len(actor_id), actor_id
