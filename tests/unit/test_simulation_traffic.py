"""Traffic and virtual time: no token is lost or made up, whatever the rate, the pace and the room.

Shape suffixes: L MoE layers, E experts of a layer.
"""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.simulation.traffic import (
    Interval,
    Rate,
    at_rate,
    draw,
    repeated,
    trace_intervals,
    zipf_intervals,
)
from expertmesh.cluster.synthetic_traces import zipf_steps
from expertmesh.cluster.traces import TraceHeader, TraceStep
from tests.simulation import QUIET, even_load, intervals, run, small_clock

HEADER = TraceHeader(model="made up", layers=(0, 1, 2, 3), num_experts=16, top_k=2, hidden_size=64)


def test_a_rate_is_linear_between_its_points_and_level_outside() -> None:
    rate = Rate([(10, 100), (20, 300)])
    assert [rate.at(t) for t in (0, 10, 15, 20, 99)] == [100, 100, 200, 300, 300]
    assert rate.tokens_until(10) == 1000
    assert rate.tokens_until(20) == 1000 + 2000
    assert rate.tokens_until(30) == 1000 + 2000 + 3000


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([], "times must rise"),
        ([(5, 1), (5, 2)], "times must rise"),
        ([(0, -1)], "not negative, got -1"),
        ([(0, math.inf)], "finite"),
        ([(0, 0), (9, 0)], "it is 0 all the time"),
    ],
)
def test_a_rate_that_is_none_is_refused(points: list[tuple[float, float]], text: str) -> None:
    with pytest.raises(InputError, match=f"^rate: .*{text}"):
        Rate(points)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.03, 0.1, 0.7]),
    st.integers(1, 40),
    st.sampled_from([0.3, 1.0]),
)
def test_tokens_in_are_tokens_out_and_those_that_wait(
    tokens: list[int], pace_s: float, room: int, length_s: float
) -> None:
    made = [
        Interval(begin_s=n * length_s, end_s=(n + 1) * length_s, tokens=count, load_LE=even_load(count))
        for n, count in enumerate(tokens)
    ]
    result = run(made, len(made) * length_s, pace_s=pace_s, max_batch_tokens=room, **QUIET)
    assert result.offered == sum(tokens) == result.served + result.left
    assert sum(result.tokens) == result.served
    assert all(1 <= count <= room * 4 for count in result.tokens)
    for begin_s, step_s, next_s in zip(result.begin_s, result.step_s, result.begin_s[1:], strict=False):
        assert next_s >= begin_s + max(step_s, pace_s) - 1e-6
    assert result.mean_wait_s >= 0
    for sample in result.samples:
        assert 0 <= sample.queue_tokens <= result.offered
        assert 0 < sample.balancedness <= 1 + 1e-9


def test_every_token_that_came_by_then_is_in_a_step() -> None:
    """100 tokens/s, a step each 0.1 s, far below what the fleet can do: 10 tokens a step."""
    result = run(intervals(even_load(100), 100, 5), 5.0, pace_s=0.1, **QUIET)
    assert result.tokens == (10,) * 50
    assert result.begin_s == pytest.approx([0.1 * (n + 1) for n in range(50)])
    assert result.mean_wait_s == pytest.approx(0.05, rel=0.1)
    assert (result.left, result.behind_s) == (0, 0.0)


def test_more_tokens_than_the_fleet_can_do_are_queued() -> None:
    """4 copies of attention with room for 10 tokens each, a step at the end of each 0.1 s: 400 tokens/s of 1000."""
    result = run(intervals(even_load(1000), 1000, 10), 10.0, pace_s=0.1, max_batch_tokens=10, **QUIET)
    assert set(result.tokens) == {40}
    assert result.left == 10_000 - 100 * 40
    assert result.samples[-1].queue_tokens == pytest.approx(6000, rel=0.02)
    # The queue grows by 600 a second: a mean of 3000 over 10 s, and 10,000 tokens that wait.
    assert result.mean_wait_s == pytest.approx(3.0, rel=0.02)
    assert result.behind_s > 0


def test_without_a_pace_steps_follow_each_other_at_once() -> None:
    result = run(intervals(even_load(100_000), 100_000, 1), 1.0, pace_s=0.0, **QUIET)
    pairs = zip(result.begin_s, result.step_s, result.begin_s[1:], strict=False)
    busy = [next_s - begin_s - step_s for begin_s, step_s, next_s in pairs]
    assert max(busy) < 1e-4
    assert result.left < 0.1 * result.offered


