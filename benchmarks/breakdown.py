"""Where a decode step's time goes, by part: what the compiled way through the layers, the head and the shards counted.

Part of `benchmarks.distribution --breakdown`, which leaves prefill steps out.

- attention, router: the dense half of all layers. choose: counting loads, finding each pair's shard.
- pack, send, wait, add: a worker's part of the exchange; waiting holds the shards' computing.
- expert: the shards' kernel, of the busiest shard; "link" is what waiting takes beyond it.
- head, sample: once a step. rest: everything else between two steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Steps:
    """What an engine did between two questions."""

    num_steps: int
    num_tokens: int
    wall_s: float
    parts_s: Mapping[str, float]


def table(steps: Steps, layers: int, expert_s: float) -> dict[str, float]:
    """Return microseconds a layer by part, of a step's mean; expert_s: the busiest shard's seconds in all the steps."""
    parts = {name: seconds / steps.num_steps / layers * 1e6 for name, seconds in steps.parts_s.items()}
    if "wait" in parts:
        parts["expert"] = expert_s / steps.num_steps / layers * 1e6
        parts["link"] = parts.pop("wait") - parts["expert"]
    parts["rest"] = steps.wall_s / steps.num_steps / layers * 1e6 - sum(parts.values())
    return parts
