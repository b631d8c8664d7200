import itertools
import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from expertmesh.cluster.autoscaler import (
    Autoscaler,
    Decision,
    ShardInputs,
    ShardTierSettings,
    WorkerInputs,
    WorkerTierSettings,
)
from expertmesh.cluster.errors import InputError

SHARDS = ShardTierSettings(min_count=2, max_count=10, up_delay_s=10, down_delay_s=60, cooldown_s=30)
WORKERS = WorkerTierSettings(max_count=8, up_delay_s=10, down_delay_s=60, cooldown_s=30, full_backlog_s=10)
CALM_SHARDS = ShardInputs(
    current=4,
    busiest_utilisation=0.65,
    mean_utilisation=0.6,
    worker_wait_fraction=0.2,
    queue_s=0.001,
    needed_bytes=150,
    shard_bytes=100,
)
CALM_WORKERS = WorkerInputs(
    current=2, outstanding_tokens=1000, tokens_per_s=100.0, free_page_fraction=0.35, num_waiting=0
)


def busy(utilisation: float, current: int = 4) -> ShardInputs:
    return replace(CALM_SHARDS, current=current, mean_utilisation=utilisation, busiest_utilisation=utilisation)


def decide_shards(scaler: Autoscaler, inputs: ShardInputs, *times_s: float) -> list[int]:
    return [scaler.decide(now_s, inputs, CALM_WORKERS).shards for now_s in times_s]


def decide_workers(scaler: Autoscaler, inputs: WorkerInputs, *times_s: float) -> list[int]:
    return [scaler.decide(now_s, CALM_SHARDS, inputs).workers for now_s in times_s]


def test_worked_example() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    # 4 shards at 0.9 are a load of 3.6, and 3.6 / 0.7 rounds up to 6.
    assert decide_shards(scaler, busy(0.9), 0, 9.9) == [4, 4]
    decision = scaler.decide(10, busy(0.9), CALM_WORKERS)
    assert (decision.shards, decision.workers) == (6, 2)
    assert decision.reasons == (
        "shards go from 4 to 6: 4 are busy for 0.90 of the time, the busiest for 0.90, 0.7 is aimed at; "
        "workers wait for 0.20 of theirs, packets for 0.001 s",
        "workers stay 2: 2 have 0.65 of their pages in use and work for 10 s of one worker, 0.7 is aimed at; "
        "0 sequences wait",
    )
    # The new ones start; 6 stay wanted, and the load is the same 3.6.
    assert decide_shards(scaler, busy(0.9), 11, 100) == [6, 6]
    assert decide_shards(scaler, busy(0.6, current=6), 101, 10_000) == [6, 6]


def test_inputs_can_be_logged_and_give_the_decision_again() -> None:
    inputs = json.loads(json.dumps(Autoscaler(SHARDS, WORKERS).decide(5, busy(0.9), CALM_WORKERS).inputs))
    assert inputs["now_s"] == 5
    assert ShardInputs(**inputs["shards"]) == busy(0.9)
    assert WorkerInputs(**inputs["workers"]) == CALM_WORKERS


def test_a_wish_that_breaks_starts_again_and_the_smallest_of_its_time_is_followed() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, busy(0.9), 0, 9) == [4, 4]
    assert decide_shards(scaler, CALM_SHARDS, 9.5) == [4]
    assert decide_shards(scaler, busy(1.0), 10, 15) == [4, 4]
    assert decide_shards(scaler, busy(0.75), 16) == [4], "a load of 3.0 asks for 5"
    assert decide_shards(scaler, busy(1.0), 19.9, 20) == [4, 5]


def test_after_a_change_comes_a_cool_down() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, busy(0.75), 0, 10) == [4, 5]
    sentence = scaler.decide(39, busy(1.0, current=5), CALM_WORKERS).reasons[0]
    assert sentence.startswith("shards stay 5: ")
    assert sentence.endswith("; 8 are wished for, and followed in 10.0 s at the earliest")
    assert decide_shards(scaler, busy(1.0, current=5), 40, 48.9, 49) == [5, 5, 8]


