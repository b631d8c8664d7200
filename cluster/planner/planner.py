"""Every plan of a model on some hardware: what it needs, what it takes, and which one is recommended.

The recommendation is the plan of the shortest step, and its reason what that saves: both come out of the cost model.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.cost import StepCost, step_cost
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.memory import GpuMemory, gpu_memory, short_of_bytes
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.plans import Plan, enumerate_plans, why_not
from expertmesh.cluster.planner.workload import Workload

REPLICAS = (0, 1)  # slots for replicas that are tried, a group and layer
MEMORY_FIELDS = (
    "weight_bytes_per_gpu",
    "attention_weight_bytes_per_gpu",
    "expert_weight_bytes_per_gpu",
    "kv_bytes_per_gpu",
    "buffer_bytes_per_gpu",
)
COST_FIELDS = (
    "tokens_per_expert",
    "tokens_per_rank",
    "active_experts_per_rank",
    "imbalance",
    "dispatch_bytes_per_layer",
    "combine_bytes_per_layer",
    "dispatch_dense_bound_bytes_per_layer",
    "dispatch_rows_stay",
    "dispatch_rows_by_tier",
    "all_reduce_bytes_per_layer",
    "dispatch_s",
    "combine_s",
    "all_reduce_s",
    "expert_s",
    "expert_bound_by",
    "attention_s",
    "parts_s",
    "step_s",
    "tokens_per_s",
    "bound_by",
)
_ROUNDING = 1e-9  # steps this near to each other take the same time: the simpler plan is better


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A plan: memory and cost where the model's sizes allow it, why_not where it cannot run."""

    plan: Plan
    why_not: str | None
    memory: GpuMemory | None = None
    cost: StepCost | None = None

    @property
    def is_feasible(self) -> bool:
        """Whether it can run."""
        return self.why_not is None

    @property
    def step_s(self) -> float:
        """Seconds of a step, infinite if it cannot run."""
        return self.cost.step_s if self.cost and self.is_feasible else float("inf")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Candidates, the best first, those that cannot run last; recommended is None where none can run."""

    shape: ModelShape
    hardware: Hardware
    workload: Workload
    dtype: str
    candidates: tuple[Candidate, ...]
    recommended: int | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: times in seconds, bytes of a layer of all ranks of a stage together."""
        workload = self.workload
        return {
            "model": self.shape.name,
            "hardware": self.hardware.name,
            "num_gpus": self.hardware.num_gpus,
            "dtype": self.dtype,
            **workload.model_dump(),
            "total_params": self.shape.total_params,
            "active_params": self.shape.active_params,
            "plans": [
                _row(candidate, workload, is_best=index == self.recommended, best_s=self.candidates[0].step_s)
                for index, candidate in enumerate(self.candidates)
            ],
            "recommended": self.recommended,
            "reason": self.reason,
        }


def make_report(
    shape: ModelShape,
    hardware: Hardware,
    workload: Workload,
    dtype: str,
    *,
    replicas: tuple[int, ...] = REPLICAS,
    plans: Iterable[Plan] | None = None,
) -> Report:
    """Weigh every plan of a model.

    Args:
        shape: the model.
        hardware: all of whose GPUs may be used.
        workload: what a step computes.
        dtype: name of a format.
        replicas: slots for replicas of hot experts to be tried.
        plans: these alone; None: all of them.

    Raises:
        InputError: the format is unknown, or the hardware has no arithmetic for it.
    """
    form = find_format(dtype)
    for arithmetic in {form.expert, form.dense, "bf16"}:
        hardware.flops(arithmetic)
    tried = enumerate_plans(hardware.num_gpus, replicas) if plans is None else plans
    weighed = [_weigh(plan, shape, hardware, workload, dtype) for plan in tried]
    candidates = tuple(sorted(weighed, key=_order))
    good = [i for i, one in enumerate(candidates) if one.is_feasible and not _misses(one, workload)]
    recommended = good[0] if good else None
    return Report(
        shape=shape,
        hardware=hardware,
        workload=workload,
        dtype=dtype,
        candidates=candidates,
        recommended=recommended,
        reason=_reason(candidates, recommended, workload),
    )


def check_plan(plan: Plan, shape: ModelShape, hardware: Hardware, *, is_elastic: bool = False) -> None:
    """Refuse a plan that the model's sizes or the number of GPUs do not allow; is_elastic as of `why_not`.

    Raises:
        InputError: says which number does not divide, or how many GPUs are missing.
    """
    refused = why_not(plan, shape, is_elastic=is_elastic)
    if refused is None and plan.num_gpus > hardware.num_gpus:
        refused = f"it takes {plan.num_gpus} GPUs, and num_gpus of hardware {hardware.name} is {hardware.num_gpus}"
    if refused is not None:
        raise InputError(f"plan ({plan}) does not fit {shape.name}: {refused}")


def _weigh(plan: Plan, shape: ModelShape, hardware: Hardware, workload: Workload, dtype: str) -> Candidate:
    refused = why_not(plan, shape)
    if refused is not None:
        return Candidate(plan=plan, why_not=refused)
    form = find_format(dtype)
    memory = gpu_memory(shape, hardware, plan, workload, form)
    short = short_of_bytes(memory, hardware)
    if short > 0:
        return Candidate(plan=plan, why_not=f"does not fit by {short / 1e9:.1f} GB a GPU", memory=memory)
    return Candidate(plan=plan, why_not=None, memory=memory, cost=step_cost(shape, hardware, plan, workload, form))


