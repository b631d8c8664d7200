import math
import struct
import zlib

import msgpack
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.cluster.errors import InputError, StateError
from expertmesh.cluster.load_windows import Load, LoadWindows

FAST_BUCKET_S, SLOW_BUCKET_S = 0.5, 10.0
NOTHING_LE = np.zeros((2, 3), dtype=np.int64)
# Sixteenths of a second, so that the naive recount adds up times without rounding.
STEPS_S = st.sampled_from([0, 1, 3, 8, 16, 40, 79, 160, 1000, 4793, 10_000]).map(lambda sixteenths: sixteenths / 16)


def one(expert: int, tokens: int) -> npt.NDArray[np.int64]:
    """Tokens for one expert of the second of two layers."""
    counts_LE = NOTHING_LE.copy()
    counts_LE[1, expert] = tokens
    return counts_LE


def total(load: Load) -> int:
    return int(load.prefill_LE.sum() + load.decode_LE.sum())


def busy_windows() -> LoadWindows:
    """Reports of half a minute: one a second, one prefill token for expert 0, two decode tokens for expert 2."""
    windows = LoadWindows(2, 3)
    for second in range(30):
        windows.add(1000.0 + second, one(0, 1), one(2, 2))
    return windows


def test_worked_example() -> None:
    windows = busy_windows()
    fast, slow = windows.fast(1029.0), windows.slow(1029.0)
    # The reports of 1024 to 1029, both included, and of all half minute.
    assert (fast.prefill_LE.tolist(), fast.decode_LE.tolist()) == ([[0, 0, 0], [6, 0, 0]], [[0, 0, 0], [0, 0, 12]])
    assert (slow.prefill_LE.tolist(), slow.decode_LE.tolist()) == ([[0, 0, 0], [30, 0, 0]], [[0, 0, 0], [0, 0, 60]])
    assert (fast.span_s, slow.span_s) == (5.0, 29.0)
    assert fast.prefill_LE.dtype == slow.decode_LE.dtype == np.int64


def test_a_window_empties_and_its_span_stays_when_nothing_comes() -> None:
    windows = busy_windows()
    assert [total(windows.fast(at_s)) for at_s in (1034.25, 1034.5)] == [3, 0]
    assert windows.fast(1034.5).span_s == 5.0
    assert [total(windows.slow(at_s)) for at_s in (1300.0, 1319.0, 1320.0)] == [90, 60, 30]
    assert (total(windows.slow(1329.0)), windows.slow(1329.0).span_s) == (30, 309.0)
    assert (total(windows.slow(1330.0)), windows.slow(1330.0).span_s) == (0, 300.0)


def test_before_time_has_passed_there_is_no_span() -> None:
    windows = LoadWindows(2, 3)
    assert (total(windows.fast(7.3)), windows.fast(7.3).span_s) == (0, 0.0)
    windows.add(8.0, one(0, 4), NOTHING_LE)
    assert windows.slow(8.3).span_s == pytest.approx(1.0)


def test_the_callers_arrays_are_not_kept() -> None:
    windows, counts_LE = LoadWindows(2, 3), one(0, 4)
    windows.add(0.0, counts_LE, counts_LE)
    counts_LE += 5
    windows.fast(0.0).prefill_LE[:] = 99
    assert total(windows.fast(0.0)) == 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(STEPS_S, st.integers(0, 1000)), max_size=40), STEPS_S, st.floats(0, 2e9).map(math.floor))
def test_sums_equal_a_recount_to_within_a_bucket_at_the_old_edge(
    reports: list[tuple[float, int]], last_step_s: float, start_s: int
) -> None:
    windows, now_s = LoadWindows(2, 3), float(start_s)
    history: list[tuple[float, int]] = []
    for number, (step_s, tokens) in enumerate(reports):
        now_s += step_s
        windows.add(now_s, one(number % 3, tokens), one((number + 1) % 3, 2 * tokens))
        history.append((now_s, 3 * tokens))
        check_recount(windows, history, now_s)
    check_recount(windows, history, now_s + last_step_s)


