"""A fleet that the live page can look at, without one: what LiveView.view returns, changed by the test."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from expertmesh.cluster.errors import UnavailableError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.model_info import ModelInfo
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.placement_lists import placement_fields
from tests.unit.gateway_fakes import MODEL, STATUS

SHARDS = [ShardId("s0"), ShardId("s1")]


def weighted(model: ModelInfo, epoch: int) -> Placement:
    """Place every expert on both shards; the first expert of the first layer is shared 3 to 1."""
    placement = initial_placement(model.moe_layers, model.num_slices, SHARDS, 2, epoch=epoch)
    return replace(placement, weights={ExpertKey(model.moe_layers[0], 0): (192, 64)})


@dataclass
class FakeFleet:
    """Answers as the controller does. asked: (epoch, last event, life) of each look."""

    model: ModelInfo = MODEL
    life: int = 100
    error: Exception | None = None
    asked: list[tuple[int, int, int]] = field(default_factory=list)
    events: list[tuple[int, float, str, str]] = field(default_factory=list)
    operations: list[dict[str, object]] = field(default_factory=list)
    generated: int = 2**35
    computed_tokens: int = 40
    decoded_tokens: int = 20

    def __post_init__(self) -> None:
        self.placement = weighted(self.model, epoch=3)
        self.load_LE = np.zeros((len(self.model.moe_layers), self.model.num_experts), dtype=np.int64)

    def route(self, tokens_LE: Any, *, prompt: int = 0, generated: int = 0) -> None:
        """Count tokens as workers do."""
        self.load_LE = self.load_LE + np.asarray(tokens_LE)
        self.computed_tokens += prompt + generated
        self.decoded_tokens += generated
        self.generated += generated

    async def ask(self, epoch: int, after: int, life: int) -> dict[str, Any]:
        self.asked.append((epoch, after, life))
        if self.error is not None:
            raise self.error
        is_same = life == self.life
        workers: Any = STATUS["workers"]
        return {
            "life": self.life,
            "status": {**STATUS, "workers": [{**workers[0], "tokens_generated": self.generated}]},
            "slots": {"s0": 5, "s1": 5},
            "load_LE": self.load_LE,
            "computed_tokens": self.computed_tokens,
            "decoded_tokens": self.decoded_tokens,
            "placement": None if is_same and epoch == self.placement.epoch else placement_fields(self.placement),
            "operations": list(self.operations),
            "events": [event for event in self.events if event[0] > (after if is_same else 0)],
        }

    def go_away(self) -> None:
        self.error = UnavailableError("the actor died")
