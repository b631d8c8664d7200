"""What one GPU has to hold, by part: of the fullest stage of a pipeline."""

import math
from dataclasses import dataclass

from expertmesh.cluster.planner.dtypes import Format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.traffic import combine_row_bytes, dispatch_row_bytes, routed_rows
from expertmesh.cluster.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Bytes of one GPU."""

    attention_weight_bytes: float  # attention, shared experts, dense layers, router, norms
    table_bytes: float  # embedding, head
    expert_weight_bytes: float
    kv_bytes: float
    buffer_bytes: float

    @property
    def weight_bytes(self) -> float:
        """Of all weights."""
        return self.attention_weight_bytes + self.table_bytes + self.expert_weight_bytes

    @property
    def total_bytes(self) -> float:
        """Of everything."""
        return self.weight_bytes + self.kv_bytes + self.buffer_bytes


def gpu_memory(shape: ModelShape, hardware: Hardware, plan: Plan, workload: Workload, form: Format) -> GpuMemory:
    """Return what one GPU has to hold."""
    layers = math.ceil(shape.num_layers / plan.pp)
    part = layers / shape.num_layers
    moe_layers = min(layers, shape.num_moe_layers)
    slots = shape.num_experts / plan.ep + plan.replicas
    sliced = part * shape.sliced_params / plan.attention_tp * form.dense_weight_bytes
    whole = part * (shape.router_params + shape.norm_params) * form.table_bytes
    tables = (
        max(shape.embedding_params, shape.head_params) if plan.pp > 1 else shape.embedding_params + shape.head_params
    )
    kept_by = 1 if shape.attention.latent else plan.attention_tp
    return GpuMemory(
        attention_weight_bytes=sliced + whole,
        table_bytes=tables / plan.attention_tp * form.table_bytes,
        expert_weight_bytes=moe_layers * slots * shape.expert_params / plan.expert_tp * form.expert_weight_bytes,
        kv_bytes=workload.sequences(plan) * part * shape.kv_bytes(workload.context, form) / kept_by,
        buffer_bytes=_buffer_bytes(shape, hardware, plan, workload, form),
    )


def _buffer_bytes(shape: ModelShape, hardware: Hardware, plan: Plan, workload: Workload, form: Format) -> float:
    """Return the bytes of rows received and sent, twice (one layer's while the next one's come), and of logits."""
    stage_tokens = workload.microbatch_tokens(plan)
    rows = routed_rows(shape, hardware, plan, stage_tokens)
    rank_rows = (rows.stay + rows.sent) / plan.stage_gpus
    exchanged = 2 * rank_rows * (dispatch_row_bytes(shape, form) + combine_row_bytes(shape, form))
    tokens = workload.attention_tokens(plan)
    hidden = 4 * tokens * shape.hidden_size * 2.0  # residual, normed, attention's output, what is combined
    drawn = tokens if workload.phase == "decode" else workload.sequences(plan)
    return exchanged + hidden + drawn * shape.vocab_size / plan.attention_tp * 4.0


def short_of_bytes(memory: GpuMemory, hardware: Hardware) -> float:
    """Return how many bytes a GPU lacks, 0 if it all fits."""
    return max(0.0, memory.total_bytes - hardware.usable_memory * hardware.memory_bytes)
