"""Packing, sharing and repairing one layer.

Shape suffixes: S shards, E experts, L layers.
"""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from expertmesh.cluster.balancer_layer import Layer
from expertmesh.cluster.balancer_repair import repair
from expertmesh.cluster.balancer_search import improve
from expertmesh.cluster.errors import CapacityError
from expertmesh.cluster.packing import pack
from expertmesh.cluster.placement import EVEN_WEIGHT


def layer_of(
    load_E: npt.ArrayLike,
    slots_S: list[int],
    *,
    speed_S: list[float] | None = None,
    nodes: list[int] | None = None,
    min_replicas: int = 1,
) -> Layer:
    node_S = np.array(nodes if nodes is not None else [0] * len(slots_S))
    return Layer(
        load_E=np.asarray(load_E, dtype=np.float64),
        slots_S=np.array(slots_S),
        speed_S=np.array(speed_S if speed_S is not None else [1.0] * len(slots_S)),
        node_S=node_S,
        domain_S=node_S,
        min_replicas=min_replicas,
    )


def least_largest_time(layer: Layer) -> float:
    """The least largest time that shares of the layer's replicas can reach, by a linear programme."""
    pairs = np.argwhere(layer.hosts_SE).tolist()
    num_shards, num_experts = layer.hosts_SE.shape
    equal, upper = np.zeros((num_experts, len(pairs) + 1)), np.zeros((num_shards, len(pairs) + 1))
    for column, (shard, expert) in enumerate(pairs):
        equal[expert, column] = upper[shard, column] = 1
    upper[:, -1] = -layer.speed_S
    cost = np.append(np.zeros(len(pairs)), 1)
    solved = linprog(cost, A_ub=upper, b_ub=np.zeros(num_shards), A_eq=equal, b_eq=layer.load_E)
    assert solved.fun is not None, solved.message
    return float(solved.fun)


def check(layer: Layer) -> None:
    assert (layer.free_S >= 0).all()
    assert (layer.count_E >= layer.min_replicas).all()
    assert (layer.share_SE[~layer.hosts_SE] == 0).all()
    assert layer.share_SE.min() >= 0
    np.testing.assert_allclose(layer.share_SE.sum(axis=0), layer.load_E, rtol=1e-9)
    np.testing.assert_allclose(layer.load_S, layer.share_SE.sum(axis=1), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    num_shards=st.integers(1, 10),
    num_slots=st.integers(1, 7),
    exponent=st.floats(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_equal_shards_with_a_slot_to_spare_are_exactly_level(
    num_shards: int, num_slots: int, exponent: float, seed: int
) -> None:
    num_experts = num_shards * (num_slots - 1) + 1
    load_E = np.random.default_rng(seed).permutation(np.arange(1, num_experts + 1) ** -exponent)
    layer = layer_of(load_E, [num_slots] * num_shards)
    pack(layer)
    check(layer)
    np.testing.assert_allclose(layer.time_S, layer.ideal_time, rtol=1e-6)


def test_one_slot_less_and_the_bound_of_whole_experts_holds() -> None:
    layer = layer_of([8, 1, 1, 1], [2, 2])
    pack(layer)
    assert layer.load_S.max() == 9, "no slot is left for a second replica of the hot expert"


@pytest.mark.parametrize("speed", [2.0, 5.0])
def test_load_is_in_proportion_to_speed(speed: float) -> None:
    load_E = np.arange(1, 33) ** -0.5
    layer = layer_of(load_E, [12, 12, 12, 12], speed_S=[speed, 1, 1, speed])
    pack(layer)
    assert layer.time_S.max() <= 1.05 * layer.ideal_time


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32 - 1))
def test_any_layer_that_fits_is_packed(data: st.DataObject, seed: int) -> None:
    slots_S = data.draw(st.lists(st.integers(0, 8), min_size=1, max_size=7))
    min_replicas = data.draw(st.integers(1, min(3, len(slots_S))))
    num_experts = data.draw(st.integers(1, 12))
    assume(np.minimum(slots_S, num_experts).sum() >= num_experts * min_replicas)
    random = np.random.default_rng(seed)
    load_E = random.pareto(1.0, num_experts) * (random.random(num_experts) < 0.8)
    speed_S = random.choice([0.5, 1.0, 3.0], len(slots_S)).tolist()
    nodes = random.integers(0, 3, len(slots_S)).tolist()
    layer = layer_of(load_E, slots_S, speed_S=speed_S, nodes=nodes, min_replicas=min_replicas)
    pack(layer)
    check(layer)
    num_nodes_E = (layer.nodes_NE() > 0).sum(axis=0)
    slots_N = [sum(s for s, n in zip(slots_S, nodes, strict=True) if n == node) for node in range(3)]
    if min_replicas == 2 <= layer.num_spread and np.minimum(slots_N, num_experts).sum() >= 2 * num_experts:
        assert (num_nodes_E >= 2).all(), "each expert is on two nodes where the nodes' slots allow"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_shards=st.integers(2, 6), num_experts=st.integers(1, 10))
