"""What `expertmesh chaos` does to a server, one scenario for each row of its table."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import psutil

from expertmesh.actors.cli.chaos_streams import Streams
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.placement import Placement, ShardSlots
from expertmesh.v1.admin_pb2 import (
    GetPlacementRequest,
    GetStatusRequest,
    ListOperationsRequest,
    Operation,
    PlacementRecord,
    ScaleRequest,
    StatusResponse,
)
from expertmesh.v1.admin_pb2_grpc import AdminStub

_WHOLE_TIMEOUT_S = 90.0
_STOPPED_S = 3.0
# How long prompts keep to a topic, and from which balancedness on the shards count as level.
_TOPIC_S = 60.0
_LEVEL = 0.9


class Target:
    """A running server, the streams from it, what was done to it, and what was found out meanwhile."""

    def __init__(self, channel: grpc.aio.Channel, streams: Streams, seed: int, cycles: int, minutes: float) -> None:
        self._admin = AdminStub(channel)
        self.streams = streams
        self.rng = random.Random(seed)
        self.cycles = cycles
        self.minutes = minutes
        self.marks: list[tuple[float, str]] = []
        self.facts: dict[str, Any] = {}

    async def status(self) -> StatusResponse:
        """Return the server's status; waits while the controller is away."""
        deadline_s = time.monotonic() + _WHOLE_TIMEOUT_S
        while True:
            try:
                return await self._admin.GetStatus(GetStatusRequest(), timeout=10)
            except grpc.RpcError as error:
                if time.monotonic() > deadline_s:
                    raise UnavailableError(f"no status for {_WHOLE_TIMEOUT_S:.0f} s: {error.details()}") from error
            await asyncio.sleep(0.2)

    async def whole(self) -> StatusResponse:
        """Wait until everything is ready again."""
        deadline_s = time.monotonic() + _WHOLE_TIMEOUT_S
        while True:
            status = await self.status()
            states = {*(s.state for s in status.shards), *(w.state for w in status.workers)}
            if status.ready and states == {"ready"} and all(s.num_slots for s in status.shards):
                return status
            if time.monotonic() > deadline_s:
                raise UnavailableError(f"not whole after {_WHOLE_TIMEOUT_S:.0f} s: {status.not_ready_reason} {states}")
            await asyncio.sleep(0.2)

    def signal(self, pid: int, number: signal.Signals, what: str) -> None:
        """Send a signal and note it; a process that is gone already is noted as such.

        Raises:
            UnavailableError: there is no process yet (0), so that nothing was done to the server.
        """
        if not pid:
            raise UnavailableError(f"{what}: it has no process yet")
        try:
            psutil.Process(pid).send_signal(number)
        except psutil.NoSuchProcess:
            what += " (gone already)"
        self.marks.append((time.monotonic(), what))

    async def scale(self, shards: int, workers: int) -> None:
        """Scale, and wait for its end."""
        self.marks.append((time.monotonic(), f"{shards} shards, {workers} workers"))
        await self._finish(await self._admin.Scale(ScaleRequest(shards=shards, workers=workers), timeout=30))

    async def placement(self) -> Placement:
        """Return the placement in force."""
        return Placement.from_bytes((await self._admin.GetPlacement(GetPlacementRequest(), timeout=30)).record)

    async def go_to(self, placement: Placement) -> None:
        """Put a placement in force, and wait for its end."""
        await self._finish(await self._admin.SetPlacement(PlacementRecord(record=placement.to_bytes()), timeout=30))

    async def _finish(self, operation: Operation) -> None:
        while operation.phase not in ("DONE", "ROLLED_BACK"):
            await asyncio.sleep(0.2)
            listed = await self._admin.ListOperations(ListOperationsRequest(id=operation.id), timeout=30)
            operation = listed.operations[0]
        if operation.phase != "DONE":
            raise UnavailableError(f"{operation.request} was rolled back: {operation.error}")


@dataclass(frozen=True)
class Scenario:
    """A row: how the server is started, and what is done to it while the streams run.

    fleets: shards and workers that it may have meanwhile. A token's sum over shards is rounded otherwise for each
    number of shards, so undisturbed outputs are wanted of all of them.
    """

    name: str
    act: Callable[[Target], Awaitable[None]]
    shards: int = 2
    workers: int = 1
    replicas: int = 1
    topics: tuple[str, ...] = ("mixed",)
    fleets: tuple[tuple[int, int], ...] = ()
    config: dict[str, float] = field(default_factory=dict)


async def _kill_shard(target: Target) -> None:
    status = await target.status()
    target.signal(status.shards[0].pid, signal.SIGKILL, "SIGKILL shard-0")
    await target.whole()


async def _stop_shard(target: Target) -> None:
    await _stop(target, (await target.status()).shards[0].pid, "shard-0")


async def _stop_worker(target: Target) -> None:
    await _stop(target, (await target.status()).workers[0].pid, "worker-0")


async def _stop(target: Target, pid: int, name: str) -> None:
    target.signal(pid, signal.SIGSTOP, f"SIGSTOP {name}")
    await asyncio.sleep(_STOPPED_S)
    target.signal(pid, signal.SIGCONT, "SIGCONT")
    await target.whole()


async def _kill_worker(target: Target) -> None:
    target.signal((await target.status()).workers[0].pid, signal.SIGKILL, "SIGKILL worker-0")
    await target.whole()


async def _kill_controller(target: Target) -> None:
    target.signal((await target.status()).controller.pid, signal.SIGKILL, "SIGKILL controller")
    await asyncio.sleep(1)
    await target.whole()


