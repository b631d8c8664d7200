"""Attention over the paged cache against softmax(Q K^T) V of each sequence alone, in float64.

Shape suffixes: T tokens of a step, L tokens of a sequence, A attention heads, G KV heads, D key size, V value size,
C cache rows.
"""

import math
import random
from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.paged_attention import AttentionOptions, ChunkSpan, KVShape, PagedKVCache, step_layout

CPU = torch.device("cpu")
LAYER = 3
# Rounding of float32 sums over at most 40 keys; of bfloat16 with 8 bits: the scores, the weights and the result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-7}


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Head layout and options of one layer."""

    num_kv_heads: int = 2
    groups: int = 2
    key_size: int = 8
    value_size: int = 8
    scale: float = 0.4
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.groups


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """chunks_by_sequence holds the lengths of each sequence's chunks, one a step, the first at step first_steps."""

    chunks_by_sequence: tuple[tuple[int, ...], ...]
    first_steps: tuple[int, ...]
    page_size: int = 4
    seed: int = 0


@dataclass
class Sequence:
    """A sequence's inputs for all its tokens, and how many of them are done."""

    query: Tensor  # [L, A, D]
    key: Tensor  # [L, G, D]
    value: Tensor  # [L, G, V]
    pages: tuple[int, ...]
    done: int = 0
    outputs: list[Tensor] = field(default_factory=list)


def plain_attention(sequence: Sequence, heads: Heads, sinks_A: Tensor | None) -> Tensor:
    """Return [L, A, V], one position at a time."""
    query_LAD, key_LGD, value_LGV = (x.double() for x in (sequence.query, sequence.key, sequence.value))
    out_LAV = torch.empty((*query_LAD.shape[:2], value_LGV.shape[2]), dtype=torch.float64)
    for position in range(query_LAD.shape[0]):
        first = 0 if heads.window is None else max(0, position - heads.window + 1)
        seen = slice(first, position + 1)
        key_LAD = key_LGD[seen].repeat_interleave(heads.groups, dim=1)
        value_LAV = value_LGV[seen].repeat_interleave(heads.groups, dim=1)
        score_LA = (key_LAD * query_LAD[position]).sum(dim=2) * heads.scale
        if heads.softcap is not None:
            score_LA = torch.tanh(score_LA / heads.softcap) * heads.softcap
        sink_A = torch.zeros(heads.num_heads) if sinks_A is None else sinks_A.double().exp()
        weight_LA = score_LA.exp() / (score_LA.exp().sum(dim=0) + sink_A)
        out_LAV[position] = (weight_LA.unsqueeze(2) * value_LAV).sum(dim=0)
    return out_LAV


