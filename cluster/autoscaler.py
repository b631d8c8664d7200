"""How many expert shards and attention workers are wanted.

The load of a tier is its utilisation times its members, so it does not change with their number, and
ceil(load / target utilisation) members are needed: the rule of Kubernetes' Horizontal Pod Autoscaler. What calms it:

- A wish must hold for up_delay_s (down_delay_s) without a break; the smallest wish of that time is followed.
- After each change no wish is followed for cooldown_s. Members leave one at a time.
- A tier shrinks only if fewer members were enough for down_margin more load than there is. It grows for a queue only
  where they would not be enough. So no constant load makes it grow and then shrink.

Bounds come before all of that: a tier outside of them is brought back at once. The tiers are decided apart.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from expertmesh.cluster.errors import InputError

_ROUNDING = 1e-9  # a need this little above a whole number of members is rounding, not need


class TierSettings(BaseModel):
    """What both tiers have to be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_count: int = Field(default=1, ge=1, description="fewest members")
    max_count: int = Field(ge=1, description="most members, even if the experts need more memory")
    target_utilisation: float = Field(default=0.7, gt=0, le=1, description="load of a member, 0..1, that is aimed at")
    down_margin: float = Field(default=0.1, ge=0, description="spare load, as a part of the load, before one leaves")
    up_delay_s: float = Field(default=15.0, ge=0, description="how long a wish for more must hold")
    down_delay_s: float = Field(default=300.0, ge=0, description="how long a wish for fewer must hold")
    cooldown_s: float = Field(default=60.0, ge=0, description="after a change, how long there is no other")

    @model_validator(mode="after")
    def _bounds_fit(self) -> "TierSettings":
        if self.min_count > self.max_count:
            raise ValueError(f"min_count={self.min_count} is above max_count={self.max_count}")
        return self


class ShardTierSettings(TierSettings):
    """When shards are slow for the workers, beside being busy."""

    max_wait_fraction: float = Field(default=0.5, ge=0, le=1, description="of workers' time, waiting for shards")
    max_queue_s: float = Field(default=0.02, ge=0, description="how long packets may queue at a shard")