def check_recount(windows: LoadWindows, history: list[tuple[float, int]], now_s: float) -> None:
    for load, window_s, bucket_s in (
        (windows.fast(now_s), windows.fast_s, FAST_BUCKET_S),
        (windows.slow(now_s), windows.slow_s, SLOW_BUCKET_S),
    ):
        least = sum(tokens for at_s, tokens in history if at_s >= now_s - window_s)
        most = sum(tokens for at_s, tokens in history if at_s > now_s - window_s - bucket_s)
        assert least <= total(load) <= most
        assert (load.prefill_LE * 2).sum() == load.decode_LE.sum()
        if history and history[0][0] <= now_s - window_s - bucket_s:
            assert window_s <= load.span_s < window_s + bucket_s
            edge_s = now_s - load.span_s
            assert total(load) == sum(tokens for at_s, tokens in history if at_s >= edge_s), "the span is what it says"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1e9, -4000, -6, -4, -0.3, 0.2, 1, 9]), st.integers(0, 9)), max_size=60))
def test_nothing_is_lost_or_counted_twice_when_the_clock_steps_back(reports: list[tuple[float, int]]) -> None:
    """Time that passed is at most the sum of the steps forward; what is younger than the window must all be there."""
    windows, now_s, passed_s = LoadWindows(2, 3), 5e9, 0.0
    history: list[tuple[float, int]] = []
    for step_s, tokens in reports:
        now_s, passed_s = now_s + step_s, passed_s + max(0.0, step_s)
        windows.add(now_s, one(0, tokens), NOTHING_LE)
        history.append((passed_s, tokens))
        fast, slow = windows.fast(now_s), windows.slow(now_s)
        assert 0 <= fast.span_s < windows.fast_s + FAST_BUCKET_S
        assert 0 <= slow.span_s < windows.slow_s + SLOW_BUCKET_S
        everything = sum(tokens for _, tokens in history)
        assert sum(t for at_s, t in history if at_s > passed_s - windows.fast_s) <= total(fast) <= everything
        assert sum(t for at_s, t in history if at_s > passed_s - windows.slow_s) <= total(slow) <= everything


def test_a_late_report_counts_now_and_does_not_turn_the_clock() -> None:
    windows = busy_windows()
    windows.add(1025.0, one(1, 7), NOTHING_LE)
    assert windows.fast(1029.0).prefill_LE.tolist() == [[0, 0, 0], [6, 7, 0]]
    assert windows.fast(1034.25).prefill_LE.tolist() == [[0, 0, 0], [1, 7, 0]], "it counts as of 1029"
    assert windows.fast(1034.25).span_s == 5.25


def test_a_clock_set_back_goes_on_at_its_pace() -> None:
    windows = busy_windows()
    windows.add(29.0, one(1, 7), NOTHING_LE)
    assert total(windows.fast(29.0)) == 18 + 7
    assert total(windows.fast(34.25)) == 3 + 7
    assert total(windows.fast(34.5)) == 0
    assert (total(windows.slow(100.0)), windows.slow(100.0).span_s) == (97, 100.0)


def test_a_clock_set_forward_expires_and_goes_on() -> None:
    windows = busy_windows()
    windows.add(90_000.0, one(1, 7), NOTHING_LE)
    assert (total(windows.fast(90_000.0)), total(windows.slow(90_000.0))) == (7, 7)
    assert windows.slow(90_000.0).span_s == 300.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(STEPS_S, st.integers(0, 2**40)), max_size=30), st.sampled_from([0.0, -500.0]), STEPS_S)
def test_a_restored_window_goes_on_like_the_original(
    reports: list[tuple[float, int]], back_s: float, later_s: float
) -> None:
    windows, now_s = LoadWindows(2, 3), 1.7e9
    for number, (step_s, tokens) in enumerate(reports):
        now_s += step_s
        windows.add(now_s, one(number % 3, tokens), one(0, 1))
    windows.fast(now_s + back_s)
    copy = LoadWindows.from_bytes(windows.to_bytes())
    assert copy.to_bytes() == windows.to_bytes()
    for one_of_both in (windows, copy):
        one_of_both.add(now_s + back_s + later_s, one(1, 5), one(2, 6))
    for mine, theirs in ((windows.fast(now_s), copy.fast(now_s)), (windows.slow(now_s), copy.slow(now_s))):
        assert mine.span_s == theirs.span_s
        np.testing.assert_array_equal(mine.prefill_LE, theirs.prefill_LE)
        np.testing.assert_array_equal(mine.decode_LE, theirs.decode_LE)