class Rig:
    """Sequences with random inputs on random pages of a cache whose every row is NaN until it is written."""

    def __init__(self, schedule: Schedule, heads: Heads, dtype: torch.dtype, *, is_invariant: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(schedule.seed)
        self.heads, self.schedule, self.dtype = heads, schedule, dtype
        lengths = [sum(chunks) for chunks in schedule.chunks_by_sequence]
        counts = [-(-length // schedule.page_size) for length in lengths]
        num_pages = sum(counts) + 2
        free = random.Random(schedule.seed).sample(range(num_pages), num_pages)
        self.sequences = [
            self._sequence(n, [free.pop() for _ in range(c)]) for n, c in zip(lengths, counts, strict=True)
        ]
        self.options = AttentionOptions(
            scale=heads.scale,
            window=heads.window,
            softcap=heads.softcap,
            sinks_A=self._random(heads.num_heads) if heads.has_sinks else None,
        )
        self.cache = PagedKVCache(page_size=schedule.page_size, device=CPU, is_invariant=is_invariant)
        probe = self._sequence(1, [])
        self._attend([probe], [slice(0, 1)])
        self.cache.allocate(num_pages)
        for rows in self.stored():
            rows.fill_(math.nan)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Return keys [C, G, D] and values [C, G, V] as the cache holds them."""
        return self.cache._keys[LAYER], self.cache._values[LAYER]

    def rows_of(self, sequence: Sequence, tokens: range) -> list[int]:
        size = self.schedule.page_size
        return [sequence.pages[token // size] * size + token % size for token in tokens]

    def step(self, number: int) -> set[int]:
        """Run one step of the schedule; return the cache rows that it had to write."""
        active: list[tuple[Sequence, int]] = []
        for sequence, chunks, first in zip(
            self.sequences, self.schedule.chunks_by_sequence, self.schedule.first_steps, strict=True
        ):
            if 0 <= number - first < len(chunks):
                active.append((sequence, chunks[number - first]))
        if not active:
            return set()
        spans: list[ChunkSpan] = []
        for sequence, length in active:
            start = sum(span.length for span in spans)
            spans.append(ChunkSpan(start=start, length=length, context=sequence.done, pages=sequence.pages))
        self.cache.layout = step_layout(tuple(spans), self.schedule.page_size, CPU)
        chunks_TAV = self._attend([s for s, _ in active], [slice(s.done, s.done + n) for s, n in active])
        written: set[int] = set()
        for (sequence, length), span in zip(active, spans, strict=True):
            sequence.outputs.append(chunks_TAV[span.start : span.start + length])
            written |= set(self.rows_of(sequence, range(sequence.done, sequence.done + length)))
            sequence.done += length
        return written

    def run(self) -> None:
        last = max(
            first + len(c) for first, c in zip(self.schedule.first_steps, self.schedule.chunks_by_sequence, strict=True)
        )
        for number in range(last):
            self.step(number)

    def check(self) -> None:
        for sequence in self.sequences:
            got_LAV = torch.cat(sequence.outputs)
            assert got_LAV.dtype == self.dtype
            expected_LAV = plain_attention(sequence, self.heads, self.options.sinks_A)
            torch.testing.assert_close(got_LAV.double(), expected_LAV, rtol=0, atol=TOLERANCE[self.dtype])

    def _attend(self, sequences: list[Sequence], parts: list[slice]) -> Tensor:
        """Call the cache as transformers does: [1, heads, T, size]. Returns [T, A, V]."""

        def flat(name: str) -> Tensor:
            rows = [getattr(s, name)[part] for s, part in zip(sequences, parts, strict=True)]
            return torch.cat(rows).transpose(0, 1).unsqueeze(0)

        return self.cache.attend(LAYER, flat("query"), flat("key"), flat("value"), self.options)[0]

    def _sequence(self, length: int, pages: list[int]) -> Sequence:
        heads = self.heads
        return Sequence(
            query=self._random(length, heads.num_heads, heads.key_size),
            key=self._random(length, heads.num_kv_heads, heads.key_size),
            value=self._random(length, heads.num_kv_heads, heads.value_size),
            pages=tuple(pages),
        )

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    chunk = st.one_of(st.just(1), st.integers(1, 9))
    chunks = draw(st.lists(st.lists(chunk, min_size=1, max_size=4).map(tuple), min_size=1, max_size=4))
    return Schedule(
        chunks_by_sequence=tuple(chunks),
        first_steps=tuple(draw(st.integers(0, 2)) for _ in chunks),
        page_size=draw(st.sampled_from([1, 4, 16])),
        seed=draw(st.integers(0, 2**32)),
    )


heads_strategy = st.builds(
    Heads,
    num_kv_heads=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 3]),
    key_size=st.sampled_from([4, 12]),
    value_size=st.sampled_from([4, 8]),
    window=st.sampled_from([None, 1, 5, 100]),
    softcap=st.sampled_from([None, 0.8]),
    has_sinks=st.booleans(),
)

# Steps: 0 takes a prompt chunk; 1 mixes a long chunk with context, a first chunk and decodes of unlike lengths.
MIXED = Schedule(chunks_by_sequence=((7, 6, 1, 1), (1, 1, 1, 1), (3, 1, 1), (9, 1)), first_steps=(0, 0, 0, 1))
FEATURES = {
    "plain": Heads(),
    "no groups": Heads(groups=1),
    "one KV head": Heads(num_kv_heads=1, groups=4),
    "values narrower than keys": Heads(key_size=12, value_size=4),
    "values wider than keys": Heads(key_size=4, value_size=12),
    "window": Heads(window=3),
    "window of the token alone": Heads(window=1),
    "soft cap": Heads(softcap=0.5),
    "sinks": Heads(has_sinks=True),
    "all together": Heads(key_size=12, value_size=4, window=4, softcap=0.5, has_sinks=True),
}


@given(schedules(), heads_strategy)
@settings(max_examples=40, deadline=None)
def test_any_schedule_equals_plain_attention(schedule: Schedule, heads: Heads) -> None:
    for is_invariant in (False, True):
        rig = Rig(schedule, heads, torch.float32, is_invariant=is_invariant)
        rig.run()
        rig.check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@given(schedule=schedules(), heads=heads_strategy)
@settings(max_examples=20, deadline=None)
def test_invariant_attention_gives_the_same_bits_under_any_schedule(
    dtype: torch.dtype, schedule: Schedule, heads: Heads
) -> None:
    """Against each sequence by itself, token after token: the other end of what a schedule can be."""
    together = Rig(schedule, heads, dtype, is_invariant=True)
    together.run()
    lengths = [sum(chunks) for chunks in schedule.chunks_by_sequence]
    one_by_one = replace(
        schedule,
        chunks_by_sequence=tuple((1,) * length for length in lengths),
        first_steps=tuple(sum(lengths[:i]) for i in range(len(lengths))),
    )
    alone = Rig(one_by_one, heads, dtype, is_invariant=True)
    alone.run()
    for got, expected in zip(together.sequences, alone.sequences, strict=True):
        assert torch.equal(torch.cat(got.outputs), torch.cat(expected.outputs))


def test_an_invariant_chunk_longer_than_its_parts() -> None:
    """Chunks of 150 and 129 tokens are computed in parts of 128; the second leaves a part of one query."""
    found = []
    for chunks in ((150, 129), (279,)):
        schedule = Schedule(chunks_by_sequence=(chunks,), first_steps=(0,))
        rig = Rig(schedule, Heads(window=90), torch.float32, is_invariant=True)
        rig.run()
        rig.check()
        found.append(torch.cat(rig.sequences[0].outputs))
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
def test_features_over_mixed_batches(feature: str, dtype: torch.dtype) -> None:
    for is_invariant in (False, True):
        rig = Rig(MIXED, FEATURES[feature], dtype, is_invariant=is_invariant)
        rig.run()
        rig.check()


@pytest.mark.parametrize("feature", ["window", "soft cap", "sinks"])
def test_each_option_changes_the_result(feature: str) -> None:
    """Else the test above could not tell whether it is applied."""
    rig = Rig(MIXED, FEATURES[feature], torch.float32)
    rig.run()
    rig.heads = Heads()
    rig.options = AttentionOptions(scale=rig.heads.scale)
    with pytest.raises(AssertionError, match="not close"):
        rig.check()


def test_a_step_writes_its_own_rows_and_no_other() -> None:
    rig = Rig(MIXED, Heads(key_size=12, value_size=4), torch.float32)
    written: set[int] = set()
    for number in range(4):
        before = [rows.clone() for rows in rig.stored()]
        new = rig.step(number)
        assert new
        assert not new & written
        others = sorted(set(range(before[0].shape[0])) - new)
        for rows, old in zip(rig.stored(), before, strict=True):
            torch.testing.assert_close(rows[others], old[others], rtol=0, atol=0, equal_nan=True)
        written |= new
    keys_CGD, values_CGV = rig.stored()
    for sequence in rig.sequences:
        own = rig.rows_of(sequence, range(sequence.done))
        assert torch.equal(keys_CGD[own], sequence.key)
        assert torch.equal(values_CGV[own], sequence.value)


def test_a_sequence_of_nans_leaves_the_others_alone() -> None:
    """The broken one has page 0, the row that a shorter decode might be padded with."""
    rig = Rig(Schedule(chunks_by_sequence=((3, 1), (9, 1), (2, 1)), first_steps=(0, 0, 0)), Heads(), torch.float32)
    broken, *others = rig.sequences
    holder = next((s for s in others if 0 in s.pages), None)
    if holder is not None:
        holder.pages = tuple(broken.pages[0] if page == 0 else page for page in holder.pages)
    broken.pages = (0, *broken.pages[1:])
    broken.key.fill_(math.nan)
    broken.value.fill_(math.nan)
    rig.run()
    assert torch.cat(broken.outputs).isnan().all()
    rig.sequences = others
    rig.check()


def test_a_layout_worked_by_hand() -> None:
    """Pages of 2: a decode at position 2 on pages 5, 0; a chunk of 2 at position 1 on pages 3, 1; a token on page 2."""
    spans = (
        ChunkSpan(start=0, length=1, context=2, pages=(5, 0)),
        ChunkSpan(start=1, length=2, context=1, pages=(3, 1)),
        ChunkSpan(start=3, length=1, context=0, pages=(2,)),
    )
    layout = step_layout(spans, 2, CPU)
    assert layout.write_T.tolist() == [0, 7, 2, 4]
    assert layout.decode_rows_N.tolist() == [0, 3]
    assert layout.decode_length_N.tolist() == [3, 1]
    assert layout.decode_read_NL.tolist() == [[10, 11, 0], [4, 4, 4]]
    assert [(span, rows.tolist()) for span, rows in layout.prefill] == [(spans[1], [6, 7, 2])]


def test_probe_mode_attends_and_learns_the_shapes_of_each_layer() -> None:
    cache = PagedKVCache(page_size=4, device=CPU)
    shapes = {0: Heads(key_size=6, value_size=4), 1: Heads(num_kv_heads=1, key_size=12, value_size=12)}
    for layer, heads in shapes.items():
        rig = Rig(Schedule(chunks_by_sequence=((5,),), first_steps=(0,)), heads, torch.float32)
        sequence = rig.sequences[0]
        inputs = (x.transpose(0, 1).unsqueeze(0) for x in (sequence.query, sequence.key, sequence.value))
        query, key, value = inputs
        got = cache.attend(layer, query, key, value, rig.options)
        torch.testing.assert_close(got[0].double(), plain_attention(sequence, heads, None), rtol=0, atol=1e-5)
    assert cache.shapes == {
        0: KVShape(num_heads=2, key_size=6, value_size=4, dtype=torch.float32),
        1: KVShape(num_heads=1, key_size=12, value_size=12, dtype=torch.float32),
    }
    assert cache.bytes_per_token == (2 * (6 + 4) + 1 * (12 + 12)) * 4


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_bytes_per_token_is_what_allocate_takes(dtype: torch.dtype, size: int) -> None:
    heads = Heads(key_size=12, value_size=4)
    rig = Rig(Schedule(chunks_by_sequence=((5,),), first_steps=(0,)), heads, dtype)
    num_tokens = rig.stored()[0].shape[0]
    taken = sum(rows.numel() * rows.element_size() for rows in rig.stored())
    assert rig.cache.bytes_per_token == 2 * (12 + 4) * size
    assert taken == num_tokens * rig.cache.bytes_per_token


def test_allocate_before_the_probe_is_refused() -> None:
    with pytest.raises(AssertionError, match="before any probe"):
        PagedKVCache(page_size=4, device=CPU).allocate(2)
