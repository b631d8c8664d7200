"""Members that move off nodes which are to end, in memory: beside the operator, with faults, killed at any point."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.actors.controller.handover import Handover
from expertmesh.actors.controller.node_watch import NodeWatch
from expertmesh.actors.controller.operator import Operator
from expertmesh.actors.links.ends import LinkEnd
from expertmesh.actors.runtime import Room
from expertmesh.cluster.errors import CapacityError, ConflictError, UnavailableError
from expertmesh.cluster.evacuation import MAX_ATTEMPTS
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.operations import Operation, Phase
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.watchdog import Watchdog

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
OLD, OTHER, NEW = "node-old", "node-other", "node-new"
AT_FIRST = {"shard-0": OTHER, "shard-1": OLD, "worker-0": OLD}
_MOST_EFFECTS = 60


class KilledError(BaseException):
    """The controller is gone."""


@dataclass
class World:
    """What outlives a controller: processes by their nodes, the members, the store. room: processes that find some."""

    processes: dict[str, str] = field(default_factory=lambda: dict(AT_FIRST))
    dead: set[str] = field(default_factory=set)
    members: tuple[list[str], list[str]] = (["shard-0", "shard-1"], ["worker-0"])
    operations: list[Operation] = field(default_factory=list)
    room: int = 100
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
        kept = [operation if o.id == operation.id else o for o in self.operations]
        self.operations = kept if operation in kept else [operation, *kept]


class Keeper:
    """A keeper's memory, over a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.shard_ids, self.worker_ids = (list(members) for members in world.members)
        self.replicas = self.expert_bytes = 1
        self.known = {*self.shard_ids, *self.worker_ids} & world.processes.keys()
        self.placement: Placement = initial_placement((0,), 4, [ShardId(s) for s in self.shard_ids], 1)
        self.refuses = False
        self.running = dict.fromkeys(world.processes, 0)
        self.may_start = threading.Event()
        self.may_start.set()

    def alarm(self) -> None:
        """There is no thread to wake."""

    def _tier(self, prefix: str) -> Any:
        facts = {
            m: {
                "state": "dead" if m in self._world.dead else "ready", "node": self._world.processes.get(m, ""),
                "link_end": LinkEnd(node="here"), "free_bytes": 1 << 30, "epoch": 1, "running": self.running.get(m, 0),
            }
            for m in self.known if m.startswith(prefix)
        }  # fmt: skip
        return SimpleNamespace(ready=[m for m in facts if facts[m]["state"] == "ready"], facts=facts, nodes={})

    @property
    def shards(self) -> Any:
        return self._tier("shard-")

    @property
    def workers(self) -> Any:
        return self._tier("worker-")

    def start_member(self, member: str, room: Room | None = None) -> None:
        self._world.effect()
        while not self.may_start.wait(0.01):
            if room is not None and room.give_up is not None and room.give_up.is_set():
                raise CapacityError(f"no room for {member}: given up")
        if member not in self._world.processes:
            if self._world.room < 1:
                raise CapacityError(f"no room for {member}")
            self._world.room -= 1
            self._world.processes[member] = NEW
        self._world.effect()
        self.known.add(member)

    def end_member(self, member: str) -> None:
        self._world.effect()
        assert member not in self.shard_ids, "experts would be without an owner"
        self._world.processes.pop(member, None)
        self.known.discard(member)

    def change_members(self, shards: list[str], workers: list[str]) -> None:
        self._world.effect()
        self._world.members = (list(shards), list(workers))
        self._world.effect()
        self.shard_ids, self.worker_ids = list(shards), list(workers)

    def replace_members(self, heirs: dict[str, str]) -> None:
        if self.refuses:
            raise UnavailableError("a shard was lost meanwhile")
        assert all(new in self._world.processes for new in heirs.values())
        shards, workers = ([heirs.get(m, m) for m in ids] for ids in (self.shard_ids, self.worker_ids))
        self.change_members(shards, workers)

    def adopt(self, target: Placement) -> None:
        assert {slots.shard for slots in target.shards} == set(self.shard_ids), "of other members"
        self._world.effect()


