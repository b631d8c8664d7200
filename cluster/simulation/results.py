"""What a simulation finds: every step, a sample each second or so, events, and a summary of it all."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that happened to the fleet. seconds: that copies took, or for which steps stood still."""

    time_s: float
    kind: str  # failure, spread, moves, scale, back
    text: str
    num_experts: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The time since the last sample. step_s: its longest step; 0 if it had none."""

    time_s: float
    balancedness: float
    queue_tokens: int
    offered_per_s: float
    served_per_s: float
    shards: int  # that compute
    step_s: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """A simulation of duration_s. Steps stand in the order in which they began; stalls are in their time.

    A token waits until the step begins that computes it. offered = served + left, in tokens.
    """

    duration_s: float
    offered: int
    served: int
    left: int
    mean_wait_s: float
    behind_s: float  # in which steps left tokens to the next, for want of room
    begin_s: tuple[float, ...]
    step_s: tuple[float, ...]
    tokens: tuple[int, ...]
    samples: tuple[Sample, ...]
    events: tuple[Event, ...]
    weight_changes: int
    slots: int  # experts that a shard has room for, all layers together, at the end
    looks: dict[str, int]

    def step_percentiles(self, begin_s: float = 0.0, end_s: float = float("inf")) -> dict[str, float]:
        """Return p50, p90, p99 and the longest of the steps that began within a time, in seconds; {} if none did."""
        at = np.asarray(self.begin_s)
        steps = np.asarray(self.step_s)[(at >= begin_s) & (at < end_s)]
        if not len(steps):
            return {}
        found = {f"p{p}": float(np.percentile(steps, p)) for p in PERCENTILES}
        return {**found, "max": float(steps.max())}

    @property
    def copied(self) -> tuple[Event, ...]:
        """Events that copied experts."""
        return tuple(event for event in self.events if event.num_experts)

    def summary(self) -> dict[str, Any]:
        """Return the figures that JSON can hold; times in seconds."""
        balance = np.array([sample.balancedness for sample in self.samples] or [1.0])
        behind = [event for event in self.copied if event.kind != "failure"]
        return {
            "duration_s": self.duration_s,
            "steps": len(self.step_s),
            "step_s": self.step_percentiles(),
            "tokens_offered": self.offered,
            "tokens_served": self.served,
            "tokens_left": self.left,
            "tokens_per_s": self.served / self.duration_s,
            "busy": min(1.0, float(np.sum(self.step_s)) / self.duration_s),
            "mean_wait_s": self.mean_wait_s,
            "behind_s": self.behind_s,
            "queue_max_tokens": max((sample.queue_tokens for sample in self.samples), default=0),
            "balancedness": {"mean": float(balance.mean()), "min": float(balance.min())},
            "weight_changes": self.weight_changes,
            "moves": sum(event.num_experts for event in behind),
            "moved_bytes": sum(event.num_bytes for event in behind),
            "moving_s": sum(event.seconds for event in behind),
            "failures": sum(event.kind == "failure" for event in self.events),
            "lost_experts": sum(event.num_experts for event in self.events if event.kind == "failure"),
            "stalled_s": sum(event.seconds for event in self.events if event.kind == "failure"),
            "shards": {
                "min": min((sample.shards for sample in self.samples), default=0),
                "max": max((sample.shards for sample in self.samples), default=0),
            },
            "slots": self.slots,
            "looks": self.looks,
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the summary, the events and the samples, by column."""
        columns = {name: [getattr(sample, name) for sample in self.samples] for name in Sample.__dataclass_fields__}
        return {**self.summary(), "events": [asdict(event) for event in self.events], "samples": columns}