def test_the_record_of_a_large_model_under_full_load_is_small() -> None:
    windows, random = LoadWindows(58, 256), np.random.default_rng(5)
    for bucket in range(40):
        # 16 random bits for each expert, prefill and decode: 6,500 tokens/s for each of them, nothing to compress.
        counts_PLE = random.integers(0, 1 << 16, (2, 58, 256))
        windows.add(SLOW_BUCKET_S * bucket, *counts_PLE)
    record = windows.to_bytes()
    assert 31 * 58 * 256 * 2 * 2 < len(record) < 4e6
    now_s = SLOW_BUCKET_S * 39
    np.testing.assert_array_equal(LoadWindows.from_bytes(record).slow(now_s).decode_LE, windows.slow(now_s).decode_LE)


@settings(max_examples=80, deadline=None)
@given(position=st.integers(0), bit=st.integers(0, 7), length=st.integers(0))
def test_a_damaged_record_is_refused(position: int, bit: int, length: int) -> None:
    record = bytearray(busy_windows().to_bytes())
    with pytest.raises(StateError, match="load windows record"):
        LoadWindows.from_bytes(bytes(record[: length % len(record)]))
    record[position % len(record)] ^= 1 << bit
    with pytest.raises(StateError, match="load windows record"):
        LoadWindows.from_bytes(bytes(record))


def test_a_record_of_another_version_says_so() -> None:
    record = busy_windows().to_bytes()
    with pytest.raises(StateError, match="version 9; this release reads version 1"):
        LoadWindows.from_bytes(record[:4] + struct.pack(">H", 9) + record[6:])


CLOCK, SOUND = [10.0, 0.0, 0.0], zlib.compress(bytes(12))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "unpack"),
        ([2, 3, 5.0, 1.0, None, [], []], "no windows of fast_s=5.0 and slow_s=1.0"),
        ([0, 3, 5.0, 300.0, None, [], []], "num_layers=0"),
        (["2", 3, 5.0, 300.0, None, [], []], "not supported"),
        ([2, 3, 5.0, 300.0, [math.nan, 0.0, 0.0], [], []], "a clock cannot have"),
        ([2, 3, 5.0, 300.0, [10.0, 0.0, 11.0], [], []], "a clock cannot have"),
        ([2, 3, 5.0, 300.0, CLOCK, [[21, SOUND]], []], "bucket 21 of 0.5 s begins after"),
        ([2, 3, 5.0, 300.0, CLOCK, [], [[1, SOUND], [1, SOUND]]], "bucket 1 follows bucket 1"),
        ([2, 3, 5.0, 300.0, CLOCK, [], [[1, SOUND[:-1]]]], "incomplete"),
        ([2, 3, 5.0, 300.0, CLOCK, [], [[1, zlib.compress(bytes(13))]]], "13 bytes for 12 counts"),
        ([2, 3, 5.0, 300.0, CLOCK, [], [[1, zlib.compress(b"")]]], "0 bytes for 12 counts"),
        ([2, 3, 5.0, 300.0, CLOCK, [], [[1, zlib.compress(b"\xff" * 96)]]], "the count -1"),
    ],
)
def test_a_record_with_other_content_is_refused(content: list[object], text: str) -> None:
    body = msgpack.packb(content)
    with pytest.raises(StateError, match=f"unusable content.*{text}"):
        LoadWindows.from_bytes(struct.pack(">4sHI", b"EMLW", 1, zlib.crc32(body)) + body)


@pytest.mark.parametrize(
    ("now_s", "counts", "text"),
    [
        (math.nan, NOTHING_LE, "nan is not finite"),
        (0.0, NOTHING_LE[:1], r"of shape \(1, 3\)"),
        (0.0, NOTHING_LE.astype(np.float64), "prefill_LE is float64"),
        (0.0, one(0, -1), "counts from -1 to 0"),
        (0.0, np.full((2, 3), 2**63, dtype=np.uint64), "to 9223372036854775808"),
    ],
)
def test_unfit_reports_are_refused_and_change_nothing(now_s: float, counts: npt.ArrayLike, text: str) -> None:
    windows = busy_windows()
    before = windows.to_bytes()
    with pytest.raises(InputError, match=text):
        windows.add(now_s, counts, NOTHING_LE)
    assert windows.to_bytes() == before


@pytest.mark.parametrize("fast_s", [0.0, 301.0, math.nan])
def test_unfit_windows_are_refused(fast_s: float) -> None:
    with pytest.raises(InputError, match=f"fast_s={fast_s}"):
        LoadWindows(2, 3, fast_s=fast_s)
