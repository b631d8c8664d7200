"""The compiled drawing of tokens against torch's, for every instruction set.

Shapes: N rows, V vocabulary.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.kernels.cpu.build import find_compiler
from expertmesh.kernels.cpu.draw import can_draw, draw_rows
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.sampling import SamplingSettings, _draw_filtered, uniform

if find_compiler() is None:
    pytest.skip("the CPU kernels cannot be built here: no C++ compiler", allow_module_level=True)
ISAS = [isa for isa in Isa if isa <= best_isa()]


@given(
    num_rows=st.integers(1, 6),
    vocab_size=st.one_of(st.integers(1, 40), st.integers(1000, 5000)),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    temperature=st.sampled_from([0.0, 0.2, 1.0, 2.5, 1e-45, 1e39]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=150, deadline=None)
def test_it_draws_what_torch_draws(
    num_rows: int, vocab_size: int, dtype: torch.dtype, temperature: float, isa: Isa, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (torch.randn(num_rows, vocab_size, generator=generator) * 3).to(dtype)
    logits_NV[torch.rand(logits_NV.shape, generator=generator) < 0.1] = -math.inf
    logits_NV[:, seed % vocab_size] = 1.0
    wanted = [SamplingSettings(temperature=temperature, seed=seed + n) for n in range(num_rows)]
    positions = list(range(num_rows))
    ids_N, best_N = draw_rows(
        logits_NV,
        [s.temperature for s in wanted],
        [uniform(s.seed, p) for s, p in zip(wanted, positions, strict=True)],
        isa,
    )
    other_ids_N, other_best_N = _draw_filtered(logits_NV.float(), wanted, positions)
    assert torch.equal(best_N, other_best_N)
    assert torch.equal(ids_N, other_ids_N)


@pytest.mark.parametrize("isa", ISAS, ids=lambda isa: isa.name)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_without_a_finite_largest_score_are_told(isa: Isa, bad: float) -> None:
    logits_NV = torch.zeros(3, 100)
    logits_NV[1] = -math.inf
    logits_NV[1, 70] = bad
    _, best_N = draw_rows(logits_NV, [1.0, 1.0, 0.0], [0.5] * 3, isa)
    assert best_N.isfinite().tolist() == [True, False, True]


def test_a_row_does_not_depend_on_threads_or_batch() -> None:
    logits_NV = torch.randn(7, 3001)
    uniforms = [(n + 0.5) / 7 for n in range(7)]
    before = torch.get_num_threads()
    try:
        drawn = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            drawn.append(draw_rows(logits_NV, [0.9] * 7, uniforms)[0].tolist())
    finally:
        torch.set_num_threads(before)
    alone = [int(draw_rows(logits_NV[n : n + 1], [0.9], [uniforms[n]])[0]) for n in range(7)]
    assert drawn[0] == drawn[1] == alone


def test_what_it_cannot_read_is_said() -> None:
    assert can_draw(torch.zeros(2, 8))
    assert not can_draw(torch.zeros(2, 8).half())
    assert not can_draw(torch.zeros(8, 2).T)
