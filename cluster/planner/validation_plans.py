"""Checks of whole plans: which is recommended, how fast, what a GPU has to hold."""

from collections.abc import Iterator

from expertmesh.cluster.planner.collectives import extra_peers_s
from expertmesh.cluster.planner.cost import LayerCost, layer_cost
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.hardware import Hardware
from expertmesh.cluster.planner.memory import gpu_memory
from expertmesh.cluster.planner.model_shape import ModelShape
from expertmesh.cluster.planner.planner import Candidate, make_report
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.skew import slowest_rank
from expertmesh.cluster.planner.validation_check import QWEN3, TENSORRT, WIKI, YES, Check, Machines, Shapes
from expertmesh.cluster.planner.workload import Workload

TP4 = Plan(attention_tp=4, attention_dp=1, ep=1, expert_tp=4)
EP4 = Plan(attention_tp=4, attention_dp=1, ep=4, expert_tp=1)
EXTRA_US = {4: 0.0, 8: 2.0, 16: 5.0, 32: 18.0}
GEMM = {4: 1.0, 8: 0.62, 16: 0.38, 32: 0.32}
KNEE = 0.15  # the sweet spot is the last doubling of EP that shortens the layer by so much


def workstation_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    """Yield 478 B parameters on four GPUs that do not reach each other's memory, one stream."""
    group = "478 B on workstation-blackwell-x4, NVFP4, one stream"
    machine, workload = machines["workstation-blackwell-x4"], Workload(tokens_per_step=1)
    report = make_report(shapes["example-478b"], machine, workload, "nvfp4")
    by_plan = {one.plan: one for one in report.candidates if one.is_feasible}
    best = report.candidates[0].plan
    order = list(by_plan)
    ranked = [plan for plan in order if plan.attention_tp == 4]
    tp, ep = by_plan[TP4], by_plan[EP4]
    yield Check(
        group=group,
        what="TP=4 recommended",
        said=1,
        model=float(best == TP4),
        unit=YES,
        tolerance=0,
        source=WIKI,
        note=str(best),
    )
    yield Check(
        group=group,
        what="EP=4 last with attention TP=4",
        said=1,
        model=float([plan.ep for plan in ranked][-1] == 4),
        unit=YES,
        tolerance=0,
        source=WIKI,
        note=f"{order.index(EP4) + 1}th of all {len(order)} that fit: those with attention DP=2 read more yet",
    )
    yield Check(
        group=group, what="TP=4", said=49, model=1 / tp.step_s, unit="tok/s", tolerance=0.5, source=WIKI, note=_most(tp)
    )
    yield Check(
        group=group,
        what="EP=4",
        said=1.4,
        model=1 / ep.step_s,
        unit="tok/s",
        tolerance=0.3,
        source=WIKI,
        note=_most(ep),
    )
    yield _implied_latency(group, shapes["example-478b"], machine, ep)


def _most(candidate: Candidate) -> str:
    assert candidate.cost is not None
    part = candidate.cost.bound_by
    return f"{candidate.cost.parts_s[part] * 1e3:.1f} of {candidate.step_s * 1e3:.1f} ms: {part}"


def _implied_latency(group: str, shape: ModelShape, machine: Hardware, ep: Candidate) -> Check:
    """Say what a message would have to take for the 1.4 tokens/s, all else as modelled."""
    messages = 2 * 3 * shape.num_moe_layers
    modelled = machine.tiers[0].staged_message_s
    return Check(
        group=group,
        what="a message that would explain 1.4",
        model=(1 / 1.4 - ep.step_s) / messages * 1e6 + modelled * 1e6,
        unit="us",
        source="this model, solved for it",
        note=f"modelled are {modelled * 1e6:.1f} us; no published latency comes near",
    )


