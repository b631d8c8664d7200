"""Each operation with the controller killed at each point where it changes something outside: it ends whole.

The fleet and the store outlive the controller; what a controller has in memory does not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.links.ends import LinkEnd
from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ShardId, WorkerId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, initial_placement

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
SHARDS = ["shard-0", "shard-1"]
WORKERS = ["worker-0", "worker-1"]
OTHER = initial_placement((0,), 4, [ShardId("shard-1"), ShardId("shard-0")], 2)
ASKS: dict[str, Callable[[Operator], Operation]] = {
    "more shards and workers": lambda operator: operator.scale(3, 4),
    "fewer shards and workers": lambda operator: operator.scale(1, 1),
    "one tier up, one down": lambda operator: operator.scale(4, 1),
    "a shard drained": lambda operator: operator.drain("shard-0"),
    "a worker drained": lambda operator: operator.drain("worker-0"),
    "another placement": lambda operator: operator.go_to(OTHER, "rebalance"),
}
_MOST_EFFECTS = 40


class KilledError(BaseException):
    """The controller is gone."""


@dataclass
class World:
    """What outlives a controller: processes, the members and the placement in force, the store."""

    processes: set[str] = field(default_factory=lambda: {*SHARDS, *WORKERS})
    members: tuple[list[str], list[str]] = (SHARDS, WORKERS)
    placement: Placement = field(default_factory=lambda: initial_placement((0,), 4, [ShardId(s) for s in SHARDS], 1))
    operations: list[Operation] = field(default_factory=list)
    num_effects: int = 0
    killed_at: int = -1
    is_killed: bool = False

    def effect(self) -> None:
        """Be killed here, or go on."""
        self.is_killed = self.is_killed or self.num_effects == self.killed_at
        if self.is_killed:
            raise KilledError
        self.num_effects += 1

    def load_operations(self) -> list[Operation]:
        return list(self.operations)

    def save_operation(self, operation: Operation) -> None:
        self.effect()
        self.operations = [operation, *(o for o in self.operations if o.id != operation.id)]


class Keeper:
    """A keeper's memory, over a world. broken: members whose processes cannot be started."""

    def __init__(self, world: World, broken: frozenset[str] = frozenset()) -> None:
        self._world = world
        self._broken = broken
        self.placement = world.placement
        self.shard_ids, self.worker_ids = (list(members) for members in world.members)
        self.replicas = 1
        self.expert_bytes = 1
        self.known = world.processes & {*self.shard_ids, *self.worker_ids}

    def alarm(self) -> None:
        """There is no thread to wake."""

    @property
    def shards(self) -> Any:
        facts = {s: {"link_end": LinkEnd(node="here"), "free_bytes": 1 << 30} for s in self.known}
        return SimpleNamespace(ready=[m for m in self.known if m.startswith("shard")], facts=facts, nodes={})

    @property
    def workers(self) -> Any:
        return SimpleNamespace(ready=[m for m in self.known if m.startswith("worker")], facts={})

    def start_member(self, member: str) -> None:
        self._world.effect()
        if member in self._broken:
            raise UnavailableError(f"{member} cannot be started")
        self._world.processes.add(member)
        self._world.effect()
        self.known.add(member)

    def end_member(self, member: str) -> None:
        self._world.effect()
        self._world.processes.discard(member)
        self.known.discard(member)

    def change_members(self, shards: list[ShardId], workers: list[WorkerId]) -> None:
        self._world.effect()
        self._world.members = (list(shards), list(workers))
        self._world.effect()
        self.shard_ids, self.worker_ids = (list(members) for members in self._world.members)

    def adopt(self, target: Placement) -> None:
        self._world.effect()
        self._world.placement = self.placement = target
        self._world.effect()


def controller(world: World, broken: frozenset[str] = frozenset()) -> Operator:
    """Start a controller: all that it knows is what the world holds."""
    operator = Operator(Keeper(world, broken), world)  # type: ignore[arg-type]  # a fleet and a store in memory
    operator.resume()
    return operator


def finish(operator: Operator) -> None:
    """Step as the keeper's rounds do, until nothing is under way."""
    for _ in range(20):
        operator.step()
        starting = operator._starting
        if starting is not None:
            starting.join(10)
    assert operator.current is None


def outcome(world: World) -> tuple[set[str], tuple[list[str], list[str]], list[Any]]:
    slots = [(slots.shard, set(slots.experts)) for slots in world.placement.shards]
    return world.processes, world.members, sorted(slots, key=lambda of: of[0])


def outcome_undisturbed(ask: Callable[[Operator], Operation]) -> Any:
    world = World()
    operator = controller(world)
    ask(operator)
    finish(operator)
    assert world.operations[0].phase is Phase.DONE
    return outcome(world)


@pytest.mark.parametrize("ask", ASKS.values(), ids=list(ASKS))
def test_killed_at_any_point_it_is_done_or_was_never_begun(ask: Callable[[Operator], Operation]) -> None:
    done, untouched = outcome_undisturbed(ask), outcome(World())
    assert done != untouched
    phases: set[Phase] = set()
    for killed_at in range(_MOST_EFFECTS):
        world = World(killed_at=killed_at)
        with pytest.raises(KilledError):  # noqa: PT012  the controller may be killed in either
            operator = controller(world)
            ask(operator)
            finish(operator)
            world.killed_at = -2
            raise KilledError
        if world.killed_at == -2:
            break
        phases |= {operation.phase for operation in world.operations}
        world.is_killed, world.killed_at = False, -1
        finish(controller(world))
        if not world.operations:
            assert outcome(world) == untouched, killed_at
        else:
            assert world.operations[0].phase is Phase.DONE, killed_at
            assert outcome(world) == done, killed_at
    else:
        pytest.fail("it never came to its end")
    assert phases >= {Phase.PREPARE, Phase.COMMIT, Phase.DRAIN}, "it was killed in every phase"


@pytest.mark.parametrize("name", ["more shards and workers", "one tier up, one down"])
def test_killed_and_then_unable_to_start_anything_it_is_done_or_rolled_back(name: str) -> None:
    done, untouched = outcome_undisturbed(ASKS[name]), outcome(World())
    for killed_at in range(1, _MOST_EFFECTS):
        world = World(killed_at=killed_at)
        operator = controller(world)
        try:
            ASKS[name](operator)
            finish(operator)
        except KilledError:
            world.is_killed, world.killed_at = False, -1
        else:
            break
        added = done[0] - untouched[0]
        world.processes -= added
        finish(controller(world, broken=frozenset(added)))
        processes, members, slots = outcome(world)
        if world.operations[0].phase is Phase.ROLLED_BACK:
            assert (processes, members, slots) == untouched, killed_at
        else:  # who joined is a member; starting it again is up to the keeper
            assert (processes | added, members, slots) == done, killed_at
