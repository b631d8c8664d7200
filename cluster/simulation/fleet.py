"""The fleet in virtual time: who lives, which placement is in force, what is being copied, what the loops propose.

It follows actors/controller/keeper.py, with the decisions that the keeper uses: a sole copy that is lost is loaded at
once (and steps stand still for it); everything else is copied behind the traffic, one placement after the other, while
the last one serves; the loops look only while all is calm.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from expertmesh.cluster.attendance import given_up, is_settled
from expertmesh.cluster.balancer_types import ShardFacts
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.load_following import LoadFollower, Proposal, Seen, shard_facts
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.repair import repair
from expertmesh.cluster.simulation.copying import Copies, copies
from expertmesh.cluster.simulation.faults import Fault
from expertmesh.cluster.simulation.observation import Observation
from expertmesh.cluster.simulation.results import Event
from expertmesh.cluster.simulation.routing import Routing
from expertmesh.cluster.simulation.scaling import Scaling
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.step_time import StepClock

_COLLECT_PERIOD_S = 1.0  # as of actors/controller/balancing.py


class _Move(NamedTuple):
    """Copies under way to a placement; members: the shards that there are to be afterwards."""

    done_s: float
    target: Placement
    copies: Copies
    kind: str
    text: str
    members: tuple[ShardId, ...]


class Fleet:
    """Call `advance` with times that do not fall, then read `routing`; `observation` is to be told of steps."""

    def __init__(
        self, clock: StepClock, layers: Sequence[int], settings: SimulationSettings, faults: Sequence[Fault]
    ) -> None:
        num_experts, num_shards = clock.shape.num_experts, clock.plan.ep
        self._clock, self._settings, self._faults = clock, settings, list(faults)
        self.members = tuple(ShardId(f"shard-{number}") for number in range(num_shards))
        self.placement = initial_placement(
            layers, num_experts, self.members, settings.replicas, nodes=self._racks(self.members)
        )
        self._holding = set(self.members)  # shards that have what the placement gives them
        self._dead_since_s: dict[ShardId, float] = {}
        self._move: _Move | None = None
        self.observation = Observation(len(layers), num_experts, slow_s=settings.slow_s)
        self._follower = LoadFollower(
            replicas=settings.replicas, slow_s=settings.slow_s, can_move=settings.rebalance_period_s > 0
        )
        self._scaling = Scaling(clock, settings, num_slots=len(layers) * num_experts * settings.replicas)
        self._due_s = {"collect": _COLLECT_PERIOD_S}
        if settings.weights_period_s:
            self._due_s["level"] = settings.weights_period_s
        if settings.rebalance_period_s:
            self._due_s["rebalance"] = settings.rebalance_period_s
        self.events: list[Event] = []
        self.weight_changes = 0
        self.looks = dict.fromkeys(("level", "rebalance"), 0)
        self.routing = self._routing()

    @property
    def num_live(self) -> int:
        """Shards that compute."""
        return len(self._holding)

    @property
    def slots(self) -> int:
        """Experts of all layers that a shard has room for."""
        return max(facts.num_slots for facts in self._facts)

    def advance(self, now_s: float) -> float:
        """Do what is due, and return for how long the step that begins now stands still."""
        stall_s = 0.0
        while self._faults and self._faults[0].at_s <= now_s:
            stall_s += self._fail(self._faults.pop(0), now_s)
        if self._dead_since_s:
            self._bring_back(now_s)
        if self._move is not None and self._move.done_s <= now_s:
            self._publish(self._move, now_s)
        if self._move is None:
            self._round(now_s)
        for name, due_s in self._due_s.items():
            if due_s <= now_s:
                self._due_s[name] += self._period_s(name) * (1 + (now_s - due_s) // self._period_s(name))
                self._look(name, now_s)
        return stall_s

    def _period_s(self, name: str) -> float:
        return {
            "collect": _COLLECT_PERIOD_S,
            "level": self._settings.weights_period_s,
            "rebalance": self._settings.rebalance_period_s,
        }[name]

    def _racks(self, shards: Sequence[ShardId]) -> dict[ShardId, str]:
        return {shard: f"rack-{_number(shard) // self._settings.rack_shards}" for shard in shards}

    def _routing(self) -> Routing:
        return Routing(self.placement, np.array([slots.shard in self._holding for slots in self.placement.shards]))

    @property
    def _live(self) -> list[ShardId]:
        return [shard for shard in self.members if shard not in self._dead_since_s]

    def _is_calm(self, now_s: float) -> bool:
        absent = given_up(self._dead_since_s, now_s, self._settings.absence_s)
        return self._move is None and is_settled(
            shards=self.members,
            placed=[slots.shard for slots in self.placement.shards],
            hosting=self._holding,
            starting=self._dead_since_s,
            absent=absent,
        )

    def _fail(self, fault: Fault, now_s: float) -> float:
        """Let shards die; what only they had is loaded by the others. Return how long steps stand still."""
        numbers = fault.shards(self._settings.rack_shards)
        dying = [s for s in self.members if _number(s) in numbers and s not in self._dead_since_s]
        if not dying:
            self.events.append(Event(time_s=now_s, kind="failure", text=f"{fault} was not there any more"))
            return 0.0
        self._dead_since_s |= dict.fromkeys(dying, now_s)
        self._holding -= set(dying)
        self._move = None  # as the keeper gives it up
        if not self._holding:
            raise CapacityError(f"{fault} fails at {fault.at_s:g} s, and no shard is left that hosts experts")
        missing = self.placement.missing(self._holding)
        made = Copies(0, 0, 0.0)
        if missing:
            hosting = [slots.shard for slots in self.placement.shards if slots.shard in self._holding]
            target = repair(self.placement, hosting, {}, replicas=1, level=False)
            made = self._copies(target)
            self.placement = target
        self.routing = self._routing()
        stall_s = self._settings.notice_s + made.seconds
        text = f"{fault} fails, {len(dying)} shards; {len(missing)} experts had no other copy"
        self.events.append(
            Event(
                time_s=now_s,
                kind="failure",
                text=text,
                num_experts=made.num_experts,
                num_bytes=made.num_bytes,
                seconds=stall_s,
            )
        )
        return stall_s

    def _bring_back(self, now_s: float) -> None:
        settings, back = self._settings, list[ShardId]()
        for shard, died_s in list(self._dead_since_s.items()):
            if settings.restart_s is None:
                if now_s >= died_s + settings.spread_after_s:
                    del self._dead_since_s[shard]
                    self.members = tuple(member for member in self.members if member != shard)
            elif now_s >= died_s + settings.restart_s:
                del self._dead_since_s[shard]
                back.append(shard)
        if back:
            self.events.append(Event(time_s=now_s, kind="back", text=f"back, empty: {', '.join(back)}"))

    def _round(self, now_s: float) -> None:
        """Spread the experts over those who live; else go on with what the autoscaler asked for."""
        live = self._live
        placed = {slots.shard for slots in self.placement.shards}
        if not placed == set(live) == self._holding:
            first_s = now_s - self._settings.spread_after_s
            if not any(died_s > first_s for died_s in self._dead_since_s.values()):
                self._move_to(
                    self._spread(live), now_s, "spread", f"experts spread over {len(live)} shards", self.members
                )
            return
        members = self._scaling.due_members(now_s)
        if members is not None and self._is_calm(now_s) and not self._dead_since_s:
            text = f"shards go from {len(self.members)} to {len(members)}"
            self._move_to(self._spread(members), now_s, "scale", text, members)

    def _spread(self, shards: Sequence[ShardId]) -> Placement:
        racks = self._racks(shards)
        return repair(self.placement, shards, {}, replicas=self._settings.replicas, level=True, nodes=racks)

    def _move_to(self, target: Placement, now_s: float, kind: str, text: str, members: tuple[ShardId, ...]) -> None:
        made = self._copies(target)
        self._move = _Move(now_s + made.seconds, target, made, kind, text, members)
        if not made.num_experts:
            self._publish(self._move, now_s)

    def _copies(self, target: Placement) -> Copies:
        shards = {slots.shard for placement in (self.placement, target) for slots in placement.shards}
        return copies(
            self.placement,
            target,
            live=self._holding,
            racks=self._racks(sorted(shards)),
            expert_bytes=self._clock.expert_bytes,
            expert_tp=self._clock.plan.expert_tp,
            settings=self._settings.copying,
        )

    def _publish(self, move: _Move, now_s: float) -> None:
        self._move = None
        if move.members != self.members:
            self._scaling.done(len(move.members))
        self.placement, self.members = move.target, move.members
        self._holding = {slots.shard for slots in move.target.shards}
        self.routing = self._routing()
        made = move.copies
        self.events.append(
            Event(
                time_s=now_s,
                kind=move.kind,
                text=move.text,
                num_experts=made.num_experts,
                num_bytes=made.num_bytes,
                seconds=made.seconds,
            )
        )

    def _look(self, name: str, now_s: float) -> None:
        if name == "collect":
            self.observation.collect(now_s)
            self._scaling.look(now_s, self.observation, self.members)
            return
        if not self._is_calm(now_s):
            return
        self.looks[name] += 1
        decide = self._follower.level if name == "level" else self._follower.rebalance
        proposal = decide(self.placement, self._see(now_s))
        if proposal is not None:
            self._follow(proposal, now_s)

    def _follow(self, proposal: Proposal, now_s: float) -> None:
        if proposal.num_moves:
            self._move_to(proposal.placement, now_s, "moves", proposal.reason, self.members)
        else:
            self.weight_changes += 1
            self.placement = proposal.placement
            self.routing = self._routing()

    def _see(self, now_s: float) -> Seen:
        return Seen(
            fast=self.observation.fast(now_s),
            slow=self.observation.slow(now_s),
            expert_time_s=self.observation.expert_s,
            shards=self._facts,
            expert_bytes=self._clock.expert_bytes,
        )

    @property
    def _facts(self) -> list[ShardFacts]:
        replicas, spare_slots = self._settings.replicas, self._settings.spare_slots
        shards = [slots.shard for slots in self.placement.shards]
        return shard_facts(self.placement, shards, self._racks(shards), replicas=replicas, spare_slots=spare_slots)


def _number(shard: ShardId) -> int:
    return int(shard.rpartition("-")[2])
