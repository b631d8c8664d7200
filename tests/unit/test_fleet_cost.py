"""The step of a fleet: sums done by hand, what shards share, and what is refused."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.fleet_cost import FleetStepCost, fleet_choices, fleet_step_cost
from expertmesh.cluster.planner.fleet_load import ShardWork, finish_s, shard_rows
from expertmesh.cluster.planner.hardware import Hardware
from tests.planner import machine, shipped_machine, shipped_shape, small_shape, tier

CPU_FLEET = {
    "shares_cores": True,
    "lone_bytes_per_s": 1.5e11,
    "product_overlap": 0.5,
    "kv_efficiency": 0.5,
    "value_s": 1e-9,
    "step_s": 1e-3,
    "sequence_s": 1e-5,
    "score_s": 1e-9,
}


def cpu(num_cores: int = 2, **changes: Any) -> Hardware:
    values = {"num_gpus": num_cores, "row_tile": 1, "column_tile": 1, "kernels_per_layer": 1, "kernel_gap_s": 1e-5}
    return machine(tier(per_peer_s=1e-7), **{**values, "fleet": CPU_FLEET, **changes})


def cost(hardware: Hardware, **changes: Any) -> FleetStepCost:
    values: dict[str, Any] = {"num_workers": 1, "num_shards": 2, "expert_tp": 1, "tokens": 4}
    return fleet_step_cost(small_shape(), hardware, **{**values, **changes})


def even(*busy_s: float, most_cores: float = 1.0) -> list[ShardWork]:
    return [ShardWork(busy_s=one, lone_s=one, most_cores=most_cores) for one in busy_s]


@pytest.mark.parametrize(
    ("works", "num_cores", "finished_s"),
    [
        (even(3.0, 3.0), 2, 3.0),
        (even(5.0, 3.0), 2, 5.0),  # the busier decides
        (even(5.0, 3.0, most_cores=2.0), 2, 4.0),  # helpers take what the other core leaves
        (even(2.0, 2.0, 2.0, 2.0), 2, 4.0),  # they take turns
        (even(1.0, 1.0, 4.0), 2, 4.5),  # 1.5 s together at 2/3 of a core each, then 3 left for one core
        (even(4.0), 8, 4.0),
        ([], 2, 0.0),
    ],
)
def test_shards_share_cores(works: list[ShardWork], num_cores: float, finished_s: float) -> None:
    assert finish_s(works, num_cores, 1.0) == pytest.approx(finished_s)


def test_a_core_that_reads_alone_is_faster() -> None:
    works = [ShardWork(busy_s=4.0, lone_s=2.0, most_cores=1.0), ShardWork(busy_s=2.0, lone_s=1.0, most_cores=1.0)]
    # 2 s side by side, then half of the first one's is left, at twice the rate.
    assert finish_s(works, 2, 2.0) == pytest.approx(3.0)


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.integers(1, 8), st.floats(1, 3))
def test_cores_are_neither_idle_nor_conjured_up(busy_s: list[float], num_cores: int, lone_gain: float) -> None:
    works = [ShardWork(busy_s=one, lone_s=one / lone_gain, most_cores=1.0) for one in busy_s]
    finished_s = finish_s(works, num_cores, lone_gain)
    assert max(max(busy_s), sum(busy_s) / num_cores) / lone_gain <= finished_s * (1 + 1e-9)
    assert finished_s <= sum(busy_s) * (1 + 1e-9)
    assert finished_s <= max(busy_s) * (1 + 1e-9) or len(busy_s) > num_cores


@settings(deadline=None)
@given(st.sampled_from([(1, 2), (2, 2), (2, 4), (4, 4)]), st.integers(1, 40), st.sampled_from([0.0, 0.8]))
def test_every_pair_is_on_some_shard(split: tuple[int, int], tokens: int, skew: float) -> None:
    expert_tp, num_shards = split
    for draw in shard_rows(16, 3, expert_tp, num_shards, tokens, skew):
        assert len(draw) == num_shards
        assert sum(int(rows.sum()) for rows in draw) == tokens * 3 * expert_tp
        assert all((rows > 0).all() and (rows <= tokens).all() for rows in draw)
        if expert_tp == num_shards:  # each has a slice of every expert
            assert {int(rows.sum()) for rows in draw} == {3 * tokens}


def test_the_parts_add_up() -> None:
    found = cost(cpu())
    assert all(seconds > 0 for seconds in found.parts_s.values())
    assert sum(found.parts_s.values()) == pytest.approx(found.path_s)
    assert found.step_s == found.path_s


def test_parts_by_hand() -> None:
    """4 layers of hidden 64, 8 heads of 16, 4 KV heads; 4 tokens attend to 10 each; a core has 100 GB/s, 1 TFLOP/s."""
    shape, found = small_shape(), cost(cpu(), context=10)
    attention = 4 * 2 * 64 * (8 * 16 + 4 * 16)
    read_s, computed_s = 2 * attention / 100e9, 2 * 4 * attention / 1e12
    router_s = 4 * (2 * 64 * 16 / 100e9 + 0.5 * 2 * 4 * 64 * 16 / 1e12)
    assert found.parts_s["dense products"] == pytest.approx((read_s + 0.5 * computed_s + router_s) / 2)
    keys_s = 4 * 10 * 2 * 4 * 16 * 2 / 100e9 / 0.5
    assert found.parts_s["attention"] == pytest.approx(4 * (keys_s + 4 * 64 * 1e-9) / 2)
    assert found.parts_s["layers"] == pytest.approx(4e-5)
    assert found.parts_s["sampling"] == pytest.approx(4 * 100 * 1e-9)
    assert found.parts_s["step"] == pytest.approx(1e-3 + 4e-5)
    assert shape.num_moe_layers == 4


def test_bytes_of_slices_are_those_of_every_token_to_every_shard() -> None:
    found = cost(cpu(), num_shards=4, expert_tp=4)
    rows, pairs = 4 * 4, 4 * 2 * 4
    assert found.dispatch_bytes_per_layer == rows * 64 * 2 + pairs * 12
    assert found.combine_bytes_per_layer == rows * 64 * 2


def test_links_are_asked_in_turn() -> None:
    """Each shard is asked where each has a slice of every expert: two ways, and three messages more."""
    slow = [cost(cpu(), num_shards=4, expert_tp=4).parts_s["link latency"]]
    assert slow == [pytest.approx(4 * (2 * 1e-6 + 3 * 1e-7))]


def test_more_shards_than_cores_gain_nothing() -> None:
    shape = shipped_shape("qwen3-30b-a3b")
    two, eight = (
        fleet_step_cost(shape, cpu(), num_workers=1, num_shards=n, expert_tp=n, tokens=32).parts_s["experts"]
        for n in (2, 8)
    )
    assert eight == pytest.approx(two, rel=0.05)
    wide = cpu(8, tiers=[tier(domain_size=8).model_dump()])
    on_eight = fleet_step_cost(shape, wide, num_workers=1, num_shards=8, expert_tp=8, tokens=32)
    assert on_eight.parts_s["experts"] < 0.5 * eight


def test_workers_share_what_computes() -> None:
    """On two cores two workers take turns with their shards: as long as what both compute takes on two cores."""
    shape = shipped_shape("qwen3-30b-a3b")
    two = fleet_step_cost(shape, cpu(), num_workers=2, num_shards=2, expert_tp=2, tokens=8)
    alone = fleet_step_cost(shape, cpu(), num_workers=1, num_shards=2, expert_tp=2, tokens=4)
    assert alone.step_s == alone.path_s
    assert alone.step_s < two.path_s < two.step_s == two.busy_s
    assert two.busy_s > 2 * alone.parts_s["experts"]


def test_slices_balance_few_tokens_between_gpus() -> None:
    choices = fleet_choices(
        shipped_shape("mixtral-8x7b"), shipped_machine("hgx-h100"), num_workers=1, num_shards=4, tokens=1
    )
    assert list(choices) == [1, 2, 4]
    experts_s = [choices[tp].parts_s["experts"] for tp in (1, 2, 4)]
    assert experts_s == sorted(experts_s, reverse=True)
    # A token's 2 experts of 8 are on one shard of 4 once in 7 times: 8/7 of an expert's time, or 2 quarters of one.
    assert experts_s[0] / experts_s[-1] == pytest.approx(8 / 7 / 0.5, rel=0.08)


def test_slices_that_an_expert_is_too_narrow_for_are_left_out() -> None:
    choices = fleet_choices(small_shape(moe_intermediate_size=6), cpu(), num_workers=1, num_shards=4, tokens=2)
    assert list(choices) == [1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"num_workers": 0}, "num_workers must be at least 1, got 0"),
        ({"num_shards": 4, "expert_tp": 3}, "expert_tp=3 does not divide num_shards=4"),
        ({"num_shards": 64, "expert_tp": 64}, "width of an expert not divisible: 32 by expert_tp=64"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cost(cpu(), **changes)