def expert_parallel_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    """Yield Qwen3-235B at EP 4 to 32, on the NVLink domain of 72."""
    group = "qwen3-235b-a22b, prefill of 6,000 tokens, EP 4 to 32"
    shape, nvl72 = shapes["qwen3-235b-a22b"], machines["gb200-nvl72"]
    layers = {ep: _prefill_layer(shape, nvl72, ep) for ep in GEMM}
    for ep, layer in layers.items():
        tokens = Workload(tokens_per_step=6000, context=6000, phase="prefill").attention_tokens(_spread(ep))
        yield Check(
            group=group, what=f"tokens a rank, EP {ep}", said=6000 // ep, model=tokens, tolerance=0.01, source=QWEN3
        )
        yield Check(
            group=group,
            what=f"extra dispatch latency, EP {ep}",
            said=EXTRA_US[ep],
            model=(extra_peers_s(nvl72, ep) - extra_peers_s(nvl72, 4)) * 1e6,
            unit="us",
            tolerance=0.5,
            source=QWEN3,
            note="gb200-nvl72: 0.6 us for each further peer",
        )
        yield Check(
            group=group,
            what=f"GEMM time over that of EP 4, EP {ep}",
            said=GEMM[ep],
            model=layer.experts.total_s / layers[4].experts.total_s,
            tolerance=0.25,
            source=QWEN3,
            note=f"gb200-nvl72, bf16, Zipf 0.6: busiest rank {layer.load.imbalance:.2f} of the mean",
        )
    wide = layers[32].experts
    yield Check(
        group=group,
        what="EP 32 bound by memory",
        said=1,
        model=float(wide.bound_by == "memory"),
        unit=YES,
        tolerance=0,
        source=QWEN3,
        note=f"reading takes {wide.memory_s * 1e6:.0f} us, computing {wide.compute_s * 1e6:.0f}",
    )
    for name, said, why in (
        ("hgx-h100", 8, "NVLink ends at 8"),
        ("gb200-nvl72", 16, f"the knee: {KNEE:.0%} a doubling"),
    ):
        yield Check(
            group=group,
            what=f"sweet spot of EP, {name}",
            said=said,
            model=sweet_spot(shape, machines[name]),
            tolerance=0,
            source=QWEN3,
            note=why,
        )
    plan = Plan(attention_tp=4, attention_dp=4, ep=16, expert_tp=1, instances=4)
    decode = make_report(shape, nvl72, Workload(tokens_per_step=4096), "bf16", plans=[plan])
    yield Check(
        group=group,
        what="attention TP=4, experts EP=16, 4 copies on 72 GPUs can run",
        said=1,
        model=float(decode.recommended == 0),
        unit=YES,
        tolerance=0,
        source=QWEN3,
        note=f"{decode.candidates[0].step_s * 1e3:.1f} ms a step of 4,096 tokens",
    )


def sweet_spot(shape: ModelShape, machine: Hardware) -> int:
    """Return the EP whose next doubling shortens dispatch, experts and combine of the prefill by less than KNEE."""
    gpus = machine.model_copy(update={"num_gpus": 64})
    layers = {ep: _prefill_layer(shape, gpus, ep) for ep in GEMM}
    times = {ep: one.dispatch.total_s + one.experts.total_s + one.combine.total_s for ep, one in layers.items()}
    return next((ep for ep in times if ep * 2 not in times or times[ep * 2] > (1 - KNEE) * times[ep]), 32)


def _prefill_layer(shape: ModelShape, machine: Hardware, ep: int) -> LayerCost:
    workload = Workload(tokens_per_step=6000, context=6000, phase="prefill")
    return layer_cost(shape, machine, _spread(ep), workload, find_format("bf16"))


def _spread(ep: int) -> Plan:
    return Plan(attention_tp=1, attention_dp=ep, ep=ep, expert_tp=1)


