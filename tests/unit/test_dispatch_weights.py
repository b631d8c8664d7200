from dataclasses import replace
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.balance import shard_load_LS
from expertmesh.cluster.dispatch_weights import MOVE_PRICE, Weights, changed_weights, level_weights
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, ShardSlots

LAYER = 3
HALF = (EVEN_WEIGHT // 2, EVEN_WEIGHT // 2)
Hosts = list[frozenset[int]]


def placement_of(hosts_E: Hosts, num_shards: int, weights: Weights | None = None) -> Placement:
    """One layer whose expert e is on the shards hosts_E[e]."""
    shards = tuple(
        ShardSlots(
            shard=ShardId(f"s{shard}"),
            experts=tuple(ExpertKey(LAYER, expert) for expert, hosts in enumerate(hosts_E) if shard in hosts),
        )
        for shard in range(num_shards)
    )
    return Placement(epoch=0, num_experts=len(hosts_E), layers=(LAYER,), shards=shards, weights=weights or {})


def key(expert: int) -> ExpertKey:
    return ExpertKey(LAYER, expert)


def least_busiest(load_E: npt.NDArray[np.float64], hosts_E: Hosts, speed_S: npt.NDArray[np.float64]) -> float:
    """The min-max flow by its cuts: a group of shards cannot shed the load of experts that live inside it alone."""
    num_shards = len(speed_S)
    groups = (set(group) for size in range(1, num_shards + 1) for group in combinations(range(num_shards), size))
    return max(
        float(
            sum(load for load, hosts in zip(load_E, hosts_E, strict=True) if hosts <= group)
            / speed_S[list(group)].sum()
        )
        for group in groups
    )


def busiest(load_E: npt.NDArray[np.float64], placement: Placement, speed_S: npt.NDArray[np.float64]) -> float:
    return float((shard_load_LS(load_E[None], placement)[0] / speed_S).max())


@st.composite
def problems(draw: st.DrawFn) -> tuple[Hosts, npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    num_shards, num_experts = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    host_sets = st.frozensets(st.integers(0, num_shards - 1), min_size=1)
    hosts_E = draw(st.lists(host_sets, min_size=num_experts, max_size=num_experts))
    load_E = draw(st.lists(st.integers(0, 5000), min_size=num_experts, max_size=num_experts))
    speed_S = draw(st.lists(st.sampled_from([0.5, 1, 3]), min_size=num_shards, max_size=num_shards))
    alive_S = draw(st.lists(st.sampled_from([True, True, False]), min_size=num_shards, max_size=num_shards))
    return hosts_E, np.array(load_E, dtype=np.float64), np.array(speed_S), np.array(alive_S)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_the_busiest_live_shard_is_as_little_busy_as_the_cuts_allow(
    problem: tuple[Hosts, npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]],
) -> None:
    hosts_E, load_E, speed_S, alive_S = problem
    live_E = [hosts & set(np.flatnonzero(alive_S).tolist()) for hosts in hosts_E]
    placement = placement_of(hosts_E, len(speed_S))
    weights = level_weights(load_E[None], placement, speed_S=speed_S, alive_S=alive_S)
    load_E = np.where([bool(live) for live in live_E], load_E, 0)  # nobody can serve the others
    levelled = replace(placement, weights=weights)
    assert shard_load_LS(load_E[None], levelled).sum() == pytest.approx(load_E.sum()), "no load is lost"
    assert not shard_load_LS(load_E[None], levelled)[0, ~alive_S].any(), "no load goes to the dead"
    if not load_E.any():
        return
    divisible_E = np.array([len(live) > 1 for live in live_E])
    rounding = max(
        sum(load for load, d, live in zip(load_E, divisible_E, live_E, strict=True) if d and shard in live) / speed
        for shard, speed in enumerate(speed_S)
    )
    price = MOVE_PRICE * load_E.sum() / speed_S[alive_S].mean()
    least = least_busiest(
        load_E, [live or frozenset(range(len(speed_S))) for live in live_E], speed_S * alive_S + 1e-12
    )
    bound = least + price + rounding / EVEN_WEIGHT
    assert busiest(load_E, levelled, speed_S) <= bound * (1 + 1e-6)
    if alive_S.all():
        assert (
            busiest(load_E, levelled, speed_S) <= busiest(load_E, placement, speed_S) + price + rounding / EVEN_WEIGHT
        )
    for expert, live in enumerate(live_E):
        row = weights.get(key(expert))
        assert row is None or (sum(row) == EVEN_WEIGHT and bool(live))


def test_worked_example_a_shared_expert_fills_the_idle_shard() -> None:
    placement = placement_of([frozenset({0, 1}), frozenset({0})], 2)
    # 30 + 10 on two shards: 20 each, so 10 of the shared 30 stay on the first.
    assert level_weights([[30, 10]], placement) == {key(0): (1365, 2731)}
    # The second shard is three times as fast: 10 and 30.
    assert level_weights([[30, 10]], placement, speed_S=[1, 3]) == {key(0): (0, EVEN_WEIGHT)}


def test_only_what_can_be_divided_or_lost_a_replica_has_an_entry() -> None:
    hosts_E = [frozenset({0}), frozenset({0, 1}), frozenset({0, 1}), frozenset({1, 2}), frozenset({2})]
    weights = level_weights([[5, 5, 0, 0, 7]], placement_of(hosts_E, 3), alive_S=[True, True, False])
    # Expert 2 has no load and no dead replica; expert 4 has no live replica.
    assert weights == {key(1): (0, EVEN_WEIGHT), key(3): (EVEN_WEIGHT, 0)}
    assert list(weights) == sorted(weights)


def test_an_expert_without_load_falls_back_to_even_weights() -> None:
    hosts_E = [frozenset({0, 1}), frozenset({0, 1})]
    placement = placement_of(hosts_E, 2, {key(0): (1, 255), key(1): (128, 128)})
    assert level_weights([[0, 10]], placement) == {key(1): HALF}


@pytest.mark.parametrize("weights", [(3072, 1024), (1024, 3072)])
def test_of_equal_solutions_the_one_nearest_to_the_current_weights_is_taken(weights: tuple[int, int]) -> None:
    current = {key(0): weights, key(1): weights[::-1]}
    placement = placement_of([frozenset({0, 1}), frozenset({0, 1})], 2, current)
    assert level_weights([[100, 100]], placement) == current


def test_levelling_comes_before_few_moves() -> None:
    placement = placement_of([frozenset({0, 1})], 2, {key(0): (129, 127)})
    assert level_weights([[1000]], placement) == {key(0): HALF}


def test_equal_arguments_give_equal_weights_whatever_the_order_of_the_current_ones() -> None:
    random = np.random.default_rng(0)
    hosts_E = [frozenset(random.choice(6, 3, replace=False).tolist()) for _ in range(20)]
    load_E = random.pareto(1, 20) * 1000
    current = {key(e): tuple(random.multinomial(EVEN_WEIGHT, [1 / 3] * 3).tolist()) for e in range(20)}
    forward = level_weights([load_E], placement_of(hosts_E, 6, current))
    backward = level_weights([load_E], placement_of(hosts_E, 6, dict(reversed(current.items()))))
    assert list(forward.items()) == list(backward.items())
    scaled = level_weights([load_E * 1024], placement_of(hosts_E, 6, current))
    assert scaled == forward, "the unit of load does not matter"


def test_layers_are_levelled_apart() -> None:
    shards = tuple(
        ShardSlots(shard=ShardId(name), experts=tuple(ExpertKey(layer, e) for layer in (0, 7) for e in experts))
        for name, experts in (("a", (0, 1)), ("b", (0,)))
    )
    placement = Placement(epoch=0, num_experts=2, layers=(0, 7), shards=shards)
    weights = level_weights([[30, 10], [10, 30]], placement)
    assert weights == {ExpertKey(0, 0): (1365, 2731), ExpertKey(7, 0): (0, EVEN_WEIGHT)}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"load_LE": [[1.0]]}, r"a load of shape \(1, 1\)"),
        ({"load_LE": [[1.0, -1.0]]}, "not negative"),
        ({"load_LE": [[1.0, float("nan")]]}, "finite"),
        ({"speed_S": [1, 0]}, r"must be positive: \[1.0, 0.0\]"),
        ({"speed_S": [1]}, r"a speed of shape \(1,\)"),
        ({"alive_S": [True]}, r"2 shards are alive was given as shape \(1,\)"),
    ],
)
def test_unfit_arguments_are_refused(arguments: dict[str, list[float]], text: str) -> None:
    placement = placement_of([frozenset({0, 1}), frozenset({0})], 2)
    with pytest.raises(InputError, match=text):
        level_weights(arguments.pop("load_LE", [[1.0, 1.0]]), placement, **arguments)


