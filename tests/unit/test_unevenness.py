"""Which layers are worth levelling, beside what the linear programme would gain."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.balance import shard_load_LS
from expertmesh.cluster.dispatch_weights import MOVE_PRICE, level_weights
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, ShardSlots
from expertmesh.cluster.unevenness import LEVEL_ENOUGH, uneven_layers


def placement_of(hosts_E: list[list[int]], num_shards: int) -> Placement:
    """One layer whose expert e is on the shards hosts_E[e], evenly."""
    slots = tuple(
        ShardSlots(shard=ShardId(f"s{s}"), experts=tuple(ExpertKey(0, e) for e, h in enumerate(hosts_E) if s in h))
        for s in range(num_shards)
    )
    return Placement(epoch=0, num_experts=len(hosts_E), layers=(0,), shards=slots)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_a_layer_that_is_left_alone_has_little_to_gain(
    data: st.DataObject, num_shards: int, num_experts: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    hosts_E = [
        random.choice(num_shards, data.draw(st.integers(1, num_shards)), replace=False).tolist()
        for _ in range(num_experts)
    ]
    load_LE = random.integers(0, 10 ** data.draw(st.integers(1, 7)), (1, num_experts))
    placement = placement_of(hosts_E, num_shards)
    before = shard_load_LS(load_LE, placement).max()
    levelled = replace(placement, weights=level_weights(load_LE, placement))
    after = shard_load_LS(load_LE, levelled).max()
    # By the programme's price, by rounding, and by chance.
    total = float(load_LE.sum())
    slack = MOVE_PRICE * total / num_shards + total / EVEN_WEIGHT + np.sqrt(2 * after * np.log(num_shards))
    assert uneven_layers(load_LE, placement)[0] or before <= after * (1 + LEVEL_ENOUGH) + slack


def test_what_weights_cannot_change_is_not_uneven() -> None:
    # Expert 0 is on the first shard alone: nobody can take any of its million.
    assert not uneven_layers(np.array([[1_000_000, 10, 10]]), placement_of([[0], [1, 2], [1, 2]], 3))[0]
    assert uneven_layers(np.array([[1_000_000, 10, 10]]), placement_of([[0, 1], [1, 2], [1, 2]], 3))[0]


def test_load_passes_from_shard_to_shard() -> None:
    # The busiest can only give to the second, which is as busy; the third is idle, and only the second can give to it.
    placement = placement_of([[0, 1], [1, 2], [2]], 3)
    assert uneven_layers(np.array([[200_000, 0, 0]]), placement)[0] == False  # noqa: E712  # numpy's
    assert uneven_layers(np.array([[200_000, 100_000, 0]]), placement)[0]


def test_chance_is_not_followed() -> None:
    placement = placement_of([[0, 1]] * 4, 2)
    even_E = [100, 100, 100, 100]
    lopsided = replace(placement, weights={ExpertKey(0, 0): (EVEN_WEIGHT, 0)})
    assert not uneven_layers(np.array([even_E]), placement)[0]
    # 250 and 150 of 400: more than chance makes of it, and with a twentieth of the tokens not.
    assert uneven_layers(np.array([even_E]), lopsided)[0]
    assert not uneven_layers(np.array([even_E]) // 20, lopsided)[0]


def test_layers_without_load_are_even() -> None:
    assert not uneven_layers(np.zeros((1, 2), dtype=np.int64), placement_of([[0], [0, 1]], 2)).any()