def memory_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    """Yield what a GPU has to hold under each kind of plan."""
    group = "memory"
    shape, machine, form = shapes["deepseek-v3"], machines["hgx-h200"], find_format("fp8")
    experts = shape.routed_params * form.expert_weight_bytes
    total = shape.weight_bytes(form)
    for what, plan, whole in (
        ("TP=8: all weights / 8", Plan(attention_tp=8, attention_dp=1, ep=1, expert_tp=8), total),
        ("EP=8, attention TP=8: all weights / 8", Plan(attention_tp=8, attention_dp=1, ep=8, expert_tp=1), total),
        ("EP=4 x TP=2: experts / 8", Plan(attention_tp=2, attention_dp=4, ep=4, expert_tp=2), experts),
    ):
        memory = gpu_memory(shape, machine, plan, Workload(), form)
        held = memory.weight_bytes if whole == total else memory.expert_weight_bytes
        note = "router and norms are whole on each GPU" if whole == total else ""
        yield Check(
            group=group,
            what=f"{what}, deepseek-v3",
            said=whole / 8e9,
            model=held / 1e9,
            unit="GB",
            tolerance=0.01,
            source=WIKI,
            note=note,
        )
    few = min(one.routed_params / one.total_params for one in shapes.values())
    yield Check(
        group=group,
        what="experts' part of the weights, least of all cards",
        said=0.9,
        model=few,
        tolerance=0.1,
        source=WIKI,
        note="the source's example is 90 %",
    )
    attention = gpu_memory(shape, machine, Plan(attention_tp=1, attention_dp=8, ep=8, expert_tp=1), Workload(), form)
    yield Check(
        group=group,
        what="deepseek-v3: shared experts whole beside attention, EP=8",
        said=(shape.attention_params + shape.dense_ffn_params + shape.shared_params) * form.dense_weight_bytes / 1e9,
        model=(attention.attention_weight_bytes - 2 * (shape.router_params + shape.norm_params)) / 1e9,
        unit="GB",
        tolerance=0.001,
        source="arXiv 2412.19437, section 3.4",
    )
    yield from _many_experts_checks(shapes["example-512-experts"], machine)


def _many_experts_checks(shape: ModelShape, machine: Hardware) -> Iterator[Check]:
    group, form = "memory", find_format("bf16")
    yield Check(
        group=group,
        what="512 experts of 5 GB",
        said=2.5,
        model=shape.routed_params * form.expert_weight_bytes / 1e12,
        unit="TB",
        tolerance=0.05,
        source=WIKI,
    )
    many = machine.model_copy(update={"num_gpus": 32})
    report = make_report(shape, many, Workload(tokens_per_step=256), "bf16")
    sliced = [one for one in report.candidates if one.plan.is_tensor_parallel and one.plan.pp == 1]
    yield Check(
        group=group,
        what="512 experts of 5 GB: no plan of TP alone can run, 32 x H200",
        said=1,
        model=float(not any(one.is_feasible for one in sliced)),
        unit=YES,
        tolerance=0,
        source=WIKI,
        note="TP ends at 8 KV heads",
    )
    yield Check(
        group=group,
        what="512 experts of 5 GB: EP recommended, 32 x H200",
        said=1,
        model=float(report.candidates[0].plan.ep > 1),
        unit=YES,
        tolerance=0,
        source=WIKI,
        note=str(report.candidates[0].plan),
    )


def skew_checks() -> Iterator[Check]:
    """Yield how unbalanced ranks are, without replicas and with one slot for them on each rank."""
    for replicas, said, note in (
        (0, 1.564, "Zipf's exponent is chosen by this"),
        (1, 0.109, "the model packs by the very load that then comes; a server packs by the past"),
    ):
        load = slowest_rank(256, 8, 32, 100_000, Workload().skew, replicas)
        yield Check(
            group="skew",
            what=f"256 experts on 32 ranks, {8 + replicas} slots",
            said=said,
            model=load.imbalance - 1,
            tolerance=0.1,
            source=TENSORRT,
            note=note,
        )


def plan_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    """Yield all of them."""
    yield from workstation_checks(shapes, machines)
    yield from expert_parallel_checks(shapes, machines)
    yield from memory_checks(shapes, machines)
    yield from skew_checks()
