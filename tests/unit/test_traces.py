"""Traces: what is written is read, and what is damaged, of another version or of another model is refused by name."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError
from expertmesh.cluster.traces import TraceHeader, TraceReader, TraceStep, TraceWriter

HEADER = TraceHeader(model="qwen", layers=(1, 3), num_experts=4, top_k=2, hidden_size=64)
LOAD_LE = np.array([[5, 0, 1, 0], [0, 0, 0, 2**31]])
STEPS = (
    TraceStep(time_s=1.0, prefill_tokens=2, decode_tokens=1, load_LE=LOAD_LE),
    TraceStep(time_s=2.5, prefill_tokens=0, decode_tokens=0, load_LE=LOAD_LE * 0),
)


def written(header: TraceHeader, steps: Sequence[TraceStep]) -> bytes:
    writer = TraceWriter(header)
    return writer.begin() + b"".join(map(writer.step, steps)) + writer.end()


def facts(steps: Sequence[TraceStep]) -> list[tuple[float, int, int, list[list[int]]]]:
    return [(s.time_s, s.prefill_tokens, s.decode_tokens, s.load_LE.tolist()) for s in steps]


def frame(content: Any) -> bytes:
    body: bytes = msgpack.packb(content)
    return struct.pack(">II", len(body), zlib.crc32(body)) + body


def interval(sparse: Sequence[int], *, time_s: Any = 1.0, prefill_tokens: Any = 1) -> bytes:
    """Return an interval as a file has it: numbers of experts by layer, experts, loads."""
    return frame([time_s, prefill_tokens, 0, zlib.compress(np.array(sparse, dtype="<u4").tobytes())])


@st.composite
def traces(draw: st.DrawFn) -> tuple[TraceHeader, list[TraceStep]]:
    num_experts = draw(st.integers(1, 300))
    header = TraceHeader(
        model=draw(st.text()),
        layers=tuple(draw(st.lists(st.integers(0, 2000), min_size=1, max_size=5, unique=True))),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        hidden_size=draw(st.integers(1, 2**20)),
    )
    rng, time_s, steps = np.random.default_rng(draw(st.integers(0, 2**32))), 0.0, []
    for _ in range(draw(st.integers(0, 5))):
        time_s += draw(st.floats(0, 1e6))
        load_LE = rng.integers(0, draw(st.sampled_from([1, 9, 2**32])), (len(header.layers), num_experts))
        load_LE *= rng.random(load_LE.shape) < draw(st.sampled_from([0.0, 0.1, 1.0]))
        tokens = draw(st.tuples(st.integers(0, 2**40), st.integers(0, 2**40)))
        steps.append(TraceStep(time_s=time_s, prefill_tokens=tokens[0], decode_tokens=tokens[1], load_LE=load_LE))
    return header, steps


@given(traces())
def test_what_is_written_is_read(trace: tuple[TraceHeader, list[TraceStep]]) -> None:
    header, steps = trace
    reader = TraceReader(written(header, steps))
    assert reader.header == header
    assert facts(list(reader.steps())) == facts(steps)
    assert facts(list(reader.steps())) == facts(steps), "it can be read twice"


@given(st.data())
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    """Any byte changed, any end cut off, anything added."""
    whole = written(HEADER, STEPS)
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    for damaged in (flipped, whole[:at], whole + whole[at:]):
        with pytest.raises(InputError, match="trace"):
            list(TraceReader(damaged).steps())


def test_counts_are_sparse() -> None:
    """An hour of seconds in which 8 of 256 experts of 58 layers are chosen: 2 bytes or so for each that is."""
    load_LE = np.zeros((58, 256), dtype=np.int64)
    load_LE[:, ::32] = 60
    header = replace(HEADER, layers=tuple(range(58)), num_experts=256, top_k=8)
    step = TraceStep(time_s=1.0, prefill_tokens=0, decode_tokens=60, load_LE=load_LE)
    assert len(TraceWriter(header).step(step)) < 58 * 8 * 2


WHOLE = written(HEADER, STEPS)
BEGUN = TraceWriter(HEADER).begin()
FIELDS = {"model": "qwen", "layers": [1, 3], "num_experts": 4, "top_k": 2, "hidden_size": 64}
EVIL = {
    "nothing": (b"", "not a trace: 0 bytes"),
    "another file": (b"EMPL" + WHOLE[4:], "not a trace: .* begin with b'EMPL'"),
    "another version": (WHOLE[:4] + b"\x00\x02" + WHOLE[6:], "a trace of version 2; this release reads version 1"),
    "no header": (WHOLE[:6], "cut short: .* within its header"),
    "no end": (written(HEADER, STEPS)[: -len(frame(2))], "cut short: .* within its interval 2"),
    "a lost interval": (BEGUN + TraceWriter(HEADER).step(STEPS[0]) + frame(2), "ends after 1 intervals .* says 2"),
    "something behind": (WHOLE + b"x", "ends after 2 intervals with 1 bytes left"),
    "no msgpack": (WHOLE[:6] + struct.pack(">II", 1, zlib.crc32(b"\xc1")) + b"\xc1", "header has a sound checksum"),
    "no map": (WHOLE[:6] + frame([1]), r"header has other fields than \['hidden_size'"),
    "a field more": (WHOLE[:6] + frame({**FIELDS, "x": 1}), "other fields"),
    "a name of another type": (WHOLE[:6] + frame({**FIELDS, "model": 3}), "header has model=3"),
    "a layer of another type": (WHOLE[:6] + frame({**FIELDS, "layers": ["a"]}), r"header has layers=\['a'\]"),
    "a count of another type": (WHOLE[:6] + frame({**FIELDS, "top_k": "2"}), "header has top_k='2'"),
    "no experts": (WHOLE[:6] + frame({**FIELDS, "num_experts": 0}), "top_k=2: it must be 1 to num_experts=0"),
    "no layers": (WHOLE[:6] + frame({**FIELDS, "layers": []}), r"layers=\(\)"),
    "an interval of another kind": (BEGUN + frame("x"), "interval 0 has a sound checksum and unusable content"),
    "counts that are not packed": (BEGUN + frame([1.0, 1, 1, b"xyz"]), "interval 0 has a sound checksum"),
    "an expert out of range": (BEGUN + interval([1, 0, 4, 9]), "interval 0 has a sound checksum"),
    "fewer experts than are said": (BEGUN + interval([3, 0, 1, 2, 9, 9]), "interval 0 has a sound checksum"),
    "an odd number of counts": (BEGUN + interval([1, 0, 1]), "interval 0 has a sound checksum"),
    "a time that is none": (BEGUN + interval([0, 0], time_s="now"), "interval 0 .*'now'"),
    "tokens that are no number": (BEGUN + interval([0, 0], prefill_tokens=None), "prefill_tokens=None"),
}


@pytest.mark.parametrize("case", EVIL)
def test_what_cannot_be_used_is_refused_and_said_why(case: str) -> None:
    record, complaint = EVIL[case]
    with pytest.raises(InputError, match=complaint):
        list(TraceReader(record).steps())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": "olmoe"}, "its model is 'qwen', the model's 'olmoe'"),
        ({"layers": (1, 2)}, r"its layers is \(1, 3\), the model's \(1, 2\)"),
        ({"num_experts": 8}, "its num_experts is 4, the model's 8"),
        ({"top_k": 1}, "its top_k is 2, the model's 1"),
        ({"hidden_size": 65}, "its hidden_size is 64, the model's 65"),
    ],
)
def test_a_trace_of_another_model_is_refused_by_the_field(change: dict[str, Any], complaint: str) -> None:
    header = TraceReader(WHOLE).header
    header.require(HEADER)
    with pytest.raises(InputError, match=f"a trace of another model: {complaint}"):
        header.require(replace(HEADER, **change))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"time_s": float("nan")}, "time_s=nan after one that ended at 1.0"),
        ({"time_s": float("inf")}, "time_s=inf"),
        ({"time_s": 0.5}, "time_s=0.5 after one that ended at 1.0"),
        ({"prefill_tokens": -1}, "prefill_tokens=-1"),
        ({"decode_tokens": 1.5}, "decode_tokens=1.5"),
        ({"load_LE": LOAD_LE[:, :3]}, r"load_LE int64 \(2, 3\); it must be int64 \(2, 4\)"),
        ({"load_LE": LOAD_LE / 1}, "load_LE float64"),
        ({"load_LE": -LOAD_LE}, "loads from -2147483648 to 0"),
        ({"load_LE": LOAD_LE * 2}, "to 4294967296"),
    ],
)
def test_an_interval_that_does_not_fit_is_not_written(change: dict[str, Any], complaint: str) -> None:
    writer = TraceWriter(HEADER)
    writer.step(STEPS[0])
    with pytest.raises(InputError, match=complaint):
        writer.step(replace(STEPS[1], **change))
    whole: npt.NDArray[np.int64] = STEPS[1].load_LE
    assert not whole.any()
