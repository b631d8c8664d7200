"""A record of routing: how many tokens each expert got, interval by interval.

What a simulation replays. A file is a magic, a version, and frames of msgpack, each with its length and CRC-32: a
header, then a frame an interval, then the end with their number. So a recording may be cut short and is found to be,
and is written and read interval by interval.

Shape suffixes: L MoE layers (by position in TraceHeader.layers), E experts of a layer, N experts that got tokens.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError

_FILE = struct.Struct(">4sH")  # magic, version
_FRAME = struct.Struct(">II")  # bytes of the msgpack body that follows, CRC-32 of it
_MAGIC = b"EMTR"
_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """The model whose routing was recorded; see ModelInfo. hidden_size is that of its hidden states.

    Raises:
        InputError: a field that no model has.
    """

    model: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) < len(self.layers) or min(self.layers) < 0:
            raise InputError(f"a trace of layers={self.layers}: they must be different, at least one, none negative")
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"a trace of top_k={self.top_k}: it must be 1 to num_experts={self.num_experts}")
        if self.hidden_size < 1:
            raise InputError(f"a trace of hidden_size={self.hidden_size}: it must be at least 1")

    def require(self, model: "TraceHeader") -> None:
        """Refuse to be taken for the trace of another model.

        Raises:
            InputError: it names the first field that differs.
        """
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(model, field.name)
            if ours != theirs:
                raise InputError(f"a trace of another model: its {field.name} is {ours!r}, the model's {theirs!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStep:
    """What was computed since the interval before: load_LE, int64, tokens that chose each expert.

    time_s is the interval's end, in seconds since the recording began. The first has what came since then.
    """

    time_s: float
    prefill_tokens: int
    decode_tokens: int
    load_LE: npt.NDArray[np.int64]


class TraceWriter:
    """Packs a trace: what its calls return, one after another, is a file.

    Raises:
        InputError: an interval whose fields do not fit the header, or that ends before the one before.
    """

    def __init__(self, header: TraceHeader) -> None:
        self._header = header
        self._num_steps = 0
        self._last_s = 0.0

    def begin(self) -> bytes:
        """Return the file's beginning."""
        return _FILE.pack(_MAGIC, _VERSION) + _frame(asdict(self._header))

    def step(self, step: TraceStep) -> bytes:
        """Return an interval."""
        _require_fit(step, self._header, self._last_s)
        self._num_steps, self._last_s = self._num_steps + 1, step.time_s
        layer_N, expert_N = np.nonzero(step.load_LE)
        count_L = np.bincount(layer_N, minlength=len(self._header.layers))
        sparse = [count_L.astype("<u4"), expert_N.astype("<u4"), step.load_LE[layer_N, expert_N].astype("<u4")]
        body = zlib.compress(b"".join(part.tobytes() for part in sparse), level=1)
        return _frame([step.time_s, step.prefill_tokens, step.decode_tokens, body])

    def end(self) -> bytes:
        """Return the file's end."""
        return _frame(self._num_steps)


