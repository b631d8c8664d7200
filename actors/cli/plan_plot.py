"""The picture of a report: the steps of the best plans, by part."""

from pathlib import Path

from expertmesh.cluster.errors import ExpertMeshError, InputError
from expertmesh.cluster.planner.planner import Report

try:
    import matplotlib as mpl
except ImportError as error:
    raise ExpertMeshError("--plot needs matplotlib: pip install 'expertmesh[plot]'") from error

mpl.use("Agg")
from matplotlib import pyplot as plt

_SHOWN = 12


def draw(file: Path, report: Report) -> None:
    """Write an SVG.

    Raises:
        InputError: the file is not named .svg, or cannot be written.
    """
    if file.suffix != ".svg":
        raise InputError(f"--plot {file}: an SVG is drawn; name it .svg")
    best = [one for one in report.candidates if one.is_feasible][:_SHOWN]
    mpl.rcParams["svg.hashsalt"] = "expertmesh"  # the same report makes the same file
    figure, axes = plt.subplots(figsize=(11, 1.2 + 0.4 * max(len(best), 1)), layout="constrained")
    names = [str(one.plan) for one in best]
    starts = [0.0] * len(best)
    costs = [one.cost for one in best if one.cost is not None]
    for part in dict.fromkeys(part for cost in costs for part in cost.parts_s):
        widths = [cost.parts_s.get(part, 0.0) * 1e3 for cost in costs]
        if any(widths):
            axes.barh(names, widths, left=starts, label=part)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of a step")
    axes.set_title(f"{report.shape.name} on {report.hardware.num_gpus} GPUs of {report.hardware.name}, {report.dtype}")
    if costs:
        axes.legend(fontsize="small")
    try:
        figure.savefig(file, metadata={"Date": None})
    except OSError as error:
        raise InputError(f"--plot {file}: {error.strerror}") from error
    finally:
        plt.close(figure)
