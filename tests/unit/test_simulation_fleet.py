"""A fleet in virtual time: what failures take, what is copied, how it grows and shrinks, and the same again."""

import itertools
from collections import Counter
from typing import Any

import pytest

from expertmesh.cluster.autoscaler import ShardTierSettings, WorkerTierSettings
from expertmesh.cluster.errors import CapacityError, InputError
from expertmesh.cluster.ids import ExpertKey, ShardId
from expertmesh.cluster.placement import Placement, initial_placement
from expertmesh.cluster.repair import repair
from expertmesh.cluster.settings import AutoscaleSettings
from expertmesh.cluster.simulation.faults import Fault, read_faults
from expertmesh.cluster.simulation.results import Event, Result
from expertmesh.cluster.simulation.sweep import gain_per_doubling, knee, point
from expertmesh.cluster.simulation.traffic import Rate, at_rate
from tests.simulation import LAYERS, NUM_EXPERTS, QUIET, even_load, hot_load, intervals, run, small_clock

SHARDS = tuple(ShardId(f"shard-{n}") for n in range(4))
RACK_1 = Fault(at_s=10.0, kind="rack", number=1)
SHARD_3 = Fault(at_s=10.0, kind="shard", number=3)


def broken(*faults: Fault, seconds: int = 60, **changes: Any) -> Result:
    asked: dict[str, Any] = {"rack_shards": 2, "pace_s": 0.5, **QUIET, **changes}
    return run(intervals(even_load(400), 400, seconds), float(seconds), faults=faults, **asked)


def of_kind(result: Result, kind: str) -> list[Event]:
    return [event for event in result.events if event.kind == kind]


NODES = {shard: f"rack-{n // 2}" for n, shard in enumerate(SHARDS)}


def placed(placement: Placement) -> set[tuple[ShardId, ExpertKey]]:
    return {(slots.shard, key) for slots in placement.shards for key in slots.experts}


def at_start(replicas: int) -> Placement:
    return initial_placement(LAYERS, NUM_EXPERTS, SHARDS, replicas, nodes=NODES)


def new_of_each(before: Placement, after: Placement) -> Counter[ShardId]:
    """Count what each shard has to copy."""
    return Counter(shard for shard, _ in placed(after) - placed(before))


def test_with_replicas_over_racks_a_rack_takes_nothing_away() -> None:
    result = broken(RACK_1, replicas=2)
    (failure,) = of_kind(result, "failure")
    assert (failure.num_experts, failure.num_bytes) == (0, 0)
    assert failure.seconds == pytest.approx(0.2)
    assert "2 shards; 0 experts had no other copy" in failure.text
    assert result.offered == result.served + result.left


def test_without_replicas_it_takes_exactly_its_sole_copies() -> None:
    sole = [one for one in placed(at_start(1)) if one[0] in SHARDS[2:]]
    result = broken(RACK_1, notice_s=0.3, copying={"checkpoint_bytes_per_s": 1e5})
    (failure,) = of_kind(result, "failure")
    assert failure.num_experts == len(sole) == 32
    assert failure.num_bytes == 32 * small_clock().expert_bytes
    # Each of the two that are left reads a half, one expert after the other.
    assert failure.seconds == pytest.approx(0.3 + 16 * small_clock().expert_bytes / 1e5)
    assert max(result.step_s) == pytest.approx(failure.seconds, abs=0.01)
    at = next(n for n, begin_s in enumerate(result.begin_s) if begin_s >= 10.0)
    assert result.step_s[at] == max(result.step_s)


def test_a_shard_of_sole_copies_likewise() -> None:
    sole = [one for one in placed(at_start(1)) if one[0] == "shard-3"]
    (failure,) = of_kind(broken(SHARD_3), "failure")
    assert failure.num_experts == len(sole) == 16


def test_the_dead_come_back_empty_and_get_their_part_again() -> None:
    result = broken(SHARD_3, replicas=2, restart_s=30.0, spread_after_s=15.0)
    spread, again = of_kind(result, "spread")
    (back,) = of_kind(result, "back")
    assert spread.time_s == pytest.approx(25.0, abs=0.6)
    assert back.time_s == pytest.approx(40.0, abs=0.6)
    assert again.time_s == pytest.approx(40.5, abs=1.1)
    on_three = repair(at_start(2), SHARDS[:3], {}, replicas=2, level=True, nodes=NODES)
    assert spread.num_experts == new_of_each(at_start(2), on_three).total() >= 32
    on_four = repair(on_three, SHARDS, {}, replicas=2, level=True, nodes=NODES)
    assert again.num_experts == new_of_each(on_three, on_four).total() >= 24
    assert [sample.shards for sample in result.samples if sample.time_s < 10] == [4] * 9
    assert {sample.shards for sample in result.samples if 11 < sample.time_s < 40} == {3}
    assert result.samples[-1].shards == 4


