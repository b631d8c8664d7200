"""The picture of a simulation: step time, balancedness, moves and failures, shards and load over time; of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expertmesh.cluster.errors import ExpertMeshError, InputError
from expertmesh.cluster.simulation.results import Result
from expertmesh.cluster.simulation.sweep import Point, knee

try:
    import matplotlib as mpl
except ImportError as error:
    raise ExpertMeshError("--plot needs matplotlib: pip install 'expertmesh[plot]'") from error

mpl.use("Agg")
from matplotlib import pyplot as plt

_MARKS = {"failure": "tab:red", "spread": "tab:orange", "moves": "0.7", "scale": "tab:green"}


def draw(file: Path, result: Result) -> None:
    """Write a PNG or an SVG, by the file's name.

    Raises:
        InputError: it cannot be written.
    """
    figure, (steps, balance, moves, load) = plt.subplots(4, 1, sharex=True, figsize=(10, 9), layout="constrained")
    at_s = [sample.time_s for sample in result.samples]
    steps.plot(at_s, [sample.step_s * 1e3 for sample in result.samples], linewidth=0.8)
    steps.set_ylabel("longest step, ms")
    steps.set_yscale("log")
    balance.plot(at_s, [sample.balancedness for sample in result.samples], linewidth=0.8)
    balance.set_ylabel("balancedness")
    balance.set_ylim(0, 1.02)
    copied = result.copied
    moves.stem([event.time_s for event in copied] or [0.0], [event.num_bytes / 1e9 for event in copied] or [0.0])
    moves.set_ylabel("GB copied")
    load.plot(at_s, [sample.offered_per_s for sample in result.samples], linewidth=0.8, label="offered tokens/s")
    load.plot(at_s, [sample.served_per_s for sample in result.samples], linewidth=0.8, label="served")
    load.set_ylabel("tokens/s")
    load.set_xlabel("seconds")
    load.legend(loc="upper left", fontsize="small")
    shards = load.twinx()
    shards.step(at_s, [sample.shards for sample in result.samples], where="post", color="tab:green")
    shards.set_ylabel("shards", color="tab:green")
    shards.set_ylim(bottom=0)
    for event in result.events:
        if event.kind in _MARKS and (event.kind != "moves" or len(copied) < 100):
            for axes in (steps, balance, moves, load):
                axes.axvline(event.time_s, color=_MARKS[event.kind], linestyle=":", linewidth=0.8)
    _write(file, figure)


def draw_sweep(file: Path, points: Sequence[Point]) -> None:
    """Write the steps and the tokens a GPU by the number of shards, the knee marked.

    Raises:
        InputError: as of `draw`.
    """
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    shards = [one.shards for one in points]
    axes.plot(shards, [one.step_p50_s * 1e3 for one in points], marker="o", label="step p50")
    axes.plot(shards, [one.step_p99_s * 1e3 for one in points], marker="o", label="step p99")
    axes.axvline(knee(points).shards, color="0.6", linestyle=":", label="knee")
    axes.set_xscale("log", base=2)
    axes.set_xticks(shards, [str(count) for count in shards])
    axes.set_xlabel("shards")
    axes.set_ylabel("milliseconds of a step")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")
    efficiency = axes.twinx()
    efficiency.plot(shards, np.array([one.tokens_per_s_per_gpu for one in points]), color="tab:green", marker=".")
    efficiency.set_ylabel("tokens/s a GPU", color="tab:green")
    efficiency.set_ylim(bottom=0)
    _write(file, figure)


def _write(file: Path, figure: Any) -> None:
    mpl.rcParams["svg.hashsalt"] = "expertmesh"  # the same result makes the same file
    try:
        figure.savefig(file, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    except OSError as error:
        raise InputError(f"--plot {file}: {error.strerror}") from error
    finally:
        plt.close(figure)