def controller(world: World, leaving: dict[str, float] | None = None) -> tuple[Operator, Keeper]:
    """Start a controller that knows what the world holds, and hears that the old node ends in a while."""
    keeper = Keeper(world)
    operator = Operator(keeper, world, room_timeout_s=5.0)  # type: ignore[arg-type]  # a fleet and a store in memory
    operator.resume()
    operator.evacuations.hear({OLD: time.time() + 600} if leaving is None else leaving)
    return operator, keeper


def step(operator: Operator, times: int = 12) -> None:
    """Step as the keeper's rounds do; whoever is being started is started between them."""
    for _ in range(times):
        operator.step()
        starts: list[Any] = [*operator.evacuations._starts.values(), operator._starting]
        for start in filter(None, starts):
            start.join(10)


def requests(operator: Operator) -> dict[str, Phase]:
    return {operation.request: operation.phase for operation in operator.all()}


def test_each_member_of_the_node_gets_a_successor_and_is_ended() -> None:
    world = World()
    operator, _ = controller(world)
    step(operator)
    assert world.members == (["shard-0", "shard-2"], ["worker-1"])
    assert world.processes == {"shard-0": OTHER, "shard-2": NEW, "worker-1": NEW}
    assert requests(operator) == {
        "move shard-1 off node node-old": Phase.DONE,
        "move worker-0 off node node-old": Phase.DONE,
    }
    step(operator)
    assert len(operator.all()) == 2, "nothing is left to move"


def test_one_without_room_stays_and_holds_up_no_other() -> None:
    world = World(room=1)
    operator, _ = controller(world)
    step(operator, 40)
    assert sorted(map(len, world.members)) == [1, 2]
    stayed = [member for member, node in world.processes.items() if node == OLD]
    assert len(stayed) == 1
    failed = [o for o in operator.all() if o.phase is Phase.ROLLED_BACK]
    assert [o.removing for o in failed] == [tuple(stayed)] * MAX_ATTEMPTS
    assert all("no room" in o.error for o in failed)
    assert not operator.evacuations.under_way


def test_experts_that_cannot_move_yet_move_later() -> None:
    operator, keeper = controller(World())
    keeper.refuses = True
    step(operator)
    assert {o.phase for o in operator.evacuations.under_way} == {Phase.COMMIT}
    keeper.refuses = False
    step(operator)
    assert set(requests(operator).values()) == {Phase.DONE}


def test_experts_that_cannot_move_until_the_node_ends_stay() -> None:
    operator, keeper = controller(World(), {OLD: time.time() + 0.2})
    keeper.refuses = True
    step(operator)
    while operator.evacuations.under_way:
        step(operator, 1)
    assert {(o.phase, o.error) for o in operator.all()} == {(Phase.ROLLED_BACK, "a shard was lost meanwhile")}
    assert keeper.known == AT_FIRST.keys()


def test_one_that_dies_without_a_successor_in_sight_is_left_to_who_replaces_the_dead() -> None:
    world = World()
    operator, keeper = controller(world)
    keeper.may_start.clear()
    operator.step()
    assert operator.evacuations.moving == {"shard-1", "worker-0"}
    world.dead = {"shard-1", "worker-0"}
    step(operator)
    assert {o.phase for o in operator.all()} == {Phase.ROLLED_BACK}
    assert not operator.evacuations.moving
    assert world.members == (["shard-0", "shard-1"], ["worker-0"]), "their number does not change"


def test_a_worker_is_ended_when_every_gateway_knows_and_its_sequences_are_elsewhere() -> None:
    world = World()
    operator, keeper = controller(world)
    keeper.running["worker-0"] = 2
    operator.handover.inform("gateway-0", [], time.monotonic())
    step(operator)
    assert operator.leaving_workers == ["worker-0"]
    assert world.members[1] == ["worker-1"]
    keeper.running["worker-0"] = 0
    step(operator)
    assert "worker-0" in world.processes, "the gateway may be about to give it a request"
    operator.handover.inform("gateway-0", operator.leaving_workers, time.monotonic())
    step(operator)
    assert "worker-0" not in world.processes
    assert operator.leaving_workers == []


