"""Placements from scratch, and plans from one placement to the next.

Shape suffixes: L layers, E experts, S shards.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.balancer import balance, rebalance
from expertmesh.cluster.balancer_types import BalancePlan, BalanceSettings, ShardFacts
from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import EVEN_WEIGHT, Placement, initial_placement

Floats = npt.NDArray[np.float64]
# The worked example of the README of https://github.com/deepseek-ai/EPLB, loads and published placement.
EPLB_LOAD_LE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
EPLB_PLACEMENT = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def fleet(num_shards: int, num_slots: int, *, shards_a_node: int = 4, **facts: Any) -> list[ShardFacts]:
    return [
        ShardFacts(
            shard=ShardId(f"s{index}"),
            num_slots=num_slots,
            node=f"n{index // shards_a_node}",
            domain=f"d{index // shards_a_node}",
            **facts,
        )
        for index in range(num_shards)
    ]


def zipf(num_layers: int, num_experts: int, *, exponent: float = 1.2, seed: int = 0) -> Floats:
    random = np.random.default_rng(seed)
    return np.array([random.permutation(1000 * np.arange(1, num_experts + 1) ** -exponent) for _ in range(num_layers)])


def plan_for(
    current: Placement, load_LE: npt.ArrayLike, shards: list[ShardFacts], expert_time_s: float = 100.0, **options: Any
) -> BalancePlan:
    return rebalance(
        current,
        load_LE,
        shards,
        epoch=current.epoch + 1,
        expert_bytes=1_000_000,
        expert_time_s=expert_time_s,
        window_s=300,
        horizon_s=600,
        settings=BalanceSettings(**options),
    )


def largest_time(load_LE: npt.ArrayLike, placement: Placement, shards: list[ShardFacts]) -> float:
    speed = {facts.shard: facts.speed for facts in shards}
    speed_S = np.array([speed[slots.shard] for slots in placement.shards])
    return float((shard_load_LS(load_LE, placement) / speed_S).max(axis=1).sum())


def check(placement: Placement, shards: list[ShardFacts], min_replicas: int) -> None:
    limits = {facts.shard: 0 if facts.is_draining else facts.num_slots for facts in shards}
    num_slots = {slots.shard: placement.num_slots(slots.shard) for slots in placement.shards}
    assert all(num_slots[shard] <= limits[shard] for shard in num_slots)
    for layer in placement.layers:
        for expert in range(placement.num_experts):
            key = ExpertKey(layer, expert)
            hosts = placement.replicas(key)
            assert len(set(hosts)) == len(hosts) >= min_replicas
            assert sum(placement.weights.get(key, (EVEN_WEIGHT,))) == EVEN_WEIGHT


def even_largest_L(load_LE: npt.ArrayLike, hosts_LSE: npt.NDArray[np.int64]) -> Floats:  # noqa: N802
    """EPLB's measure: the largest load of a GPU when replicas share evenly."""
    load_LSE = hosts_LSE * (np.asarray(load_LE) / hosts_LSE.sum(axis=1))[:, None]
    return np.asarray(load_LSE.sum(axis=2).max(axis=1))


