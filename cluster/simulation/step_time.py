"""The time of a step from the rows of every shard: the planner's cost model, with the busiest rank of each layer.

A shard is one of the plan's ep groups: expert_tp GPUs, which compute attention too. When there are more or fewer
shards, there are as many more or fewer copies of attention.

Shape suffixes: L MoE layers, S shards.
"""

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.compute import expert_rooflines
from expertmesh.cluster.planner.cost import EvenParts, step_cost
from expertmesh.cluster.planner.dtypes import Format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.memory import GpuMemory, gpu_memory, short_of_bytes
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.planner import check_plan
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.skew import RankLoad
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.routing import Ranks


class StepTime(NamedTuple):
    """Seconds: of a step; of the busiest shards' experts, all layers; of the mean shards'."""

    step_s: float
    expert_s: float
    mean_expert_s: float


class StepClock:
    """Tells how long steps take.

    Raises:
        InputError: the plan does not divide, takes more GPUs than there are, or has stages or instances; or the GPUs
            have no arithmetic for the format.
    """

    def __init__(self, shape: ModelShape, hardware: Hardware, plan: Plan, workload: Workload, form: Format) -> None:
        for name in ("pp", "instances"):
            if getattr(plan, name) != 1:
                raise InputError(f"plan: {name}={getattr(plan, name)}; one stage of one instance is simulated")
        check_plan(plan, shape, hardware, is_elastic=True)
        for arithmetic in {form.expert, form.dense, "bf16"}:
            hardware.flops(arithmetic)
        self.shape, self.hardware, self.plan, self.form = shape, hardware, plan, form
        self._workload = workload
        self._parts = lru_cache(maxsize=4096)(self._even_parts)

    def require(self, num_shards: int, name: str) -> None:
        """Refuse more shards than the hardware has GPUs for; the message names who asks.

        Raises:
            InputError: there are fewer.
        """
        gpus = num_shards * self.plan.expert_tp
        if num_shards < 1 or gpus > self.hardware.num_gpus:
            have = f"num_gpus of hardware {self.hardware.name} is {self.hardware.num_gpus}"
            raise InputError(f"{name}: {num_shards} shards take {gpus} GPUs, and {have}; --gpus says otherwise")

    def resized(self, num_shards: int) -> "StepClock":
        """Return the same with another number of shards.

        Raises:
            InputError: as of the constructor.
        """
        self.require(num_shards, "--sweep")
        copies, rest = divmod(num_shards * self.plan.expert_tp, self.plan.attention_tp)
        if rest:
            raise InputError(f"--sweep: {num_shards} shards do not divide by attention_tp={self.plan.attention_tp}")
        plan = replace(self.plan, ep=num_shards, attention_dp=copies)
        return StepClock(self.shape, self.hardware, plan, self._workload, self.form)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert, of all GPUs of its shard together."""
        return round(self.shape.expert_params * self.form.expert_weight_bytes)

    @property
    def shard_room_bytes(self) -> int:
        """Bytes that a shard has for experts: of its GPUs' usable memory, without attention's weights and tables."""
        held = self.memory(self.plan.ep, 0, 1)
        free = self.hardware.usable_memory * self.hardware.memory_bytes - held.weight_bytes
        return max(1, int(free)) * self.plan.expert_tp

    def plan_of(self, num_shards: int) -> Plan:
        """Return the plan with another number of shards; attention's slices that are not whole are left out."""
        copies = max(1, num_shards * self.plan.expert_tp // self.plan.attention_tp)
        return replace(self.plan, ep=num_shards, attention_dp=copies, replicas=0)

    def memory(self, num_shards: int, slots: int, tokens: int) -> GpuMemory:
        """Return what a GPU holds: `slots` experts of all layers on each shard, caches of a step of so many tokens."""
        workload = self._workload.model_copy(update={"tokens_per_step": max(1, tokens)})
        memory = gpu_memory(self.shape, self.hardware, self.plan_of(num_shards), workload, self.form)
        return replace(memory, expert_weight_bytes=slots * self.expert_bytes / self.plan.expert_tp)

    def short_of_bytes(self, num_shards: int, slots: int, tokens: int) -> float:
        """Return how many bytes a GPU lacks for that, 0 if it fits."""
        return short_of_bytes(self.memory(num_shards, slots, tokens), self.hardware)

    def seconds(self, ranks: Ranks, tokens: int, num_live: int) -> StepTime:
        """Return the time of a step.

        Args:
            ranks: of the step; shards that are dead have no rows.
            tokens: of the step, at least 1.
            num_live: shards that compute.
        """
        compute_LS, memory_LS = expert_rooflines(
            self.shape,
            self.hardware,
            self.form,
            rows=ranks.rows_LS,
            active_experts=ranks.active_LS,
            expert_tp=self.plan.expert_tp,
        )
        time_LS = np.maximum(compute_LS, memory_LS)
        expert_s = float(time_LS.max(axis=1).sum())
        mean_rows = tokens * self.shape.top_k / num_live
        imbalance = float(np.maximum(ranks.rows_LS.max(axis=1) / mean_rows, 1.0).mean())
        step_s = self._parts(tokens, num_live).step_s(expert_s, imbalance, self._workload.overlap)
        return StepTime(step_s, expert_s, float(time_LS.sum()) / num_live)

    def _even_parts(self, tokens: int, num_live: int) -> EvenParts:
        """Return what a step takes beside its experts, were all shards equally busy."""
        workload = self._workload.model_copy(update={"tokens_per_step": tokens})
        mean_rows = tokens * self.shape.top_k / num_live
        even = RankLoad(mean_rows=mean_rows, busiest_rows=mean_rows, busiest_active_experts=1.0)
        return step_cost(self.shape, self.hardware, self.plan_of(num_live), workload, self.form, even).even_parts()
