"""The grouped expert MLP against its slow twin.

Shape suffixes: T rows, H hidden, P (row, slot) pairs, W expert width, U up-projection width, S slots.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, relu, rms_norm, silu

from expertmesh.kernels.grouped_mlp import ExpertMath, SlotWeights, grouped_mlp, grouped_mlp_pairs, reference_mlp

# float32: the two differ in the order of sums of at most 24 products, and of a row's pairs.
FLOAT32_TOLERANCE = 1e-5
# bfloat16 has 8 significant bits. Both paths round at the same places (up projection, activation, down projection), now
# and then to neighbours 2**-7 apart, as their sums run in another order: four such steps of the largest value.
BF16_TOLERANCE = 4 * 2**-7


def swiglu(up_PU: Tensor) -> Tensor:
    gate_PW, linear_PW = up_PU.chunk(2, dim=-1)
    return silu(gate_PW) * linear_PW


def reglu(up_PU: Tensor) -> Tensor:
    gate_PW, linear_PW = up_PU.chunk(2, dim=-1)
    return relu(gate_PW) * linear_PW


def smooth_norm(out_PH: Tensor) -> Tensor:
    return rms_norm(out_PH, out_PH.shape[-1:], eps=1.0)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the MLP; sizes are T, S and H. is_whole: all values are small integers, so that no sum is rounded."""

    sizes: tuple[int, int, int] = (5, 4, 16)
    width: int = 24
    pairs: tuple[tuple[int, int], ...] = ()
    has_gate: bool = True
    is_transposed: bool = False
    has_bias: bool = False
    has_post_norm: bool = False
    is_whole: bool = False
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows, slots = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    pair = st.tuples(st.integers(0, rows - 1), st.integers(0, slots - 1))
    return Case(
        sizes=(rows, slots, draw(st.sampled_from([1, 8, 24]))),
        width=draw(st.sampled_from([1, 8, 24])),
        pairs=tuple(draw(st.lists(pair, max_size=16))),
        has_gate=draw(st.booleans()),
        is_transposed=draw(st.booleans()),
        has_bias=draw(st.booleans()),
        has_post_norm=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def inputs(
    case: Case, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, dict[str, Tensor], SlotWeights, ExpertMath]:
    """Return a case's rows, its pairs (row_P, slot_P, weight_P), the slots' weights and the experts' function."""
    rows, slots, hidden = case.sizes
    up_width = 2 * case.width if case.has_gate else case.width
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        if case.is_whole:
            return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)
        return (torch.randn(shape, generator=generator) * (0.3 if len(shape) == 3 else 1)).to(device, dtype)

    up_SUH, down_SHW = random(slots, up_width, hidden), random(slots, hidden, case.width)
    if case.is_transposed:
        up_SUH, down_SHW = up_SUH.transpose(1, 2).contiguous(), down_SHW.transpose(1, 2).contiguous()
    weights = SlotWeights(
        up_SUH=up_SUH,
        down_SHW=down_SHW,
        up_bias_SU=random(slots, up_width) if case.has_bias else None,
        down_bias_SH=random(slots, hidden) if case.has_bias else None,
    )
    gate, plain = (reglu, relu) if case.is_whole else (swiglu, gelu)
    math = ExpertMath(
        activate=gate if case.has_gate else plain,
        is_transposed=case.is_transposed,
        post_norm=smooth_norm if case.has_post_norm else None,
    )
    rows_TH = random(rows, hidden)
    pairs_P2 = torch.tensor(case.pairs, dtype=torch.int64, device=device).reshape(-1, 2)
    row_P, slot_P = pairs_P2.unbind(1)
    weight_P = torch.rand(len(case.pairs), generator=generator).to(device)
    if case.is_whole:
        weight_P = (weight_P * 4).ceil() / 4
    return rows_TH, {"row_P": row_P, "slot_P": slot_P, "weight_P": weight_P}, weights, math