class TraceReader:
    """A trace in memory, or in a file that is mapped there. Intervals are checked as they are read.

    Raises:
        InputError: not a trace, of another version, damaged, or cut short; here or while intervals are read.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        if len(data) < _FILE.size or bytes(self._data[:4]) != _MAGIC:
            raise InputError(f"not a trace: {len(data)} bytes that begin with {bytes(self._data[:4])!r}")
        version = _FILE.unpack_from(self._data)[1]
        if version != _VERSION:
            raise InputError(f"a trace of version {version}; this release reads version {_VERSION}")
        content, self._first = self._frame_at(_FILE.size, "header")
        self.header = _header(content)

    def steps(self) -> Iterator[TraceStep]:
        """Yield the intervals, the first first."""
        at, number, last_s = self._first, 0, 0.0
        while True:
            content, at = self._frame_at(at, f"interval {number}")
            if isinstance(content, int):
                break
            step = self._step(content, number)
            _require_fit(step, self.header, last_s)
            last_s = step.time_s
            yield step
            number += 1
        if content != number or at != len(self._data):
            raise InputError(
                f"a damaged trace: it ends after {number} intervals with {len(self._data) - at} bytes left, "
                f"and says {content}"
            )

    def _frame_at(self, at: int, what: str) -> tuple[Any, int]:
        """Return the content of the frame at an offset, and where the next one begins."""
        body_at = at + _FRAME.size
        length, checksum = _FRAME.unpack_from(self._data, at) if body_at <= len(self._data) else (math.inf, 0)
        if body_at + length > len(self._data):
            raise InputError(f"a trace that was cut short: it has {len(self._data)} bytes and ends within its {what}")
        body = self._data[body_at : body_at + length]
        if zlib.crc32(body) != checksum:
            raise InputError(f"a damaged trace: {what} has checksum {zlib.crc32(body):08x}, not {checksum:08x}")
        try:
            return msgpack.unpackb(body), body_at + length
        except (ValueError, msgpack.UnpackException) as error:
            raise InputError(f"a trace whose {what} has a sound checksum and unusable content: {error}") from error

    def _step(self, content: Any, number: int) -> TraceStep:
        try:
            time_s, prefill_tokens, decode_tokens, packed = content
            values = np.frombuffer(zlib.decompress(packed), dtype="<u4").astype(np.int64)
            num_layers = len(self.header.layers)
            count_L, sparse_2N = values[:num_layers], values[num_layers:].reshape(2, -1)
            load_LE = np.zeros((num_layers, self.header.num_experts), dtype=np.int64)
            load_LE[np.repeat(np.arange(num_layers), count_L), sparse_2N[0]] = sparse_2N[1]
            return TraceStep(
                time_s=float(time_s), prefill_tokens=prefill_tokens, decode_tokens=decode_tokens, load_LE=load_LE
            )
        except (ValueError, TypeError, LookupError, zlib.error) as error:
            raise InputError(
                f"a trace whose interval {number} has a sound checksum and unusable content: {error}"
            ) from error


def _frame(content: Any) -> bytes:
    body: bytes = msgpack.packb(content)
    return _FRAME.pack(len(body), zlib.crc32(body)) + body


def _header(content: Any) -> TraceHeader:
    """Read the header's fields; what is no map of exactly these is refused by name."""
    names = {field.name for field in fields(TraceHeader)}
    if not isinstance(content, dict) or content.keys() != names:
        raise InputError(f"a trace whose header has other fields than {sorted(names)}: {content!r}")
    for name, value in content.items():
        if not _has_type_of(name, value):
            raise InputError(f"a trace whose header has {name}={value!r}")
    return TraceHeader(**{**content, "layers": tuple(content["layers"])})


def _has_type_of(name: str, value: Any) -> bool:
    if name == "layers":
        return isinstance(value, list) and all(isinstance(layer, int) for layer in value)
    return isinstance(value, str if name == "model" else int)


def _require_fit(step: TraceStep, header: TraceHeader, last_s: float) -> None:
    shape = (len(header.layers), header.num_experts)
    if not last_s <= step.time_s < math.inf:
        raise InputError(f"an interval with time_s={step.time_s!r} after one that ended at {last_s}")
    for name in ("prefill_tokens", "decode_tokens"):
        tokens = getattr(step, name)
        if not isinstance(tokens, int) or tokens < 0:
            raise InputError(f"an interval with {name}={tokens!r}; it must be a whole number, not negative")
    if step.load_LE.shape != shape or step.load_LE.dtype != np.int64:
        raise InputError(
            f"an interval with load_LE {step.load_LE.dtype} {step.load_LE.shape}; it must be int64 {shape}"
        )
    if not 0 <= step.load_LE.min() <= step.load_LE.max() < 2**32:
        raise InputError(f"an interval with loads from {step.load_LE.min()} to {step.load_LE.max()}")
