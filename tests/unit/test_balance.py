import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.errors import InputError, NoReplicaError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement


def placement_of(
    *experts_of_shards: list[tuple[int, int]], weights: dict[ExpertKey, tuple[int, ...]] | None = None
) -> Placement:
    """Layers 2 and 5 of 3 experts."""
    shards = tuple(
        ShardSlots(shard=ShardId(f"s{index}"), experts=tuple(ExpertKey(*pair) for pair in pairs))
        for index, pairs in enumerate(experts_of_shards)
    )
    return Placement(epoch=0, num_experts=3, layers=(2, 5), shards=shards, weights=weights or {})


def test_worked_example() -> None:
    placement = placement_of(
        [(2, 0), (2, 1), (5, 0), (5, 1), (5, 2)],
        [(2, 2), (2, 0), (5, 0)],
        weights={ExpertKey(5, 0): (1, 3)},
    )
    load_LS = shard_load_LS([[8, 2, 6], [40, 0, 10]], placement)
    assert load_LS.tolist() == [[6, 10], [20, 30]]
    assert balancedness(load_LS) == pytest.approx((8 + 25) / (10 + 30))


def test_level_load_is_one_and_a_single_busy_shard_is_one_part_of_all() -> None:
    assert balancedness([[3, 3, 3], [5, 5, 5]]) == 1
    assert balancedness([[9, 0, 0], [0, 5, 0]]) == pytest.approx(1 / 3)
    assert balancedness([[0, 0], [0, 0]]) == 1


def test_a_layer_counts_by_its_load_not_by_its_shape() -> None:
    assert balancedness([[100, 100], [1, 0]]) == pytest.approx(100.5 / 101)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_no_load_is_lost_or_made(num_layers: int, num_experts: int, num_shards: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shards = [ShardId(f"s{index}") for index in range(num_shards)]
    placement = initial_placement(range(num_layers), num_experts, shards, int(random.integers(1, num_shards + 1)))
    load_LE = random.integers(0, 1000, (num_layers, num_experts))
    load_LS = shard_load_LS(load_LE, placement)
    np.testing.assert_allclose(load_LS.sum(axis=1), load_LE.sum(axis=1))
    assert 1 / num_shards - 1e-9 <= balancedness(load_LS) <= 1 + 1e-9


def test_load_without_a_replica_is_an_error_and_no_load_is_not() -> None:
    placement = placement_of([(2, 0), (2, 1), (2, 2), (5, 0), (5, 1)])
    assert shard_load_LS([[1, 1, 1], [1, 1, 0]], placement).tolist() == [[3], [2]]
    with pytest.raises(NoReplicaError, match="L5E2 has load and no replica"):
        shard_load_LS([[1, 1, 1], [1, 1, 1]], placement)


@pytest.mark.parametrize("load_LE", [[[1, 1], [1, 1]], [1, 1, 1], [[1, 1, -1]] * 2, [[1, 1, np.nan]] * 2])
def test_a_load_that_does_not_fit_is_refused(load_LE: object) -> None:
    placement = placement_of([(layer, expert) for layer in (2, 5) for expert in range(3)])
    with pytest.raises(InputError, match="load"):
        shard_load_LS(load_LE, placement)  # type: ignore[arg-type]


@pytest.mark.parametrize("load_LS", [[1, 2], [[]], [[[1]]]])
def test_balancedness_wants_layers_by_shards(load_LS: object) -> None:
    with pytest.raises(InputError, match="layers by shards"):
        balancedness(load_LS)  # type: ignore[arg-type]
