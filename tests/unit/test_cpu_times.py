"""Hardware and constants from times: made-up times of known constants give these back."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.calibration import calibrate
from expertmesh.cluster.planner.cpu_times import CpuTimes, Products, fit_products, hardware_of

ROWS = (1, 2, 4, 8, 16, 32, 256)
PRODUCTS = Products(bytes_per_s=60e9, flop_per_s=800e9, overlap=0.4)
LAYER_S, ROW_S, KV_BYTES_PER_S, DENSE_PARAMS = 2e-5, 3e-6, 30e9, 3_000_000


def times_of(**changes: Any) -> CpuTimes:
    """Return the times of a machine of two cores with these constants."""

    def dense_s(rows: int, attended: int) -> float:
        keys_s = rows * attended * 2048 / KV_BYTES_PER_S
        return PRODUCTS.seconds(DENSE_PARAMS, rows) + LAYER_S + rows * ROW_S + keys_s

    values: dict[str, Any] = {
        "num_cores": 2,
        "memory_bytes": 16e9,
        "hidden_size": 1024,
        "num_experts": 16,
        "expert_params": 1_500_000,
        "experts_s": {rows: PRODUCTS.seconds(24e6, rows) for rows in ROWS},
        "lone_s": 48e6 / 40e9,
        "dense_params": DENSE_PARAMS,
        "kv_bytes": 2048,
        "dense_s": [(rows, attended, dense_s(rows, attended)) for rows, attended in ((1, 16), (32, 16), (32, 256))],
        "scores_s": [(32, 1000, 1e-4 + 32_000 * 2e-10), (32, 30_000, 1e-4 + 960_000 * 2e-10)],
        "steps_s": {1: 1e-3 + 1e-5, 32: 1e-3 + 32e-5},
        "exchange_s": [(1, 1, 2e-5 + 4096 / 5e9), (1, 64, 2e-5 + 64 * 4096 / 5e9), (2, 1, 5e-5 + 4096 / 5e9)],
        "row_bytes": 4096,
    }
    return CpuTimes(**{**values, **changes})


def test_the_constants_come_back() -> None:
    hardware, calibration = hardware_of(times_of(), "made up")
    found = calibrate(hardware, calibration)
    assert (found.num_gpus, found.memory_bytes, found.fleet.shares_cores) == (2, 8e9, True)
    assert found.memory_bytes_per_s * found.memory_efficiency == pytest.approx(30e9, rel=1e-3)
    assert found.flops("bf16") * found.compute_efficiency == pytest.approx(400e9, rel=1e-3)
    assert found.fleet.product_overlap == pytest.approx(0.4, abs=1e-2)
    assert found.fleet.lone_bytes_per_s == pytest.approx(40e9)
    assert found.fleet.kv_efficiency == pytest.approx(0.5, rel=1e-3)
    assert found.kernel_gap_s * found.kernels_per_layer == pytest.approx(LAYER_S, rel=0.02)
    assert found.fleet.value_s * 1024 / 2 == pytest.approx(ROW_S, rel=0.02)
    assert found.fleet.step_s == pytest.approx(1e-3)
    assert found.fleet.sequence_s == pytest.approx(1e-5)
    assert found.fleet.score_s == pytest.approx(2e-10)
    tier = found.tiers[0]
    assert tier.latency_s == pytest.approx(1e-5)
    assert tier.per_peer_s == pytest.approx(3e-5)
    assert tier.bytes_per_s == pytest.approx(5e9)


@settings(deadline=None, max_examples=40)
@given(st.floats(1e10, 3e11), st.floats(1e11, 5e12), st.floats(0, 1))
def test_products_of_any_machine_are_found(bytes_per_s: float, flop_per_s: float, overlap: float) -> None:
    """Whatever the constants, the fitted ones give the times between those that were measured."""
    true = Products(bytes_per_s, flop_per_s, overlap)
    found = fit_products(24e6, {rows: true.seconds(24e6, rows) for rows in ROWS})
    for rows in (1, 3, 12, 24, 128):
        assert found.seconds(24e6, rows) == pytest.approx(true.seconds(24e6, rows), rel=0.1)


def test_one_core_has_no_further_shard() -> None:
    hardware, calibration = hardware_of(times_of(num_cores=1, exchange_s=[(1, 1, 2e-5), (1, 64, 9e-5)]), "made up")
    assert calibrate(hardware, calibration).tiers[0].per_peer_s == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_s": {1: 1e-3, 8: 2e-3}}, "three or more numbers of rows"),
        ({"experts_s": {1: 1e-3, 8: 2e-3, 16: 0.0}}, "times above 0"),
        ({"dense_s": [(1, 16, 1e-4), (32, 16, 2e-4), (32, 256, 2e-4)]}, "attention to 256 tokens took no longer"),
        ({"exchange_s": [(1, 1, 2e-5), (1, 64, 1e-5)]}, "64 rows took no longer over a link than 1"),
    ],
)
def test_times_that_say_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        hardware_of(times_of(**changes), "made up")