def test_shares_are_as_level_as_a_linear_programme_makes_them(seed: int, num_shards: int, num_experts: int) -> None:
    random = np.random.default_rng(seed)
    speed_S = random.choice([1.0, 2.0], num_shards).tolist()
    layer = layer_of(random.pareto(1.2, num_experts), [num_experts] * num_shards, speed_S=speed_S)
    hosts_SE = random.random((num_shards, num_experts)) < 0.4
    hosts_SE[random.integers(num_shards, size=num_experts), np.arange(num_experts)] = True
    for shard, expert in np.argwhere(hosts_SE).tolist():
        layer.add(shard, expert)
    layer.level()
    check(layer)
    assert layer.time_S.max() <= least_largest_time(layer) * 1.01 + 1e-9


@settings(max_examples=50, deadline=None)
@given(share=st.lists(st.floats(0, 100), min_size=2, max_size=9).filter(lambda share: sum(share) > 1e-3))
def test_weights_are_within_a_step_of_the_shares(share: list[float]) -> None:
    # Idle shards of these speeds share in proportion to speed, so the exact shares are known.
    speed_S = [part + 1e-3 for part in share]
    layer = layer_of([10.0], [1] * len(share), speed_S=speed_S)
    for shard in range(len(share)):
        layer.add(shard, 0)
    layer.level()
    weights = np.array(layer.quantise()[0])
    assert weights.sum() == EVEN_WEIGHT
    assert np.abs(weights - EVEN_WEIGHT * np.array(speed_S) / sum(speed_S)).max() < 1
    check(layer)


def test_experts_with_one_replica_or_without_load_get_no_weights() -> None:
    layer = layer_of([4.0, 2.0, 0.0], [3, 3])
    for shard, expert in ((0, 0), (1, 0), (0, 1), (0, 2), (1, 2)):
        layer.add(shard, expert)
    layer.level()
    # Shards end up with 3 each: expert 1's 2 on the first, so 1 and 3 of expert 0's 4.
    assert layer.quantise() == {0: (1024, 3072)}


def test_the_tightest_placement_is_found_by_a_chain() -> None:
    """Three experts twice on three shards of two slots: the third expert's place must be made by moving others."""
    layer = layer_of([3.0, 2.0, 1.0], [2, 2, 2], min_replicas=2)
    for shard, expert in ((0, 0), (0, 1), (1, 0), (1, 1)):
        layer.add(shard, expert)
    assert repair(layer) == 0
    assert layer.count_E.tolist() == [2, 2, 2]
    assert (layer.free_S == 0).all()


def test_pairs_on_one_node_are_exchanged_for_pairs_on_two() -> None:
    layer = layer_of([1.0, 1.0], [1, 1, 1, 1], nodes=[0, 0, 1, 1], min_replicas=2)
    for shard, expert in ((0, 0), (1, 0), (2, 1), (3, 1)):
        layer.add(shard, expert)
    assert repair(layer) == 0
    assert (layer.nodes_NE() > 0).sum(axis=0).tolist() == [2, 2]


def test_repair_counts_what_finds_no_second_slot_and_refuses_when_one_has_none() -> None:
    layer = layer_of([1.0, 1.0], [2, 1], min_replicas=2)
    assert repair(layer) == 1
    with pytest.raises(CapacityError, match=r"3 experts, slots of the shards \[1, 1\]"):
        repair(layer_of([1.0, 1.0, 1.0], [1, 1]))


def test_a_full_layer_is_improved_by_exchanging_experts() -> None:
    layer = layer_of([4.0, 4.0, 1.0, 1.0], [2, 2])
    for shard, expert in ((0, 0), (0, 1), (1, 2), (1, 3)):
        layer.add(shard, expert)
    layer.level()
    assert layer.load_S.tolist() == [8, 2]
    assert len(list(itertools.islice(improve(layer), 10))) == 1
    assert layer.load_S.tolist() == [5, 5]