def compute(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return what the fast path and the slow twin make of a case."""
    rows_TH, arguments, weights, math = inputs(case, dtype, device)
    return (
        grouped_mlp(rows_TH, **arguments, slots=weights, math=math),
        reference_mlp(rows_TH, **arguments, slots=weights, math=math),
    )


@given(cases())
@settings(max_examples=40, deadline=None)
def test_pairs_are_the_outputs_that_are_summed(case: Case) -> None:
    """Each pair's output by itself, in the order of the pairs: weighted and added up they are the rows."""
    rows_TH, pairs, weights, math = inputs(case, torch.float32)
    out_PH = grouped_mlp_pairs(rows_TH, row_P=pairs["row_P"], slot_P=pairs["slot_P"], slots=weights, math=math)
    weighted_PH = out_PH * pairs["weight_P"].unsqueeze(1)
    got_TH = torch.zeros_like(rows_TH).index_add_(0, pairs["row_P"], weighted_PH)
    expected_TH = reference_mlp(rows_TH, **pairs, slots=weights, math=math)
    torch.testing.assert_close(got_TH, expected_TH, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


def assert_close_in_bf16(got_TH: Tensor, expected_TH: Tensor) -> None:
    largest = float(expected_TH.abs().max())
    torch.testing.assert_close(got_TH, expected_TH, rtol=0, atol=BF16_TOLERANCE * largest)


@given(cases())
@settings(max_examples=70, deadline=None)
def test_float32_equals_the_reference(case: Case) -> None:
    got_TH, expected_TH = compute(case, torch.float32)
    assert got_TH.dtype == torch.float32
    torch.testing.assert_close(got_TH, expected_TH, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)


@given(cases())
@settings(max_examples=50, deadline=None)
def test_bf16_equals_the_reference_exactly_where_no_sum_is_rounded(case: Case) -> None:
    got_TH, expected_TH = compute(replace(case, is_whole=True, has_post_norm=False), torch.bfloat16)
    assert got_TH.dtype == torch.float32
    assert torch.equal(got_TH, expected_TH)


EDGES = {
    "ragged groups, an empty slot between": ((0, 0), (1, 0), (2, 0), (3, 3), (0, 3), (4, 1)),
    "one row on all slots": ((2, 0), (2, 1), (2, 2), (2, 3)),
    "all rows on one slot": ((0, 2), (1, 2), (2, 2), (3, 2), (4, 2)),
    "the last slot alone": ((1, 3),),
    "no pairs": (),
    "one row twice on a slot": ((1, 1), (1, 1)),
    "slots in falling order": ((0, 3), (1, 2), (2, 1), (3, 0)),
}
MATHS = {
    "gate": Case(),
    "no gate": Case(has_gate=False),
    "biases": Case(has_bias=True),
    "transposed with biases": Case(is_transposed=True, has_bias=True),
    "norm after each expert": Case(has_post_norm=True),
}


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, math: str) -> None:
    case = replace(MATHS[math], pairs=EDGES[edge])
    got_TH, expected_TH = compute(case, torch.float32)
    torch.testing.assert_close(got_TH, expected_TH, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    without_pair = sorted(set(range(case.sizes[0])) - {row for row, _ in case.pairs})
    assert not got_TH[without_pair].any()
    assert got_TH.any() == bool(case.pairs)


@pytest.mark.parametrize("math", MATHS)
@pytest.mark.parametrize("edge", EDGES)
def test_bf16_equals_the_reference_within_its_rounding(edge: str, math: str) -> None:
    got_TH, expected_TH = compute(replace(MATHS[math], pairs=EDGES[edge]), torch.bfloat16)
    assert got_TH.dtype == torch.float32
    assert_close_in_bf16(got_TH, expected_TH)


def test_a_value_worked_by_hand() -> None:
    """Row (1, 2) through gate (1, 0) and up (0, 1) is relu(1) * 2 = 2; down (3, 5) at weight 0.5 gives (3, 5)."""
    weights = SlotWeights(up_SUH=torch.eye(2).unsqueeze(0), down_SHW=torch.tensor([[[3.0], [5.0]]]))
    math = ExpertMath(activate=lambda up_PU: relu(up_PU[:, :1]) * up_PU[:, 1:])
    pair = {"row_P": torch.tensor([1]), "slot_P": torch.tensor([0]), "weight_P": torch.tensor([0.5])}
    for mlp in (grouped_mlp, reference_mlp):
        got_TH = mlp(torch.tensor([[7.0, 7.0], [1.0, 2.0]]), **pair, slots=weights, math=math)
        assert got_TH.tolist() == [[0.0, 0.0], [3.0, 5.0]]


def test_a_rows_result_does_not_depend_on_what_other_rows_ask_of_other_slots() -> None:
    """To the bit: what lets a shard take the packets of several workers together. A pair's weight is drawn first."""
    alone_TH, _ = compute(Case(pairs=((2, 1),)), torch.float32)
    together_TH, _ = compute(Case(pairs=((2, 1), (0, 0), (1, 0), (3, 3), (4, 2))), torch.float32)
    assert torch.equal(alone_TH[2], together_TH[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("edge", EDGES)
def test_bf16_on_a_gpu_equals_the_reference_within_its_rounding(edge: str, is_transposed: bool) -> None:
    case = Case(sizes=(5, 4, 64), width=32, pairs=EDGES[edge], is_transposed=is_transposed, has_bias=True)
    got_TH, expected_TH = compute(case, torch.bfloat16, "cuda")
    assert_close_in_bf16(got_TH, expected_TH)