def test_a_shard_is_ended_when_every_worker_uses_the_placement_without_it() -> None:
    world = World()
    operator, keeper = controller(world)
    object.__setattr__(keeper.placement, "epoch", 2)
    step(operator)
    assert "shard-1" in world.processes
    object.__setattr__(keeper.placement, "epoch", 1)
    step(operator)
    assert "shard-1" not in world.processes


def test_a_gateway_that_is_gone_is_not_waited_for() -> None:
    handover = Handover()
    assert handover.is_known("worker-0", 0.0)
    handover.inform("gateway-0", [], 0.0)
    handover.inform("gateway-1", ["worker-0"], 1.0)
    assert not handover.is_known("worker-0", 1.0)
    assert handover.is_known("worker-0", 5.5)


ASKS: dict[str, tuple[Callable[[Operator], Operation], tuple[int, int]]] = {
    "more": (lambda operator: operator.scale(4, 2), (4, 2)),
    "fewer": (lambda operator: operator.scale(1, None), (1, 1)),
    "one that moves is drained": (lambda operator: operator.drain(operator._keeper.shard_ids[1]), (1, 1)),
    "one that stays is drained": (lambda operator: operator.drain(operator._keeper.shard_ids[0]), (1, 1)),
}


@pytest.mark.parametrize(("ask", "numbers"), ASKS.values(), ids=list(ASKS))
@pytest.mark.parametrize("asked_after", range(8))
def test_what_an_operator_asks_for_meanwhile_is_done_as_well(
    ask: Callable[[Operator], Operation], numbers: tuple[int, int], asked_after: int
) -> None:
    world = World()
    operator, _ = controller(world)
    step(operator, asked_after)
    asked = ask(operator)
    step(operator, 30)
    assert operator.get(asked.id).phase is Phase.DONE, operator.get(asked.id).error
    assert tuple(map(len, world.members)) == numbers
    assert world.processes.keys() == {m for members in world.members for m in members}
    assert OLD not in world.processes.values()


def test_fewer_are_those_that_would_have_to_move() -> None:
    world = World(processes={"shard-0": OLD, "shard-1": OTHER, "worker-0": OTHER})
    operator, keeper = controller(world)
    keeper.may_start.clear()
    operator.step()
    operator.scale(1, None)
    keeper.may_start.set()
    step(operator, 30)
    assert world.members == (["shard-1"], ["worker-0"])
    assert world.processes == {"shard-1": OTHER, "worker-0": OTHER}


def test_a_placement_that_is_asked_for_waits_for_nobody_and_nobody_is_moved_under_it() -> None:
    operator, keeper = controller(World())
    keeper.may_start.clear()
    operator.step()
    with pytest.raises(ConflictError, match="is under way: move shard-1 off node node-old"):
        operator.go_to(keeper.placement, "rebalance")
    keeper.may_start.set()
    step(operator)
    keeper.placement = initial_placement((0,), 4, [ShardId(s) for s in keeper.shard_ids], 1)
    assert operator.go_to(keeper.placement, "rebalance").phase is Phase.PREPARE


def test_members_move_when_a_placement_that_was_asked_for_is_in_force() -> None:
    operator, keeper = controller(World(), {})
    operator.go_to(keeper.placement, "rebalance")
    operator.evacuations.hear({OLD: time.time() + 600})
    step(operator)
    assert {o.phase for o in operator.all()} == {Phase.DONE}
    assert len(operator.all()) == 3


