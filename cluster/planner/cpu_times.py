"""What `expertmesh doctor --measure` timed on a machine without a GPU, and the hardware and constants that follow.

A core is what the planner calls a GPU.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import least_squares

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.calibration import Calibration
from expertmesh.cluster.planner.hardware import Hardware, read_hardware

_BF16_BYTES = 2


class CpuTimes(BaseModel):
    """Seconds, of all cores together unless it says otherwise, weights in no cache.

    experts_s: of num_experts packed experts of expert_params parameters, by rows that each computes. lone_s: of the
    same with one row, on one core while the others idle. dense_s: of one layer's dense half of dense_params parameters,
    by (rows, tokens that each attends to), kv_bytes of keys and values each. scores_s: of drawing tokens, by
    (sequences, vocabulary). steps_s: of an engine's step beside its layers, by sequences. exchange_s: from a worker's
    request to shards to its sum of their answers, beside what the slower shard computes, by (shards, rows to each);
    row_bytes of a row there and back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_cores: int = Field(ge=1)
    memory_bytes: float = Field(gt=0)
    hidden_size: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    expert_params: int = Field(ge=1)
    experts_s: dict[int, float]
    lone_s: float = Field(gt=0)
    dense_params: int = Field(ge=1)
    kv_bytes: float = Field(gt=0)
    dense_s: tuple[tuple[int, int, float], ...]
    scores_s: tuple[tuple[int, int, float], ...]
    steps_s: dict[int, float]
    exchange_s: tuple[tuple[int, int, float], ...]
    row_bytes: float = Field(gt=0)


class Products(NamedTuple):
    """How all cores multiply: bytes of weights and operations a second, and the part of the shorter that is hidden."""

    bytes_per_s: float
    flop_per_s: float
    overlap: float

    def seconds(self, params: float, rows: float) -> float:
        """Return the time of so many bf16 parameters, each met by so many rows."""
        sides = params * _BF16_BYTES / self.bytes_per_s, 2 * params * rows / self.flop_per_s
        return max(sides) + (1 - self.overlap) * min(sides)


def fit_products(params: float, seconds_by_rows: Mapping[int, float]) -> Products:
    """Fit seconds = longer side + (1 - overlap) * shorter side by least squares of relative errors.

    Raises:
        InputError: fewer than three numbers of rows, or a time that is not above 0.
    """
    if len(seconds_by_rows) < 3 or min(seconds_by_rows.values()) <= 0:
        raise InputError(f"products: three or more numbers of rows are needed, with times above 0: {seconds_by_rows}")
    fewest, most = min(seconds_by_rows), max(seconds_by_rows)
    bytes_guess = params * _BF16_BYTES / seconds_by_rows[fewest]
    flop_guess = 2 * params * most / seconds_by_rows[most]

    def products(x: Any) -> Products:
        return Products(bytes_guess * float(np.exp(x[0])), flop_guess * float(np.exp(x[1])), float(x[2]))

    def errors(x: Any) -> list[float]:
        model = products(x)
        return [model.seconds(params, rows) / measured - 1 for rows, measured in seconds_by_rows.items()]

    found = least_squares(errors, x0=(0.0, 0.0, 0.5), bounds=([-2, -2, 0], [2, 2, 1]))
    return products(found.x)


