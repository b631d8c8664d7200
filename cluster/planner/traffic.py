"""How many rows and bytes cross links in a layer: exact for uniform routing, and the dense bound beside it."""

import math
from dataclasses import dataclass
from functools import lru_cache

from expertmesh.cluster.planner.dtypes import Format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.plans import Plan


@lru_cache(maxsize=4096)
def hit_probability(num_experts: int, top_k: int, num_groups: int) -> float:
    """Return the probability that a token has an expert in a group, of top_k of num_experts at random.

    1 - C(E - E/G, k) / C(E, k): one minus the probability that all k choices fall outside (hypergeometric). Where the
    groups do not divide the experts, some have one more: the mean over the groups.
    """
    inside, num_larger = divmod(num_experts, num_groups)
    larger = num_larger / num_groups
    smaller_hit = _hit(num_experts, top_k, inside)
    return smaller_hit if not larger else (1 - larger) * smaller_hit + larger * _hit(num_experts, top_k, inside + 1)


def _hit(num_experts: int, top_k: int, inside: int) -> float:
    missed = math.prod((num_experts - inside - i) / (num_experts - i) for i in range(top_k))
    return 1 - max(0.0, missed)


def expected_destinations(num_experts: int, top_k: int, num_groups: int) -> float:
    """Return how many distinct groups a token is sent to, its own included: a token once a group."""
    return num_groups * hit_probability(num_experts, top_k, num_groups)


def dense_bound_bytes(tokens: float, hidden_size: int, num_ranks: int, value_bytes: float) -> float:
    """Return the bytes of every token going to every rank: what an all-to-all moves at most."""
    return num_ranks * hidden_size * tokens * value_bytes


def all_reduce_bytes(tokens: float, hidden_size: int, value_bytes: float = 2.0) -> float:
    """Return the bytes that an all-reduce adds up, counted once: a row for each token."""
    return tokens * hidden_size * value_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedRows:
    """Rows of one layer's dispatch, which are those of its combine, of all ranks of a stage together.

    stay: for the rank itself, which cross no link. by_tier: that cross each tier, from the innermost.
    """

    stay: float
    by_tier: tuple[float, ...]

    @property
    def sent(self) -> float:
        """Rows that leave their rank."""
        return sum(self.by_tier)


def routed_rows(shape: ModelShape, hardware: Hardware, plan: Plan, tokens: float) -> RoutedRows:
    """Return where the rows of a layer go.

    Each token goes once to each group that has an expert of its choice, there to all expert_tp ranks, which hold slices
    of it. Which groups those are is as likely for each: replicas and skew are not seen here.

    Args:
        shape: the model.
        hardware: whose tiers the ranks of the stage fill, domain after domain.
        plan: ep and expert_tp of it.
        tokens: of the stage.
    """
    if plan.is_tensor_parallel:
        return RoutedRows(stay=tokens, by_tier=(0.0,) * len(hardware.tiers))
    rows = tokens * hit_probability(shape.num_experts, shape.top_k, plan.ep)  # to each rank
    return RoutedRows(stay=rows, by_tier=tuple(rows * peers for peers in hardware.peers_by_tier(plan.stage_gpus)))


def dispatch_row_bytes(shape: ModelShape, form: Format) -> float:
    """Return the bytes of a token's way to an expert."""
    return shape.hidden_size * form.dispatch_bytes


def combine_row_bytes(shape: ModelShape, form: Format) -> float:
    """Return the bytes of a row's way back."""
    return shape.hidden_size * form.combine_bytes
