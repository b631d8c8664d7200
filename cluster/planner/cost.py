"""The time of one step of a plan, by part, and what bounds it.

All layers follow each other; a pipeline's stages work on pp parts of the batch, so a step is pp times that of one part.
Communication is hidden by computing as far as Workload.overlap says. Nothing here knows any hardware by its name.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from expertmesh.cluster.planner.collectives import NOTHING, LinkTime, all_gather, all_reduce, all_to_all, send
from expertmesh.cluster.planner.compute import Roofline, attention_roofline, dense_roofline, expert_roofline
from expertmesh.cluster.planner.dtypes import Format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.skew import RankLoad, slowest_rank
from expertmesh.cluster.planner.traffic import (
    RoutedRows,
    all_reduce_bytes,
    combine_row_bytes,
    dense_bound_bytes,
    dispatch_row_bytes,
    routed_rows,
)
from expertmesh.cluster.planner.workload import Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCost:
    """One layer with experts, one part of the batch. Bytes are of all ranks of a stage together.

    all_reduce covers what is reduced, or gathered, within attention's slices and, where nothing is dispatched, after
    the experts. all_reduce_bytes counts each payload once. dense_bound_bytes: were each token dispatched everywhere.
    """

    load: RankLoad
    rows: RoutedRows
    dispatch_bytes: float
    combine_bytes: float
    dense_bound_bytes: float
    all_reduce_bytes: float
    dispatch: LinkTime
    combine: LinkTime
    all_reduce: LinkTime
    experts: Roofline
    attention: Roofline  # scores and sums
    dense: Roofline  # projections, shared experts, router


@dataclass(frozen=True, kw_only=True, slots=True)
class StepCost:
    """A step. parts_s: seconds of it by what they go to; they sum up to step_s unless communication is hidden."""

    layer: LayerCost
    step_s: float
    parts_s: dict[str, float]

    @property
    def bound_by(self) -> str:
        """Return the part that takes longest."""
        return max(self.parts_s, key=lambda part: self.parts_s[part])

    def even_parts(self) -> "EvenParts":
        """Return this step apart from what depends on how busy the busiest rank is; pp must be 1.

        The step must be of ranks that are all as busy as the mean.
        """
        routed_s = self.parts_s["dispatch and combine bytes"]
        links_s = sum(self.parts_s[part] for part in _LINK_PARTS) - routed_s
        experts_s = sum(seconds for part, seconds in self.parts_s.items() if part.startswith("experts"))
        return EvenParts(sum(self.parts_s.values()) - experts_s - links_s - routed_s, links_s, routed_s)


class EvenParts(NamedTuple):
    """Seconds of a step by what they depend on: neither experts nor links, links but for routed rows, those rows."""

    computing_s: float
    links_s: float
    routed_s: float

    def step_s(self, expert_s: float, imbalance: float, overlap: float) -> float:
        """Return the step's time as `step_cost` has it, where ranks are unevenly busy.

        Args:
            expert_s: of the busiest rank of each layer, all layers together.
            imbalance: rows of the busiest rank over the mean, the mean over the layers with experts.
            overlap: part of the computing that hides communication.
        """
        links_s = self.links_s + imbalance * self.routed_s
        computing_s = self.computing_s + expert_s
        return links_s + computing_s - min(links_s, overlap * computing_s)


_LINK_PARTS = (
    "all-reduce latency",
    "all-reduce bytes",
    "dispatch and combine latency",
    "dispatch and combine bytes",
)


def step_cost(
    shape: ModelShape,
    hardware: Hardware,
    plan: Plan,
    workload: Workload,
    form: Format,
    load: RankLoad | None = None,
) -> StepCost:
    """Return the time of a step.

    Args:
        shape: the model.
        hardware: the GPUs and links.
        plan: one that the model's sizes allow (plans.why_not).
        workload: tokens, context, skew.
        form: of weights and messages.
        load: of the busiest rank, where it is known from counts; None: expected from workload.skew.
    """
    layer = layer_cost(shape, hardware, plan, workload, form, load)
    num_dense = shape.num_layers - shape.num_moe_layers
    moe, layers = shape.num_moe_layers, shape.num_layers
    tokens = workload.attention_tokens(plan)
    ffn = shape.num_matrices * shape.hidden_size * shape.dense_width
    layer_without_experts = dense_roofline(
        hardware,
        form,
        params=(shape.attention_params / layers + ffn) / plan.attention_tp,
        tokens=tokens,
        weight_bytes=form.dense_weight_bytes,
    )
    head = dense_roofline(
        hardware,
        form,
        params=shape.embedding_params / plan.attention_tp,
        tokens=tokens if workload.phase == "decode" else workload.sequences(plan),
        weight_bytes=form.table_bytes,
    )
    dense_reduce = all_reduce(hardware, plan.attention_tp, all_reduce_bytes(tokens, shape.hidden_size))
    reduces = _times(layer.all_reduce, moe).plus(_times(dense_reduce, 2 * num_dense))
    routed = _times(layer.dispatch.plus(layer.combine), moe)
    passed = NOTHING
    if plan.pp > 1:
        passed = send(hardware, plan.pp * plan.stage_gpus, all_reduce_bytes(tokens, shape.hidden_size))
    parts = {
        f"experts, {layer.experts.bound_by}": moe * layer.experts.total_s,
        f"attention, {layer.attention.bound_by}": layers * layer.attention.total_s,
        f"dense weights, {layer.dense.bound_by}": (
            moe * layer.dense.total_s + num_dense * layer_without_experts.total_s + head.total_s
        ),
        "kernel gaps": layers * hardware.kernels_per_layer * hardware.kernel_gap_s,
        "all-reduce latency": reduces.latency_s,
        "all-reduce bytes": reduces.transfer_s,
        "dispatch and combine latency": routed.latency_s,
        "dispatch and combine bytes": routed.transfer_s,
    }
    # A pipeline waits for its longest stage; the last one also computes the head.
    uneven = math.ceil(layers / plan.pp) * plan.pp / layers
    parts_s = {what: seconds * uneven for what, seconds in parts.items()}
    parts_s["pipeline sends"] = plan.pp * passed.total_s
    links_s = reduces.total_s * uneven + routed.total_s * uneven
    hidden_s = min(links_s, workload.overlap * (sum(parts.values()) * uneven - links_s))
    # Each of the pp parts of the batch goes through all stages; the stages work beside each other.
    return StepCost(layer=layer, step_s=sum(parts_s.values()) - hidden_s, parts_s=parts_s)


def layer_cost(
    shape: ModelShape,
    hardware: Hardware,
    plan: Plan,
    workload: Workload,
    form: Format,
    load: RankLoad | None = None,
) -> LayerCost:
    """Return the bytes and times of one layer with experts, of one part of the batch; arguments as of step_cost."""
    stage_tokens = workload.microbatch_tokens(plan)
    tokens = workload.attention_tokens(plan)
    if load is None:
        load = slowest_rank(shape.num_experts, shape.top_k, plan.ep, stage_tokens, workload.skew, plan.replicas)
    rows = routed_rows(shape, hardware, plan, stage_tokens)
    row_bytes = dispatch_row_bytes(shape, form), combine_row_bytes(shape, form)
    dispatch, combine = (
        NOTHING if plan.is_tensor_parallel else _exchange(hardware, plan, rows, load, one) for one in row_bytes
    )
    payload = all_reduce_bytes(tokens, shape.hidden_size)
    reduces, reduced_bytes = _all_reduces(hardware, shape, plan, payload)
    router = shape.hidden_size * shape.num_experts
    sliced = (
        shape.attention_params / shape.num_layers + shape.shared_params / shape.num_moe_layers
    ) / plan.attention_tp
    return LayerCost(
        load=load,
        rows=rows,
        dispatch_bytes=rows.sent * row_bytes[0],
        combine_bytes=rows.sent * row_bytes[1],
        dense_bound_bytes=0.0
        if plan.is_tensor_parallel
        else dense_bound_bytes(stage_tokens, shape.hidden_size, plan.stage_gpus, form.dispatch_bytes),
        all_reduce_bytes=reduced_bytes * plan.attention_dp,
        dispatch=dispatch,
        combine=combine,
        all_reduce=reduces,
        experts=expert_roofline(
            shape,
            hardware,
            form,
            rows=load.busiest_rows,
            active_experts=load.busiest_active_experts,
            expert_tp=plan.expert_tp,
        ),
        attention=attention_roofline(
            shape,
            hardware,
            form,
            tokens=tokens,
            sequences=_sequences(workload, tokens),
            attended=workload.attended,
            tp=plan.attention_tp,
            is_decode=workload.phase == "decode",
        ),
        dense=dense_roofline(
            hardware, form, params=sliced + router, tokens=tokens, weight_bytes=form.dense_weight_bytes
        ),
    )


def _sequences(workload: Workload, tokens: int) -> int:
    """Return the sequences of so many tokens: each has its keys and values read once."""
    return tokens if workload.phase == "decode" else math.ceil(tokens / workload.context)


def _exchange(hardware: Hardware, plan: Plan, rows: RoutedRows, load: RankLoad, row_bytes: float) -> LinkTime:
    """Return the time of dispatch or combine: as long as the rank takes that hears, or says, the most."""
    busiest = [max(1.0, load.imbalance) * sent * row_bytes / plan.stage_gpus for sent in rows.by_tier]
    return all_to_all(hardware, plan.stage_gpus, busiest)


def _all_reduces(hardware: Hardware, shape: ModelShape, plan: Plan, payload: float) -> tuple[LinkTime, float]:
    """Return the time and the bytes of a layer's all-reduces and gathers, of one copy of attention.

    After attention, whose output is a sum over slices. After the experts: where nothing was dispatched, of their sums;
    else the slices of attention share out dispatching, and each has to learn of the others' rows: a gather, or a
    reduction if shared experts are sliced too.
    """
    if plan.stage_gpus == 1 or plan.attention_tp == 1:
        return NOTHING, 0.0
    reduce = all_reduce(hardware, plan.attention_tp, payload)
    if plan.is_tensor_parallel or shape.shared_width:
        return _times(reduce, 2), 2 * payload
    return reduce.plus(all_gather(hardware, plan.attention_tp, payload)), 2 * payload


def _times(time: LinkTime, count: float) -> LinkTime:
    return LinkTime(time.latency_s * count, time.transfer_s * count)
