"""How `expertmesh plan --kubernetes` prints: the sizes of the worker groups, as a patch that kustomize takes."""

import dataclasses
from collections.abc import Iterator

import typer
import yaml

from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.planner.planner import Report
from expertmesh.cluster.planner.worker_groups import WorkerGroup, servable_plans, worker_groups
from expertmesh.cluster.serving_plan import ServingPlan, read_plan

# Where the groups are in k8s/base/rayservice.yaml.
_INDEX = {"attention": 1, "experts": 2}


def print_groups(report: Report, gpus_per_pod: int) -> None:
    """Print the groups of the best plan that a fleet can run, and the settings that go with them.

    Raises:
        CapacityError: none fits.
    """
    servable = servable_plans(report.candidates)
    if not servable:
        raise CapacityError(
            f"{report.shape.name} on {report.hardware.num_gpus} GPUs of {report.hardware.name}: no plan fits in which "
            "a worker has all layers and all heads, which is what a fleet runs"
        )
    best = servable[0]
    assert best.memory is not None, "a plan that can run has its memory"
    plan = read_plan(report.shape.name, {**dataclasses.asdict(best.plan)})
    groups = worker_groups(plan, best.memory, gpus_per_pod)
    for line in _remarks(report, plan, best.step_s, groups):
        typer.echo(f"# {line}")
    typer.echo(yaml.safe_dump([op for group in groups for op in _patch(group)], sort_keys=False, width=120), nl=False)


def _remarks(report: Report, plan: ServingPlan, step_s: float, groups: tuple[WorkerGroup, ...]) -> Iterator[str]:
    yield f"{report.shape.name}, {report.dtype}, on {report.hardware.name}: {plan}"
    yield f"predicted: {step_s * 1e3:.3g} ms a step"
    first = report.candidates[0]
    if report.recommended is not None and first.step_s < step_s:
        yield f"faster, and not served: {first.plan}, {first.step_s * 1e3:.3g} ms"
    num_gpus = sum(group.pods * group.gpus for group in groups)
    counted = report.hardware.num_gpus
    yield f"{num_gpus} GPUs: workers and shards have their own, where the plan counts {counted} for both"
    for group in groups:
        yield f"{group.tier}: {group.members} members, {group.pods} pods of {group.gpus} GPUs"
    yield "settings, for a file beside overlays/gpu/20-gpu.toml, its [autoscale] tables with bounds to match:"
    yield f"  shards = {plan.shards}"
    yield f"  workers = {plan.workers}"
    yield f"  replicas = {plan.replicas}"
    yield f"  expert_tp = {plan.expert_tp}"
    yield "cores and memory are assumed, not measured (cluster/planner/worker_groups.py); a patch of the RayService:"


def _patch(group: WorkerGroup) -> Iterator[dict[str, object]]:
    path = f"/spec/rayClusterConfig/workerGroupSpecs/{_INDEX[group.tier]}"
    for field in ("replicas", "minReplicas", "maxReplicas"):
        yield {"op": "replace", "path": f"{path}/{field}", "value": group.pods}
    resources = {"cpu": str(group.cpus), "memory": f"{group.memory_bytes >> 30}Gi", "nvidia.com/gpu": str(group.gpus)}
    value = {"requests": resources, "limits": dict(resources)}
    yield {"op": "replace", "path": f"{path}/template/spec/containers/0/resources", "value": value}
