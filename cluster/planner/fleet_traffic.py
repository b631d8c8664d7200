"""The bytes of a layer that cross the links between attention workers and expert shards, as both ends count them.

A worker is no shard: every row crosses a link, once to each shard that has an expert (or a slice of one) of the token's
choice, with a few bytes for each pair of row and slice; one row comes back from each.

E experts, S shards.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.traffic import expected_destinations

Floats = npt.NDArray[np.float64]

PAIR_BYTES = 12.0  # row, slice, weight, four each: kernels/dispatch.py
_ROUNDS, _NEAR = 100, 1e-8  # of fitting odds to chances


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetTraffic:
    """Bytes of one layer, all workers and shards together. back_bytes: outputs, or partial sums of slices."""

    rows: float
    dispatch_bytes: float
    back_bytes: float


def fleet_traffic(
    *,
    tokens: float,
    hidden_size: int,
    num_experts: int,
    top_k: int,
    num_shards: int,
    expert_tp: int = 1,
    value_bytes: float,
    hosts_SE: npt.ArrayLike | None = None,
    load_E: npt.ArrayLike | None = None,
) -> FleetTraffic:
    """Return the bytes of one layer for so many tokens.

    Args:
        tokens: of all workers.
        hidden_size: values of a row.
        num_experts: of the layer.
        top_k: experts of a token.
        num_shards: that hold the layer's experts, each of them once.
        expert_tp: slices of an expert, on different shards.
        value_bytes: of a value of a row.
        hosts_SE: whether a shard has (a slice of) an expert; None: evenly spread.
        load_E: tokens that chose each expert, in any unit; None: all alike.

    Raises:
        InputError: loads that no router of top_k choices gives.
    """
    if hosts_SE is None:
        rows = tokens * expected_destinations_of_slices(num_experts, top_k, num_shards, expert_tp)
    else:
        hosts = np.asarray(hosts_SE, dtype=np.bool_)
        load = np.ones(num_experts) if load_E is None else np.asarray(load_E, dtype=np.float64)
        rows = tokens * float(hit_chances(load, top_k, hosts).sum())
    row_bytes = hidden_size * value_bytes
    return FleetTraffic(
        rows=rows,
        dispatch_bytes=rows * row_bytes + tokens * top_k * expert_tp * PAIR_BYTES,
        back_bytes=rows * row_bytes,
    )


def expected_destinations_of_slices(num_experts: int, top_k: int, num_shards: int, expert_tp: int) -> float:
    """Return how many shards a token goes to, under uniform routing: expert_tp of each group that it meets."""
    if num_shards % expert_tp or num_experts % (num_shards // expert_tp):
        raise InputError(f"{num_experts} experts of {expert_tp} slices do not spread evenly over {num_shards} shards")
    return expert_tp * expected_destinations(num_experts, top_k, num_shards // expert_tp)


def hit_chances(load_E: Floats, top_k: int, hosts_SE: npt.NDArray[np.bool_]) -> Floats:
    """Return for each shard how likely a token chooses an expert of it.

    A token's choices are taken as those of conditional Poisson sampling (Hajek 1964): top_k different experts, each set
    as likely as the product of its experts' odds, and the odds such that each expert is chosen as often as it was. So
    they know what is popular, not what is chosen together.

    Raises:
        InputError: an expert that is chosen by more tokens than there are, or fewer than top_k that are chosen at all.
    """
    chance_E = load_E * (top_k / load_E.sum())
    if chance_E.max() > 1 + 1e-6 or (chance_E > 0).sum() < top_k:
        raise InputError(f"loads of which the largest is {chance_E.max():.3f} of the tokens, with top_k={top_k}")
    certain_E = chance_E > 1 - 1e-6  # chosen by every token
    open_E = (chance_E > 0) & ~certain_E
    left = top_k - int(certain_E.sum())
    odds_E = np.where(open_E, _odds(np.where(open_E, chance_E, 0.0), left), 0.0)
    every = _sums(odds_E, left)[left]
    missed_S = [_sums(np.where(hosts_E, 0.0, odds_E), left)[left] / every for hosts_E in hosts_SE]
    return np.where((hosts_SE & certain_E).any(axis=1), 1.0, 1.0 - np.array(missed_S))


def _odds(chance_E: Floats, top_k: int) -> Floats:
    """Return odds whose chances of being among top_k are these.

    Each round corrects them by the square root of what their chances are short of, as odds. Without the root two
    experts would swing for ever: what one gains the other loses.
    """
    is_open_E = chance_E > 0
    wanted_E = chance_E / (1 - chance_E)
    odds_E = wanted_E
    for _ in range(_ROUNDS if top_k else 0):
        now_E = np.clip(_chances(odds_E, top_k), 1e-12, 1 - 1e-12)
        if np.abs(now_E - chance_E)[is_open_E].max(initial=0.0) < _NEAR:
            break
        odds_E = odds_E * np.sqrt(wanted_E * (1 - now_E) / now_E)
        odds_E = odds_E / odds_E.mean()  # a common factor changes nothing
    return odds_E


def _chances(odds_E: Floats, top_k: int) -> Floats:
    """Return each expert's chance to be among top_k: its odds times the sum over sets of the others, over all sets."""
    num_experts = len(odds_E)
    before = np.zeros((num_experts + 1, top_k + 1))  # sums over sets of the experts before each
    before[0, 0] = 1.0
    for expert in range(num_experts):
        before[expert + 1] = before[expert]
        before[expert + 1, 1:] += odds_E[expert] * before[expert, :-1]
    chances_E = np.zeros(num_experts)
    after = np.zeros(top_k + 1)
    after[0] = 1.0
    for expert in range(num_experts - 1, -1, -1):
        others = float(before[expert, :top_k] @ after[top_k - 1 :: -1])
        chances_E[expert] = odds_E[expert] * others
        after[1:] += odds_E[expert] * after[:-1].copy()
    chances_E /= before[num_experts, top_k]
    return chances_E


def _sums(odds_E: Floats, top_k: int) -> Floats:
    """Return for each k up to top_k the sum over sets of k experts of the products of their odds."""
    sums = np.zeros(top_k + 1)
    sums[0] = 1.0
    for odds in odds_E:
        sums[1:] += odds * sums[:-1].copy()
    return sums
