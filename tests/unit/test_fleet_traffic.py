"""Bytes between workers and shards: against counting every set of choices, and against uniform routing's closed form.

E experts, S shards, K choices.
"""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.fleet_traffic import PAIR_BYTES, fleet_traffic, hit_chances
from expertmesh.cluster.planner.traffic import hit_probability
from expertmesh.kernels import dispatch

COMMON: dict[str, Any] = {"hidden_size": 64, "num_experts": 16, "top_k": 4, "value_bytes": 2.0}


def test_a_pair_is_as_large_as_it_travels() -> None:
    assert PAIR_BYTES == dispatch.PAIR_BYTES


def test_worked_example() -> None:
    """10 tokens of 4 choices. Slices of every expert on both shards: 20 rows of 128 bytes, and 80 pairs."""
    sliced = fleet_traffic(tokens=10, num_shards=2, expert_tp=2, **COMMON)
    assert (sliced.rows, sliced.back_bytes, sliced.dispatch_bytes) == (20, 20 * 128, 20 * 128 + 80 * 12)
    # Whole experts, 8 on each: a shard is left out where all four choices are among the other 8: C(8, 4) / C(16, 4).
    whole = fleet_traffic(tokens=10, num_shards=2, **COMMON)
    assert whole.rows == pytest.approx(20 * (1 - 70 / 1820))
    assert whole.dispatch_bytes == pytest.approx(whole.back_bytes + 40 * 12)


@pytest.mark.parametrize(("shards", "expert_tp"), [(3, 1), (4, 3), (32, 1)])
def test_what_does_not_spread_evenly_is_refused(shards: int, expert_tp: int) -> None:
    with pytest.raises(InputError, match=f"16 experts of {expert_tp} slices do not spread evenly over {shards}"):
        fleet_traffic(tokens=1, num_shards=shards, expert_tp=expert_tp, **COMMON)


def by_counting(odds_E: list[float], top_k: int, hosts_SE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how often each expert is chosen and each shard is met, over every set of top_k experts."""
    experts, shards, total = np.zeros(len(odds_E)), np.zeros(len(hosts_SE)), 0.0
    for chosen in map(list, itertools.combinations(range(len(odds_E)), top_k)):
        weight = float(np.prod([odds_E[expert] for expert in chosen]))
        experts[chosen] += weight
        shards += weight * hosts_SE[:, chosen].any(axis=1)
        total += weight
    return experts / total, shards / total


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 7), st.integers(1, 4))
def test_chances_are_those_of_counting_every_set(data: st.DataObject, num_experts: int, num_shards: int) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    odds = data.draw(st.lists(st.floats(0.05, 20), min_size=num_experts, max_size=num_experts))
    bits = st.lists(st.booleans(), min_size=num_experts, max_size=num_experts)
    hosts_SE = np.array([data.draw(bits) for _ in range(num_shards)])
    load_E, hit_S = by_counting(odds, top_k, hosts_SE)
    np.testing.assert_allclose(hit_chances(1000 * load_E, top_k, hosts_SE), hit_S, atol=1e-5)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 16))
def test_even_loads_are_uniform_routing(num_shards: int, top_k: int) -> None:
    hosts_SE = np.repeat(np.eye(num_shards, dtype=bool), 16 // num_shards, axis=1)
    expected = hit_probability(16, top_k, num_shards)
    np.testing.assert_allclose(hit_chances(np.ones(16), top_k, hosts_SE), expected, atol=1e-9)


def test_experts_of_every_token_and_of_none() -> None:
    hosts_SE = np.array([[True, False, False, False], [False, True, True, False], [False, False, False, True]])
    # Expert 0 by all 10 tokens, 1 and 2 by half, 3 by none.
    np.testing.assert_allclose(hit_chances(np.array([10.0, 5, 5, 0]), 2, hosts_SE), [1, 1, 0], atol=1e-6)


@pytest.mark.parametrize("load", [[10.0, 1, 1, 1], [5.0, 0, 0, 0]])
def test_loads_that_no_router_gives_are_refused(load: list[float]) -> None:
    with pytest.raises(InputError, match="with top_k=2"):
        hit_chances(np.array(load), 2, np.eye(4, dtype=bool))


def test_hosts_and_loads_give_other_rows_than_even_ones() -> None:
    hosts_SE = np.zeros((2, 16), dtype=bool)
    hosts_SE[0, :4], hosts_SE[1, 4:] = True, True
    skewed = fleet_traffic(tokens=10, num_shards=2, hosts_SE=hosts_SE, **COMMON)
    assert skewed.rows == pytest.approx(10 * (1 - 495 / 1820) + 10 * (1 - 1 / 1820))