def hardware_of(times: CpuTimes, source: str) -> tuple[Hardware, Calibration]:
    """Return the machine as `plan` reads it, efficiencies 1, and the constants of its fleets.

    Args:
        times: what was measured.
        source: what, where and when, for the files.

    Raises:
        InputError: times from which no rate follows.
    """
    products = fit_products(times.num_experts * times.expert_params, times.experts_s)
    lone_bytes_per_s = times.num_experts * times.expert_params * _BF16_BYTES / times.lone_s
    layer_s, row_s, kv_bytes_per_s = _dense(times, products)
    latency_s, per_peer_s, link_bytes_per_s = _links(times)
    step_s, sequence_s = _line(times.steps_s)
    by_scores = {sequences * vocabulary: seconds for sequences, vocabulary, seconds in times.scores_s}
    cores = times.num_cores
    tier = {
        "name": "memory between processes",
        "domain_size": max(2, cores),
        "bytes_per_s": link_bytes_per_s,
        "latency_s": latency_s,
        "source": source,
    }
    hardware = read_hardware(
        "this-machine",
        {
            "name": "this-machine",
            "num_gpus": cores,
            "memory_bytes": times.memory_bytes / cores,
            "memory_bytes_per_s": products.bytes_per_s / cores,
            "memory_efficiency": 1.0,
            "flop_per_s": {"bf16": products.flop_per_s / cores},
            "compute_efficiency": 1.0,
            "row_tile": 1,
            "column_tile": 32,
            "kernels_per_layer": 1,
            "collective_s": 0.0,
            "all_to_all_s": 0.0,
            "tiers": [tier],
            "fleet": {"shares_cores": True},
            "sources": {"all": source},
        },
    )
    constants = {
        "kernel_gap_s": layer_s,
        "tiers.0.per_peer_s": per_peer_s,
        "fleet.lone_bytes_per_s": max(lone_bytes_per_s, products.bytes_per_s / cores),
        "fleet.product_overlap": products.overlap,
        "fleet.kv_efficiency": min(1.0, kv_bytes_per_s / products.bytes_per_s),
        "fleet.value_s": row_s * cores / times.hidden_size,
        "fleet.step_s": step_s,
        "fleet.sequence_s": sequence_s,
        "fleet.score_s": _line(by_scores)[1],
    }
    return hardware, Calibration(source=source, constants=constants)


def _line(seconds_by_count: Mapping[int, float]) -> tuple[float, float]:
    """Return what no count takes, and what each one adds, between the fewest and the most; neither below 0."""
    fewest, most = min(seconds_by_count), max(seconds_by_count)
    slope = max(0.0, (seconds_by_count[most] - seconds_by_count[fewest]) / (most - fewest))
    return max(0.0, seconds_by_count[fewest] - slope * fewest), slope


def _dense(times: CpuTimes, products: Products) -> tuple[float, float, float]:
    """Return what a layer takes beside its products, what each row adds, and the bytes/s of keys and values."""
    seconds = {(rows, attended): measured for rows, attended, measured in times.dense_s}
    few, many = min(rows for rows, _ in seconds), max(rows for rows, _ in seconds)
    short, long = min(attended for _, attended in seconds), max(attended for _, attended in seconds)
    gained_s = seconds[many, long] - seconds[many, short]
    if gained_s <= 0:
        raise InputError(f"attention to {long} tokens took no longer than to {short}: the machine is not quiet")
    kv_bytes_per_s = many * (long - short) * times.kv_bytes / gained_s
    beside = {
        rows: seconds[rows, short]
        - products.seconds(times.dense_params, rows)
        - rows * short * times.kv_bytes / kv_bytes_per_s
        for rows in (few, many)
    }
    return *_line(beside), kv_bytes_per_s


def _links(times: CpuTimes) -> tuple[float, float, float]:
    """Return a message's latency, what each further shard adds, and bytes/s."""
    seconds = {(shards, rows): measured for shards, rows, measured in times.exchange_s}
    few = min(rows for _, rows in seconds)
    many = max(rows for _, rows in seconds)
    moved_s = seconds[1, many] - seconds[1, few]
    if moved_s <= 0:
        raise InputError(f"{many} rows took no longer over a link than {few}: the machine is not quiet")
    bytes_per_s = (many - few) * times.row_bytes / moved_s
    round_trip_s = max(0.0, seconds[1, few] - few * times.row_bytes / bytes_per_s)
    further = [measured - seconds[1, few] for (shards, rows), measured in seconds.items() if shards > 1 and rows == few]
    return round_trip_s / 2, max(0.0, *further, 0.0) if further else 0.0, bytes_per_s
