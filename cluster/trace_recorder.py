"""Intervals of a trace from looks at counts that only grow.

Shape suffixes: L MoE layers, E experts of a layer.
"""

import numpy as np
import numpy.typing as npt

from expertmesh.cluster.traces import TraceHeader, TraceStep


class TraceRecorder:
    """Says what was computed between two looks at what the workers counted since they began.

    Workers that leave or begin anew take their counts with them: where a count fell since the last look, what was
    computed meanwhile is not known, and there is no interval.
    """

    def __init__(self, header: TraceHeader) -> None:
        self._top_k = header.top_k
        self._start_s: float | None = None
        self._last: tuple[npt.NDArray[np.int64], int] | None = None

    def look(self, now_s: float, load_LE: npt.NDArray[np.int64], decode_load: int) -> TraceStep | None:
        """Return what is new since the last look; None: it is the first, or a count fell.

        Args:
            now_s: of any clock that does not step back.
            load_LE: tokens that chose each expert.
            decode_load: those of the first layer that were generated, not of prompts.
        """
        if self._start_s is None:
            self._start_s = now_s
        last, self._last = self._last, (load_LE, decode_load)
        if last is None:
            return None
        grown_LE, grown_decode = load_LE - last[0], decode_load - last[1]
        if grown_LE.min() < 0 or grown_decode < 0:
            return None
        # A worker counts on while its counts are copied, so that they need not be of whole tokens.
        decode_tokens = round(grown_decode / self._top_k)
        tokens = round(int(grown_LE[0].sum()) / self._top_k)
        return TraceStep(
            time_s=now_s - self._start_s,
            prefill_tokens=max(0, tokens - decode_tokens),
            decode_tokens=decode_tokens,
            load_LE=grown_LE,
        )