@given(st.integers(0, 10**6), st.floats(0.0, 3.0), st.sampled_from([0.0, 2.0]))
@settings(max_examples=20, deadline=None)
def test_made_up_tokens_choose_top_k_experts_and_are_those_of_the_rate(seed: int, skew: float, topic_s: float) -> None:
    rate = Rate([(0, 50), (4, 250)])
    made = list(zipf_intervals(HEADER, rate, skew=skew, topic_s=topic_s, duration_s=4.5, seed=seed))
    assert sum(interval.tokens for interval in made) == rate.tokens_until(4.5)
    assert made[-1].end_s == 4.5
    for interval in made:
        assert interval.load_LE.max() <= interval.tokens
        assert interval.load_LE.sum(axis=1).max() <= 2 * interval.tokens * (1 + 1e-9)
        assert interval.load_LE.sum() >= 0.8 * 2 * 4 * interval.tokens  # a hottest expert is cut at all tokens


def test_other_experts_are_hot_with_another_topic() -> None:
    made = list(zipf_intervals(HEADER, Rate([(0, 9000)]), skew=1.5, topic_s=3.0, duration_s=9.0, seed=1))
    hottest = [interval.load_LE.argmax(axis=1).tolist() for interval in made]
    assert hottest[0] == hottest[2] != hottest[3] == hottest[5] != hottest[6]


def test_a_trace_is_replayed_at_its_own_times() -> None:
    steps = list(zipf_steps(HEADER, skew=1.0, num_steps=5, step_s=0.5, prefill_tokens=3, decode_tokens=40, seed=1))
    made = list(trace_intervals(steps))
    assert [(i.begin_s, i.end_s, i.tokens) for i in made] == [(n / 2, n / 2 + 0.5, 43) for n in range(5)]
    for interval, step in zip(made, steps, strict=True):
        assert (interval.load_LE == step.load_LE).all()


def test_tokens_that_took_no_time_are_refused() -> None:
    step = TraceStep(time_s=0.0, prefill_tokens=0, decode_tokens=1, load_LE=np.zeros((4, 16), dtype=np.int64))
    with pytest.raises(InputError, match=r"interval 0 of the trace: time_s=0"):
        list(trace_intervals([step]))


@given(st.floats(0.1, 20.0), st.integers(1, 4))
def test_a_trace_is_repeated_until_the_end_and_cut_there(duration_s: float, num: int) -> None:
    made = list(repeated(lambda: intervals(even_load(50), 50, num), duration_s))
    assert made[0].begin_s == 0.0
    assert made[-1].end_s == pytest.approx(duration_s)
    assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(made))
    assert sum(i.tokens for i in made) == pytest.approx(50 * duration_s, abs=len(made))


def test_a_trace_without_intervals_is_refused() -> None:
    with pytest.raises(InputError, match="no intervals"):
        list(repeated(list, 5.0))


def test_a_rate_takes_the_place_of_the_traces_tokens() -> None:
    made = list(at_rate(intervals(even_load(50), 50, 3), Rate([(0, 200)])))
    assert [i.tokens for i in made] == [200] * 3
    assert made[0].load_LE == pytest.approx(even_load(200))


@pytest.mark.parametrize(("tokens", "chance"), [(400, 0.005), (400, 0.05), (1000, 0.3), (1000, 0.8)])
def test_drawn_counts_are_as_binomial_ones(tokens: int, chance: float) -> None:
    """The slow, obvious twin draws whole numbers; a step waits for the largest of many shards, here 64."""
    rng = np.random.default_rng(7)
    mean = np.full((4000, 64), tokens * chance)
    drawn = draw(mean, mean * (1 - chance), rng)
    exact = rng.binomial(tokens, chance, size=mean.shape)
    assert drawn.mean() == pytest.approx(exact.mean(), rel=0.02)
    assert drawn.std() == pytest.approx(exact.std(), rel=0.06)
    assert drawn.max(axis=1).mean() == pytest.approx(exact.max(axis=1).mean(), rel=0.03)


def test_counts_without_variance_are_exact() -> None:
    mean = np.array([[3.0, 0.0, 7.5]])
    assert (draw(mean, np.zeros((1, 3)), np.random.default_rng(0)) == mean).all()


def test_the_clock_of_a_small_fleet_is_quick_enough_for_these_tests() -> None:
    """Steps of a few tokens take far less than the paces above, so that no test is of an overload by chance."""
    result = run(intervals(even_load(400), 400, 1), 1.0, small_clock(), pace_s=0.1, **QUIET)
    assert max(result.step_s) < 0.03
