"""Checks of volumes and times of communication."""

from collections.abc import Iterator, Sequence

from expertmesh.cluster.planner.calibration import Calibration, Fit, Sample, calibrate, fit_links
from expertmesh.cluster.planner.collectives import all_reduce, all_to_all, extra_peers_s
from expertmesh.cluster.planner.cost import layer_cost
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.hardware import Hardware, LinkTier
from expertmesh.cluster.planner.plans import Plan
from expertmesh.cluster.planner.traffic import all_reduce_bytes, dense_bound_bytes, expected_destinations
from expertmesh.cluster.planner.validation_check import DEEPEP, RTX6KPRO, WIKI, Check, Machines, Shapes
from expertmesh.cluster.planner.workload import Workload

# Microseconds of dispatch and combine by ranks, as published.
DEEPEP_US = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
CALIBRATED_ON = (8, 32, 128)  # the other half is what the fit is held against
_TOKENS, _HIDDEN, _TOP_K = 128, 7168, 8
# DeepEP's README: H800's NVLink has 400 GB/s in both directions.
_H800 = Calibration(source=DEEPEP, constants={"num_gpus": 256, "tiers.0.bytes_per_s": 200e9})


def volume_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    """Yield the worked example: 4 GPUs, hidden 7168, 64 tokens, bf16, top-8 of 256 experts."""
    group = "bytes a layer: 4 GPUs, hidden 7168, 64 tokens, bf16"
    dispatch = dense_bound_bytes(64, _HIDDEN, 4, 2.0)
    reduced = all_reduce_bytes(64, _HIDDEN)
    sent_to = expected_destinations(256, _TOP_K, 4)
    routed = sent_to * 64 * _HIDDEN * 2.0
    yield Check(
        group=group,
        what="EP dispatch, dense bound",
        said=3.67,
        model=dispatch / 1e6,
        unit="MB",
        tolerance=0.01,
        source=WIKI,
    )
    yield Check(
        group=group,
        what="EP dispatch and combine, dense bound",
        said=8,
        model=2 * dispatch / 1e6,
        unit="MB",
        tolerance=0.1,
        source=WIKI,
        note="the source rounds 7.34 up",
    )
    yield Check(
        group=group, what="TP all-reduce", said=0.92, model=reduced / 1e6, unit="MB", tolerance=0.01, source=WIKI
    )
    yield Check(
        group=group, what="EP over TP", said=8, model=2 * dispatch / reduced, unit="x", tolerance=0.01, source=WIKI
    )
    yield Check(
        group=group,
        what="EP dispatch, routed: once a rank",
        model=routed / 1e6,
        unit="MB",
        source=WIKI,
        note=f"exact: {sent_to:.2f} of 4 ranks a token; {routed * 0.75 / 1e6:.2f} MB of it leave the rank",
    )
    yield from _time_checks(shapes, machines)


def _time_checks(shapes: Shapes, machines: Machines) -> Iterator[Check]:
    group = "time a layer of those 8 MB"
    nvlink, pcie = machines["gb200-nvl72"], machines["workstation-blackwell-x4"]
    both_ways = 2 * nvlink.tiers[0].bytes_per_s
    one_way = pcie.tiers[0].bytes_per_s
    note = "as the source divides: all ranks' bytes by one GPU's rate"
    yield Check(
        group=group,
        what="NVLink 5",
        said=5,
        model=8e6 / both_ways * 1e6,
        unit="us",
        tolerance=0.15,
        source=WIKI,
        note=note,
    )
    yield Check(
        group=group,
        what="PCIe 4",
        said=250,
        model=8e6 / one_way * 1e6,
        unit="us",
        tolerance=0.01,
        source=WIKI,
        note=note,
    )
    step_s = 100 * 8e6 / one_way
    yield Check(
        group=group, what="100 layers, PCIe 4", said=25, model=step_s * 1e3, unit="ms", tolerance=0.01, source=WIKI
    )
    yield Check(
        group=group, what="tokens/s at most, PCIe 4", said=40, model=1 / step_s, unit="/s", tolerance=0.01, source=WIKI
    )
    plan = Plan(attention_tp=1, attention_dp=4, ep=4, expert_tp=1)
    for name, machine in (("NVLink 5", nvlink), ("PCIe 4, staged", pcie)):
        layer = layer_cost(
            shapes["deepseek-v3"], machine, plan, Workload(tokens_per_step=64, skew=0), find_format("bf16")
        )
        times = layer.dispatch.plus(layer.combine)
        yield Check(
            group=group,
            what=f"the cost model's own, {name}",
            model=times.total_s * 1e6,
            unit="us",
            source="this model: routed rows, each rank one way",
            note=f"{times.latency_s * 1e6:.0f} us of it latency",
        )