def test_the_public_example_is_at_least_as_level_as_published() -> None:
    placement = balance(EPLB_LOAD_LE, fleet(8, 4), layers=[0, 1], num_experts=12, epoch=0)
    hosts_LSE, published_LSE = np.zeros((2, 2, 8, 12), dtype=np.int64)
    for index, slots in enumerate(placement.shards):
        for layer, expert in slots.experts:
            hosts_LSE[layer, index, expert] = 1
    for layer in range(2):
        np.add.at(published_LSE[layer], (np.arange(16) // 2, np.array(EPLB_PLACEMENT[layer])), 1)
    published_L = even_largest_L(EPLB_LOAD_LE, published_LSE)
    assert published_L.tolist() == [156, 179.5]
    even_L = even_largest_L(EPLB_LOAD_LE, hosts_LSE)
    assert even_L.sum() <= published_L.sum()
    assert even_L.max() <= published_L.max()
    # With weights: in every layer, and more than the published placement's replicas could reach (154 and 173).
    assert (shard_load_LS(EPLB_LOAD_LE, placement).max(axis=1) < [154, 173]).all()


@pytest.mark.parametrize("exponent", [1.0, 1.6])
def test_skewed_loads_are_level_within_a_twentieth(exponent: float) -> None:
    load_LE = zipf(3, 256, exponent=exponent)
    shards = fleet(32, 3 * 9)
    placement = balance(load_LE, shards, layers=range(3), num_experts=256, epoch=0)
    check(placement, shards, 1)
    assert balancedness(shard_load_LS(load_LE, placement)) >= 0.95


@st.composite
def problems(draw: st.DrawFn) -> tuple[Floats, list[ShardFacts], int]:
    """A load, shards whose slots suffice, and min_replicas."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    num_slots_S = draw(st.lists(st.integers(0, 20), min_size=2, max_size=6))
    min_replicas = draw(st.integers(1, 2))
    num_keys = num_layers * num_experts
    assume(np.minimum(num_slots_S, num_keys).sum() >= num_keys * min_replicas)
    load_LE = random.pareto(1.0, (num_layers, num_experts)) * (random.random((num_layers, num_experts)) < 0.9)
    shards = [
        ShardFacts(
            shard=ShardId(f"s{index}"),
            num_slots=num_slots,
            node=f"n{random.integers(3)}",
            domain=f"d{random.integers(2)}",
            speed=float(random.choice([1.0, 1.0, 2.5])),
        )
        for index, num_slots in enumerate(num_slots_S)
    ]
    return load_LE, shards, min_replicas


@settings(max_examples=30, deadline=None)
@given(problems())
def test_any_fleet_that_suffices_gets_a_sound_placement_and_the_same_again(
    problem: tuple[Floats, list[ShardFacts], int],
) -> None:
    load_LE, shards, min_replicas = problem
    layers = [index * 2 + 1 for index in range(len(load_LE))]
    placement = balance(
        load_LE, shards, layers=layers, num_experts=load_LE.shape[1], epoch=4, min_replicas=min_replicas
    )
    check(placement, shards, min_replicas)
    again = balance(load_LE, shards, layers=layers, num_experts=load_LE.shape[1], epoch=4, min_replicas=min_replicas)
    assert again == placement


@settings(max_examples=40, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1))
def test_a_plan_after_losses_and_drains_is_sound_no_worse_and_final(
    problem: tuple[Floats, list[ShardFacts], int], seed: int
) -> None:
    load_LE, shards, min_replicas = problem
    random = np.random.default_rng(seed)
    num_layers, num_experts = load_LE.shape
    current = balance(
        load_LE, shards, layers=range(num_layers), num_experts=num_experts, epoch=0, min_replicas=min_replicas
    )
    fate_S = random.choice(["live", "live", "gone", "drain"], len(shards))
    left = [
        ShardFacts(
            shard=facts.shard,
            num_slots=facts.num_slots,
            node=facts.node,
            domain=facts.domain,
            speed=facts.speed,
            is_draining=bool(fate == "drain"),
        )
        for facts, fate in zip(shards, fate_S, strict=True)
        if fate != "gone"
    ]
    if random.random() < 0.5:
        left.append(ShardFacts(shard=ShardId("new"), num_slots=6, node="n0", domain="d1"))
    new_load_LE = random.permuted(load_LE, axis=1)
    num_usable = sum(min(f.num_slots, load_LE.size) for f in left if not f.is_draining)
    if num_usable < load_LE.size:
        with pytest.raises(CapacityError, match=f"{load_LE.size} expert slots are needed.* have {num_usable}"):
            plan_for(current, new_load_LE, left, min_replicas=min_replicas)
        return
    plan = plan_for(current, new_load_LE, left, min_replicas=min_replicas)
    check(plan.placement, left, min_replicas if num_usable >= min_replicas * load_LE.size else 1)
    assert plan == plan_for(current, new_load_LE, left, min_replicas=min_replicas)
    check_moves(current, plan, left)
    if (fate_S == "live").all() and plan.is_worthwhile:
        before, after = (largest_time(new_load_LE, placement, left) for placement in (current, plan.placement))
        assert after <= before * (1 + 1e-9)
    again = plan_for(plan.placement, new_load_LE, left, min_replicas=min_replicas)
    assert not again.is_worthwhile, again.reason


def check_moves(current: Placement, plan: BalancePlan, shards: list[ShardFacts]) -> None:
    """The moves are exactly the new replicas, and every source is alive and has what it gives."""
    had = {slots.shard: set(slots.experts) for slots in current.shards}
    live = {facts.shard for facts in shards}
    added = {(key, s.shard) for s in plan.placement.shards for key in set(s.experts) - had.get(s.shard, set())}
    assert {(move.key, move.target) for move in plan.moves} == added
    assert len(plan.moves) == len(added)
    for move in plan.moves:
        holders = {shard for shard in live if move.key in had.get(shard, set())}
        assert move.source in holders if holders else move.source is None


@pytest.mark.parametrize("exponent", [0.8, 1.4])
def test_with_two_replicas_any_shard_or_node_may_be_lost(exponent: float) -> None:
    load_LE = zipf(3, 32, exponent=exponent)
    shards = fleet(6, 3 * 12, shards_a_node=2)
    placement = balance(load_LE, shards, layers=range(3), num_experts=32, epoch=0, min_replicas=2)
    live = {facts.shard for facts in shards}
    for facts in shards:
        assert not placement.missing(live - {facts.shard})
        assert not placement.missing({other.shard for other in shards if other.node != facts.node})
    rest = [facts for facts in shards if facts.node != "n2"]
    plan = plan_for(placement, load_LE, rest, min_replicas=2)
    assert plan.is_worthwhile
    assert "experts have fewer than 2 replicas for want of slots" in plan.reason
    assert all(move.source is not None for move in plan.moves), "nothing is read from the checkpoint"


def test_a_topic_switch_is_followed_by_few_moves() -> None:
    shards = fleet(16, 4 * 9)
    old_LE, new_LE = (zipf(4, 128, seed=seed) for seed in (0, 1))
    current = balance(old_LE, shards, layers=range(4), num_experts=128, epoch=0)
    plan = plan_for(current, new_LE, shards)
    assert plan.is_worthwhile
    assert plan.balancedness_before < 0.5
    assert plan.balancedness_after >= 0.9
    assert plan.balancedness_after == pytest.approx(balancedness(shard_load_LS(new_LE, plan.placement)))
    assert plan.bytes_moved == 1_000_000 * len(plan.moves)
    scratch = balance(new_LE, shards, layers=range(4), num_experts=128, epoch=1)
    hosted = {(slots.shard, key) for slots in current.shards for key in slots.experts}
    from_scratch = sum((slots.shard, key) not in hosted for slots in scratch.shards for key in slots.experts)
    assert len(plan.moves) < from_scratch / 2


def test_a_plan_keeps_to_its_cap_and_takes_the_best_moves_first() -> None:
    shards = fleet(8, 2 * 9)
    old_LE, new_LE = (zipf(2, 64, seed=seed) for seed in (0, 1))
    current = balance(old_LE, shards, layers=range(2), num_experts=64, epoch=0)
    plans = [plan_for(current, new_LE, shards, max_moves=cap) for cap in (0, 4, 8, 100)]
    assert plans[0].moves == ()
    assert all(len(plan.moves) <= cap for plan, cap in zip(plans, (0, 4, 8, 100), strict=True))
    after = [plan.balancedness_after for plan in plans]
    assert after == sorted(after)
    assert after[1] - after[0] > (after[3] - after[1]) * 4 / len(plans[3].moves)


def test_declined_for_little_gain_or_for_high_cost() -> None:
    shards = fleet(8, 2 * 9)
    load_LE = zipf(2, 64)
    current = balance(load_LE, shards, layers=range(2), num_experts=64, epoch=0)
    same = plan_for(current, load_LE, shards)
    assert not same.is_worthwhile
    assert same.moves == ()
    assert "below the threshold of 5.0%" in same.reason
    other_LE = zipf(2, 64, seed=1)
    assert plan_for(current, other_LE, shards).is_worthwhile
    dear = plan_for(current, other_LE, shards, expert_time_s=0.0)
    assert dear.moves == ()
    assert "costs more than it saves" in dear.reason


def test_sources_in_the_targets_domain_come_first() -> None:
    shards = fleet(8, 2 * 16, shards_a_node=4)
    load_LE = zipf(2, 64)
    current = balance(load_LE, shards, layers=range(2), num_experts=64, epoch=0)
    hosts = {slots.shard: set(slots.experts) for slots in current.shards}
    domain = {facts.shard: facts.domain for facts in shards}
    plan = plan_for(current, load_LE, shards[1:])
    assert plan.is_worthwhile
    for move in plan.moves:
        near = {s.shard for s in shards[1:] if s.domain == domain[move.target] and move.key in hosts[s.shard]}
        assert move.source in near or not near


def test_an_empty_shard_is_filled_whatever_the_gain() -> None:
    shards = fleet(4, 2 * 10)
    current = balance(np.zeros((2, 16)), shards[:3], layers=range(2), num_experts=16, epoch=0)
    plan = plan_for(current, np.zeros((2, 16)), shards)
    assert plan.is_worthwhile
    assert plan.placement.num_slots(shards[3].shard) == 20
    assert {move.target for move in plan.moves} == {shards[3].shard}
    assert not plan_for(current, np.zeros((2, 16)), shards, max_moves=0).is_worthwhile, "no moves, nothing to do"


def test_a_draining_shard_is_emptied_and_gives_what_only_it_has() -> None:
    shards = fleet(3, 12)
    current = balance([[5.0, 3.0, 2.0, 1.0]], shards[:1], layers=[7], num_experts=4, epoch=0)
    draining = ShardFacts(shard=ShardId("s0"), num_slots=12, node="n0", domain="d0", is_draining=True)
    plan = plan_for(current, [[5.0, 3.0, 2.0, 1.0]], [draining, *shards[1:]])
    assert [slots.shard for slots in plan.placement.shards] == ["s1", "s2"]
    assert {move.source for move in plan.moves} == {"s0"}
    assert plan.placement.missing({ShardId("s1"), ShardId("s2")}) == ()


def test_a_missing_expert_comes_from_the_checkpoint() -> None:
    current = balance([[5.0, 3.0, 2.0, 1.0]], fleet(2, 3), layers=[0], num_experts=4, epoch=0)
    lost = {ExpertKey(0, expert) for expert in range(4)} - set(current.shards[0].experts)
    plan = plan_for(current, [[5.0, 3.0, 2.0, 1.0]], fleet(1, 4))
    assert plan.is_worthwhile
    assert {move.key for move in plan.moves} == lost != set()
    assert all(move.source is None for move in plan.moves)
    assert (plan.balancedness_before, plan.gain_s) == (0.0, 0.0)
    assert plan.cost_s == pytest.approx(len(lost) * 1_000_000 / BalanceSettings().checkpoint_bytes_per_s)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"load_LE": [[1.0]]}, InputError, r"shape \(1, 1\) for 1 layers of 4"),
        ({"load_LE": [[1.0, 2.0, 3.0, -1.0]]}, InputError, "finite and not negative"),
        ({"load_LE": [[1.0, 2.0, 3.0, float("nan")]]}, InputError, "finite and not negative"),
        ({"shards": fleet(2, 1)}, CapacityError, "4 expert slots are needed .* 2 shards have 2"),
        ({"shards": fleet(1, 9), "min_replicas": 2}, CapacityError, "8 expert slots are needed .* 1 shards have 4"),
        ({"shards": fleet(2, 4) + fleet(1, 4)}, InputError, "named twice"),
    ],
)
def test_unfit_arguments_are_refused(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"load_LE": [[1.0, 2.0, 3.0, 4.0]], "shards": fleet(2, 4), "min_replicas": 1} | change
    with pytest.raises(error, match=text):
        balance(**arguments, layers=[0], num_experts=4, epoch=0)


def test_unfit_shards_are_refused() -> None:
    for facts in ({"num_slots": -1}, {"num_slots": 1, "speed": 0.0}, {"num_slots": 1, "speed": float("inf")}):
        with pytest.raises(InputError, match="shard s0 cannot have"):
            ShardFacts(shard=ShardId("s0"), node="n", domain="d", **facts)


def test_what_cannot_save_enough_is_not_searched_for() -> None:
    shards = fleet(8, 2 * 10)
    load_LE = zipf(2, 64)
    current = balance(load_LE, shards, layers=range(2), num_experts=64, epoch=0)
    uneven_LE = load_LE * np.random.default_rng(1).uniform(0.97, 1.03, load_LE.shape)
    stay, searched = (plan_for(current, uneven_LE, shards, min_improvement=least) for least in (0.05, 0.0))
    assert "level shards would save" in stay.reason
    assert not stay.is_worthwhile
    assert (stay.placement.shards, stay.placement.weights) == (current.shards, current.weights)
    assert stay.balancedness_before == stay.balancedness_after == searched.balancedness_before > 0.95
    assert searched.is_worthwhile, "the threshold alone keeps the other one from it"
    # A lost shard leaves the placement in any case.
    assert len(plan_for(current, uneven_LE, shards[1:]).placement.shards) == 7


def test_a_thousand_shards_are_levelled() -> None:
    shards = fleet(1024, 2, shards_a_node=72)
    load_LE = zipf(1, 256, exponent=0.8)
    current = initial_placement([0], 256, [facts.shard for facts in shards], 1)
    plan = plan_for(current, load_LE, shards)
    plan = plan_for(plan.placement, load_LE, shards)
    check(plan.placement, shards, 1)
    assert plan.balancedness_after >= 0.95
