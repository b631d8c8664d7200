"""Replicas on different nodes: in first placements and repaired ones, as far as level slots allow, and no further."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.repair import repair
from expertmesh.cluster.spread import node_indices, spread_over_nodes

LAYERS = (0, 3)
NUM_EXPERTS = 9


def fleet(sizes: list[int]) -> dict[ShardId, str]:
    """Return nodes with so many shards each, the shards in an order that mixes the nodes."""
    nodes = [f"node-{node}" for place in range(max(sizes)) for node, size in enumerate(sizes) if place < size]
    return {ShardId(f"shard-{index}"): node for index, node in enumerate(nodes)}


def slots_by_layer(placement: Placement) -> list[list[int]]:
    return [[sum(key.layer == layer for key in s.experts) for s in placement.shards] for layer in placement.layers]


def fewest_on_one_node(sizes: list[int], num_experts: int = NUM_EXPERTS) -> int:
    """Two replicas each, in a layer: what a node must have more slots than there are experts is both of some.

    Level slots are `even` on each shard and one more on `odd` of them, which need not be on that node.
    """
    even, odd = divmod(2 * num_experts, sum(sizes))
    return max(0, *(size * even + max(0, odd - (sum(sizes) - size)) - num_experts for size in sizes))


SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@settings(deadline=None, max_examples=60)
@given(SIZES)
def test_two_replicas_are_on_two_nodes_wherever_level_slots_allow(sizes: list[int]) -> None:
    nodes = fleet(sizes)
    placement = initial_placement(LAYERS, NUM_EXPERTS, list(nodes), 2, nodes=nodes)
    assert all(max(slots) - min(slots) <= 1 for slots in slots_by_layer(placement))
    # Both of some experts are on a node with more slots than there are experts. Level in all layers together, too,
    # slots of unequal nodes leave no choice; those of equal nodes need not be so.
    on_nodes = [
        [sum(count for s, count in zip(placement.shards, row, strict=True) if nodes[s.shard] == node) for node in names]
        for names in [set(nodes.values())]
        for row in slots_by_layer(placement)
    ]
    assert len(placement.on_one_node(nodes)) == sum(max(0, max(row) - NUM_EXPERTS) for row in on_nodes)


@settings(deadline=None, max_examples=60)
@given(SIZES, st.data())
def test_a_repaired_placement_is_spread_as_far_as_level_slots_allow(sizes: list[int], data: st.DataObject) -> None:
    nodes = fleet(sizes)
    before = data.draw(st.lists(st.sampled_from(sorted(nodes)), min_size=1, unique=True))
    after = data.draw(st.lists(st.sampled_from(sorted(nodes)), min_size=2, unique=True))
    old = initial_placement(LAYERS, NUM_EXPERTS, before, min(2, len(before)))  # knows no nodes
    new = repair(old, after, {}, replicas=2, level=True, nodes=nodes)
    assert all(max(slots) - min(slots) <= 1 for slots in slots_by_layer(new))
    assert all(len(new.replicas(ExpertKey(layer, e))) >= 2 for layer in LAYERS for e in range(NUM_EXPERTS))
    sizes = list(Counter(nodes[shard] for shard in after).values())
    if len(sizes) > 1:
        assert len(new.on_one_node(nodes)) == len(LAYERS) * fewest_on_one_node(sizes)
    again = repair(new, after, {}, replicas=2, level=True, nodes=nodes)
    assert again.shards == new.shards, "what is spread and level stays"


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(2, 4))
def test_equal_nodes_lose_nothing_when_one_goes(num_nodes: int, size: int, replicas: int) -> None:
    nodes = fleet([size] * num_nodes)
    placement = initial_placement(LAYERS, NUM_EXPERTS, list(nodes), min(replicas, len(nodes)), nodes=nodes)
    for lost in set(nodes.values()):
        assert not placement.missing({shard for shard, node in nodes.items() if node != lost})


def test_an_emergency_repair_moves_nothing_and_prefers_other_nodes() -> None:
    nodes = fleet([2, 2])
    before = initial_placement(LAYERS, NUM_EXPERTS, list(nodes), 2, nodes=nodes)
    left = list(nodes)[1:]
    after = repair(before, left, {}, replicas=2, level=False, nodes=nodes)
    for slots in after.shards:
        assert {k for s in before.shards if s.shard == slots.shard for k in s.experts} <= set(slots.experts)
    assert not after.on_one_node(nodes)


def test_without_nodes_nothing_is_exchanged() -> None:
    shards = [ShardId(f"shard-{i}") for i in range(5)]
    plain = initial_placement(LAYERS, NUM_EXPERTS, shards, 2)
    assert initial_placement(LAYERS, NUM_EXPERTS, shards, 2, nodes=dict.fromkeys(shards, "here")) == plain
    assert len(plain.on_one_node({})) == len(LAYERS) * NUM_EXPERTS


def test_a_swap_that_helps_both_comes_first() -> None:
    node_S = [0, 0, 1, 1]
    hosts_E = [[0, 1], [0, 2], [2, 3]]
    spread_over_nodes(hosts_E, node_S, 2)
    assert hosts_E[1] == [0, 2], "it had no part in it"
    assert sorted(sorted(node_S[h] for h in hosts) for hosts in hosts_E) == [[0, 1]] * 3


@pytest.mark.parametrize("wanted", [1, 2])
def test_one_node_and_one_replica_are_left_alone(wanted: int) -> None:
    hosts_E = [[0, 1], [1, 2]]
    spread_over_nodes(hosts_E, [0, 0, 0] if wanted == 2 else [0, 0, 1], wanted)
    assert hosts_E == [[0, 1], [1, 2]]


def test_unknown_nodes_are_one_node() -> None:
    a, b, c = (ShardId(name) for name in "abc")
    assert node_indices([a, b, c], {b: "x"}) == [0, 1, 0]
