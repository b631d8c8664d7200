"""The compiled dense half against the same mathematics in float32 torch, one row at a time.

Shape suffixes: T rows, H hidden, A heads, G KV heads, D head size, R rotated elements, L context length.
"""

import itertools
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.dense import (
    AttentionLayer,
    AttentionStep,
    AttentionWeights,
    QkNorm,
    Router,
    can_attend,
)
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.linear import can_pack_linear, pack_linear, padded_outputs

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
ISAS = [isa for isa in Isa if isa <= best_isa()]
PAGE_SIZE = 4
# bf16 has 8 bits: roundings of inputs, of the queries and keys, and of the result.
TOLERANCE = 0.02


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layer to test."""

    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 32
    rope_size: int = 32
    qk_norm: QkNorm = QkNorm.NONE
    window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False
    has_bias: bool = False


SHAPES = {
    "plain": Shape(),
    "wide": Shape(hidden=320, heads=6, kv_heads=3, head_size=64, rope_size=64),
    "norm of each head": Shape(qk_norm=QkNorm.EACH_HEAD),
    "norm of all heads": Shape(qk_norm=QkNorm.ALL_HEADS, kv_heads=4),
    "half rotated": Shape(head_size=64, rope_size=32, kv_heads=1),
    "window": Shape(window=7),
    "soft cap": Shape(softcap=2.0),
    "sinks": Shape(has_sinks=True),
    "biases": Shape(has_bias=True),
}


def bf16(*size: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*size) * scale).bfloat16()


@dataclass
class Layer:
    """Random weights, in the layout that computes and as they are."""

    shape: Shape
    pages: int
    qkv_OH: Tensor = field(init=False)
    compiled: AttentionLayer = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        inner, wide = s.heads * s.head_size, (s.heads + 2 * s.kv_heads) * s.head_size
        self.qkv_OH = bf16(wide, s.hidden, scale=2 * s.hidden**-0.5)
        self.out_HO = bf16(s.hidden, inner, scale=2 * inner**-0.5)
        self.qkv_bias = bf16(wide) if s.has_bias else None
        self.out_bias = bf16(s.hidden) if s.has_bias else None
        self.norms = [bf16(s.hidden) for _ in range(2)]
        sizes = {QkNorm.EACH_HEAD: (s.head_size,) * 2, QkNorm.ALL_HEADS: (inner, s.kv_heads * s.head_size)}
        self.qk_norms = [bf16(size) for size in sizes.get(s.qk_norm, ())]
        self.sinks_A = torch.randn(s.heads) if s.has_sinks else None
        self.keys, self.values = (bf16(self.pages * PAGE_SIZE, s.kv_heads, s.head_size) for _ in range(2))
        weights = AttentionWeights(
            num_heads=s.heads,
            num_kv_heads=s.kv_heads,
            head_size=s.head_size,
            norm_H=self.norms[0],
            norm_epsilon=1e-6,
            qkv=pack_linear([self.qkv_OH[: inner + 32], self.qkv_OH[inner + 32 :]], self._parts(inner + 32)),
            qk_norm=s.qk_norm,
            q_norm=self.qk_norms[0] if self.qk_norms else None,
            k_norm=self.qk_norms[1] if self.qk_norms else None,
            qk_epsilon=1e-5,
            out=pack_linear([self.out_HO], [self.out_bias]),
            next_norm_H=self.norms[1],
            next_epsilon=1e-6,
            scale=0.2,
            window=s.window,
            softcap=s.softcap,
            sinks_A=self.sinks_A,
        )
        self.compiled = AttentionLayer(weights, self.keys, self.values, PAGE_SIZE, s.rope_size)

    def _parts(self, first: int) -> list[Tensor | None]:
        return [None, None] if self.qkv_bias is None else [self.qkv_bias[:first], self.qkv_bias[first:]]


def step_of(layer: Layer, sequences: list[tuple[int, int]]) -> AttentionStep:
    """Return a step of sequences, each with so many tokens in the cache and so many new ones, on pages in any order."""
    s = layer.shape
    needed = [-(-(context + new) // PAGE_SIZE) for context, new in sequences]
    order = torch.randperm(layer.pages).tolist()
    pages_NP = torch.zeros((len(sequences), max(needed)), dtype=torch.int64)
    for n, (start, count) in enumerate(zip(itertools.accumulate([0, *needed]), needed, strict=False)):
        pages_NP[n, :count] = torch.tensor(order[start : start + count])
    tokens = [(n, c + i) for n, (c, new) in enumerate(sequences) for i in range(new)]
    positions = torch.tensor([position for _, position in tokens])
    angles = positions.unsqueeze(1) * torch.tensor([1.3**-i for i in range(s.rope_size // 2)]).repeat(2)
    size = (len(tokens), s.heads, s.head_size)
    return AttentionStep(
        cos_TR=angles.cos(),
        sin_TR=angles.sin(),
        write_T=torch.tensor([int(pages_NP[n, p // PAGE_SIZE]) * PAGE_SIZE + p % PAGE_SIZE for n, p in tokens]),
        sequence_T=torch.tensor([n for n, _ in tokens]),
        length_T=positions + 1,
        pages_NP=pages_NP,
        query_TAD=torch.empty(size, dtype=torch.bfloat16),
        attended_TAD=torch.empty(size, dtype=torch.bfloat16),
    )


def rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def reference(layer: Layer, x_TH: Tensor, step: AttentionStep) -> tuple[Tensor, Tensor]:
    """Compute the layer in float32, one row after another, on copies of the cache."""
    s = layer.shape
    keys, values = layer.keys.float(), layer.values.float()
    inner, kv = s.heads * s.head_size, s.kv_heads * s.head_size
    qkv = rms(x_TH.float(), layer.norms[0], 1e-6) @ layer.qkv_OH.float().T
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias.float()
    q, k, v = qkv[:, :inner], qkv[:, inner : inner + kv], qkv[:, inner + kv :]
    if s.qk_norm is QkNorm.ALL_HEADS:
        q, k = rms(q, layer.qk_norms[0], 1e-5), rms(k, layer.qk_norms[1], 1e-5)
    q, k, v = q.view(-1, s.heads, s.head_size), k.view(-1, s.kv_heads, s.head_size), v.view(-1, s.kv_heads, s.head_size)
    if s.qk_norm is QkNorm.EACH_HEAD:
        q, k = rms(q, layer.qk_norms[0], 1e-5), rms(k, layer.qk_norms[1], 1e-5)
    q, k = (rotated(x, step.cos_TR, step.sin_TR) for x in (q, k))
    keys[step.write_T], values[step.write_T] = k, v
    attended = torch.stack([attend(layer, q[t], t, keys, values, step) for t in range(len(x_TH))])
    out = attended.flatten(1) @ layer.out_HO.float().T
    if layer.out_bias is not None:
        out = out + layer.out_bias.float()
    residual = x_TH.float() + out
    return residual, rms(residual, layer.norms[1], 1e-6)


def rotated(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    size = cos_TR.shape[1]
    turned, rest = x[..., :size], x[..., size:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos_TR.unsqueeze(1) + torch.cat([-high, low], dim=-1) * sin_TR.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1)


def attend(layer: Layer, q_AD: Tensor, row: int, keys: Tensor, values: Tensor, step: AttentionStep) -> Tensor:
    s, length = layer.shape, int(step.length_T[row])
    positions = range(max(0, length - s.window) if s.window else 0, length)
    pages_P = step.pages_NP[step.sequence_T[row]].tolist()
    cache_L = [pages_P[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in positions]
    key_LAD, value_LAD = (x[cache_L].repeat_interleave(s.heads // s.kv_heads, dim=1) for x in (keys, values))
    scores_AL = torch.einsum("ad,lad->al", q_AD, key_LAD) * 0.2
    if s.softcap is not None:
        scores_AL = torch.tanh(scores_AL / s.softcap) * s.softcap
    if layer.sinks_A is not None:
        scores_AL = torch.cat([scores_AL, layer.sinks_A.unsqueeze(1)], dim=1)
    weights_AL = torch.softmax(scores_AL, dim=-1)[:, : len(cache_L)]
    return torch.einsum("al,lad->ad", weights_AL, value_LAD)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    error = float((got.float() - wanted).norm() / wanted.norm())
    assert error < TOLERANCE, error


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_a_layer_computes_what_its_parts_compute(isa: Isa, shape: Shape) -> None:
    torch.manual_seed(1)
    layer = Layer(shape, pages=80)
    for sequences in ([(0, 1)], [(33, 1), (0, 20), (16, 1), (5, 3)], [(0, 150)]):
        step = step_of(layer, sequences)
        x_TH = bf16(len(step.write_T), shape.hidden)
        wanted = reference(layer, x_TH, step)
        got = layer.compiled.run(x_TH, step, isa=isa)
        for mine, right in zip(got, wanted, strict=True):
            assert_close(mine, right)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_a_row_has_the_same_bits_whatever_is_beside_it(isa: Isa, threads: int) -> None:
    torch.manual_seed(2)
    layer = Layer(SHAPES["wide"], pages=80)
    # From 16 rows of a sequence on they attend together.
    step = step_of(layer, [(40, 1), (0, 15), (21, 1), (30, 15), (0, 15)])
    x_TH = bf16(len(step.write_T), layer.shape.hidden)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = layer.compiled.run(x_TH, step, isa=isa)
        for row in (0, 10, 15, 16, 40):
            alone = layer.compiled.run(x_TH[row : row + 1], row_of(step, row), isa=isa)
            assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


def row_of(step: AttentionStep, row: int) -> AttentionStep:
    return rows_of(step, slice(row, row + 1))


def rows_of(step: AttentionStep, rows: slice | list[int]) -> AttentionStep:
    tensors = {field.name: getattr(step, field.name) for field in fields(step)}
    return AttentionStep(**{n: t if n == "pages_NP" or t is None else t[rows] for n, t in tensors.items()})


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_many_rows_of_a_sequence_attend_together(isa: Isa, shape: Shape) -> None:
    torch.manual_seed(4)
    layer = Layer(shape, pages=200)
    layer.keys[:], layer.values[:] = float("nan"), float("nan")  # of nobody
    for sequences in ([(0, 16)], [(0, 129), (7, 1)], [(3, 64), (0, 17), (0, 200)], [(0, 300)]):
        step = step_of(layer, [(0, context + new) for context, new in sequences])
        x_TH = bf16(len(step.write_T), shape.hidden)
        before = layer.compiled.run(x_TH, step, isa=isa)  # the cache holds what comes before
        starts = itertools.accumulate([0, *(context + new for context, new in sequences)])
        rows = [s + context + i for s, (context, new) in zip(starts, sequences, strict=False) for i in range(new)]
        part = rows_of(step, rows)
        got = layer.compiled.run(x_TH[rows].contiguous(), part, isa=isa)
        wanted = reference(layer, x_TH[rows], part)
        for mine, right in zip(got, wanted, strict=True):
            assert_close(mine, right)
        del before


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
def test_where_a_sequence_is_cut_changes_no_bit(isa: Isa) -> None:
    torch.manual_seed(5)
    layer = Layer(SHAPES["plain"], pages=80)
    step = step_of(layer, [(0, 250), (0, 40)])
    x_TH = bf16(len(step.write_T), layer.shape.hidden)
    whole = layer.compiled.run(x_TH, step, isa=isa)
    for begin, end in ((100, 250), (130, 200), (17, 33), (250, 290)):
        rows = slice(begin, end)
        part = rows_of(step, rows)
        got = layer.compiled.run(x_TH[rows].contiguous(), part, isa=isa)
        assert all(torch.equal(mine, right[rows]) for mine, right in zip(got, whole, strict=True))


@given(
    experts=st.sampled_from([1, 2, 7, 8, 32, 60, 64, 128, 200, 256]),
    choices=st.integers(1, 8),
    rows=st.integers(1, 40),
    normalise=st.booleans(),
    rounded=st.booleans(),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_a_router_chooses_as_torch_does(
    experts: int, choices: int, rows: int, normalise: bool, rounded: bool, has_bias: bool, seed: int
) -> None:
    """Given the same scores, of which many are equal: bf16 has few numbers."""
    torch.manual_seed(seed)
    layer, choices = Layer(SHAPES["plain"], pages=20), min(choices, experts)
    weight, outputs = torch.zeros(padded_outputs(experts), layer.shape.hidden, dtype=torch.bfloat16), experts
    weight[:outputs] = bf16(outputs, layer.shape.hidden, scale=0.05)
    bias = bf16(weight.shape[0]) if has_bias else None
    router = Router(
        linear=pack_linear([weight], [bias]),
        num_experts=experts,
        top_k=choices,
        normalise=normalise,
        rounded=rounded,
    )
    routed = AttentionLayer(layer.compiled.weights, layer.keys, layer.values, PAGE_SIZE, layer.shape.rope_size, router)
    step = with_room(step_of(layer, [(0, 1)] * min(rows, 19)), router)
    x_TH = bf16(len(step.write_T), layer.shape.hidden)
    _, normed_TH = routed.run(x_TH, step)
    assert step.scores_TO is not None
    scores_TE = step.scores_TO[:, :experts].float()
    bias_E = torch.zeros(experts) if bias is None else bias[:experts].float()
    torch.testing.assert_close(scores_TE, normed_TH.float() @ weight[:experts].float().T + bias_E, rtol=0.02, atol=0.02)
    weights_TK, ids_TK = torch.softmax(scores_TE, dim=-1).topk(choices)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    assert torch.equal(step.ids_TK, ids_TK)  # type: ignore[arg-type]  # there is room
    exact = step.weights_TK
    if rounded:
        assert torch.equal(exact, exact.bfloat16().float())  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(exact, weights_TK, rtol=2**-8 if rounded else 1e-5, atol=0)


def with_room(step: AttentionStep, router: Router) -> AttentionStep:
    rows = len(step.write_T)
    return replace(
        step,
        scores_TO=torch.empty((rows, router.linear.num_outputs), dtype=torch.bfloat16),
        ids_TK=torch.empty((rows, router.top_k), dtype=torch.int64),
        weights_TK=torch.empty((rows, router.top_k)),
    )


def test_scores_that_are_no_numbers_choose_some_experts() -> None:
    """What comes of it is not finite, and the request ends with an error; no other is touched."""
    layer = Layer(SHAPES["plain"], pages=20)
    router = Router(
        linear=pack_linear([bf16(32, layer.shape.hidden)]), num_experts=32, top_k=4, normalise=True, rounded=False
    )
    routed = AttentionLayer(layer.compiled.weights, layer.keys, layer.values, PAGE_SIZE, layer.shape.rope_size, router)
    step = with_room(step_of(layer, [(0, 1), (0, 1)]), router)
    x_TH = bf16(2, layer.shape.hidden)
    x_TH[0] = float("nan")
    routed.run(x_TH, step)
    assert step.ids_TK is not None
    assert step.weights_TK is not None
    assert all(0 <= expert < 32 for expert in step.ids_TK.flatten().tolist())
    assert step.weights_TK[0].isnan().all()
    assert step.weights_TK[1].isfinite().all()


@given(
    rows=st.integers(0, 300),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 6),
    has_bias=st.booleans(),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_any_linear_layer(rows: int, inputs: int, outputs: int, has_bias: bool, isa: Isa, seed: int) -> None:
    torch.manual_seed(seed)
    weight = bf16(32 * outputs, 32 * inputs)
    bias = bf16(32 * outputs) if has_bias else None
    x = bf16(rows, 32 * inputs)
    got = pack_linear([weight], [bias])(x, isa)
    assert got.shape == (rows, 32 * outputs)
    if rows:
        assert_close(got, F.linear(x.float(), weight.float(), None if bias is None else bias.float()))


def test_what_the_kernel_cannot_do_is_said() -> None:
    assert can_pack_linear(bf16(64, 32))
    assert not can_pack_linear(bf16(64, 48))
    assert not can_pack_linear(torch.zeros(64, 32))
    assert can_attend(16, 8, 64, 64)
    assert not can_attend(16, 8, 64, 16), "too few elements are rotated for a vector"
    assert not can_attend(64, 2, 64, 64), "too many heads share a key"
    assert not can_attend(8, 8, 512, 64), "heads are too large"
