"""How many pods of which size a plan needs on Kubernetes, a group for each tier.

A member has a GPU of its own. What a pod asks for beside GPUs is assumed, as no fleet has run on GPUs yet: see the
constants.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.memory import GpuMemory
from expertmesh.cluster.planner.planner import Candidate
from expertmesh.cluster.serving_plan import ServingPlan

# Assumed: the process's own thread, one that reads weights, and Ray's.
CPUS_A_MEMBER = 4
# Assumed: Python, torch and CUDA's libraries in a process.
PROCESS_BYTES = 8 << 30
# Of Ray's processes and the object store in a pod, as base/rayservice.yaml has them.
POD_BYTES = 8 << 30
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerGroup:
    """Pods of one tier. cpus, memory_bytes and gpus are of a pod, requests and limits alike."""

    tier: str
    members: int
    pods: int
    gpus: int
    cpus: int
    memory_bytes: int


def servable_plans(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that a fleet can run, the best first: a worker is one process and has all layers."""
    return [c for c in candidates if c.is_feasible and c.plan.attention_tp == 1 and c.plan.pp == 1]


def worker_groups(plan: ServingPlan, memory: GpuMemory, gpus_per_pod: int) -> tuple[WorkerGroup, WorkerGroup]:
    """Return the groups of attention workers and of expert shards.

    Host memory holds once what a member loads to its GPU, as reading a checkpoint goes through it.

    Args:
        plan: members of the tiers.
        memory: of a GPU of the plan.
        gpus_per_pod: of a host that gives all to one pod, so that its members reach each other over NVLink.

    Raises:
        InputError: gpus_per_pod is not positive.
    """
    if gpus_per_pod < 1:
        raise InputError(f"--gpus-per-pod is {gpus_per_pod}, and must be at least 1")
    dense_bytes = memory.attention_weight_bytes + memory.table_bytes
    return (
        _group("attention", plan.workers, dense_bytes, gpus_per_pod),
        _group("experts", plan.shards, memory.expert_weight_bytes, gpus_per_pod),
    )


def _group(tier: str, members: int, weight_bytes: float, gpus_per_pod: int) -> WorkerGroup:
    gpus = min(members, gpus_per_pod)
    memory_bytes = POD_BYTES + gpus * (PROCESS_BYTES + math.ceil(weight_bytes))
    return WorkerGroup(
        tier=tier,
        members=members,
        pods=math.ceil(members / gpus),
        gpus=gpus,
        cpus=gpus * CPUS_A_MEMBER,
        memory_bytes=math.ceil(memory_bytes / _GIB) * _GIB,
    )
