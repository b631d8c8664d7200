"""How many shards there are to be: the autoscaler's decisions in virtual time, one change after the other."""

from expertmesh.cluster.autoscaler import Autoscaler, WorkerInputs
from expertmesh.cluster.ids import ShardId
from expertmesh.cluster.simulation.observation import Observation
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.step_time import StepClock

# Attention is computed by the shards' GPUs: a worker tier of its own is idle, and stays.
_NO_WORKERS = WorkerInputs(current=1, outstanding_tokens=0, tokens_per_s=0.0, free_page_fraction=1.0, num_waiting=0)


class Scaling:
    """Follows the autoscaler; without one it never asks for anything."""

    def __init__(self, clock: StepClock, settings: SimulationSettings, *, num_slots: int) -> None:
        self._settings, self._auto = settings, settings.autoscale
        self._needed_bytes = num_slots * clock.expert_bytes
        self._shard_bytes = clock.shard_room_bytes
        self._wanted: tuple[ShardId, ...] | None = None
        self._ready_s = self._due_s = 0.0
        if self._auto is not None:
            # Fewer shards than replicas would give up what the replicas are for.
            shards = self._auto.shards.model_copy(
                update={"min_count": max(self._auto.shards.min_count, settings.replicas)}
            )
            self._autoscaler = Autoscaler(shards, self._auto.workers)
            self._autoscaler.accept(clock.plan.ep, 1)
            self._due_s = self._auto.period_s

    def look(self, now_s: float, observation: Observation, members: tuple[ShardId, ...]) -> None:
        """Decide if it is time to, and begin what is decided unless something is under way."""
        if self._auto is None or now_s < self._due_s:
            return
        self._due_s = now_s + self._auto.period_s
        inputs = observation.shard_inputs(
            now_s, current=len(members), needed_bytes=self._needed_bytes, shard_bytes=self._shard_bytes
        )
        wanted = self._autoscaler.decide(now_s, inputs, _NO_WORKERS).shards
        if self._wanted is not None or wanted == len(members):
            return
        numbers = sorted(int(member.rpartition("-")[2]) for member in members)
        if wanted > len(members):
            free = [n for n in range(len(members) + wanted) if n not in set(numbers)][: wanted - len(members)]
            numbers = sorted([*numbers, *free])
            self._ready_s = now_s + self._settings.start_s
        else:
            numbers = numbers[:wanted]
            self._ready_s = now_s
        self._wanted = tuple(ShardId(f"shard-{number}") for number in numbers)

    def due_members(self, now_s: float) -> tuple[ShardId, ...] | None:
        """Return the shards that are to host experts from now on; None: no change is ready to be made."""
        return self._wanted if self._wanted is not None and now_s >= self._ready_s else None

    def done(self, count: int) -> None:
        """Hear that the fleet has changed to so many shards."""
        if self._wanted is not None and len(self._wanted) == count:
            self._wanted = None
