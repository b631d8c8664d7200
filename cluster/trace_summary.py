"""What a trace holds, in a few numbers.

Shape suffixes: L MoE layers (by position in TraceHeader.layers), E experts of a layer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.traces import TraceHeader, TraceReader


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceSummary:
    """A whole trace. load_LE: tokens that chose each expert.

    imbalance is the busiest expert's load over the mean of its layer, layers averaged: of the whole trace, and of its
    intervals with tokens, averaged. The first is the smaller where other experts are hot at other times. None: no
    tokens.
    """

    header: TraceHeader
    num_steps: int
    duration_s: float
    prefill_tokens: int
    decode_tokens: int
    load_LE: npt.NDArray[np.int64]
    imbalance: float | None
    interval_imbalance: float | None

    def hottest(self, count: int) -> list[tuple[ExpertKey, float]]:
        """Return the most chosen experts and the part of all tokens that chose each, the most chosen first."""
        tokens = max(1, self.prefill_tokens + self.decode_tokens)
        order = np.argsort(-self.load_LE, axis=None, kind="stable")[:count]
        places = zip(*np.unravel_index(order, self.load_LE.shape), strict=True)
        return [
            (ExpertKey(self.header.layers[layer], int(expert)), float(self.load_LE[layer, expert]) / tokens)
            for layer, expert in places
        ]


def summarise(trace: TraceReader) -> TraceSummary:
    """Read a trace to its end.

    Raises:
        InputError: it is damaged; see TraceReader.
    """
    load_LE = np.zeros((len(trace.header.layers), trace.header.num_experts), dtype=np.int64)
    num_steps, duration_s, prefill_tokens, decode_tokens = 0, 0.0, 0, 0
    imbalances = []
    for step in trace.steps():
        num_steps, duration_s = num_steps + 1, step.time_s
        prefill_tokens, decode_tokens = prefill_tokens + step.prefill_tokens, decode_tokens + step.decode_tokens
        load_LE += step.load_LE
        if (imbalance := _imbalance(step.load_LE)) is not None:
            imbalances.append(imbalance)
    return TraceSummary(
        header=trace.header,
        num_steps=num_steps,
        duration_s=duration_s,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        load_LE=load_LE,
        imbalance=_imbalance(load_LE),
        interval_imbalance=float(np.mean(imbalances)) if imbalances else None,
    )


def _imbalance(load_LE: npt.NDArray[np.int64]) -> float | None:
    mean_L = load_LE.mean(axis=1)
    if not (mean_L > 0).any():
        return None
    return float((load_LE.max(axis=1)[mean_L > 0] / mean_L[mean_L > 0]).mean())
