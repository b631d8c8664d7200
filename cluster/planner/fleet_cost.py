"""The time of one decode step of this project's fleet, by part: attention workers that ask expert shards over links.

What differs from the ranks of a plan (cost.py): dense half and experts follow each other in different processes; on
CPUs the worker computes with all cores while shards wait, then the shards share the cores, taking turns if there are
more of them; a worker sends to each shard in turn and waits for the slowest. docs/planner.md has the formulas.
"""

import math
from dataclasses import dataclass

import numpy as np

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.compute import Roofline, attention_roofline, dense_roofline, expert_roofline
from expertmesh.cluster.planner.dtypes import FORMATS, Format
from expertmesh.cluster.planner.fleet_load import Counts, ShardWork, finish_s, shard_rows
from expertmesh.cluster.planner.fleet_traffic import PAIR_BYTES
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.plans import divisors
from expertmesh.cluster.planner.traffic import combine_row_bytes, dispatch_row_bytes, hit_probability

_BF16 = FORMATS["bf16"]
# Of kernels/cpu/expert_mlp.cpp: a call has helpers on other cores if it has at most so many experts, or pairs enough.
_FEW_EXPERTS, _MANY_PAIRS = 8, 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetStepCost:
    """A step of all workers. parts_s: seconds of one worker's step by what they go to; they sum up to path_s.

    path_s: a step of one worker that has the shards to itself. busy_s: how long what is shared computes for all
    workers' steps: the cores, or the busiest shard's GPU. step_s: the longer.
    dispatch_bytes_per_layer, combine_bytes_per_layer: of packets, all workers and shards together.
    """

    path_s: float
    busy_s: float
    parts_s: dict[str, float]
    dispatch_bytes_per_layer: float
    combine_bytes_per_layer: float

    @property
    def step_s(self) -> float:
        """Seconds until all workers have done their step."""
        return max(self.path_s, self.busy_s)