async def _kill_redis(target: Target) -> None:
    target.signal(_redis_pid((await target.status()).controller.pid), signal.SIGKILL, "SIGKILL Redis")
    await asyncio.sleep(3)
    await target.whole()


def _redis_pid(controller_pid: int) -> int:
    for child in psutil.Process(controller_pid).children(recursive=True):
        if "redis" in child.name():
            return int(child.pid)
    raise UnavailableError("the controller has no Redis of its own")


async def _scale_cycles(target: Target) -> None:
    """Scale up and down. After each cycle the server's memory is read: what its processes have for themselves."""
    memory: list[Counter[str]] = []
    for _ in range(target.cycles):
        await target.scale(4, 2)
        await target.scale(2, 1)
        memory.append(await asyncio.to_thread(_own_bytes_by_kind))
    target.facts["memory_mib_after_each_cycle"] = [of.total() >> 20 for of in memory]
    target.facts["memory_mib_of_each_kind_of_process"] = {
        kind: [of[kind] >> 20 for of in memory] for kind, _ in memory[-1].most_common()
    }


def _own_bytes_by_kind() -> Counter[str]:
    """Return the memory that this process's children have for themselves, by the name of what they run."""
    found: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # ended meanwhile
            found[process.name().split(".")[0]] += process.memory_full_info().uss
    return found


async def _move_experts(target: Target) -> None:
    """Move every third expert of each shard to the next, and back, again and again."""
    home = await target.placement()
    shards = home.shards
    away = []
    for at, slots in enumerate(shards):
        stay = tuple(key for key in slots.experts if key.expert % 3)
        come = tuple(key for key in shards[at - 1].experts if key.expert % 3 == 0)
        away.append(ShardSlots(shard=slots.shard, experts=stay + come))
    num_moves = sum(key.expert % 3 == 0 for slots in shards for key in slots.experts)
    for _ in range(target.cycles):
        for placement in (replace(home, shards=tuple(away)), home):
            target.marks.append((time.monotonic(), f"{num_moves} experts move"))
            await target.go_to(placement)
    target.facts["experts_moved"] = 2 * target.cycles * num_moves


async def _switch_topic(target: Target) -> None:
    """Let all prompts change their topic, and see how soon the shards are level again."""
    target.streams.topic = "code"
    await asyncio.sleep(_TOPIC_S)
    target.facts["balancedness_before"] = (await target.status()).recent_balancedness
    target.streams.topic = "tables"
    start_s = time.monotonic()
    target.marks.append((start_s, "topic: tables"))
    seen: list[tuple[float, float]] = []
    while time.monotonic() < start_s + _TOPIC_S:
        await asyncio.sleep(1)
        seen.append((time.monotonic() - start_s, (await target.status()).recent_balancedness))
    below = [at_s for at_s, value in seen if value < _LEVEL]
    target.facts["lowest_balancedness"] = min(value for _, value in seen)
    target.facts["last_balancedness"] = seen[-1][1]
    # From then on it was level for good; the streams of the old topic have ended by the time it is first below.
    target.facts["level_again_after_s"] = max(below, default=0.0)


async def _random_faults(target: Target) -> None:
    end_s = time.monotonic() + 60 * target.minutes
    while time.monotonic() < end_s:
        await asyncio.sleep(5)
        status = await target.status()
        if not (status.shards and status.workers):
            continue  # a controller that has just come back knows nobody yet
        shard, worker = target.rng.choice(status.shards), target.rng.choice(status.workers)
        match target.rng.randrange(5):
            case 0 if shard.pid:
                target.signal(shard.pid, signal.SIGKILL, f"SIGKILL {shard.id}")
            case 1 if shard.pid:
                target.signal(shard.pid, signal.SIGSTOP, f"SIGSTOP {shard.id}")
                await asyncio.sleep(_STOPPED_S)
                target.signal(shard.pid, signal.SIGCONT, f"SIGCONT {shard.id}")
            case 2 if worker.pid:
                target.signal(worker.pid, signal.SIGKILL, f"SIGKILL {worker.id}")
            case 3:
                target.signal(status.controller.pid, signal.SIGKILL, "SIGKILL controller")
            case _:
                target.signal(_redis_pid(status.controller.pid), signal.SIGKILL, "SIGKILL Redis")
    await target.whole()


SCENARIOS = (
    Scenario("SIGKILL of a shard, experts replicated", _kill_shard, replicas=2),
    Scenario("SIGKILL of a shard, sole copies", _kill_shard),
    Scenario("SIGSTOP of a shard", _stop_shard, replicas=2, config={"link_timeout_s": 1.0}),
    Scenario("SIGKILL of a worker, another alive", _kill_worker, workers=2),
    Scenario("SIGSTOP of a worker, another alive", _stop_worker, workers=2, config={"worker_timeout_s": 1.0}),
    Scenario("SIGKILL of the controller", _kill_controller),
    Scenario("SIGKILL of Redis", _kill_redis),
    Scenario("shards 2-4-2, workers 1-2-1", _scale_cycles, fleets=((4, 2), (2, 1))),
    Scenario("experts move", _move_experts, shards=3, config={"rebalance_period_s": 0, "weights_period_s": 0}),
    Scenario("prompts switch topic", _switch_topic, shards=4, topics=("mixed", "code", "tables")),
    Scenario("random faults", _random_faults, shards=3, workers=2, replicas=2, config={"link_timeout_s": 1.0}),
)
