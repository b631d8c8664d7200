"""What a fleet of workers and shards costs beside what a plan of GPUs counts; `doctor --measure` measures it."""

from pydantic import BaseModel, ConfigDict, Field


class FleetConstants(BaseModel):
    """Part of Hardware. The defaults are of members that have a GPU each, and of a host that costs nothing.

    Where members share cores, a "GPU" of Hardware is a core, and num_gpus of them serve all members of the machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    shares_cores: bool = Field(default=False, description="members compute on the same num_gpus cores, not on one each")
    lone_bytes_per_s: float = Field(
        default=0.0, ge=0, description="that a core reads while the others do not; 0: as while all read"
    )
    product_overlap: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="part of a product's shorter side, reading or computing, that is hidden",
    )
    kv_efficiency: float = Field(
        default=1.0, gt=0, le=1, description="part of the reading rate that attention reaches over keys and values"
    )
    value_s: float = Field(
        default=0.0,
        ge=0,
        description="of a row's hidden value in a layer's dense half beside products and keys, one core",
    )
    step_s: float = Field(default=0.0, ge=0, description="of a step beside its layers, head and rows")
    sequence_s: float = Field(default=0.0, ge=0, description="of each sequence in it: scheduling, events")
    score_s: float = Field(default=0.0, ge=0, description="of each of a sequence's scores: drawing a token, all cores")
