"""What the balancer is told and what it answers."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFacts:
    """A live shard. One that is draining keeps no expert, but may be the source of moves.

    num_slots: experts it can host, over all layers. domain: the NVLink domain, or what else is near and fails together.
    speed: tokens a second, as a multiple of any unit that the shards share.

    Raises:
        InputError: a negative number of slots, or a speed that is not above 0.
    """

    shard: ShardId
    num_slots: int
    node: str
    domain: str
    speed: float = 1.0
    is_draining: bool = False

    def __post_init__(self) -> None:
        if self.num_slots < 0 or not 0 < self.speed < float("inf"):
            raise InputError(f"shard {self.shard} cannot have num_slots={self.num_slots} and speed={self.speed}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """Copy an expert to a shard, from one that has it, or from the checkpoint (None)."""

    key: ExpertKey
    source: ShardId | None
    target: ShardId


class BalanceSettings(BaseModel):
    """When the balancer acts, and how much at a time. Bandwidths are of one copy."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    min_replicas: int = Field(default=1, ge=1, description="shards that hold each expert; 2: also on two nodes")
    # Measured when a layer with replicas left compiled code, a tenth of a step on CPUs (docs/performance.md); it now
    # only asks which replica computes what, and less may do.
    min_improvement: float = Field(default=0.05, ge=0, lt=1, description="least part of the expert time to be saved")
    max_moves: int = Field(default=4096, ge=0, description="copies of a plan, those that repair not counted")
    domain_bytes_per_s: float = Field(default=20e9, gt=0, description="between shards of a domain")
    network_bytes_per_s: float = Field(default=5e9, gt=0, description="between domains")
    checkpoint_bytes_per_s: float = Field(default=1e9, gt=0, description="from the checkpoint")


@dataclass(frozen=True, kw_only=True, slots=True)
class BalancePlan:
    """A placement to go to, what has to be copied for it, and whether that is worth it.

    Balancedness is that of the expected times (load over speed) of the shards (empty ones that drain
    not counted); 0 before, if an expert is missing.
    gain_s: expert time saved over the horizon. cost_s: time of the copies, all shards at once.
    A plan with is_worthwhile False is what was considered and declined; `reason` says why, with numbers.
    """

    placement: Placement
    moves: tuple[Move, ...]
    bytes_moved: int
    balancedness_before: float
    balancedness_after: float
    gain_s: float
    cost_s: float
    is_worthwhile: bool
    reason: str
