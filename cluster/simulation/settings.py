"""What a simulation is told of the fleet, beside the model, the hardware and the plan."""

from pydantic import BaseModel, ConfigDict, Field

from expertmesh.cluster.balancer_types import BalanceSettings
from expertmesh.cluster.settings import AutoscaleSettings


class SimulationSettings(BaseModel):
    """Fields that `ServeSettings` has too mean the same there, and have its defaults.

    notice_s, start_s: measured, docs/performance.md: the longest gap after SIGKILL of a shard is 0.22 to 0.24 s, and a
    scale up takes some 20 s. spread_after_s is that of the controller (actors/controller/reviver.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    pace_s: float = Field(default=0.1, ge=0, description="steps begin at least so far apart; 0: one after the other")
    max_batch_tokens: int = Field(default=1024, ge=1, description="tokens of a step, of one copy of attention")
    replicas: int = Field(default=1, ge=1, description="shards that hold each expert, at most the number of shards")
    spare_slots: float = Field(default=0.125, ge=0, le=8, description="room for more replicas, as a part of the slots")
    rebalance_period_s: float = Field(
        default=30.0, ge=0, description="between looks at which experts are hot; 0: never"
    )
    weights_period_s: float = Field(default=3.0, ge=0, description="between looks at how replicas share; 0: never")
    slow_s: float = Field(default=300.0, gt=5, description="seconds of load that replicas follow")
    rack_shards: int = Field(default=8, ge=1, description="shards that fail together: a rack, or a node")
    notice_s: float = Field(
        default=0.2, ge=0, description="until a dead shard is noticed, in which the step stands still"
    )
    spread_after_s: float = Field(
        default=15.0, ge=0, description="how long a dead shard may be away before others help"
    )
    absence_s: float = Field(
        default=60.0, ge=0, description="how long one may be away before the others are balanced without it"
    )
    restart_s: float | None = Field(default=20.0, ge=0, description="until a dead shard is back, empty; None: never")
    start_s: float = Field(default=20.0, ge=0, description="until a new shard is ready, empty")
    copying: BalanceSettings = Field(default=BalanceSettings(), description="bandwidths of one shard's copies")
    autoscale: AutoscaleSettings | None = Field(default=None, description="None: the number of shards stays")
