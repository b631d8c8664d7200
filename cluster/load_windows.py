"""How many tokens each expert got lately: a slow window, which decides replica counts, and a fast one, for weights.

Counts lie in buckets of wall-clock time and leave a window bucket by bucket, so memory is bounded whatever is reported.

Shape suffixes: L MoE layers, E experts of a layer, P prefill and decode, B bytes of a count.
"""

import math
import struct
import zlib
from collections import deque
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

from expertmesh.cluster.errors import InputError, StateError

_NUM_FAST_BUCKETS = 10
_NUM_SLOW_BUCKETS = 30
_HEADER = struct.Struct(">4sHI")  # magic, version, CRC-32 of the msgpack body that follows
_MAGIC = b"EMLW"
_VERSION = 1
_COUNT_BYTES = 8


class Load(NamedTuple):
    """What a window holds: int64 tokens of each expert over span_s seconds, which is 0 when no time has passed yet."""

    prefill_LE: npt.NDArray[np.int64]
    decode_LE: npt.NDArray[np.int64]
    span_s: float


@dataclass(slots=True)
class _Clock:
    """The windows' own time: it never steps back. time_s is the caller's time plus ahead_s, as of the last call."""

    time_s: float
    ahead_s: float
    start_s: float


class LoadWindows:
    """Token counts of the last fast_s and slow_s seconds, for each (layer, expert), prefill and decode apart.

    Every call tells the time, in seconds of one wall clock. A time up to fast_s before the latest one is a late report:
    it counts as of the latest. An earlier one means that the clock was set back: the windows go on from where they
    were, at the new clock's pace. A clock set forward expires what is too old by it. Not for several threads at once.

    Raises:
        InputError: no layers or experts, or windows that are not 0 < fast_s <= slow_s.
    """

    def __init__(self, num_layers: int, num_experts: int, *, fast_s: float = 5.0, slow_s: float = 300.0) -> None:
        if num_layers < 1 or num_experts < 1 or not 0 < fast_s <= slow_s < math.inf:
            raise InputError(f"no windows of {fast_s=} and {slow_s=} over {num_layers=} and {num_experts=}")
        self.num_layers, self.num_experts = num_layers, num_experts
        self.fast_s, self.slow_s = fast_s, slow_s
        self._clock: _Clock | None = None
        self._fast = _Window(fast_s, fast_s / _NUM_FAST_BUCKETS, (2, num_layers, num_experts))
        self._slow = _Window(slow_s, slow_s / _NUM_SLOW_BUCKETS, (2, num_layers, num_experts))

    def add(self, now_s: float, prefill_LE: npt.ArrayLike, decode_LE: npt.ArrayLike) -> None:
        """Count tokens that were computed since their worker's last report. The arrays are copied.

        Args:
            now_s: the time of the report.
            prefill_LE: integers, not negative.
            decode_LE: likewise.

        Raises:
            InputError: now_s is not finite, or an array of another shape or type or with negative counts.
        """
        counts_PLE = np.stack([self._checked("prefill_LE", prefill_LE), self._checked("decode_LE", decode_LE)])
        clock = self._advance(now_s)
        self._fast.add(clock.time_s, counts_PLE)
        self._slow.add(clock.time_s, counts_PLE)

    def fast(self, now_s: float) -> Load:
        """Return the load of the last fast_s seconds, and of up to a tenth of that before, where a bucket begins.

        Raises:
            InputError: now_s is not finite.
        """
        return self._fast.load(self._advance(now_s))

    def slow(self, now_s: float) -> Load:
        """Return the load of the last slow_s seconds, and of up to a thirtieth of that before, where a bucket begins.

        Raises:
            InputError: now_s is not finite.
        """
        return self._slow.load(self._advance(now_s))

    def to_bytes(self) -> bytes:
        """Pack both windows into a versioned record with a checksum."""
        clock = None if self._clock is None else list(astuple(self._clock))
        shape = [self.num_layers, self.num_experts, self.fast_s, self.slow_s]
        body: bytes = msgpack.packb([*shape, clock, self._fast.packed(), self._slow.packed()])
        return _HEADER.pack(_MAGIC, _VERSION, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, record: bytes) -> "LoadWindows":
        """Unpack what `to_bytes` packed.

        Raises:
            StateError: the record is damaged, something else, or of another version.
        """
        if len(record) < _HEADER.size or not record.startswith(_MAGIC):
            raise StateError(f"not a load windows record: {len(record)} bytes that begin with {record[:4]!r}")
        _, version, checksum = _HEADER.unpack_from(record)
        if version != _VERSION:
            raise StateError(f"a load windows record of version {version}; this release reads version {_VERSION}")
        body = record[_HEADER.size :]
        if zlib.crc32(body) != checksum:
            raise StateError(f"a damaged load windows record: checksum {zlib.crc32(body):08x}, not {checksum:08x}")
        try:
            num_layers, num_experts, fast_s, slow_s, clock, fast, slow = msgpack.unpackb(body)
            windows = cls(num_layers, num_experts, fast_s=fast_s, slow_s=slow_s)
            if clock is not None:
                windows._clock = _checked_clock(*clock)
                windows._fast.restore(windows._clock.time_s, fast)
                windows._slow.restore(windows._clock.time_s, slow)
            return windows
        except (InputError, ValueError, TypeError, LookupError, ArithmeticError, zlib.error) as error:
            raise StateError(f"a load windows record with a sound checksum and unusable content: {error}") from error

    def _advance(self, now_s: float) -> _Clock:
        if not math.isfinite(now_s):
            raise InputError(f"the time {now_s} is not finite")
        if self._clock is None:
            self._clock = _Clock(now_s, 0.0, now_s)
        clock = self._clock
        if now_s + clock.ahead_s < clock.time_s - self.fast_s:
            clock.ahead_s = clock.time_s - now_s
        clock.time_s = max(clock.time_s, now_s + clock.ahead_s)
        return clock

    def _checked(self, name: str, counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
        counts_LE = np.asarray(counts)
        shape = (self.num_layers, self.num_experts)
        if counts_LE.shape != shape or not np.issubdtype(counts_LE.dtype, np.integer):
            raise InputError(f"{name} is {counts_LE.dtype} of shape {counts_LE.shape}; it must be integers of {shape}")
        if counts_LE.min() < 0 or counts_LE.max() > np.iinfo(np.int64).max:
            raise InputError(f"{name} has counts from {counts_LE.min()} to {counts_LE.max()}; they must be 0 or more")
        return counts_LE.astype(np.int64)


class _Window:
    """Buckets in the order of time: their number since time 0, and what was counted in them."""

    def __init__(self, window_s: float, bucket_s: float, shape_PLE: tuple[int, int, int]) -> None:
        self._window_s, self._bucket_s, self._shape_PLE = window_s, bucket_s, shape_PLE
        self._buckets: deque[tuple[int, npt.NDArray[np.int64]]] = deque()

    def add(self, time_s: float, counts_PLE: npt.NDArray[np.int64]) -> None:
        """Count into the bucket of a time, which is never before that of an earlier call."""
        self._expire(time_s)
        number = math.floor(time_s / self._bucket_s)
        if not self._buckets or self._buckets[-1][0] < number:
            self._buckets.append((number, np.zeros(self._shape_PLE, dtype=np.int64)))
        newest_PLE = self._buckets[-1][1]
        newest_PLE += counts_PLE

    def load(self, clock: _Clock) -> Load:
        """Sum the buckets that reach into the window."""
        oldest = self._expire(clock.time_s)
        sum_PLE = np.zeros(self._shape_PLE, dtype=np.int64)
        for _, counts_PLE in self._buckets:
            sum_PLE += counts_PLE
        return Load(sum_PLE[0], sum_PLE[1], clock.time_s - max(clock.start_s, oldest * self._bucket_s))

    def packed(self) -> list[tuple[int, bytes]]:
        """Return the buckets with their counts compressed."""
        return [(number, _pack(counts_PLE)) for number, counts_PLE in self._buckets]

    def restore(self, time_s: float, packed: Any) -> None:
        """Take the buckets that `packed` returned; anything else raises what `from_bytes` catches."""
        for number, counts in packed:
            if self._buckets and number <= self._buckets[-1][0]:
                raise ValueError(f"bucket {number} follows bucket {self._buckets[-1][0]}")
            if number > math.floor(time_s / self._bucket_s):
                raise ValueError(f"bucket {number} of {self._bucket_s} s begins after the record's time {time_s}")
            self._buckets.append((int(number), _unpack(counts, self._shape_PLE)))

    def _expire(self, time_s: float) -> int:
        """Drop the buckets that end before the window begins. Return the number of the oldest that may be in it."""
        oldest = math.floor((time_s - self._window_s) / self._bucket_s)
        while self._buckets and self._buckets[0][0] < oldest:
            self._buckets.popleft()
        return oldest


def _checked_clock(time_s: float, ahead_s: float, start_s: float) -> _Clock:
    if not all(map(math.isfinite, (time_s, ahead_s, start_s))) or start_s > time_s:
        raise ValueError(f"a clock cannot have {time_s=}, {ahead_s=} and {start_s=}")
    return _Clock(time_s, ahead_s, start_s)


def _pack(counts_PLE: npt.NDArray[np.int64]) -> bytes:
    """Compress counts: the low bytes of all, then the next bytes, up to the highest that any count has.

    Bytes of one rank are alike (the high ones mostly 0), so zlib finds more in them than in whole integers.
    """
    num_bytes = max(1, (int(counts_PLE.max()).bit_length() + 7) // 8)
    rows_B = counts_PLE.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :num_bytes]
    return zlib.compress(rows_B.T.tobytes(), level=1)


def _unpack(packed: bytes, shape_PLE: tuple[int, int, int]) -> npt.NDArray[np.int64]:
    planes = np.frombuffer(zlib.decompress(packed), dtype=np.uint8)
    num_counts = math.prod(shape_PLE)
    num_bytes = len(planes) // num_counts
    if not 1 <= num_bytes <= _COUNT_BYTES or num_bytes * num_counts != len(planes):
        raise ValueError(f"a bucket of {len(planes)} bytes for {num_counts} counts")
    rows_B = np.zeros((num_counts, _COUNT_BYTES), dtype=np.uint8)
    rows_B[:, :num_bytes] = planes.reshape(num_bytes, num_counts).T
    counts_PLE = rows_B.view("<i8").reshape(shape_PLE).astype(np.int64)
    if counts_PLE.min() < 0:
        raise ValueError(f"a bucket with the count {counts_PLE.min()}")
    return counts_PLE