class WorkerTierSettings(TierSettings):
    """What makes a worker full, beside its pages."""

    full_backlog_s: float = Field(default=60.0, gt=0, description="work ahead of a worker that makes it full: 1.0")
    max_waiting: float = Field(default=0.5, ge=0, description="sequences that may wait for admission, a worker")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardInputs:
    """What was measured of the shards. Fractions are 0..1.

    Raises:
        InputError: a negative or infinite value, a fraction above 1, or a mean above the busiest.
    """

    current: int  # shards that serve or drain, over which the utilisations were measured
    busiest_utilisation: float
    mean_utilisation: float
    worker_wait_fraction: float  # of the workers' time
    queue_s: float  # how long packets wait at a shard
    needed_bytes: int  # all experts times their fewest replicas
    shard_bytes: int  # room for experts on one shard

    def __post_init__(self) -> None:
        _check(self, fractions=("busiest_utilisation", "mean_utilisation", "worker_wait_fraction"))
        if self.shard_bytes < 1 or self.mean_utilisation > self.busiest_utilisation:
            raise InputError(f"no shard has room, or the mean is above the busiest: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerInputs:
    """What was measured of the workers.

    Raises:
        InputError: a negative or infinite value, or a fraction above 1.
    """

    current: int  # workers that serve or drain
    outstanding_tokens: int  # that live requests may still need, of all workers
    tokens_per_s: float  # that one worker makes; 0: not measured yet, and the backlog is not used
    free_page_fraction: float  # of the KV pages of all workers, 0..1
    num_waiting: int  # sequences that no batch has admitted

    def __post_init__(self) -> None:
        _check(self, fractions=("free_page_fraction",))


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """How many members are wanted now, why, and what was known: values that JSON can hold."""

    shards: int
    workers: int
    reasons: tuple[str, ...]
    inputs: dict[str, Any]


class _Need(NamedTuple):
    """grow: members for the load; enough: members for the peak load and its margin; is_slow: clients feel a queue."""

    grow: int
    enough: int
    is_slow: bool
    why: str


class Autoscaler:
    """Decides for both tiers from what is measured. Keep one for the life of a deployment."""

    def __init__(self, shards: ShardTierSettings, workers: WorkerTierSettings) -> None:
        self._shard_settings, self._worker_settings = shards, workers
        self._shards, self._workers = _Tier("shards", shards), _Tier("workers", workers)
        self._now_s: float | None = None

    def accept(self, shards: int, workers: int) -> None:
        """Hear that others have brought the tiers to these numbers: they are what is wanted until there is a reason.

        A tier whose number was wanted already goes on as it was; for another a cool-down begins.
        """
        self._shards.accept(shards)
        self._workers.accept(workers)

    def decide(self, now_s: float, shards: ShardInputs, workers: WorkerInputs) -> Decision:
        """Return how many shards and workers are wanted.

        A number stays wanted until another is, however many members there are so far. A tier with more members than
        that and the one that leaves was enlarged by others; the autoscaler goes on from there. Other changes by others
        are told by `accept`.

        Args:
            now_s: seconds of any clock. One that is set back stands still for delays and cool-downs.
            shards: the shards' measurements.
            workers: the workers' measurements.

        Raises:
            InputError: now_s is not finite.
        """
        if not math.isfinite(now_s):
            raise InputError(f"the time {now_s} is not finite")
        passed_s = 0.0 if self._now_s is None else max(0.0, now_s - self._now_s)
        self._now_s = now_s
        floor = -(-shards.needed_bytes // shards.shard_bytes)
        num_shards, shard_reasons = self._shards.decide(
            passed_s, shards.current, floor, _shard_need(shards, self._shard_settings)
        )
        num_workers, worker_reasons = self._workers.decide(
            passed_s, workers.current, 0, _worker_need(workers, self._worker_settings)
        )
        return Decision(
            shards=num_shards,
            workers=num_workers,
            reasons=(*shard_reasons, *worker_reasons),
            inputs={"now_s": now_s, "shards": asdict(shards), "workers": asdict(workers)},
        )


class _Tier:
    """What is wanted of a tier, and for how long something else has been wished for."""

    def __init__(self, name: str, settings: TierSettings) -> None:
        self._name, self._settings = name, settings
        self._wanted: int | None = None
        self._since_change_s = math.inf
        self._direction, self._held_wish, self._held_s = 0, 0, 0.0

    def accept(self, count: int) -> None:
        """Want this number from now on."""
        if count != self._wanted:
            self._since_change_s = math.inf if self._wanted is None else 0.0
            self._wanted, self._direction, self._held_s = count, 0, 0.0

    def decide(self, passed_s: float, current: int, floor: int, need: _Need) -> tuple[int, list[str]]:
        """Return the wanted number and sentences that say why."""
        self._since_change_s += passed_s
        high = self._settings.max_count
        low = min(high, max(self._settings.min_count, floor))
        notes = [f"{self._name}: {floor} are needed for memory, and at most {high} are allowed"] * (floor > high)
        if self._wanted is None:
            self._wanted = current
        elif min(current, high) > self._wanted + 1:
            return self._change(min(high, max(low, current)), f"others brought them to {current}", notes)
        if not low <= self._wanted <= high:
            return self._change(min(high, max(low, self._wanted)), f"the bounds are {low} and {high}", notes)
        self._hold(min(high, max(low, self._wish(current, need))), passed_s)
        return self._follow(need.why, notes)

    def _wish(self, current: int, need: _Need) -> int:
        assert self._wanted is not None, "decide sets it"
        grow = max(need.grow, current + 1) if need.is_slow and need.enough > current else need.grow
        if grow > self._wanted:
            return grow
        # The one that leaves must have left before the next goes.
        may_shrink = need.enough < self._wanted and not need.is_slow and current <= self._wanted
        return self._wanted - 1 if may_shrink else self._wanted

    def _hold(self, wish: int, passed_s: float) -> None:
        assert self._wanted is not None, "decide sets it"
        direction = (wish > self._wanted) - (wish < self._wanted)
        if direction == self._direction:
            self._held_wish, self._held_s = min(self._held_wish, wish), self._held_s + passed_s
        else:
            self._direction, self._held_wish, self._held_s = direction, wish, 0.0

    def _follow(self, why: str, notes: list[str]) -> tuple[int, list[str]]:
        assert self._wanted is not None, "decide sets it"
        if self._direction == 0:
            return self._wanted, [f"{self._name} stay {self._wanted}: {why}", *notes]
        delay_s = self._settings.up_delay_s if self._direction > 0 else self._settings.down_delay_s
        left_s = max(delay_s - self._held_s, self._settings.cooldown_s - self._since_change_s)
        if left_s > 0:
            wish = f"{self._held_wish} are wished for, and followed in {left_s:.1f} s at the earliest"
            return self._wanted, [f"{self._name} stay {self._wanted}: {why}; {wish}", *notes]
        return self._change(self._held_wish, why, notes)

    def _change(self, count: int, why: str, notes: list[str]) -> tuple[int, list[str]]:
        sentence = f"{self._name} go from {self._wanted} to {count}: {why}"
        self._wanted, self._since_change_s = count, 0.0
        self._direction, self._held_s = 0, 0.0
        return count, [sentence, *notes]


def _shard_need(inputs: ShardInputs, settings: ShardTierSettings) -> _Need:
    """More shards relieve the mean shard; the busiest one says whether fewer would do."""
    peak = inputs.current * inputs.busiest_utilisation
    slow = inputs.worker_wait_fraction > settings.max_wait_fraction or inputs.queue_s > settings.max_queue_s
    return _Need(
        _members(inputs.current * inputs.mean_utilisation, settings),
        _members(peak * (1 + settings.down_margin), settings),
        slow,
        f"{inputs.current} are busy for {inputs.mean_utilisation:.2f} of the time, the busiest for "
        f"{inputs.busiest_utilisation:.2f}, {settings.target_utilisation:g} is aimed at; workers wait for "
        f"{inputs.worker_wait_fraction:.2f} of theirs, packets for {inputs.queue_s:.3g} s",
    )


def _worker_need(inputs: WorkerInputs, settings: WorkerTierSettings) -> _Need:
    """A worker's load is the fuller of its pages and its backlog."""
    load = inputs.current * (1 - inputs.free_page_fraction)
    backlog = "an unknown time"
    if inputs.tokens_per_s > 0:
        work_s = inputs.outstanding_tokens / inputs.tokens_per_s
        load = max(load, work_s / settings.full_backlog_s)
        backlog = f"{work_s:.3g} s of one worker"
    return _Need(
        _members(load, settings),
        _members(load * (1 + settings.down_margin), settings),
        inputs.num_waiting > settings.max_waiting * inputs.current,
        f"{inputs.current} have {1 - inputs.free_page_fraction:.2f} of their pages in use and work for {backlog}, "
        f"{settings.target_utilisation:g} is aimed at; {inputs.num_waiting} sequences wait",
    )


def _members(load: float, settings: TierSettings) -> int:
    """Return the members that carry a load at the target; one more than allowed stands for any higher number."""
    return math.ceil(min(load / settings.target_utilisation - _ROUNDING, settings.max_count + 1))


def _check(inputs: ShardInputs | WorkerInputs, fractions: tuple[str, ...]) -> None:
    for name, value in asdict(inputs).items():
        if not 0 <= value <= (1 if name in fractions else math.inf) or math.isinf(value):
            raise InputError(f"{name}={value} of {inputs}")
