"""The named, detached actors of one tier: started, found again, asked how they are, ended."""

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.placement_group import placement_group_table

from expertmesh.actors.cores import python_that_gives_way
from expertmesh.actors.logs import EventLog, reason_of
from expertmesh.actors.runtime import NAMESPACE, Room, actor_env, pinned_options
from expertmesh.cluster.errors import ExpertMeshError, InputError, UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.settings import ServeSettings

_log = EventLog(__name__)
# Unless settings say otherwise, on CPUs a member reserves its share of a fleet this many times as large, which is room
# to scale up.
_ROOM_TO_GROW = 4
_CREATED_AT_ONCE = 32
_LOOK_AGAIN_S = 0.05
# Ray's part of starting a process, which takes a core for itself; after it the process gives way.
_LAUNCH_S = 1.0
# Half of this machine's cores are left to what serves. Each launch takes its place for _LAUNCH_S at most, on any node.
_LAUNCHES = threading.BoundedSemaphore(max(1, (os.cpu_count() or 1) // 2))
# How often members are looked at while something long is waited for.
_WATCH_S = 1.0
# Longer without an answer is away for now.
_SILENCE_S = 5.0
Id = TypeVar("Id", ShardId, WorkerId)


class Tier(Generic[Id]):
    """Shards or workers. Any thread may call; an id is started or ended by one thread at a time.

    facts: the last answer of each to `describe`; its "state" is "unresponsive" or "dead" where none came.
    """

    def __init__(
        self, actor: type, settings: ServeSettings, *, node_labels: Mapping[str, str], threads: int, concurrency: int
    ) -> None:
        """Make an empty tier.

        Args:
            actor: the class, whose constructor takes (id, settings, threads) and which has `describe`.
            settings: of the deployment.
            node_labels: of the nodes that its members may run on; empty: any.
            threads: each computes with.
            concurrency: calls that an actor may work on at once.
        """
        self._actor = actor
        self._settings = settings
        self._node_labels = node_labels
        self._threads = threads
        self._concurrency = concurrency
        self.handles: dict[Id, Any] = {}
        self.facts: dict[Id, dict[str, Any]] = {}
        # The question to each member that it has not answered yet, with the handle that was asked.
        self._asked: dict[Id, tuple[Any, Any]] = {}

    @property
    def ready(self) -> list[Id]:
        """The members that said they were ready when last asked, in order of id."""
        return sorted((i for i, facts in tuple(self.facts.items()) if facts["state"] == "ready"), key=natural)

    @property
    def nodes(self) -> dict[Id, str]:
        """What each shard fails together with, as far as it is known: its node in Ray, or its failure domain."""
        return {i: facts["domain"] for i, facts in tuple(self.facts.items()) if "domain" in facts}

    def in_order(self) -> list[dict[str, Any]]:
        """Return the facts in order of id."""
        return [facts for _, facts in sorted(self.facts.items(), key=lambda item: natural(item[0]))]

    @property
    def dead(self) -> list[Id]:
        """The members whose process is gone."""
        return [i for i, facts in tuple(self.facts.items()) if facts["state"] == "dead"]

    @property
    def loading(self) -> list[Id]:
        """The members that said that they were still loading when last asked."""
        return [i for i, facts in tuple(self.facts.items()) if facts["state"] == "loading"]

    def create(self, actor_id: Id, *, behind_traffic: bool = False, room: Room | None = None) -> Any:
        """Return the actor of that name, started if it is not there; it is no member yet.

        Args:
            actor_id: the name.
            behind_traffic: requests are served meanwhile: on a cluster of one machine the process gives way to them
                until it is ready, and only so many are launched at once that cores are left.
            room: how long it may wait for room; None: as the settings say.

        Raises:
            CapacityError: the cluster has no room for it.
            InputError: it would compute deterministically on a GPU.
        """
        found = self.find(actor_id)
        if found is not None:
            return found
        _free_room(actor_id)  # that a controller reserved which was killed before it could start the actor
        settings = self._settings
        resources = ray.cluster_resources()
        use_gpu = settings.device == "cuda" or (settings.device == "auto" and resources.get("GPU", 0) > 0)
        if use_gpu and settings.deterministic:
            raise InputError("deterministic mode computes on CPUs: set device to cpu, or leave the GPUs out of Ray")
        share = 0.9 * resources.get("CPU", 1) / (settings.shards + settings.workers) / _ROOM_TO_GROW
        num_cpus = settings.member_cpus or max(0.01, min(1.0, round(share - 0.005, 2)))
        options = pinned_options(
            actor_id,
            f"{_group_prefix(actor_id)}{uuid.uuid4().hex[:8]}",
            num_cpus=num_cpus,
            num_gpus=1 if use_gpu else 0,
            node_labels=self._node_labels,
            runtime_env=self._runtime_env(gives_way=behind_traffic),
            room=room or Room(timeout_s=settings.room_timeout_s),
        )
        actor = ray.remote(self._actor).options(max_concurrency=self._concurrency, **options)
        if not behind_traffic:
            return actor.remote(actor_id, settings, self._threads)
        with _LAUNCHES:
            handle = actor.remote(actor_id, settings, self._threads)
            ray.wait([handle.describe.remote()], timeout=_LAUNCH_S)
        return handle

    def _runtime_env(self, *, gives_way: bool) -> dict[str, Any]:
        env: dict[str, Any] = {"env_vars": actor_env(self._threads)}
        # Another machine may have its Python elsewhere: there Ray knows where.
        if gives_way and sum(node["Alive"] for node in ray.nodes()) == 1:
            env["py_executable"] = python_that_gives_way()
        return env

    def create_members(self, actor_ids: Sequence[Id]) -> None:
        """Create and admit actors, all at once, so that Ray sees all that is demanded.

        Raises:
            CapacityError: the cluster has no room for one; the others are members.
        """
        with ThreadPoolExecutor(_CREATED_AT_ONCE, "create") as pool:
            list(pool.map(lambda actor_id: self.admit(actor_id, self.create(actor_id)), actor_ids))

    def find(self, actor_id: Id) -> Any | None:
        """Return the actor of that name if there is one."""
        try:
            return ray.get_actor(actor_id, NAMESPACE)
        except ValueError:
            return None

    def find_again(self, actor_id: Id) -> None:
        """Make a member of the actor of that name; one that is gone is a dead member."""
        handle = self.find(actor_id)
        if handle is not None:
            self.admit(actor_id, handle)
        else:
            self.facts[actor_id] = {"id": actor_id, "state": "dead"}

    @staticmethod
    def named(prefix: str) -> list[Any]:
        """Return the names of this deployment's actors that begin so."""
        return [name for name in list_named_actors() if name.startswith(prefix)]

    def admit(self, actor_id: Id, handle: Any) -> None:
        """Make a created actor a member."""
        _log.tell("member_joined", member=actor_id)
        self.handles[actor_id] = handle
        self.facts[actor_id] = {"id": actor_id, "state": "starting"}

    def dismiss(self, actor_id: Id, *, returns: bool = False) -> None:
        """End a member, or what is left of it, and free what was reserved for it.

        Args:
            actor_id: the member.
            returns: it is started again at once; nobody sees a fleet without it meanwhile.
        """
        handle = self.handles.pop(actor_id, None)
        if returns:
            self.facts[actor_id] = {"id": actor_id, "state": "starting"}
        else:
            self.facts.pop(actor_id, None)
        _log.tell("member_left", member=actor_id)
        try:
            # One that a former controller started is known by its name alone.
            ray.kill(handle or ray.get_actor(actor_id, NAMESPACE))
        except ValueError:
            _log.tell("member_gone_already", member=actor_id)
        _free_room(actor_id)

    def ask(self, timeout_s: float) -> None:
        """Ask all members how they are, together at most timeout_s. One thread at a time.

        A member that has not answered an earlier question is not waited for again: it costs the others no time.
        """
        handles = dict(self.handles)
        self._asked = {i: asked for i, asked in self._asked.items() if handles.get(i) is asked[0]}
        fresh = [i for i in handles if i not in self._asked]
        self._asked |= {i: (handles[i], handles[i].describe.remote()) for i in fresh}
        if fresh:
            ray.wait([self._asked[i][1] for i in fresh], num_returns=len(fresh), timeout=timeout_s)
        for actor_id, handle in handles.items():
            answer = self._answer(actor_id)
            if self.handles.get(actor_id) is handle:
                _tell_change(actor_id, self.facts.get(actor_id, {}).get("state"), answer["state"])
                self.facts[actor_id] = answer

    def wait_for_all(self, calls: Mapping[Id, Any], timeout_s: float, give_up: threading.Event | None = None) -> None:
        """Wait for a call to each of these members, which may be long, as long as they are there. The asking thread.

        Args:
            calls: by member.
            timeout_s: longest wait.
            give_up: ends the wait when it is set.

        Raises:
            ExpertMeshError: the first failure; UnavailableError: a member is gone or silent, timeout_s is over, or
                give_up was set.
        """
        deadline_s = time.monotonic() + timeout_s
        look_s = time.monotonic() + _WATCH_S
        pending = list(calls.values())
        while pending:
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_LOOK_AGAIN_S)
            wait_for(done, _WATCH_S)
            if not pending:
                return
            if give_up is not None and give_up.is_set():
                raise UnavailableError("given up: a shard was lost meanwhile")
            if time.monotonic() < look_s:
                continue
            self.ask(_SILENCE_S)
            look_s = time.monotonic() + _WATCH_S
            away = [i for i, call in calls.items() if call in pending and i not in self.ready]
            if away or time.monotonic() > deadline_s:
                raise UnavailableError(f"no answer from {', '.join(away) or f'all of them in {timeout_s:g} s'}")

    def _answer(self, actor_id: Id) -> dict[str, Any]:
        """Return what a member said if it has answered, else what it said before with the state that follows."""
        try:
            answer: dict[str, Any] = ray.get(self._asked[actor_id][1], timeout=0)
        except GetTimeoutError:
            return {**self.facts.get(actor_id, {"id": actor_id}), "state": "unresponsive"}
        except ActorUnavailableError:  # cut off, which may pass
            answer = {**self.facts.get(actor_id, {"id": actor_id}), "state": "unresponsive"}
        except RayActorError:
            answer = {**self.facts.get(actor_id, {"id": actor_id}), "state": "dead"}
        del self._asked[actor_id]
        return answer


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


def try_all(references: Sequence[Any], timeout_s: float) -> None:
    """Wait for all calls, together at most timeout_s; one that fails is logged, and a later round makes up for it."""
    if not references:
        return
    done, pending = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    if pending:
        _log.tell("members_untold", num_untold=len(pending), num_members=len(references), timeout_s=timeout_s)
    for reference in done:
        try:
            wait_for([reference], timeout_s)
        except UnavailableError as error:
            _log.tell("member_untold", reason=reason_of(error))


def _tell_change(member: str, before: str | None, now: str) -> None:
    if now != before:
        _log.tell("member_lost" if now in ("dead", "unresponsive") else "member_state", member=member, state=now)


def _free_room(actor_id: str) -> None:
    """Give back what is reserved for an actor."""
    for group in placement_group_table().values():
        if group["name"].startswith(_group_prefix(actor_id)) and group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))


def _group_prefix(actor_id: str) -> str:
    return f"pg-{actor_id}~"


def natural(actor_id: str) -> tuple[int, str]:
    """Return the key that orders shard-10 after shard-9."""
    return len(actor_id), actor_id