def test_processes_beside_the_members_are_not_counted() -> None:
    operator, keeper = controller(World())
    surplus: list[set[str]] = []
    for _ in range(8):
        surplus.append(keeper.known - operator.evacuations.surplus - {*keeper.shard_ids, *keeper.worker_ids})
        assert len(keeper.known - operator.evacuations.surplus) == 3
        step(operator, 1)
    assert not any(surplus)
    assert not operator.evacuations.surplus


def test_nodes_are_told_of_once_when_they_are_to_end_and_once_when_nothing_is_left() -> None:
    said: list[str] = []
    keeper = Keeper(World())
    operator = Operator(keeper, World(), note=said.append)  # type: ignore[arg-type]  # a fleet and a store in memory
    operator.evacuations.hear({OLD: time.time() + 600.2, OTHER: math.inf, "elsewhere": 1.0})
    assert [line.partition(";")[0] for line in operator.evacuations.warnings(time.time())] == [
        "node node-old is to end in 600 s", "node de-other is to end",
    ]  # fmt: skip
    step(operator, 20)
    assert sorted(said) == [
        "node de-other is to end; shard-0 move off it",
        "node node-old is to end in 600 s; shard-1, worker-0 move off it",
        "shard-0 moved off node de-other; nothing is left on it",
        "shard-1, worker-0 moved off node node-old; nothing is left on it",
    ]
    assert operator.evacuations.warnings(time.time()) == []


def test_who_has_moved_is_said_when_the_node_is_gone_at_once_and_nothing_of_who_died() -> None:
    said: list[str] = []
    world = World()
    keeper = Keeper(world)
    operator = Operator(keeper, world, note=said.append)  # type: ignore[arg-type]  # a fleet and a store in memory
    operator.evacuations.hear({OLD: time.time() + 600})
    while "shard-1" in world.processes:
        step(operator, 1)
    operator.evacuations.hear({OTHER: math.inf})
    world.dead = {"shard-0"}
    step(operator)
    assert [line for line in said if "moved" in line] == [
        "shard-1, worker-0 moved off node node-old; nothing is left on it"
    ]


def test_killed_at_any_point_it_goes_on_or_begins_anew() -> None:
    phases: set[Phase] = set()
    for killed_at in range(_MOST_EFFECTS):
        world = World(killed_at=killed_at)
        with pytest.raises(KilledError):  # noqa: PT012  the controller may be killed anywhere
            operator, _ = controller(world)
            step(operator)
            if not world.is_killed:
                world.killed_at = -2
            raise KilledError
        if world.killed_at == -2:
            break
        phases |= {operation.phase for operation in world.operations}
        world.is_killed, world.killed_at = False, -1
        operator, _ = controller(world)
        step(operator, 20)
        assert tuple(map(len, world.members)) == (2, 1), killed_at
        assert world.processes.keys() == {m for members in world.members for m in members}, killed_at
        assert OLD not in world.processes.values(), killed_at
        assert {o.phase for o in operator.all()} == {Phase.DONE}, "what was begun is gone on with"
    else:
        pytest.fail("it never came to its end")
    assert phases >= {Phase.PREPARE, Phase.COMMIT, Phase.DRAIN}, "it was killed in every phase"


def test_the_watch_tells_what_has_changed_and_keeps_what_it_knows_while_ray_is_silent() -> None:
    looks: list[dict[str, float] | Exception] = [
        {},
        {OLD: 7.0},
        {OLD: 7.0},
        UnavailableError("away"),
        KeyError("x"),
        {},
    ]
    told: list[object] = []

    def look(timeout_s: float) -> dict[str, float]:
        found = looks.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    watchdog = Watchdog()
    watchdog.expect("look at nodes that end", 1.0, patience=2.0)
    watch = NodeWatch(look, told.append, watchdog)
    for second in range(3):
        watch.step(float(second))
    assert told == [{OLD: 7.0}]
    watch.step(10.0)
    assert "away" in watchdog.stalled(10.0)[0]
    watch.step(11.0)
    assert told == [{OLD: 7.0}]
    watch.step(12.0)
    assert told == [{OLD: 7.0}, {}]
    assert not watchdog.stalled(12.0)