def _order(candidate: Candidate) -> tuple[float, float, int, int, Plan]:
    """Sort by step time; equal ones by GPUs used, then by replicas; what does not fit by how much, then the rest."""
    memory = candidate.memory.total_bytes if candidate.memory and not candidate.is_feasible else 0.0
    step_s = candidate.step_s
    rounded = step_s if step_s == float("inf") else round(step_s / _ROUNDING)
    no_memory = 0.0 if candidate.memory else float("inf")
    return rounded, memory or no_memory, candidate.plan.num_gpus, candidate.plan.replicas, candidate.plan


def _misses(candidate: Candidate, workload: Workload) -> bool:
    return workload.slo_itl_s is not None and candidate.step_s > workload.slo_itl_s


def _reason(candidates: tuple[Candidate, ...], recommended: int | None, workload: Workload) -> str:
    """Say in a sentence why: the best plan, the best of the other kind, and the part that differs most."""
    feasible = [one for one in candidates if one.is_feasible]
    if not feasible:
        fitting = [one.why_not for one in candidates if one.memory]
        return f"no plan can run: the nearest {fitting[0]}" if fitting else "no plan can run: no sizes divide"
    if recommended is None:
        slo_s = workload.slo_itl_s or 0.0
        return f"no plan meets {slo_s * 1e3:g} ms: the fastest, {feasible[0].plan}, takes {_ms(feasible[0].step_s)}"
    best = candidates[recommended]
    text = f"{best.plan}: {_ms(best.step_s)} a step, the shortest of {len(feasible)} plans that fit"
    assert best.cost is not None
    text += f", bound by {best.cost.bound_by}"
    other = next((one for one in feasible if (one.plan.ep > 1) != (best.plan.ep > 1)), None)
    if other is None or other.cost is None:
        kind = "spreads experts (EP)" if best.plan.ep == 1 else "keeps a slice of every expert on each GPU (EP=1)"
        return f"{text}; no plan that {kind} fits"
    ours, theirs = best.cost.parts_s, other.cost.parts_s
    gains = {part: theirs.get(part, 0.0) - ours.get(part, 0.0) for part in {*ours, *theirs}}
    part = max(sorted(gains), key=lambda name: gains[name])
    kind = "spreads experts" if other.plan.ep > 1 else "has EP=1"
    return (
        f"{text}; the best that {kind}, {other.plan}, takes {_ms(other.step_s)}: "
        f"{_ms(theirs.get(part, 0.0))} of {part} against {_ms(ours.get(part, 0.0))}"
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _row(candidate: Candidate, workload: Workload, *, is_best: bool, best_s: float) -> dict[str, Any]:
    plan, memory, cost = candidate.plan, candidate.memory, candidate.cost
    row: dict[str, Any] = {
        "attention_tp": plan.attention_tp,
        "attention_dp": plan.attention_dp,
        "ep": plan.ep,
        "expert_tp": plan.expert_tp,
        "pp": plan.pp,
        "instances": plan.instances,
        "replicas": plan.replicas,
        "num_gpus": plan.num_gpus,
        "feasible": candidate.is_feasible,
        "why_not": candidate.why_not,
    }
    row |= dict.fromkeys(MEMORY_FIELDS + COST_FIELDS)
    if memory:
        values = (
            memory.weight_bytes,
            memory.attention_weight_bytes + memory.table_bytes,
            memory.expert_weight_bytes,
            memory.kv_bytes,
            memory.buffer_bytes,
        )
        row |= dict(zip(MEMORY_FIELDS, values, strict=True))
    if cost:
        row |= dict(zip(COST_FIELDS, _cost_values(plan, cost, workload), strict=True))
    row["verdict"] = _verdict(candidate, workload, is_best=is_best, best_s=best_s)
    return row


def _cost_values(plan: Plan, cost: StepCost, workload: Workload) -> tuple[Any, ...]:
    layer = cost.layer
    return (
        layer.load.busiest_rows / max(layer.load.busiest_active_experts, 1e-9),
        workload.microbatch_tokens(plan) / plan.stage_gpus,
        layer.load.busiest_active_experts,
        layer.load.imbalance,
        layer.dispatch_bytes,
        layer.combine_bytes,
        layer.dense_bound_bytes,
        layer.rows.stay * plan.stage_gpus,
        list(layer.rows.by_tier),
        layer.all_reduce_bytes,
        layer.dispatch.total_s,
        layer.combine.total_s,
        layer.all_reduce.total_s,
        layer.experts.total_s,
        layer.experts.bound_by,
        layer.attention.total_s + layer.dense.total_s,
        dict(cost.parts_s),
        cost.step_s,
        workload.tokens_per_step / cost.step_s,
        cost.bound_by,
    )


def _verdict(candidate: Candidate, workload: Workload, *, is_best: bool, best_s: float) -> str:
    if candidate.why_not:
        return f"cannot run: {candidate.why_not}"
    if is_best:
        return "recommended"
    if _misses(candidate, workload):
        return f"too slow: {_ms(candidate.step_s)} a step, wanted are {_ms(workload.slo_itl_s or 0.0)}"
    return f"{candidate.step_s / best_s:.2f} x the shortest"
