"""The plan that `serve` runs: how many members each tier has, and in how many slices their experts are cut.

ep: experts whole, spread over the shards. tp: each shard has a slice of every expert. tpxep: experts are spread over
groups of shards, and cut within a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.plans import divisors

KINDS = ("ep", "tp", "tpxep")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingPlan:
    """Members of the tiers, slices of an expert, and copies of each."""

    shards: int
    workers: int
    expert_tp: int = 1
    replicas: int = 1

    def __str__(self) -> str:
        parts = [f"ep={self.shards // self.replicas // self.expert_tp}", f"expert_tp={self.expert_tp}"]
        parts += [f"{self.replicas} replicas"] * (self.replicas > 1)
        return ", ".join([*parts, f"attention_dp={self.workers}"])


def slices_of(kind: str, shards: int) -> int:
    """Return the slices of an expert under a kind of plan.

    Raises:
        InputError: no such kind, or shards cannot be grouped for it.
    """
    if kind == "ep":
        return 1
    if kind == "tp":
        return shards
    if kind != "tpxep":
        raise InputError(f"plan {kind!r} is not one of auto, {', '.join(KINDS)}, nor a file")
    between = divisors(shards)[1:-1]
    if not between:
        raise InputError(f"plan tpxep needs shards that form equal groups of two or more, such as 4; shards={shards}")
    return between[0]


def read_plan(name: str, content: Mapping[str, Any]) -> ServingPlan:
    """Read a plan of `expertmesh plan --json`: the recommended one, or one of its `plans` by itself.

    Raises:
        InputError: a field is missing or no whole number, or the plan asks for what is not served.
    """
    if "plans" in content:
        plans, recommended = content["plans"], content.get("recommended")
        if not isinstance(plans, list) or not isinstance(recommended, int) or not 0 <= recommended < len(plans):
            raise InputError(f"plan {name}: recommended={recommended!r} is none of its plans")
        content = plans[recommended]
        if not isinstance(content, Mapping):
            raise InputError(f"plan {name}: plans[{recommended}] is {type(content).__name__}, not a plan")
    values = {field: _count(name, content, field) for field in ("attention_dp", "ep", "expert_tp")}
    others = {field: _count(name, content, field, 1) for field in ("attention_tp", "pp", "instances")}
    for field, why in (("attention_tp", "a worker is one process"), ("pp", "a worker has all layers")):
        if others[field] > 1:
            raise InputError(f"plan {name}: {field}={others[field]} is not served: {why}")
    instances = others["instances"]
    return ServingPlan(
        shards=values["ep"] * values["expert_tp"] * instances,
        workers=values["attention_dp"] * instances,
        expert_tp=values["expert_tp"],
        replicas=instances,
    )


def _count(name: str, content: Mapping[str, Any], field: str, default: int | None = None) -> int:
    value = content.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"plan {name}: {field} must be a positive whole number, got {value!r}")
    return value