def fleet_step_cost(
    shape: ModelShape,
    hardware: Hardware,
    *,
    num_workers: int,
    num_shards: int,
    expert_tp: int,
    tokens: int,
    context: int = 128,
    form: Format = _BF16,
    skew: float = 0.0,
) -> FleetStepCost:
    """Return the time of a decode step.

    Args:
        shape: the model.
        hardware: of one machine, as `expertmesh doctor --measure` writes it, or GPUs, one a member.
        num_workers: attention workers, which share the tokens evenly.
        num_shards: expert shards, on which slices lie as `placement.initial_placement` puts them.
        expert_tp: slices of each expert, a divisor of num_shards: 1 is expert parallelism, num_shards is tensor
            parallelism.
        tokens: sequences that decode, of all workers together.
        context: tokens of each so far.
        form: of weights and messages.
        skew: exponent of Zipf's law by which experts are chosen; 0 is uniform.

    Raises:
        InputError: a number is below 1, or expert_tp divides neither num_shards nor the width of an expert.
    """
    _check(shape, num_workers=num_workers, num_shards=num_shards, expert_tp=expert_tp, tokens=tokens, context=context)
    own = math.ceil(tokens / num_workers)
    cores = hardware.num_gpus if hardware.fleet.shares_cores else num_workers
    worker_cores = max(1.0, cores // num_workers)
    dense_s = _dense_parts(shape, hardware, form, own, context, worker_cores)
    experts_s, expert_work_s, busiest_s = _experts(shape, hardware, form, num_shards, expert_tp, own, skew)
    # A token goes once to each shard that has any of its experts' slices.
    rows = own * hit_probability(shape.num_experts, shape.top_k, num_shards // expert_tp)  # to each shard
    pairs = own * shape.top_k * expert_tp
    asked = num_shards * (1 - (1 - hit_probability(shape.num_experts, shape.top_k, num_shards // expert_tp)) ** own)
    sent = num_shards * rows * dispatch_row_bytes(shape, form) + pairs * PAIR_BYTES
    answered = num_shards * rows * combine_row_bytes(shape, form)
    moe = shape.num_moe_layers
    latency_s, transfer_s = _links(hardware, num_workers + num_shards, asked, sent, answered)
    parts_s = dense_s | {
        "experts": moe * experts_s,
        "link latency": moe * latency_s,
        "link bytes": moe * transfer_s,
    }
    if hardware.fleet.shares_cores:
        one_core_s = dense_s["step"]  # an interpreter's
        work_s = one_core_s + (sum(dense_s.values()) - one_core_s) * worker_cores + moe * (expert_work_s + transfer_s)
        busy_s = num_workers * work_s / hardware.num_gpus if num_workers > 1 else 0.0
    else:
        busy_s = num_workers * moe * busiest_s
    return FleetStepCost(
        path_s=sum(parts_s.values()),
        busy_s=busy_s,
        parts_s=parts_s,
        dispatch_bytes_per_layer=num_workers * sent,
        combine_bytes_per_layer=num_workers * answered,
    )


def fleet_choices(
    shape: ModelShape,
    hardware: Hardware,
    *,
    num_workers: int,
    num_shards: int,
    tokens: int,
    context: int = 128,
    form: Format = _BF16,
    skew: float = 0.0,
) -> dict[int, FleetStepCost]:
    """Return the step of every expert_tp that num_shards and the model's experts allow; arguments as above."""
    return {
        expert_tp: fleet_step_cost(
            shape,
            hardware,
            num_workers=num_workers,
            num_shards=num_shards,
            expert_tp=expert_tp,
            tokens=tokens,
            context=context,
            form=form,
            skew=skew,
        )
        for expert_tp in divisors(num_shards)
        if shape.expert_width % expert_tp == 0
    }


def _check(shape: ModelShape, **counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
    if counts["num_shards"] % counts["expert_tp"]:
        raise InputError(f"expert_tp={counts['expert_tp']} does not divide num_shards={counts['num_shards']}")
    if shape.expert_width % counts["expert_tp"]:
        raise InputError(f"width of an expert not divisible: {shape.expert_width} by expert_tp={counts['expert_tp']}")


def _product_s(hardware: Hardware, sides: Roofline) -> float:
    """Return the time of a product on one core or GPU: its longer side, and what that does not hide of the other."""
    return max(sides) + (1 - hardware.fleet.product_overlap) * min(sides)


def _dense_parts(
    shape: ModelShape, hardware: Hardware, form: Format, tokens: int, context: int, cores: float
) -> dict[str, float]:
    """Return what a worker computes itself in a step, by part, on so many cores."""
    fleet, layers, moe = hardware.fleet, shape.num_layers, shape.num_moe_layers

    def products_s(params: float, weight_bytes: float) -> float:
        sides = dense_roofline(hardware, form, params=params, tokens=tokens, weight_bytes=weight_bytes)
        return _product_s(hardware, sides) / cores

    attended = attention_roofline(
        shape, hardware, form, tokens=tokens, sequences=tokens, attended=context, tp=1, is_decode=True
    )
    beside = shape.attention_params + shape.shared_params + shape.dense_ffn_params
    rows_s = tokens * shape.hidden_size * fleet.value_s / cores
    return {
        "dense products": products_s(beside, form.dense_weight_bytes)
        + moe * products_s(shape.hidden_size * shape.num_experts, form.table_bytes),
        "attention": layers * (max(attended.memory_s / fleet.kv_efficiency, attended.compute_s) / cores + rows_s),
        "layers": layers * hardware.kernels_per_layer * hardware.kernel_gap_s,
        "head": products_s(shape.embedding_params, form.table_bytes),
        "sampling": tokens * shape.vocab_size * fleet.score_s,
        "step": fleet.step_s + tokens * fleet.sequence_s,
    }


def _experts(
    shape: ModelShape, hardware: Hardware, form: Format, num_shards: int, expert_tp: int, tokens: int, skew: float
) -> tuple[float, float, float]:
    """Return how long a layer's experts take, the seconds of all shards' cores, and those of the busiest shard."""
    fleet = hardware.fleet
    lone_gain = max(1.0, fleet.lone_bytes_per_s / (hardware.memory_bytes_per_s * hardware.memory_efficiency))
    lone = hardware.model_copy(update={"memory_bytes_per_s": hardware.memory_bytes_per_s * lone_gain})
    draws = shard_rows(shape.num_experts, shape.top_k, expert_tp, num_shards, tokens, skew)

    def seconds(one: Hardware, rows: Counts) -> float:
        different, counts = np.unique(rows, return_counts=True)
        sides = (
            expert_roofline(shape, one, form, rows=row, active_experts=1, expert_tp=expert_tp)
            for row in different.tolist()
        )
        return math.fsum(count * _product_s(one, side) for count, side in zip(counts.tolist(), sides, strict=True))

    cores = hardware.num_gpus if fleet.shares_cores else num_shards
    threads = max(1, cores // num_shards)
    layers = []
    for draw in draws:
        works = []
        for rows in draw:
            if not len(rows):
                continue
            is_helped = fleet.shares_cores and threads * num_shards <= cores
            is_helped &= len(rows) <= _FEW_EXPERTS or int(rows.sum()) >= _MANY_PAIRS
            most = threads + (min(threads, cores - threads) if is_helped else 0)
            works.append(ShardWork(busy_s=seconds(hardware, rows), lone_s=seconds(lone, rows), most_cores=most))
        busy = [work.busy_s for work in works]
        layers.append((finish_s(works, cores, lone_gain), sum(busy), max(busy)))
    finished_s, work_s, busiest_s = np.mean(layers, axis=0).tolist()
    return finished_s, work_s, busiest_s


def _links(hardware: Hardware, members: int, asked: float, sent: float, answered: float) -> tuple[float, float]:
    """Return the latency and the transfer of a layer's requests and answers: sent in turn, the last one waited for."""
    if not hardware.tiers:
        return 0.0, 0.0
    reachable = [tier for tier in hardware.tiers if tier.domain_size >= members]
    tier = reachable[0] if reachable else hardware.tiers[-1]
    message_s = tier.latency_s if tier.is_direct else tier.staged_message_s
    latency_s = 2 * message_s + max(0.0, asked - 1) * (tier.per_peer_s if tier.is_direct else message_s)
    return latency_s, (sent + answered) / tier.effective_bytes_per_s
