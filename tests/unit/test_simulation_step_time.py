"""The time of a step against the planner's, and against sums done by hand.

Shape suffixes: L MoE layers, E experts of a layer, S shards.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.balance import balancedness, shard_load_LS
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, ShardSlots, initial_placement
from expertmesh.cluster.planner.cost import step_cost
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.skew import RankLoad
from expertmesh.cluster.planner.traffic import expected_destinations, hit_probability
from expertmesh.cluster.planner.workload import Workload
from expertmesh.cluster.simulation.routing import Mix, Ranks, Routing
from expertmesh.cluster.simulation.settings import SimulationSettings
from expertmesh.cluster.simulation.simulator import simulate
from expertmesh.cluster.simulation.step_time import StepClock
from expertmesh.cluster.simulation.traffic import Interval, Rate, zipf_intervals
from expertmesh.cluster.traces import TraceHeader
from tests.planner import shipped_machine, shipped_shape
from tests.simulation import LAYERS, NUM_EXPERTS, QUIET, even_load, hot_load, intervals, plan, run, small_clock

SHARDS = tuple(ShardId(f"shard-{n}") for n in range(4))


def interval(load_LE: np.ndarray[tuple[int, ...], np.dtype[np.float64]], tokens: int) -> Interval:
    return Interval(begin_s=0.0, end_s=1.0, tokens=tokens, load_LE=load_LE)


@pytest.mark.parametrize("num_shards", [16, 64])
def test_uniform_load_gives_the_planners_step_time(num_shards: int) -> None:
    """Within 3 %: the planner takes the mean of 24 draws, and the busiest rows and experts of different ranks."""
    shape, machine, fp8 = shipped_shape("deepseek-v3"), shipped_machine("gb200-nvl72"), find_format("fp8")
    tokens, chosen = 8192, plan(num_shards)
    clock = StepClock(shape, machine, chosen, Workload(), fp8)
    layers = tuple(range(3, 61))
    header = TraceHeader(model="m", layers=layers, num_experts=256, top_k=8, hidden_size=7168)
    made = zipf_intervals(header, Rate([(0, tokens * 10)]), skew=0.0, topic_s=0.0, duration_s=2.0, seed=0)
    result = simulate(clock, layers, made, SimulationSettings(**QUIET), duration_s=2.0)
    assert set(result.tokens) == {tokens}
    planned = step_cost(shape, machine, chosen, Workload(tokens_per_step=tokens, skew=0.0), fp8)
    assert result.step_percentiles()["p50"] == pytest.approx(planned.step_s, rel=0.03)


@pytest.mark.parametrize("overlap", [0.0, 0.4, 1.0])
def test_a_hot_expert_without_replicas_gives_the_time_of_its_shard(overlap: float) -> None:
    """A step that has all tokens of an interval has exactly its rows: 1200 of the hot expert and 80 of each other one.

    A shard of four experts that has the hot one computes 1440 rows, of 2400 / 4 that a mean one does.
    """
    clock = small_clock(overlap=overlap)
    result = run(intervals(hot_load(1200), 1200, 3), 3.0, clock, pace_s=1.0, **QUIET)
    load = RankLoad(mean_rows=600, busiest_rows=1440, busiest_active_experts=4)
    workload = Workload(context=64, overlap=overlap, tokens_per_step=1200)
    by_hand = step_cost(clock.shape, clock.hardware, clock.plan, workload, clock.form, load)
    assert result.step_s == pytest.approx([by_hand.step_s] * 3)
    assert result.samples[-1].balancedness == pytest.approx(600 / 1440)


def test_replicas_of_the_hot_expert_level_it() -> None:
    made = list(intervals(hot_load(40_000), 40_000, 90))
    slow = run(made, 90.0, max_batch_tokens=4000, weights_period_s=0.0, rebalance_period_s=0.0)
    levelled = run(made, 90.0, max_batch_tokens=4000, weights_period_s=3.0, rebalance_period_s=30.0)
    assert slow.samples[-1].balancedness == pytest.approx(600 / 1440, rel=0.01)
    assert levelled.samples[-1].balancedness > 0.95
    assert levelled.step_percentiles(60.0)["p50"] < 0.7 * slow.step_percentiles(60.0)["p50"]
    assert levelled.copied
    assert not slow.copied


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_balancedness_is_that_of_the_placement_by_hand(seed: int, replicas: int, num_shards: int) -> None:
    replicas = min(replicas, num_shards)
    load_LE = np.random.default_rng(seed).integers(0, 50, (len(LAYERS), NUM_EXPERTS)).astype(np.float64)
    load_LE[:, 0] += 1
    shards = [ShardId(f"shard-{n}") for n in range(num_shards)]
    placement = initial_placement(LAYERS, NUM_EXPERTS, shards, replicas)
    by_hand = balancedness(shard_load_LS(load_LE, placement))
    tokens = int(load_LE.sum())
    result = run(intervals(load_LE, tokens, 4), 4.0, small_clock(num_shards), pace_s=1.0, replicas=replicas, **QUIET)
    assert [sample.balancedness for sample in result.samples] == pytest.approx([by_hand] * len(result.samples))
    assert result.samples


def test_dead_replicas_get_nothing_and_the_others_their_part() -> None:
    keys = tuple(ExpertKey(0, expert) for expert in range(2))
    placement = Placement(
        epoch=0,
        num_experts=2,
        layers=(0,),
        shards=tuple(ShardSlots(shard=shard, experts=keys) for shard in SHARDS[:3]),
        weights={ExpertKey(0, 0): (128, 64, 64)},
    )
    mix = Mix(Routing(placement, np.array([False, True, True])), interval(np.array([[60.0, 40.0]]), 60))
    rows_LS, active_LS = mix.draw(60, np.random.default_rng(0))
    assert rows_LS[0, 0] == active_LS[0, 0] == 0
    assert rows_LS.sum() == pytest.approx(100, rel=0.2)
    assert mix.balancedness == pytest.approx(1.0)


def test_a_part_of_an_interval_is_a_draw_of_its_tokens() -> None:
    """Without putting back: 100 of 400 tokens, of which a fifth chose an expert, have 20 +- sqrt(16 * 3 / 4) rows."""
    placement = initial_placement((0,), 4, SHARDS, 1)
    load_LE = np.array([[80.0, 320.0, 400.0, 0.0]])
    mix = Mix(Routing(placement, np.ones(4, dtype=np.bool_)), interval(load_LE, 400))
    rng = np.random.default_rng(3)
    drawn = np.stack([np.sort(mix.draw(100, rng).rows_LS[0]) for _ in range(4000)])
    assert drawn.mean(axis=0) == pytest.approx([0, 20, 80, 100], rel=0.01)
    assert drawn.std(axis=0) == pytest.approx([0, 12**0.5, 12**0.5, 0], rel=0.05)
    active_S = np.sort(mix.draw(2, rng).active_LS[0])
    assert active_S == pytest.approx([0, 1 - 0.995**80, 1 - 0.995**320, 1 - 0.995**400])


@pytest.mark.parametrize("tokens", [1, 7, 600])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_parts_of_a_step_sum_up_to_the_planners(tokens: int, overlap: float) -> None:
    clock = small_clock(overlap=overlap)
    load = RankLoad(mean_rows=tokens / 2, busiest_rows=tokens, busiest_active_experts=3)
    workload = Workload(context=64, overlap=overlap, tokens_per_step=tokens)
    planned = step_cost(clock.shape, clock.hardware, clock.plan, workload, clock.form, load)
    rows_LS, active_LS = np.full((4, 4), tokens / 3), np.full((4, 4), 3.0)
    rows_LS[:, 2] = tokens
    assert clock.seconds(Ranks(rows_LS, active_LS), tokens, 4).step_s == pytest.approx(planned.step_s)


def test_groups_that_do_not_divide_the_experts_are_weighed_by_their_number() -> None:
    """16 experts in 5 groups: four of three and one of four."""
    of_three, of_four = (1 - (13 * 12) / (16 * 15)), (1 - (12 * 11) / (16 * 15))
    assert hit_probability(16, 2, 5) == pytest.approx((4 * of_three + of_four) / 5)
    assert expected_destinations(16, 2, 16) == pytest.approx(2)
    assert expected_destinations(16, 2, 64) == pytest.approx(2)


def test_a_fleet_of_another_size_has_as_many_copies_of_attention() -> None:
    shape, machine = shipped_shape("qwen3-30b-a3b"), shipped_machine("hgx-h100", 64)
    chosen = Plan(attention_tp=4, attention_dp=8, ep=16, expert_tp=2)
    clock = StepClock(shape, machine, chosen, Workload(), find_format("bf16"))
    assert clock.plan_of(15).attention_dp == 7  # 30 GPUs: two are idle
    assert clock.plan_of(1).attention_dp == 1
    assert clock.resized(32).plan == Plan(attention_tp=4, attention_dp=16, ep=32, expert_tp=2)
    with pytest.raises(InputError, match="--sweep: 33 shards take 66 GPUs, and num_gpus of hardware hgx-h100 is 64"):
        clock.resized(33)
    with pytest.raises(InputError, match="--sweep: 3 shards do not divide by attention_tp=4"):
        clock.resized(3)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attention_tp": 3, "attention_dp": 2, "ep": 6}, "heads not divisible: 8 by attention_tp=3"),
        ({"attention_dp": 5, "expert_tp": 5, "ep": 1}, "width of an expert not divisible: 32 by expert_tp=5"),
        ({"ep": 128, "attention_dp": 128}, "it takes 128 GPUs, and num_gpus of hardware made up is 64"),
        ({"pp": 2}, "plan: pp=2; one stage"),
        ({"instances": 2}, "plan: instances=2; one stage"),
    ],
)
def test_a_plan_that_cannot_be_simulated_is_refused_by_its_field(changes: dict[str, int], text: str) -> None:
    clock = small_clock()
    with pytest.raises(InputError, match=text):
        StepClock(clock.shape, clock.hardware, plan(4, **changes), Workload(), clock.form)


def test_a_number_of_shards_that_does_not_divide_the_experts_is_simulated() -> None:
    result = run(intervals(even_load(300), 300, 2), 2.0, small_clock(5), **QUIET)
    assert result.served == 600 - result.left
    assert result.slots >= 4 * NUM_EXPERTS / 5
