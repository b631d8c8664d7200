"""The hardware that a plan runs on: one kind of GPU, and links in tiers from the innermost outwards.

A tier joins groups of domain_size GPUs. Two GPUs talk over the innermost tier whose group holds both.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.fleet_hardware import FleetConstants


class LinkTier(BaseModel):
    """How GPUs of a group reach each other. Latencies are of one message.

    A message between peers that cannot reach each other's memory is staged: copied to the host by its sender, fetched
    from there by its receiver. A ring's sizes are known, and one kernel runs all its steps, through memory of the host.
    The sizes of an all-to-all follow from the routing, so the host launches a copy for every peer and waits for it:
    such messages do not overlap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    domain_size: int = Field(ge=2, description="GPUs that this tier joins")
    bytes_per_s: float = Field(gt=0, description="of one GPU in one direction, as the datasheet says")
    efficiency: float = Field(default=1.0, gt=0, le=1, description="part of it that large messages reach")
    latency_s: float = Field(ge=0, description="of a message, and of a step of a ring")
    per_peer_s: float = Field(default=0.0, ge=0, description="what each further peer adds to an all-to-all")
    is_direct: bool = Field(default=True, description="peers read and write each other's memory")
    staged_step_s: float = Field(default=0.0, ge=0, description="added to a ring's step where is_direct is false")
    staging_s: float = Field(
        default=0.0, ge=0, description="added to an all-to-all's message where it is false: copies"
    )
    sync_s: float = Field(default=0.0, ge=0, description="added to it too: a launch and a wait")
    reduces_in_network: bool = Field(default=False, description="switches add up: NVLS, SHARP")
    in_network_latency_s: float = Field(default=0.0, ge=0, description="of an all-reduce that the network adds up")
    source: str = Field(description="where the numbers are from")

    @property
    def effective_bytes_per_s(self) -> float:
        """Bytes a second of one GPU in one direction that large messages reach."""
        return self.bytes_per_s * self.efficiency

    @property
    def step_s(self) -> float:
        """Seconds of a step of a ring but for its bytes."""
        return self.latency_s + (0.0 if self.is_direct else self.staged_step_s)

    @property
    def staged_message_s(self) -> float:
        """Seconds of a message of an all-to-all between peers that do not reach each other's memory."""
        return self.latency_s + self.staging_s + self.sync_s


class Hardware(BaseModel):
    """GPUs of one kind and what joins them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    num_gpus: int = Field(ge=1)
    memory_bytes: float = Field(gt=0, description="of one GPU")
    usable_memory: float = Field(default=0.9, gt=0, le=1, description="part of it for weights, keys, values, buffers")
    memory_bytes_per_s: float = Field(gt=0, description="of one GPU, as the datasheet says")
    memory_efficiency: float = Field(default=0.85, gt=0, le=1, description="part of it that reading weights reaches")
    flop_per_s: dict[str, float] = Field(description="dense operations a second of one GPU, by number format")
    compute_efficiency: float = Field(default=0.75, gt=0, le=1, description="part of them that large products reach")
    row_tile: int = Field(default=64, ge=1, description="rows that products are padded to")
    column_tile: int = Field(default=128, ge=1, description="columns that products are padded to")
    kernel_gap_s: float = Field(default=0.5e-6, ge=0, description="between two kernels of a captured graph")
    kernels_per_layer: int = Field(default=12, ge=1, description="kernels of a layer, those of collectives not counted")
    collective_s: float = Field(default=6.6e-6, ge=0, description="of a collective but for its steps")
    all_to_all_s: float = Field(default=6.6e-6, ge=0, description="of an all-to-all but for its messages and bytes")
    tiers: tuple[LinkTier, ...] = Field(default=(), description="from the innermost outwards")
    fleet: FleetConstants = Field(default=FleetConstants(), description="of this project's workers and shards on it")
    sources: dict[str, str] = Field(default={}, description="where the other numbers are from, by field")

    @model_validator(mode="after")
    def _is_sound(self) -> "Hardware":
        if not self.flop_per_s or any(not value > 0 for value in self.flop_per_s.values()):
            raise ValueError(f"flop_per_s must hold positive numbers by format, got {self.flop_per_s}")
        sizes = [tier.domain_size for tier in self.tiers]
        if any(outer <= inner for inner, outer in pairwise(sizes)):
            raise ValueError(f"tiers must grow outwards, got domain_size {sizes}")
        if self.num_gpus > (sizes[-1] if sizes else 1):
            joined = f"the outermost of tiers joins {sizes[-1]}" if sizes else "tiers is empty"
            raise ValueError(f"num_gpus={self.num_gpus}, but {joined}")
        return self

    def flops(self, arithmetic: str) -> float:
        """Return the dense operations a second of one GPU in a number format.

        Raises:
            InputError: the GPU has no such arithmetic.
        """
        if arithmetic not in self.flop_per_s:
            known = ", ".join(self.flop_per_s)
            raise InputError(f"dtype {arithmetic}: flop_per_s of hardware {self.name} has {known} only")
        return self.flop_per_s[arithmetic]

    def peers_by_tier(self, num_ranks: int) -> tuple[int, ...]:
        """Return how many peers a rank reaches over each tier, ranks filling one domain after another."""
        reached, peers = 1, []
        for tier in self.tiers:
            within = min(tier.domain_size, num_ranks)
            peers.append(max(0, within - reached))
            reached = max(reached, within)
        return tuple(peers)

    def tier_of(self, num_ranks: int) -> LinkTier:
        """Return the innermost tier that joins so many neighbours."""
        return next(tier for tier in self.tiers if tier.domain_size >= num_ranks)


def read_hardware(name: str, content: Mapping[str, Any], num_gpus: int | None = None) -> Hardware:
    """Check what a hardware file holds.

    Args:
        name: of the file, for errors.
        content: fields of Hardware.
        num_gpus: in place of the file's, if given.

    Raises:
        InputError: a field is missing, unknown or out of range; the message names it.
    """
    values = {**content, **({} if num_gpus is None else {"num_gpus": num_gpus})}
    try:
        return Hardware(**values)
    except ValidationError as error:
        raise InputError(f"hardware {name}: {complaint(error)}") from error


def complaint(error: ValidationError) -> str:
    """Say in one line what pydantic found first: the path of the field, the rule, the value."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    value = "" if first["type"] == "missing" or isinstance(first["input"], dict) else f", got {first['input']!r}"
    return f"{path}: {message}{value}" if path else message