def test_members_leave_one_at_a_time_each_after_the_last_has_left() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    idle = busy(0.05)
    assert decide_shards(scaler, idle, 0, 59, 60) == [4, 4, 3]
    assert decide_shards(scaler, idle, 61, 500) == [3, 3], "the fourth still drains"
    left = busy(0.05, current=3)
    assert decide_shards(scaler, left, 501, 560, 561) == [3, 3, 2]
    assert decide_shards(scaler, busy(0.05, current=2), 562, 1000) == [2, 2], "never below the minimum"


def test_the_busiest_shard_and_a_queue_keep_a_tier_from_shrinking() -> None:
    times_s = (0.0, 100.0, 200.0)
    lopsided = replace(CALM_SHARDS, mean_utilisation=0.1, busiest_utilisation=0.6)
    assert decide_shards(Autoscaler(SHARDS, WORKERS), lopsided, *times_s) == [4, 4, 4]
    level = replace(lopsided, busiest_utilisation=0.3)
    assert decide_shards(Autoscaler(SHARDS, WORKERS), level, *times_s) == [4, 3, 3]
    for slow in (replace(level, queue_s=0.1), replace(level, worker_wait_fraction=0.8)):
        assert decide_shards(Autoscaler(SHARDS, WORKERS), slow, *times_s) == [4, 4, 4]


def test_a_queue_grows_the_tier_by_one_where_shards_are_busy() -> None:
    lopsided = replace(CALM_SHARDS, mean_utilisation=0.5, busiest_utilisation=0.95)
    assert decide_shards(Autoscaler(SHARDS, WORKERS), lopsided, 0, 10) == [4, 4]
    assert decide_shards(Autoscaler(SHARDS, WORKERS), replace(lopsided, queue_s=0.1), 0, 10) == [4, 5]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"free_page_fraction": 0.1}, 3),  # 1.8 workers full of pages
        ({"outstanding_tokens": 4000}, 6),  # 40 s of a worker, of which 10 fill one: 4 full ones
        ({"outstanding_tokens": 10**9}, 8),  # the most allowed
        ({"outstanding_tokens": 4000, "tokens_per_s": 0.0}, 2),  # no speed is known
        ({"num_waiting": 2}, 3),  # a load of 1.3 and a tenth more is more than two carry
        ({"num_waiting": 2, "free_page_fraction": 0.8, "outstanding_tokens": 0}, 2),
        ({"num_waiting": 0, "free_page_fraction": 0.8, "outstanding_tokens": 0}, 1),
        ({"num_waiting": 1}, 2),
    ],
)
def test_workers_follow_pages_backlog_and_waiting_sequences(change: dict[str, float], wanted: int) -> None:
    inputs = replace(CALM_WORKERS, **change)  # type: ignore[arg-type]
    assert decide_workers(Autoscaler(SHARDS, WORKERS), inputs, 0, 60)[-1] == wanted


def test_an_unknown_speed_is_told() -> None:
    inputs = replace(CALM_WORKERS, tokens_per_s=0.0)
    assert "work for an unknown time" in Autoscaler(SHARDS, WORKERS).decide(0, CALM_SHARDS, inputs).reasons[1]


def test_bounds_come_before_delays() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, replace(CALM_SHARDS, needed_bytes=601), 0) == [7]
    assert decide_shards(scaler, replace(CALM_SHARDS, needed_bytes=701), 1) == [8], "not even a cool-down"
    too_many, scaler = busy(0.6, current=14), Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, too_many, 0) == [10]
    assert scaler.decide(1, too_many, CALM_WORKERS).reasons[0].startswith("shards stay 10: "), "while the others drain"
    assert decide_workers(Autoscaler(SHARDS, WORKERS), replace(CALM_WORKERS, current=0), 0) == [1]


def test_a_floor_above_the_maximum_is_told() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    decision = scaler.decide(0, replace(CALM_SHARDS, needed_bytes=1101), CALM_WORKERS)
    assert decision.shards == 10
    told = "shards: 12 are needed for memory, and at most 10 are allowed"
    assert told in decision.reasons
    assert told in scaler.decide(1, replace(CALM_SHARDS, needed_bytes=1101), CALM_WORKERS).reasons
    assert told not in scaler.decide(2, CALM_SHARDS, CALM_WORKERS).reasons


