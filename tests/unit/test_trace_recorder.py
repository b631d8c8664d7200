"""Intervals from counts that only grow, and what a whole trace comes to.

Shape suffixes: L MoE layers, E experts of a layer.
"""

import numpy as np
import pytest

from expertmesh.cluster.ids import ExpertKey
from expertmesh.cluster.trace_recorder import TraceRecorder
from expertmesh.cluster.trace_summary import TraceSummary, summarise
from expertmesh.cluster.traces import TraceHeader, TraceReader, TraceStep, TraceWriter

HEADER = TraceHeader(model="qwen", layers=(1, 3), num_experts=4, top_k=2, hidden_size=64)


def test_an_interval_is_what_was_counted_since_the_last_look() -> None:
    recorder = TraceRecorder(HEADER)
    before_LE = np.array([[100, 0, 0, 0], [0, 100, 0, 0]])
    grown_LE = np.array([[3, 2, 1, 0], [0, 0, 0, 6]])
    assert recorder.look(50.0, before_LE, 40) is None
    step = recorder.look(51.5, before_LE + grown_LE, 44)
    assert step is not None
    assert (step.time_s, step.prefill_tokens, step.decode_tokens) == (1.5, 1, 2)
    assert step.load_LE.tolist() == grown_LE.tolist()
    idle = recorder.look(53.0, before_LE + grown_LE, 44)
    assert idle is not None
    assert (idle.time_s, idle.prefill_tokens, idle.decode_tokens) == (3.0, 0, 0)
    assert not idle.load_LE.any()


def test_a_worker_that_left_makes_a_gap_and_no_negative_load() -> None:
    recorder = TraceRecorder(HEADER)
    load_LE = np.full((2, 4), 10)
    recorder.look(0.0, load_LE, 5)
    assert recorder.look(1.0, load_LE - 4, 5) is None
    assert recorder.look(2.0, load_LE, 2) is None
    step = recorder.look(3.0, load_LE + 2, 4)
    assert step is not None
    assert (step.time_s, step.prefill_tokens, step.decode_tokens) == (3.0, 3, 1)


def test_counts_of_parts_of_tokens_make_no_negative_tokens() -> None:
    """A worker counts on while its counts are copied: generated ones may be ahead of all."""
    recorder = TraceRecorder(HEADER)
    recorder.look(0.0, np.zeros((2, 4), dtype=np.int64), 0)
    step = recorder.look(1.0, np.array([[4, 0, 0, 0], [0, 0, 0, 0]]), 6)
    assert step is not None
    assert (step.prefill_tokens, step.decode_tokens) == (0, 3)


def summary_of(*loads: list[list[int]]) -> TraceSummary:
    writer = TraceWriter(HEADER)
    steps = [
        TraceStep(time_s=float(n + 1), prefill_tokens=1, decode_tokens=n, load_LE=np.array(load_LE, dtype=np.int64))
        for n, load_LE in enumerate(loads)
    ]
    return summarise(TraceReader(writer.begin() + b"".join(map(writer.step, steps)) + writer.end()))


def test_a_summary_adds_up() -> None:
    """Two intervals, each with one busy expert a layer, and one without tokens: 4 times the mean in each, 2 in all."""
    found = summary_of([[4, 0, 0, 0], [4, 0, 0, 0]], [[0] * 4, [0] * 4], [[0, 4, 0, 0], [0, 0, 4, 0]])
    assert found.num_steps == 3
    assert (found.duration_s, found.prefill_tokens, found.decode_tokens) == (3.0, 3, 3)
    assert (found.imbalance, found.interval_imbalance) == (2.0, 4.0)
    assert [key for key, _ in found.hottest(2)] == [ExpertKey(1, 0), ExpertKey(1, 1)]
    assert [part for _, part in found.hottest(2)] == pytest.approx([4 / 6] * 2)


def test_a_summary_of_no_tokens_has_no_imbalance() -> None:
    for found in (summary_of(), summary_of([[0] * 4, [0] * 4])):
        assert (found.imbalance, found.interval_imbalance) == (None, None)
