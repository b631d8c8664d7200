"""Shapes and machines for tests of the planner: the shipped ones, and small ones whose sums are done by hand."""

from functools import cache
from typing import Any

from expertmesh.actors.cli import plan_files
from expertmesh.cluster.planner.config_reader import read_shape
from expertmesh.cluster.planner.hardware import Hardware, LinkTier, read_hardware
from expertmesh.cluster.planner.model_shape import ModelShape

CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "vocab_size": 100,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


@cache
def shipped_shape(name: str) -> ModelShape:
    return plan_files.load_shape(name)


@cache
def shipped_machine(name: str, num_gpus: int | None = None) -> Hardware:
    return plan_files.load_hardware(name, num_gpus)


def small_shape(**changes: Any) -> ModelShape:
    return read_shape("small", {**CONFIG, **changes})


def tier(**changes: Any) -> LinkTier:
    values = {"name": "links", "domain_size": 4, "bytes_per_s": 1e9, "latency_s": 1e-6, "source": "made up"}
    return LinkTier(**{**values, **changes})


def machine(*tiers: LinkTier, **changes: Any) -> Hardware:
    values: dict[str, Any] = {
        "name": "made up",
        "num_gpus": 4,
        "memory_bytes": 1e9,
        "memory_bytes_per_s": 1e11,
        "memory_efficiency": 1.0,
        "flop_per_s": {"bf16": 1e12, "fp8": 2e12},
        "compute_efficiency": 1.0,
        "collective_s": 0.0,
        "all_to_all_s": 0.0,
        "tiers": [one.model_dump() for one in tiers or (tier(),)],
    }
    return read_hardware("made up", {**values, **changes})