def test_small_changes_of_share_are_left_undone() -> None:
    old = {key(0): (128, 128), key(1): (100, 156), key(3): (0, 256)}
    new = {key(0): (130, 126), key(1): (140, 116), key(2): (129, 127), key(3): (0, 256), key(4): (200, 56)}
    assert changed_weights(old, new, 0.04) == {
        key(0): (128, 128),
        key(1): (140, 116),
        key(3): (0, 256),
        key(4): (200, 56),
    }
    assert changed_weights(old, new, 0.0) == new
    assert changed_weights(old, {}, 0.1) == {key(0): (128, 128)}, "even again, but the first hardly changes"
    assert changed_weights(old, new, 2.0) == old


def test_a_negative_dead_band_or_one_for_other_replicas_is_refused() -> None:
    with pytest.raises(InputError, match="threshold of -1"):
        changed_weights({}, {}, -1)
    with pytest.raises(InputError, match=r"L3E0 has weights \(1, 2\) and then \(1, 2, 3\)"):
        changed_weights({key(0): (1, 2)}, {key(0): (1, 2, 3)}, 0.1)


def test_layers_that_are_not_to_be_levelled_keep_their_weights() -> None:
    shards = tuple(
        ShardSlots(shard=ShardId(name), experts=tuple(ExpertKey(layer, e) for layer in (0, 7) for e in experts))
        for name, experts in (("a", (0, 1)), ("b", (0,)))
    )
    placement = Placement(epoch=0, num_experts=2, layers=(0, 7), shards=shards, weights={ExpertKey(7, 0): (1, 2)})
    load_LE = [[30, 10], [10, 30]]
    kept, levelled = {ExpertKey(7, 0): (1, 2)}, {ExpertKey(0, 0): (1365, 2731)}
    assert level_weights(load_LE, placement, only_L=[True, False]) == kept | levelled
    assert level_weights(load_LE, placement, only_L=[False, False]) == kept
    with pytest.raises(InputError, match=r"2 layers are to be levelled was given as shape \(1,\)"):
        level_weights(load_LE, placement, only_L=[True])


@pytest.mark.parametrize(("num_replicas", "moved", "is_kept"), [(2, 0.04, True), (2, 0.06, False), (50, 0.004, False)])
def test_a_change_is_small_beside_the_even_share_of_a_replica(num_replicas: int, moved: float, is_kept: bool) -> None:
    step = round(moved * EVEN_WEIGHT)
    even = EVEN_WEIGHT // num_replicas
    old = {key(0): (even,) * num_replicas}
    new = {key(0): (even + step, even - step, *(even,) * (num_replicas - 2))}
    assert changed_weights(old, new, 0.1) == (old if is_kept else new)
