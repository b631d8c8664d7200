"""Volumes against counting, collectives against their formulas, skew against its limits."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.planner.collectives import all_gather, all_reduce, all_to_all, send
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.skew import inclusion_probabilities, slowest_rank
from expertmesh.cluster.planner.traffic import expected_destinations, hit_probability, routed_rows
from tests.planner import machine, small_shape, tier


@given(st.sampled_from([(8, 2, 4), (6, 3, 3), (8, 4, 2), (10, 1, 5), (9, 2, 9)]))
def test_destinations_against_counting_every_choice(sizes: tuple[int, int, int]) -> None:
    num_experts, top_k, num_groups = sizes
    each = num_experts // num_groups
    choices = list(itertools.combinations(range(num_experts), top_k))
    counted = sum(len({expert // each for expert in choice}) for choice in choices) / len(choices)
    assert expected_destinations(num_experts, top_k, num_groups) == pytest.approx(counted)


def test_a_token_goes_everywhere_when_it_must() -> None:
    assert hit_probability(8, 8, 4) == 1
    assert hit_probability(8, 7, 4) == 1
    assert hit_probability(8, 2, 1) == 1


@pytest.mark.parametrize(
    ("plan", "stay", "near", "far"),
    [
        (Plan(attention_tp=1, attention_dp=8, ep=8, expert_tp=1), 1, 3, 4),
        (Plan(attention_tp=2, attention_dp=4, ep=4, expert_tp=2), 1, 3, 4),
        (Plan(attention_tp=1, attention_dp=4, ep=4, expert_tp=1), 1, 3, 0),
    ],
)
def test_rows_by_tier(plan: Plan, stay: int, near: int, far: int) -> None:
    """Two domains of 4 ranks: a rank has 3 peers in its own and 4 in the other, each as likely to be asked."""
    gpus = machine(tier(), tier(domain_size=8, name="network"), num_gpus=8)
    rows = routed_rows(small_shape(), gpus, plan, tokens=100)
    each = 100 * hit_probability(16, 2, plan.ep)
    assert (rows.stay, *rows.by_tier) == pytest.approx((stay * each, near * each, far * each))


def test_rows_against_a_simulation() -> None:
    rng = np.random.default_rng(5)
    gpus, tokens = machine(tier(), tier(domain_size=8), num_gpus=8), 4000
    home = np.arange(tokens) % 8
    chosen = np.array([rng.permutation(16)[:2] for _ in range(tokens)])
    stay = near = far = 0
    for rank, experts in zip(home, chosen, strict=True):
        for target in {expert // 2 for expert in experts}:
            stay += target == rank
            near += target != rank and target // 4 == rank // 4
            far += target // 4 != rank // 4
    rows = routed_rows(small_shape(), gpus, Plan(attention_tp=1, attention_dp=8, ep=8, expert_tp=1), tokens)
    assert (rows.stay, *rows.by_tier) == pytest.approx((stay, near, far), rel=0.06)


def test_nothing_is_dispatched_where_each_rank_has_a_slice_of_all() -> None:
    plan = Plan(attention_tp=4, attention_dp=1, ep=1, expert_tp=4)
    assert routed_rows(small_shape(), machine(), plan, 100).sent == 0


def test_an_all_to_all_waits_for_its_slowest_tier() -> None:
    gpus = machine(tier(per_peer_s=1e-7), tier(domain_size=8, bytes_per_s=1e8), num_gpus=8, all_to_all_s=1e-5)
    found = all_to_all(gpus, 8, (1e6, 1e6))
    assert found.transfer_s == pytest.approx(1e6 / 1e8)
    assert found.latency_s == pytest.approx(1e-5 + 1e-6 + 2e-7)
    assert all_to_all(gpus, 1, (0, 0)).total_s == 0


def test_staged_messages_follow_each_other() -> None:
    gpus = machine(tier(is_direct=False, staging_s=1e-5, sync_s=4e-6))
    assert all_to_all(gpus, 4, (0,)).latency_s == pytest.approx(3 * 1.5e-5)


def test_an_all_reduce_takes_the_fastest_way() -> None:
    direct, ring = machine(), machine(tier(is_direct=False, staged_step_s=1e-6))
    assert all_reduce(direct, 4, 10).total_s == pytest.approx(1e-6 + 30 / 1e9)  # one shot
    assert all_reduce(direct, 4, 1e6).total_s == pytest.approx(6e-6 + 1.5e6 / 1e9)  # ring
    assert all_reduce(ring, 4, 10).total_s == pytest.approx(6 * 2e-6 + 15 / 1e9)
    adds_up = machine(tier(reduces_in_network=True, in_network_latency_s=2e-6))
    assert all_reduce(adds_up, 4, 1e6).total_s == pytest.approx(2e-6 + 1e6 / 1e9)


def test_an_all_reduce_over_domains_sends_parts_between_them() -> None:
    gpus = machine(tier(), tier(domain_size=64, bytes_per_s=1e7, latency_s=1e-5), num_gpus=64)
    within = 6e-6 + 1.5 * 1e6 / 1e9
    ring = 30e-5 + 30 / 16 * 0.25e6 / 1e7
    assert all_reduce(gpus, 64, 1e6).total_s == pytest.approx(within + ring)
    tree = 8e-5 + 2 * 250 / 1e7
    assert all_reduce(gpus, 64, 1000).total_s == pytest.approx(6e-6 + 1.5e3 / 1e9 + tree)


def test_gather_and_send() -> None:
    gpus = machine(collective_s=1e-6)
    assert all_gather(gpus, 4, 1e6).total_s == pytest.approx(1e-6 + 3e-6 + 0.75e6 / 1e9)
    assert send(gpus, 4, 1e6).total_s == pytest.approx(2e-6 + 1e-3)


@given(st.integers(1, 64), st.integers(1, 8), st.floats(0, 3))
def test_choices_add_up_and_none_is_certain_twice(num_experts: int, top_k: int, skew: float) -> None:
    top_k = min(top_k, num_experts)
    chosen = inclusion_probabilities(num_experts, top_k, skew)
    assert chosen.sum() == pytest.approx(top_k)
    assert (chosen <= 1 + 1e-9).all()
    assert (np.diff(chosen) <= 1e-12).all()


def test_the_busiest_rank_at_its_limits() -> None:
    even = slowest_rank(64, 8, 8, 100_000, 0.0, 0)
    assert even.imbalance == pytest.approx(1, abs=0.03)
    assert even.busiest_active_experts == 8
    assert slowest_rank(64, 8, 1, 1000, 1.0, 0).imbalance == pytest.approx(1, abs=0.01)
    # One token of top-2 among 64 experts on 64 ranks: the busiest has one expert, the mean 1/32.
    assert slowest_rank(64, 2, 64, 1, 0.0, 0).busiest_active_experts <= 1


def test_skew_unbalances_and_replicas_level() -> None:
    loads = [slowest_rank(128, 8, 16, 10_000, skew, 0).imbalance for skew in (0.0, 0.4, 0.8)]
    assert loads == sorted(loads)
    assert loads[2] > 1.5
    assert slowest_rank(128, 8, 16, 10_000, 0.8, 2).imbalance < 1.1


def test_the_same_question_has_the_same_answer() -> None:
    first = slowest_rank(64, 4, 8, 777, 0.6, 1)
    slowest_rank.cache_clear()
    assert slowest_rank(64, 4, 8, 777, 0.6, 1) == first