def test_a_tier_that_others_enlarged_is_taken_as_it_is() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, CALM_SHARDS, 0) == [4]
    decision = scaler.decide(1, busy(0.4, current=7), CALM_WORKERS)
    assert (decision.shards, decision.reasons[0]) == (7, "shards go from 4 to 7: others brought them to 7")
    assert decide_shards(scaler, busy(0.4, current=7), 2, 61.9, 62) == [7, 7, 6]
    beyond = replace(CALM_SHARDS, current=8, needed_bytes=801)
    assert decide_shards(scaler, beyond, 63) == [9], "the floor holds for these too"


def test_what_others_brought_a_tier_to_is_accepted_after_which_comes_a_cool_down() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, busy(0.6), 0) == [4]
    scaler.accept(3, 2)
    assert decide_shards(scaler, busy(0.9, current=3), 1, 29.9, 31) == [3, 3, 4]
    scaler.accept(4, 2)
    assert decide_shards(scaler, busy(1.0), 62, 72) == [4, 6], "nothing new: no second cool-down"
    scaler.accept(1, 2)
    assert decide_shards(scaler, busy(0.1, current=1), 73) == [2], "the minimum holds"


def test_what_is_accepted_first_is_wanted_though_fewer_can_be_measured() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    scaler.accept(4, 2)
    assert decide_shards(scaler, busy(0.9, current=3), 0, 10) == [4, 4]
    assert decide_shards(scaler, busy(1.0), 11, 21) == [4, 6], "no cool-down before any change"


def test_a_lost_member_stays_wanted() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, CALM_SHARDS, 0) == [4]
    assert decide_shards(scaler, busy(0.8, current=3), 1, 1000) == [4, 4]
    assert decide_shards(scaler, busy(0.0, current=0), 1001, 1002) == [4, 4]


def test_a_need_that_is_whole_but_for_rounding_is_whole() -> None:
    exact = replace(CALM_WORKERS, outstanding_tokens=2100, free_page_fraction=1.0)
    settings_of_workers = WORKERS.model_copy(update={"target_utilisation": 0.3})
    # 2.1 / 0.3 is a little more than 7 in binary fractions.
    assert decide_workers(Autoscaler(SHARDS, settings_of_workers), exact, 0, 10) == [2, 7]


def test_a_clock_set_back_stands_still() -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    assert decide_shards(scaler, busy(0.9), 1000, 1005, 5, 9.9, 10) == [4, 4, 4, 4, 6]


FRACTIONS = st.floats(0, 1)
ANY_SHARDS = st.builds(
    lambda mean, spread, **rest: ShardInputs(
        mean_utilisation=mean, busiest_utilisation=mean + (1 - mean) * spread, shard_bytes=100, **rest
    ),
    mean=FRACTIONS,
    spread=FRACTIONS,
    current=st.integers(0, 20),
    worker_wait_fraction=FRACTIONS,
    queue_s=st.floats(0, 1),
    needed_bytes=st.integers(0, 1500),
)
ANY_WORKERS = st.builds(
    WorkerInputs,
    current=st.integers(0, 20),
    outstanding_tokens=st.integers(0, 10**12),
    tokens_per_s=st.floats(0, 1e6),
    free_page_fraction=FRACTIONS,
    num_waiting=st.integers(0, 100),
)
STEPS_S = st.sampled_from([-50.0, 0.0, 1.0, 5.0, 20.0, 100.0])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(STEPS_S, ANY_SHARDS, ANY_WORKERS), max_size=25))
def test_bounds_always_hold_and_no_tier_holds_up_the_other(
    steps: list[tuple[float, ShardInputs, WorkerInputs]],
) -> None:
    both, shards_alone, workers_alone = (Autoscaler(SHARDS, WORKERS) for _ in range(3))
    now_s = 0.0
    for step_s, shards, workers in steps:
        now_s += step_s
        decision = both.decide(now_s, shards, workers)
        floor = min(SHARDS.max_count, math.ceil(shards.needed_bytes / 100))
        assert max(1, SHARDS.min_count, floor) <= decision.shards <= SHARDS.max_count
        assert 1 <= decision.workers <= WORKERS.max_count
        assert len(decision.reasons) >= 2
        assert decision.shards == shards_alone.decide(now_s, shards, CALM_WORKERS).shards
        assert decision.workers == workers_alone.decide(now_s, CALM_SHARDS, workers).workers


