"""The picture of a scenario: tokens a second and the longest gap over time, with what was done marked."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

from expertmesh.actors.cli.chaos_streams import Record

mpl.use("Agg")
from matplotlib import pyplot as plt

_BIN_S = 0.5


def draw(file: Path, title: str, record: Record, marks: Sequence[tuple[float, str]]) -> None:
    """Write a PNG."""
    times = [t for stream in record.token_times_s for t in stream]
    start_s = min(times)
    tokens = Counter(int((t - start_s) / _BIN_S) for t in times)
    longest: dict[int, float] = {}
    for end_s, gap in record.gaps:
        at = int((end_s - start_s) / _BIN_S)
        longest[at] = max(longest.get(at, 0.0), gap)
    bins = range(max(tokens) + 1)
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(10, 5), layout="constrained")
    above.step([b * _BIN_S for b in bins], [tokens[b] / _BIN_S for b in bins], where="post")
    above.set_ylabel("tokens/s, all streams")
    above.set_title(title)
    below.step([b * _BIN_S for b in bins], [longest.get(b, 0.0) for b in bins], where="post", color="tab:red")
    below.set_ylabel("longest gap, s")
    below.set_xlabel("seconds")
    for at_s, what in marks:
        for axes in (above, below):
            axes.axvline(at_s - start_s, color="0.6", linestyle=":", linewidth=1)
        above.annotate(what, (at_s - start_s, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=6)
    figure.savefig(file, dpi=110)
    plt.close(figure)
