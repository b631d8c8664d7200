"""Plans, memory, rooflines and the time of a step: sums done by hand, and what must hold whatever the numbers."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.planner.compute import expert_roofline, roofline, tile_efficiency
from expertmesh.cluster.planner.cost import layer_cost, step_cost
from expertmesh.cluster.planner.dtypes import FORMATS, find_format
from expertmesh.cluster.planner.memory import gpu_memory
from expertmesh.cluster.planner.plans import Plan, divisors, enumerate_plans, why_not
from expertmesh.cluster.planner.skew import RankLoad
from expertmesh.cluster.planner.workload import Workload
from tests.planner import machine, shipped_machine, shipped_shape, small_shape, tier

BF16, FP8 = find_format("bf16"), find_format("fp8")
SPREAD = Plan(attention_tp=1, attention_dp=4, ep=4, expert_tp=1)
SLICED = Plan(attention_tp=4, attention_dp=1, ep=1, expert_tp=4)


@given(st.integers(1, 64))
def test_every_plan_uses_no_more_than_there_is(num_gpus: int) -> None:
    plans = list(enumerate_plans(num_gpus, (0, 1)))
    assert len(plans) == len(set(plans))
    assert max(plan.num_gpus for plan in plans) == num_gpus
    assert all(plan.ep * plan.expert_tp == plan.stage_gpus for plan in plans)
    assert all(plan.replicas == 0 or plan.ep > 1 for plan in plans)


def test_four_copies_of_sixteen_are_tried_on_a_rack() -> None:
    wanted = Plan(attention_tp=4, attention_dp=4, ep=16, expert_tp=1, instances=4)
    assert wanted in set(enumerate_plans(72))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"attention_dp": 3, "ep": 3}, "experts not divisible: 16 by ep=3"),
        ({"attention_tp": 8, "expert_tp": 8}, "KV heads not divisible: 4 by attention_tp=8"),
        ({"attention_tp": 16, "ep": 16}, "heads not divisible: 8 by attention_tp=16"),
        ({"attention_dp": 5, "expert_tp": 5}, "width of an expert not divisible: 32 by expert_tp=5"),
        ({"pp": 5}, "pp=5 is above the number of layers, 4"),
        ({"ep": 2}, "ep=2 x expert_tp=1 is not attention_tp=1 x attention_dp=1"),
        ({"attention_dp": 2, "ep": 2, "replicas": 9}, "replicas=9 is above the experts that a group lacks"),
    ],
)
def test_sizes_that_do_not_divide_are_named(plan: dict[str, int], message: str) -> None:
    found = why_not(Plan(**{"attention_tp": 1, "attention_dp": 1, "ep": 1, "expert_tp": 1, **plan}), small_shape())
    assert found is not None
    assert message in found


def test_a_latent_is_never_sliced_by_head() -> None:
    wide = Plan(attention_tp=8, attention_dp=1, ep=8, expert_tp=1)
    latent = shipped_shape("deepseek-v3")
    assert why_not(wide, latent) is None
    one, eight = (
        gpu_memory(latent, shipped_machine("hgx-h200"), plan, Workload(tokens_per_step=8), FP8).kv_bytes
        for plan in (Plan(attention_tp=1, attention_dp=8, ep=8, expert_tp=1), wide)
    )
    assert eight == 8 * one


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("plan", [SPREAD, SLICED, Plan(attention_tp=2, attention_dp=2, ep=2, expert_tp=2)])
def test_experts_of_all_gpus_are_the_model_s(plan: Plan, form: Any) -> None:
    shape = small_shape()
    memory = gpu_memory(shape, machine(), plan, Workload(), form)
    assert 4 * memory.expert_weight_bytes == pytest.approx(shape.routed_params * form.expert_weight_bytes)
    assert memory.attention_weight_bytes * plan.attention_tp >= shape.attention_params * form.dense_weight_bytes


def test_stages_and_replicas_change_the_weights() -> None:
    shape = small_shape()
    whole = gpu_memory(shape, machine(), SPREAD, Workload(), BF16)
    halved = Plan(attention_tp=1, attention_dp=2, ep=2, expert_tp=1, pp=2)
    assert gpu_memory(shape, machine(), halved, Workload(), BF16).expert_weight_bytes == whole.expert_weight_bytes
    spare = Plan(attention_tp=1, attention_dp=4, ep=4, expert_tp=1, replicas=2)
    more = gpu_memory(shape, machine(), spare, Workload(), BF16)
    assert more.expert_weight_bytes == pytest.approx(whole.expert_weight_bytes * 6 / 4)


def test_keys_and_values_follow_the_sequences() -> None:
    shape = small_shape()
    decode = gpu_memory(shape, machine(), SPREAD, Workload(tokens_per_step=64, context=100), BF16)
    assert decode.kv_bytes == 16 * shape.kv_bytes(100, BF16)
    sliced = gpu_memory(shape, machine(), SLICED, Workload(tokens_per_step=64, context=100), BF16)
    assert sliced.kv_bytes == 64 * shape.kv_bytes(100, BF16) / 4
    prefill = Workload(tokens_per_step=64, context=16, phase="prefill")
    assert gpu_memory(shape, machine(), SPREAD, prefill, BF16).kv_bytes == shape.kv_bytes(16, BF16)


def test_the_roofline_is_the_slower_of_both() -> None:
    gpus = machine()
    assert roofline(gpus, "bf16", 1e9, 1).total_s == pytest.approx(1e-3)
    assert roofline(gpus, "fp8", 1e9, 1).total_s == pytest.approx(0.5e-3)
    assert roofline(gpus, "bf16", 1e9, 1).bound_by == "compute"
    assert roofline(gpus, "bf16", 1, 1e9).total_s == pytest.approx(1e-2)
    assert roofline(gpus, "bf16", 1, 1e9).bound_by == "memory"


def test_few_rows_read_weights_and_many_compute() -> None:
    shape, gpus = shipped_shape("qwen3-235b-a22b"), shipped_machine("hgx-h100")
    few, many = (
        expert_roofline(shape, gpus, BF16, rows=rows * 16, active_experts=16, expert_tp=1) for rows in (2, 2048)
    )
    assert few.bound_by == "memory"
    assert many.bound_by == "compute"
    read_s = 16 * shape.expert_params * 2 / (3.35e12 * 0.85)
    assert few.memory_s == pytest.approx(read_s, rel=0.02)
    assert many.compute_s == pytest.approx(2 * 32_768 * shape.expert_params / (989e12 * 0.75), rel=0.01)


def test_products_that_fill_no_tile_lose() -> None:
    assert tile_efficiency(64, 64) == 1
    assert tile_efficiency(65, 64) == pytest.approx(65 / 128)
    assert tile_efficiency(1, 64) == 1 / 64
    shape, gpus = shipped_shape("qwen3-30b-a3b"), shipped_machine("hgx-h100")
    whole, sliced = (
        expert_roofline(shape, gpus, BF16, rows=4096, active_experts=4, expert_tp=tp).compute_s for tp in (1, 16)
    )
    assert sliced > whole / 16  # 768 / 16 = 48 columns of a tile of 128


def test_parts_add_up_to_the_step() -> None:
    cost = step_cost(small_shape(), machine(), SPREAD, Workload(), BF16)
    assert sum(cost.parts_s.values()) == pytest.approx(cost.step_s)
    assert cost.parts_s[cost.bound_by] == max(cost.parts_s.values())


def test_dense_weights_are_read_once_a_step() -> None:
    """One token on one GPU reads everything but the embedding and the experts not chosen, norms not counted."""
    shape = small_shape(first_k_dense_replace=1, intermediate_size=48, n_shared_experts=1)
    gpus = machine(flop_per_s={"bf16": 1e15})
    alone = Plan(attention_tp=1, attention_dp=1, ep=1, expert_tp=1)
    cost = step_cost(shape, gpus, alone, Workload(tokens_per_step=1), BF16)
    read = shape.sliced_params + shape.router_params + shape.head_params
    assert cost.parts_s["dense weights, memory"] == pytest.approx(2 * read / 1e11)


def test_a_layer_of_ep_by_hand() -> None:
    gpus, shape = machine(tier(per_peer_s=0.0), all_to_all_s=5e-6), small_shape()
    layer = layer_cost(shape, gpus, SPREAD, Workload(tokens_per_step=400, skew=0), BF16)
    probability = 1 - (12 * 11) / (16 * 15)
    leave = 400 * probability * 3
    assert layer.dispatch_bytes == pytest.approx(leave * 128)
    assert layer.combine_bytes == layer.dispatch_bytes
    assert layer.dense_bound_bytes == 4 * 400 * 128
    assert layer.all_reduce_bytes == 0
    busiest = leave / 4 * 128 * layer.load.imbalance / 1e9
    assert layer.dispatch.total_s == pytest.approx(6e-6 + busiest)


def test_a_layer_of_tp_by_hand() -> None:
    layer = layer_cost(small_shape(), machine(), SLICED, Workload(tokens_per_step=400), BF16)
    assert layer.dispatch_bytes == layer.dispatch.total_s == 0
    assert layer.all_reduce_bytes == 2 * 400 * 128
    assert layer.all_reduce.total_s == pytest.approx(2 * min(6e-6 + 1.5 * 51_200 / 1e9, 1e-6 + 3 * 51_200 / 1e9))


def test_measured_loads_take_the_place_of_expected_ones() -> None:
    load = RankLoad(mean_rows=200, busiest_rows=800, busiest_active_experts=3)
    shape, gpus = small_shape(), machine()
    cost = step_cost(shape, gpus, SPREAD, Workload(tokens_per_step=400), BF16, load)
    assert cost.layer.load is load
    expected = expert_roofline(shape, gpus, BF16, rows=800, active_experts=3, expert_tp=1)
    assert cost.layer.experts == expected


def test_overlap_hides_communication_behind_computing() -> None:
    steps = [
        step_cost(small_shape(), machine(), SPREAD, Workload(overlap=part), BF16).step_s for part in (0.0, 0.5, 1.0)
    ]
    assert steps == sorted(steps, reverse=True)
    cost = step_cost(small_shape(), machine(), SPREAD, Workload(overlap=1.0), BF16)
    links_s = cost.parts_s["dispatch and combine latency"] + cost.parts_s["dispatch and combine bytes"]
    assert cost.step_s >= max(links_s, sum(cost.parts_s.values()) - links_s) * (1 - 1e-9)


def test_a_pipeline_takes_each_part_through_all_stages() -> None:
    gpus, shape = machine(), small_shape()
    one = Plan(attention_tp=1, attention_dp=1, ep=1, expert_tp=1)
    staged = Plan(attention_tp=1, attention_dp=1, ep=1, expert_tp=1, pp=4)
    alone = step_cost(shape, gpus, one, Workload(tokens_per_step=16, skew=0), BF16)
    four = step_cost(shape, gpus, staged, Workload(tokens_per_step=64, skew=0), BF16)
    assert four.parts_s["pipeline sends"] == pytest.approx(4 * (1e-6 + 16 * 128 / 1e9))
    assert four.step_s == pytest.approx(alone.step_s + four.parts_s["pipeline sends"])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(divisors(4)), st.sampled_from(divisors(4)), st.integers(1, 4096), st.floats(0, 1.5))
def test_better_hardware_is_never_slower(attention_tp: int, ep: int, tokens: int, skew: float) -> None:
    plan = Plan(attention_tp=attention_tp, attention_dp=4 // attention_tp, ep=ep, expert_tp=4 // ep)
    workload = Workload(tokens_per_step=tokens, skew=skew)
    base = step_cost(small_shape(), machine(), plan, workload, BF16).step_s
    for better in (
        machine(tier(bytes_per_s=2e9)),
        machine(tier(latency_s=0.0)),
        machine(memory_bytes_per_s=2e11),
        machine(flop_per_s={"bf16": 2e12}),
        machine(tier(reduces_in_network=True)),
    ):
        assert step_cost(small_shape(), better, plan, workload, BF16).step_s <= base * (1 + 1e-12)
    staged = machine(tier(is_direct=False, staged_step_s=1e-5, staging_s=1e-5))
    assert step_cost(small_shape(), staged, plan, workload, BF16).step_s >= base
