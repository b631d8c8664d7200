"""Hardware, calibrations and formats: what is refused, and with which words."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.actors.cli import plan_files
from expertmesh.cluster.errors import InputError, UnknownNameError
from expertmesh.cluster.planner.calibration import Calibration, Sample, calibrate, fit_links, read_calibration
from expertmesh.cluster.planner.dtypes import find_format
from expertmesh.cluster.planner.hardware import read_hardware
from tests.planner import machine, shipped_machine, tier


@pytest.mark.parametrize("name", plan_files.machine_names())
def test_shipped_machines_are_sound(name: str) -> None:
    found = shipped_machine(name)
    assert found.name == name
    assert found.flops("bf16") > 0
    assert all(one.source for one in found.tiers)


@pytest.mark.parametrize(
    ("name", "num_gpus", "domain", "both_ways"),
    [
        ("hgx-h100", 8, 8, 900e9),
        ("hgx-h200", 8, 8, 900e9),
        ("gb200-nvl72", 72, 72, 1800e9),
        ("workstation-blackwell-x4", 4, 4, 64e9),
    ],
)
def test_shipped_machines_are_what_they_are_called(name: str, num_gpus: int, domain: int, both_ways: float) -> None:
    found = shipped_machine(name)
    assert (found.num_gpus, found.tiers[0].domain_size, 2 * found.tiers[0].bytes_per_s) == (num_gpus, domain, both_ways)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory_bytes_per_s": 0}, "memory_bytes_per_s: Input should be greater than 0, got 0"),
        ({"memory_bytes": -1}, "memory_bytes: Input should be greater than 0"),
        ({"flop_per_s": {}}, "flop_per_s must hold positive numbers"),
        ({"flop_per_s": {"bf16": 0}}, "flop_per_s must hold positive numbers"),
        ({"num_gpus": 5}, "num_gpus=5, but the outermost of tiers joins 4"),
        ({"num_gpus": 2, "tiers": []}, "num_gpus=2, but tiers is empty"),
        ({"colour": "green"}, "colour: Extra inputs are not permitted"),
        ({"memory_efficiency": 1.5}, "memory_efficiency: Input should be less than or equal to 1"),
        ({"memory_bytes": float("nan")}, "memory_bytes: Input should be"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="hardware made up: ") as caught:
        machine(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_without_bandwidth_is_named() -> None:
    content = machine().model_dump()
    content["tiers"] = [{**content["tiers"][0], "bytes_per_s": 0.0}]
    with pytest.raises(InputError, match=r"tiers\.0\.bytes_per_s: Input should be greater than 0, got 0\.0"):
        read_hardware("mine.yaml", content)


def test_tiers_grow_outwards() -> None:
    with pytest.raises(InputError, match=r"tiers must grow outwards, got domain_size \[4, 4\]"):
        machine(tier(), tier())


def test_an_unknown_format_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match="dtype 'int3' is unknown; known are bf16, fp8, nvfp4"):
        find_format("int3")


def test_arithmetic_that_a_gpu_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="dtype nvfp4: flop_per_s of hardware hgx-h100 has bf16, fp8 only"):
        shipped_machine("hgx-h100").flops("nvfp4")


@given(st.integers(1, 256), st.integers(2, 16))
def test_every_peer_is_reached_over_one_tier(num_ranks: int, domain: int) -> None:
    found = machine(tier(domain_size=domain), tier(domain_size=1024)).peers_by_tier(num_ranks)
    assert found == (min(domain, num_ranks) - 1, max(0, num_ranks - domain))


def test_a_calibration_replaces_constants() -> None:
    constants = {"compute_efficiency": 0.5, "tiers.0.latency_s": 3e-6, "flop_per_s.bf16": 7e12, "num_gpus": 3.0}
    found = calibrate(machine(), Calibration(source="measured", constants=constants))
    assert (found.compute_efficiency, found.tiers[0].latency_s, found.flops("bf16")) == (0.5, 3e-6, 7e12)
    assert found.num_gpus == 3
    assert found.memory_bytes_per_s == machine().memory_bytes_per_s


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tiers.7.latency_s", 1.0, "no constant 'tiers.7.latency_s'"),
        ("tiers.x.latency_s", 1.0, "no constant 'tiers.x.latency_s'"),
        ("memory_speed", 1.0, "no constant 'memory_speed'"),
        ("tiers", 1.0, "'tiers' is no number"),
        ("tiers.0.name", 1.0, "'tiers.0.name' is no number"),
        ("memory_bytes_per_s", 0.0, "memory_bytes_per_s: Input should be greater than 0, got 0.0"),
    ],
)
def test_a_wrong_constant_is_named(path: str, value: float, message: str) -> None:
    with pytest.raises(InputError) as caught:
        calibrate(machine(), Calibration(source="measured", constants={path: value}))
    assert message in str(caught.value)


def test_a_calibration_file_is_checked() -> None:
    with pytest.raises(InputError, match=r"calibration c\.json: source: Field required"):
        read_calibration("c.json", {"constants": {}})


@given(st.floats(1e-6, 1e-3), st.floats(1e8, 1e12), st.floats(1e8, 1e12))
def test_a_fit_finds_the_constants_that_made_the_samples(latency_s: float, inner: float, outer: float) -> None:
    sizes = [(latency_s * inner * part, latency_s * outer * (4 - part)) for part in (0.5, 1, 1.5, 2.5, 3, 3.5)]
    samples = [
        Sample(seconds=latency_s + max(near / inner, far / outer) + 2e-6, bytes_by_tier=(near, far), messages_s=2e-6)
        for near, far in sizes
    ]
    fit = fit_links(samples, [inner * 1.2, outer * 1.2])
    assert fit.latency_s == pytest.approx(latency_s, rel=1e-3)
    assert list(fit.bytes_per_s) == pytest.approx([inner, outer], rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([Sample(seconds=0.0, bytes_by_tier=(1.0,))], "must be above"),
        ([Sample(seconds=1.0, bytes_by_tier=(1.0,))], "1 samples are too few"),
        ([Sample(seconds=3.0, bytes_by_tier=(1.0,)), Sample(seconds=1.0, bytes_by_tier=(9.0,))], "no positive"),
    ],
)
def test_samples_that_tell_nothing_are_refused(samples: list[Sample], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_links(samples, [1.0])
