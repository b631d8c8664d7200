"""Time of computing on one GPU: the roofline of products, padded to tiles, and of attention.

A product takes as long as the slower of its operations and of reading its weights (Williams, Waterman and Patterson,
"Roofline", 2009). Both rates are of the datasheet times what large cases reach (Hardware.compute_efficiency,
memory_efficiency).
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.planner.dtypes import Format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape

Floats = npt.NDArray[np.floating]


class Roofline(NamedTuple):
    """Seconds that operations and memory would take alone; the longer decides."""

    compute_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        """The longer."""
        return max(self.compute_s, self.memory_s)

    @property
    def bound_by(self) -> str:
        """Which it is."""
        return "compute" if self.compute_s > self.memory_s else "memory"


def roofline(hardware: Hardware, arithmetic: str, flop: float, moved_bytes: float) -> Roofline:
    """Return the roofline of so many operations in a number format over so many bytes."""
    return Roofline(
        flop / (hardware.flops(arithmetic) * hardware.compute_efficiency),
        moved_bytes / (hardware.memory_bytes_per_s * hardware.memory_efficiency),
    )


def tile_efficiency(size: float, tile: int) -> float:
    """Return the useful part of a dimension that is padded to tiles."""
    return size / (math.ceil(size / tile) * tile) if size > 0 else 1.0


def expert_roofline(
    shape: ModelShape, hardware: Hardware, form: Format, *, rows: float, active_experts: float, expert_tp: int
) -> Roofline:
    """Return the time of one layer's routed experts on one rank.

    Args:
        shape: the model.
        hardware: the GPU.
        form: of the weights.
        rows: (token, expert) pairs that the rank computes.
        active_experts: experts that have any row; each reads its weights once.
        expert_tp: ways that an expert is sliced.
    """
    if not rows:
        return Roofline(0.0, 0.0)
    seconds = expert_rooflines(
        shape, hardware, form, rows=np.array([rows]), active_experts=np.array([active_experts]), expert_tp=expert_tp
    )
    return Roofline(*(float(one[0]) for one in seconds))


def expert_rooflines(
    shape: ModelShape, hardware: Hardware, form: Format, *, rows: Floats, active_experts: Floats, expert_tp: int
) -> tuple[Floats, Floats]:
    """Return the seconds of operations and of memory as `expert_roofline` does, of many ranks or layers at once."""
    params = shape.expert_params / expert_tp
    # A product of few rows reads weights anyway: padding costs time only where there are enough rows to compute long.
    products = np.maximum(active_experts, 1.0)
    padded = np.ceil(rows / (products * hardware.row_tile)) * (products * hardware.row_tile)
    flop = padded * (2 * params / tile_efficiency(shape.expert_width / expert_tp, hardware.column_tile))
    activation_bytes = (2 * shape.hidden_size + 2 * shape.expert_width / expert_tp) * 2.0
    moved = active_experts * (params * form.expert_weight_bytes) + rows * activation_bytes
    unit = roofline(hardware, form.expert, 1.0, 1.0)
    return flop * unit.compute_s, moved * unit.memory_s


def dense_roofline(hardware: Hardware, form: Format, *, params: float, tokens: float, weight_bytes: float) -> Roofline:
    """Return the time of products whose weights every token meets: params of them, on one GPU, weight_bytes each."""
    filled = tile_efficiency(tokens, hardware.row_tile)
    return roofline(hardware, form.dense, 2 * tokens * params / filled, params * weight_bytes)


def attention_roofline(
    shape: ModelShape,
    hardware: Hardware,
    form: Format,
    *,
    tokens: float,
    sequences: float,
    attended: int,
    tp: int,
    is_decode: bool = True,
) -> Roofline:
    """Return the time of one layer's scores and weighted sums on one GPU, averaged over the layers.

    Args:
        shape: the model.
        hardware: the GPU.
        form: of keys and values.
        tokens: that attend.
        sequences: whose keys and values are read.
        attended: tokens before each.
        tp: ways that heads are sliced; a latent is read by all of them whole.
        is_decode: latent attention runs on the latent itself.
    """
    attention = shape.attention
    seen = attention.attended_tokens(attended, shape.num_layers)
    kept = 1 if attention.latent else tp
    moved = sequences * seen * attention.kv_values_per_layer * form.kv_bytes / kept
    flop = tokens * seen * attention.flop_per_pair(on_latent=is_decode) / tp
    return roofline(hardware, "bf16", flop, moved)
