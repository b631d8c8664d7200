"""Constants measured in place of those of datasheets, and how they are fitted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.planner.hardware import Hardware, complaint, read_hardware


class Calibration(BaseModel):
    """Constants of Hardware by their path: `compute_efficiency`, `tiers.0.latency_s`, `flop_per_s.bf16`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    source: str = Field(description="what was measured, where and when")
    constants: dict[str, float | bool] = Field(description="values by path")


def read_calibration(name: str, content: Mapping[str, Any]) -> Calibration:
    """Check what a calibration file holds.

    Raises:
        InputError: a field is missing, unknown or of another kind.
    """
    try:
        return Calibration(**content)
    except ValidationError as error:
        raise InputError(f"calibration {name}: {complaint(error)}") from error


def calibrate(hardware: Hardware, calibration: Calibration) -> Hardware:
    """Return the hardware with the calibration's constants in place of its own.

    Raises:
        InputError: there is no constant of a path, or its value is out of range.
    """
    content = hardware.model_dump()
    for path, value in calibration.constants.items():
        _replace(content, path, value)
    return read_hardware(f"{hardware.name} as calibrated", content)


def _replace(content: Any, path: str, value: float | bool) -> None:
    *way, last = path.split(".")
    try:
        for key in way:
            content = content[int(key)] if isinstance(content, list | tuple) else content[key]
        known = content[last]
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"calibration: no constant {path!r} in this hardware") from error
    if isinstance(known, str | dict | list | tuple):
        raise InputError(f"calibration: {path!r} is no number")
    content[last] = int(value) if isinstance(known, int) and not isinstance(known, bool) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measured all-to-all: seconds, what its messages take of them, and the busiest rank's bytes over each tier."""

    seconds: float
    bytes_by_tier: tuple[float, ...]
    messages_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Seconds that every sample takes, and bytes a second of each tier that ever bound one (None: it never did)."""

    latency_s: float
    bytes_per_s: tuple[float | None, ...]


def fit_links(samples: Sequence[Sample], guess_bytes_per_s: Sequence[float]) -> Fit:
    """Fit seconds = latency + messages + the largest of bytes / bandwidth, by least squares of relative errors.

    Which tier binds a sample follows from the bandwidths; fitted ones are put in place of the guess until it stays.

    Args:
        samples: at least as many as tiers that bind any, plus one.
        guess_bytes_per_s: of each tier, to begin with.

    Raises:
        InputError: too few samples, a time that is not above 0, or samples that no positive constants explain.
    """
    if any(not sample.seconds > sample.messages_s for sample in samples):
        raise InputError("calibration: seconds of a sample must be above those of its messages")
    bandwidths = list(guess_bytes_per_s)
    latency_s, binding = 0.0, [-1] * len(samples)
    for _ in range(16):
        times = [[size / rate for size, rate in zip(s.bytes_by_tier, bandwidths, strict=True)] for s in samples]
        found = [int(np.argmax(row)) for row in times]
        if found == binding:
            break
        binding = found
        latency_s, fitted = _solve(samples, binding)
        for tier, rate in fitted.items():
            bandwidths[tier] = rate
    rates = tuple(rate if tier in binding else None for tier, rate in enumerate(bandwidths))
    return Fit(latency_s=latency_s, bytes_per_s=rates)


def _solve(samples: Sequence[Sample], binding: Sequence[int]) -> tuple[float, dict[int, float]]:
    tiers = sorted(set(binding))
    if len(samples) <= len(tiers):
        raise InputError(f"calibration: {len(samples)} samples are too few for {len(tiers)} tiers and a latency")
    rows = [
        [1.0, *(sample.bytes_by_tier[tier] if tier == bound else 0.0 for tier in tiers)]
        for sample, bound in zip(samples, binding, strict=True)
    ]
    seconds = np.array([sample.seconds for sample in samples])
    rest = seconds - np.array([sample.messages_s for sample in samples])
    solution = np.linalg.lstsq(np.array(rows) / seconds[:, None], rest / seconds, rcond=None)[0]
    if not (solution[1:] > 0).all() or solution[0] < 0:
        raise InputError(f"calibration: no positive latency and bandwidths explain the samples: {solution.tolist()}")
    return float(solution[0]), {tier: float(1 / cost) for tier, cost in zip(tiers, solution[1:], strict=True)}