@settings(max_examples=100, deadline=None)
@given(ANY_SHARDS, ANY_WORKERS)
def test_constant_input_never_flaps(shards: ShardInputs, workers: WorkerInputs) -> None:
    scaler = Autoscaler(SHARDS, WORKERS)
    decisions = [scaler.decide(7.0 * step, shards, workers) for step in range(60)]
    check_one_way([decision.shards for decision in decisions])
    check_one_way([decision.workers for decision in decisions])


@settings(max_examples=100, deadline=None)
@given(
    load=st.floats(0, 15),
    lopsided=st.floats(1, 2),
    work_s=st.floats(0, 100),
    pages=st.floats(0, 10),
    current=st.tuples(st.integers(1, 10), st.integers(1, 8)),
)
def test_constant_load_never_flaps_when_the_tiers_follow(
    load: float, lopsided: float, work_s: float, pages: float, current: tuple[int, int]
) -> None:
    """Utilisation, queues and waiting sequences change with the number of members; the load is always the same."""
    scaler = Autoscaler(SHARDS, WORKERS)
    num_shards, num_workers = current
    history: list[Decision] = []
    for step in range(150):
        busiest = min(1.0, load * lopsided / num_shards)
        shards = ShardInputs(
            current=num_shards,
            mean_utilisation=min(busiest, load / num_shards),
            busiest_utilisation=busiest,
            worker_wait_fraction=busiest,
            queue_s=0.1 if busiest > 0.66 else 0.0,
            needed_bytes=100,
            shard_bytes=100,
        )
        workers = WorkerInputs(
            current=num_workers,
            outstanding_tokens=int(work_s * 100),
            tokens_per_s=100.0,
            free_page_fraction=max(0.0, 1 - pages / num_workers),
            num_waiting=100 if pages / num_workers > 0.5 else 0,
        )
        history.append(scaler.decide(7.0 * step, shards, workers))
        num_shards, num_workers = history[-1].shards, history[-1].workers
    check_one_way([decision.shards for decision in history])
    check_one_way([decision.workers for decision in history])
    assert history[-1].shards == history[-10].shards, "it comes to rest"
    assert history[-1].shards >= min(SHARDS.max_count, load / SHARDS.target_utilisation)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.lists(st.tuples(st.sampled_from([1.0, 6.0, 31.0]), st.floats(0.4, 1.0)), max_size=120))
def test_a_noisy_input_changes_at_most_once_a_cool_down(current: int, noise: list[tuple[float, float]]) -> None:
    hasty = SHARDS.model_copy(update={"up_delay_s": 0.0, "down_delay_s": 0.0})
    scaler, now_s, changes_s = Autoscaler(hasty, WORKERS), 0.0, [-math.inf]
    for step_s, utilisation in noise:
        now_s += step_s
        wanted = decide_shards(scaler, busy(utilisation, current), now_s)[0]
        if wanted != current:
            assert now_s - changes_s[-1] >= hasty.cooldown_s
            assert wanted >= current - 1
            changes_s.append(now_s)
        current = wanted


def check_one_way(counts: list[int]) -> None:
    """Numbers only grow or only shrink, the latter by one at a time."""
    assert counts in (sorted(counts), sorted(counts, reverse=True))
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(counts))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"current": -1}, "current=-1"),
        ({"mean_utilisation": 1.1}, "mean_utilisation=1.1"),
        ({"queue_s": math.nan}, "queue_s=nan"),
        ({"queue_s": math.inf}, "queue_s=inf"),
        ({"shard_bytes": 0}, "shard_bytes=0"),
        ({"busiest_utilisation": 0.5}, "busiest_utilisation=0.5, mean_utilisation=0.6"),
    ],
)
def test_unfit_measurements_are_refused(change: dict[str, float], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(CALM_SHARDS, **change)  # type: ignore[arg-type]


def test_other_unfit_arguments_are_refused() -> None:
    with pytest.raises(InputError, match=r"free_page_fraction=-0\.1"):
        replace(CALM_WORKERS, free_page_fraction=-0.1)
    with pytest.raises(InputError, match="nan is not finite"):
        Autoscaler(SHARDS, WORKERS).decide(math.nan, CALM_SHARDS, CALM_WORKERS)
    with pytest.raises(ValidationError, match="min_count=9 is above max_count=8"):
        WorkerTierSettings(min_count=9, max_count=8)