def deepep_checks(machines: Machines) -> Iterator[Check]:
    """Yield DeepEP's published times beside the model's, calibrated on half of them."""
    h800 = deepep_machine(machines["hgx-h100"])
    for ranks, published in DEEPEP_US.items():
        for kind, row_bytes, said in zip(("dispatch", "combine"), _row_bytes(), published, strict=True):
            model = all_to_all(h800, ranks, _bytes_by_tier(h800, ranks, row_bytes))
            fitted = ranks in CALIBRATED_ON
            yield Check(
                group="DeepEP, low latency",
                what=f"{kind}, EP {ranks}",
                said=said,
                model=model.total_s * 1e6,
                unit="us",
                tolerance=0.3,
                source=DEEPEP,
                note="fitted to" if fitted else "predicted",
            )


def deepep_machine(machine: Hardware) -> Hardware:
    """Return the H800 as fitted to half of DeepEP's times: latency of an all-to-all, rates of NVLink and InfiniBand."""
    h800 = calibrate(machine, _H800)
    fit = deepep_fit(h800)
    rates = {
        f"tiers.{tier}.efficiency": rate / h800.tiers[tier].bytes_per_s
        for tier, rate in enumerate(fit.bytes_per_s)
        if rate is not None
    }
    return calibrate(h800, Calibration(source=DEEPEP, constants={"all_to_all_s": fit.latency_s, **rates}))


def deepep_fit(h800: Hardware) -> Fit:
    """Fit to DeepEP's times at CALIBRATED_ON ranks."""
    samples = [
        Sample(
            seconds=published * 1e-6,
            bytes_by_tier=tuple(_bytes_by_tier(h800, ranks, row_bytes)),
            messages_s=extra_peers_s(h800, ranks),
        )
        for ranks in CALIBRATED_ON
        for row_bytes, published in zip(_row_bytes(), DEEPEP_US[ranks], strict=True)
    ]
    return fit_links(samples, [tier.effective_bytes_per_s for tier in h800.tiers])


def _row_bytes() -> tuple[float, float]:
    form = find_format("fp8")
    return _HIDDEN * form.dispatch_bytes, _HIDDEN * form.combine_bytes


def _bytes_by_tier(hardware: Hardware, ranks: int, row_bytes: float) -> Sequence[float]:
    """Return a rank's bytes: these kernels send a token to each of its experts, not once to each rank."""
    rows = _TOKENS * _TOP_K / ranks
    return [rows * peers * row_bytes for peers in hardware.peers_by_tier(ranks)]


def all_reduce_checks() -> Iterator[Check]:
    """Yield small all-reduces between 8 GPUs on PCIe 5 with peer-to-peer."""
    tier = LinkTier(
        name="PCIe 5 x16", domain_size=8, bytes_per_s=63e9, efficiency=0.89, latency_s=1e-6, source=RTX6KPRO
    )
    gpus = Hardware(
        name="8 RTX PRO 6000",
        num_gpus=8,
        memory_bytes=96e9,
        memory_bytes_per_s=1.792e12,
        flop_per_s={"bf16": 5e14},
        tiers=(tier,),
    )
    # Without one-shot, as NCCL: peers that are not direct, but for the staging.
    rings = gpus.model_copy(update={"tiers": (tier.model_copy(update={"is_direct": False}),)})
    for what, machine, said in (("one shot, 1 KB", gpus, 7.5), ("NCCL's ring, 1 KB", rings, 24.1)):
        yield Check(
            group="all-reduce, 8 GPUs, PCIe 5",
            what=what,
            said=said,
            model=all_reduce(machine, 8, 1024).total_s * 1e6,
            unit="us",
            tolerance=0.3,
            source=RTX6KPRO,
        )
