"""The loop over virtual time: tokens come, steps take them, the fleet does what is due before each."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.simulation.faults import Fault
from expertmesh.cluster.simulation.fleet import Fleet
from expertmesh.cluster.simulation.results import Result, Sample
from expertmesh.cluster.simulation.routing import Mix, Routing
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.step_time import StepClock
from expertmesh.cluster.simulation.traffic import Interval

_MOST_SAMPLES = 3600
_SLACK_S = 1e-6  # times within this are the same: they are sums of many


def simulate(
    clock: StepClock,
    layers: Sequence[int],
    intervals: Iterable[Interval],
    settings: SimulationSettings,
    *,
    duration_s: float,
    faults: Sequence[Fault] = (),
    seed: int = 0,
    on_progress: Callable[[float], None] = lambda now_s: None,
) -> Result:
    """Serve intervals of tokens. Equal arguments give equal results, to the bit on one machine.

    Args:
        clock: the model on its hardware, by its plan.
        layers: the MoE layers' indices in the model.
        intervals: one after the other, from 0 to duration_s.
        settings: of the fleet.
        duration_s: when the last token comes; the step under way is finished.
        faults: in the order of time.
        seed: of what tokens choose within an interval.
        on_progress: told the virtual time now and then.

    Raises:
        InputError: more replicas than shards, or choices that are not of this model.
        CapacityError: no shard is left.
    """
    sample_s = max(1.0, math.ceil(duration_s / _MOST_SAMPLES))
    run = _Run(Fleet(clock, layers, settings, faults), clock, settings, seed, sample_s)
    for interval in intervals:
        if interval.load_LE.shape != (len(layers), clock.shape.num_experts):
            raise InputError(
                f"trace: its choices are of shape {interval.load_LE.shape}, the model has {len(layers)} MoE layers "
                f"of {clock.shape.num_experts} experts"
            )
        run.serve(interval)
        on_progress(interval.end_s)
    return run.result(duration_s)


@dataclass(kw_only=True, slots=True)
class Queue:
    """Tokens offered so far and tokens taken. Those of an interval come evenly, so a wait is an area."""

    offered: int = 0
    taken: int = 0
    wait_token_s: float = 0.0
    _last_s: float = 0.0

    @property
    def waiting(self) -> int:
        """Tokens that no step has taken."""
        return self.offered - self.taken

    def offer(self, offered: int, now_s: float) -> None:
        """Have so many tokens in all by now."""
        arrived = offered - self.offered
        passed_s = max(0.0, now_s - self._last_s)
        self.wait_token_s += (self.waiting + arrived / 2) * passed_s
        self.offered, self._last_s = offered, max(self._last_s, now_s)

    def take(self, most: int) -> int:
        """Take tokens for a step, at most so many."""
        tokens = min(self.waiting, most)
        self.taken += tokens
        return tokens


class _Run:
    """What changes while virtual time passes."""

    def __init__(
        self, fleet: Fleet, clock: StepClock, settings: SimulationSettings, seed: int, sample_s: float
    ) -> None:
        self._fleet, self._clock, self._settings = fleet, clock, settings
        self._rng = np.random.default_rng(seed)
        self._sample_period_s = sample_s
        self._next_s = settings.pace_s  # when the next step may begin
        self._queue = Queue()
        self._behind_s = 0.0
        self._balancedness = 1.0  # of the last mix; without a load all is level
        self._begin_s: list[float] = []
        self._step_s: list[float] = []
        self._tokens: list[int] = []
        self._samples: list[Sample] = []
        self._sampled = (0.0, 0, 0, 0)  # time, steps, offered, taken

    def serve(self, interval: Interval) -> None:
        """Let an interval's tokens come, and begin all steps that begin in it."""
        before = self._queue.offered
        length_s = interval.end_s - interval.begin_s
        mix: Mix | None = None
        routing: Routing | None = None
        while self._next_s <= interval.end_s + _SLACK_S:
            now_s = self._next_s
            come = min(1.0, (now_s - interval.begin_s) / length_s + 1e-9)
            self._queue.offer(before + math.floor(interval.tokens * come + 1e-6), now_s)
            stall_s = self._fleet.advance(now_s)
            tokens = self._queue.take(self._most_tokens)
            if not tokens:
                self._next_s = self._next_token_s(interval, before, now_s + stall_s)
                self._sample(now_s)
                continue
            if mix is None or routing is not self._fleet.routing:
                routing = self._fleet.routing
                mix = Mix(routing, interval)
                self._balancedness = mix.balancedness
            self._step(now_s, tokens, stall_s, mix, interval)
            self._sample(now_s)
        self._queue.offer(before + interval.tokens, interval.end_s)

    @property
    def _most_tokens(self) -> int:
        return self._settings.max_batch_tokens * self._clock.plan_of(self._fleet.num_live).attention_dp

    def _next_token_s(self, interval: Interval, before: int, now_s: float) -> float:
        """Return when to look again if there was nothing to do: at the next pace, or when a token has come."""
        if self._settings.pace_s:
            return now_s + self._settings.pace_s
        if self._queue.offered == before + interval.tokens:
            return interval.end_s + 2 * _SLACK_S
        part = (self._queue.offered - before + 1) / interval.tokens
        return max(now_s + _SLACK_S, interval.begin_s + part * (interval.end_s - interval.begin_s))

    def _step(self, now_s: float, tokens: int, stall_s: float, mix: Mix, interval: Interval) -> None:
        num_live = self._fleet.num_live
        time = self._clock.seconds(mix.draw(tokens, self._rng), tokens, num_live)
        took_s = time.step_s + stall_s
        left = self._queue.waiting
        self._behind_s += took_s if left else 0.0
        copies = self._clock.plan_of(num_live).attention_dp
        self._fleet.observation.step(time, tokens, left / tokens * took_s, copies)
        self._fleet.observation.chosen(interval, tokens)
        self._begin_s.append(now_s)
        self._step_s.append(took_s)
        self._tokens.append(tokens)
        self._next_s = max(now_s + took_s, now_s + self._settings.pace_s)

    def _sample(self, now_s: float) -> None:
        since_s, steps, offered, taken = self._sampled
        passed_s = now_s - since_s
        if passed_s < self._sample_period_s - _SLACK_S:
            return
        self._samples.append(
            Sample(
                time_s=now_s,
                balancedness=self._balancedness,
                queue_tokens=self._queue.waiting,
                offered_per_s=(self._queue.offered - offered) / passed_s,
                served_per_s=(self._queue.taken - taken) / passed_s,
                shards=self._fleet.num_live,
                step_s=max(self._step_s[steps:], default=0.0),
            )
        )
        self._sampled = (now_s, len(self._step_s), self._queue.offered, self._queue.taken)

    def result(self, duration_s: float) -> Result:
        """Return what was found."""
        queue, fleet = self._queue, self._fleet
        return Result(
            duration_s=duration_s,
            offered=queue.offered,
            served=queue.taken,
            left=queue.waiting,
            mean_wait_s=queue.wait_token_s / max(1, queue.offered),
            behind_s=self._behind_s,
            begin_s=tuple(self._begin_s),
            step_s=tuple(self._step_s),
            tokens=tuple(self._tokens),
            samples=tuple(self._samples),
            events=tuple(fleet.events),
            weight_changes=fleet.weight_changes,
            slots=fleet.slots,
            looks=fleet.looks,
        )