def test_copies_come_from_peers_and_only_then_serve() -> None:
    """The new replicas are in force after as long as the slowest shard copies, at the bandwidth between racks."""
    result = broken(
        SHARD_3, replicas=2, restart_s=None, copying={"network_bytes_per_s": 1e4, "domain_bytes_per_s": 1e4}
    )
    (spread,) = of_kind(result, "spread")
    on_three = repair(at_start(2), SHARDS[:3], {}, replicas=2, level=True, nodes=NODES)
    most = max(new_of_each(at_start(2), on_three).values())
    assert spread.seconds == pytest.approx(most * small_clock().expert_bytes / 1e4)
    assert spread.time_s == pytest.approx(25.0 + spread.seconds, abs=1.0)


def test_the_dead_that_do_not_come_back_are_left_out() -> None:
    result = broken(SHARD_3, restart_s=None)
    assert not of_kind(result, "back")
    assert result.samples[-1].shards == 3
    assert result.served + result.left == result.offered


def test_fewer_shards_take_longer() -> None:
    result = broken(RACK_1, replicas=2, restart_s=None, pace_s=0.5)
    assert result.step_percentiles(11.0)["p50"] > 1.3 * result.step_percentiles(0.0, 10.0)["p50"]


def test_the_loss_of_all_shards_is_told() -> None:
    with pytest.raises(CapacityError, match="rack-0 fails at 20 s, and no shard is left"):
        broken(RACK_1, Fault(at_s=20.0, kind="rack", number=0), restart_s=None)


def test_the_same_seed_gives_the_same_to_the_bit() -> None:
    def once(seed: int) -> Result:
        made = intervals(hot_load(4000), 4000, 50)
        return run(made, 50.0, replicas=2, rack_shards=2, faults=[SHARD_3], seed=seed)

    first = once(1)
    assert first == once(1)
    assert first.step_s != once(2).step_s
    assert first.events


def autoscaled(peak: float, **changes: Any) -> Result:
    shards = ShardTierSettings(min_count=2, max_count=16, up_delay_s=5.0, down_delay_s=20.0, cooldown_s=10.0, **changes)
    rate = Rate([(0, 1000), (100, peak), (200, peak), (300, 1000)])
    made = at_rate(intervals(even_load(1000), 1000, 500), rate)
    auto = AutoscaleSettings(shards=shards, workers=WorkerTierSettings(max_count=1))
    return run(made, 500.0, small_clock(2), autoscale=auto, start_s=10.0, max_batch_tokens=100_000, **QUIET)


def test_shards_follow_the_load_up_and_down() -> None:
    result = autoscaled(2_000_000.0)
    counts = [sample.shards for sample in result.samples]
    assert counts[0] == 2
    assert max(counts) >= 4
    assert counts[-1] < max(counts)
    changes = of_kind(result, "scale")
    assert changes[0].text.startswith("shards go from 2 to ")
    assert changes[0].num_experts > 0
    # A new shard serves after it has started, and not at once.
    first_wish_s = next(sample.time_s for sample in result.samples if sample.served_per_s > 2000)
    assert changes[0].time_s > first_wish_s + 10.0


def test_a_load_that_two_can_bear_keeps_two() -> None:
    result = autoscaled(2000.0)
    assert {sample.shards for sample in result.samples} == {2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("shard-3", "it must be like 600:shard-3"),
        ("x:shard-3", "it must be like 600:shard-3"),
        ("1e:shard-3", "it must be like 600:shard-3"),
        ("5:node-1", "it must be like 600:shard-3"),
        ("99:shard-1", "99 s is not within the 60 s"),
        ("5:shard-4", "no shard-4; there are shard-0 to shard-3"),
        ("5:rack-2", "no rack-2; there are rack-0 to rack-1"),
    ],
)
def test_a_fault_that_cannot_be_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=f"--fail {text}: .*{complaint}"):
        read_faults([text], num_shards=4, rack_shards=2, duration_s=60.0)


def test_faults_come_in_the_order_of_time() -> None:
    faults = read_faults(["20:rack-1", "5.5:shard-0"], num_shards=4, rack_shards=2, duration_s=60.0)
    assert [(fault.at_s, str(fault)) for fault in faults] == [(5.5, "shard-0"), (20.0, "rack-1")]
    assert list(faults[1].shards(2)) == [2, 3]


def test_the_knee_is_where_a_doubling_stops_paying() -> None:
    made = list(intervals(even_load(4000), 4000, 3))
    points = []
    for count in (1, 2, 4, 8, 16):
        clock = small_clock(count)
        points.append(point(clock, run(made, 3.0, clock, **QUIET)))
    found = knee(points)
    position = points.index(found)
    assert all(gain_per_doubling(a, b) >= 0.1 for a, b in itertools.pairwise(points))
    assert position == len(points) - 1 or gain_per_doubling(found, points[position + 1]) < 0.1
    assert [one.gpus for one in points] == [1, 2, 4, 8, 16]
    assert knee(points[:1]) is points[0]


def test_one_that_stays_away_keeps_nobody_from_following_the_load() -> None:
    looks: dict[str, Any] = {"weights_period_s": 1.0, "rebalance_period_s": 0.0}
    # Spread over the others by second 26, given up at second 40, back long after the end.
    waits, goes_on = (
        broken(SHARD_3, restart_s=1e4, absence_s=absence_s, **looks).looks["level"] for absence_s in (1e4, 30.0)
    )
    assert 5 <= waits <= 10, "the looks before the failure"
    assert waits + 15 <= goes_on <= waits + 21
