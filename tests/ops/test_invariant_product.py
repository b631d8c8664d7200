"""The product of one fixed order: right, and each element the same to the bit wherever it is computed.

Shape suffixes: O and B batch dimensions, M rows, N columns, K what is summed over.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.kernels.cpu import build
from expertmesh.kernels.cpu.invariant_product import product_across, product_along

DTYPES = [torch.float32, torch.bfloat16]
SIZES = st.tuples(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 5, 16, 23, 48])
)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def operands(sizes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return x [O, B, M, K] and w [O, B, N, K]."""
    outer, inner, rows, columns, depth = sizes
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(outer, inner, rows, depth, generator=generator)
    return x.to(dtype), torch.randn(outer, inner, columns, depth, generator=generator).to(dtype)


def across(x_OBMK: Tensor, w_OBNK: Tensor, *, use_wide: bool = True) -> Tensor:
    return product_across(x_OBMK, w_OBNK.transpose(2, 3).contiguous(), use_wide=use_wide)


@pytest.mark.parametrize("product", [product_along, across])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=30, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 1000))
def test_an_element_is_a_function_of_its_row_and_its_column(
    product: Callable[..., Tensor], dtype: torch.dtype, sizes: tuple[int, ...], seed: int
) -> None:
    x, w = operands(sizes, dtype, seed)
    got = product(x, w)
    expected = x.double() @ w.double().transpose(2, 3)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-4)
    assert torch.equal(product(x, w, use_wide=False), got)
    row, column = seed % sizes[2], seed % sizes[3]
    one = product(x[:1, -1:, row : row + 1], w[:1, -1:, column : column + 1])
    assert one.item() == got[0, -1, row, column].item()


@pytest.mark.parametrize("product", [product_along, across])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(product: Callable[..., Tensor], dtype: torch.dtype) -> None:
    x, w = operands((1, 3, 7, 333, 1001), dtype)
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(product(x, w))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_at_the_end_change_no_bit(dtype: torch.dtype) -> None:
    """Keys that a query may not see have weight 0, and values that may be anything finite."""
    x, w = operands((1, 1, 3, 20, 37), dtype)
    longer = torch.cat([x, x.new_zeros(1, 1, 3, 30)], dim=3)
    assert torch.equal(across(longer, torch.cat([w, w.new_full((1, 1, 20, 30), -7)], dim=3)), across(x, w))
    assert torch.equal(
        product_along(longer, torch.cat([w, w.new_full((1, 1, 20, 30), -7)], dim=3)), product_along(x, w)
    )


def test_strides_of_all_kinds() -> None:
    """Keys as they lie in a cache, shared by the heads of a group; rows whose elements are not neighbours."""
    x, _ = operands((2, 3, 4, 1, 8), torch.float32)
    cache_LGD = torch.randn(11, 3, 8)
    keys = cache_LGD.transpose(0, 1).unsqueeze(0).expand(2, -1, -1, -1)
    expected = product_along(x, keys.contiguous())
    assert torch.equal(product_along(x, keys), expected)
    assert torch.equal(product_along(x.transpose(2, 3).contiguous().transpose(2, 3), keys), expected)
    assert torch.equal(product_across(x, keys.transpose(2, 3)), across(x, keys))


@pytest.mark.parametrize("use_wide", [True, False])
@pytest.mark.parametrize("product", [product_along, across])
def test_multiply_and_add_round_once(product: Callable[..., Tensor], use_wide: bool) -> None:
    """(1 + 2**-12)**2 - (1 + 2**-11) is 2**-24, and 0 where the square is rounded before it is added."""
    x, w = torch.zeros(1, 1, 1, 17), torch.zeros(1, 1, 1, 17)
    x[..., 0], w[..., 0] = -(1 + 2**-11), 1
    x[..., 16] = w[..., 16] = 1 + 2**-12
    assert product(x, w, use_wide=use_wide).item() == 2**-24


def test_bfloat16_is_rounded_to_the_nearest_even() -> None:
    """Above 1, neighbours are 1/128 apart: halves go down to 1 and up to 1 + 2/128; the rest, and no number."""
    rows = [[1, 1 / 256, 0], [1, 3 / 256, 0], [1, 1 / 256, 1 / 512], [-1, -3 / 256, 0], [float("inf"), 0, 0]]
    got = product_along(torch.tensor([[rows]]).bfloat16(), torch.ones(1, 1, 1, 3).bfloat16())
    assert got.flatten().tolist() == [1, 1 + 2 / 128, 1 + 1 / 128, -1 - 2 / 128, float("inf")]
    assert product_along(torch.full((1, 1, 1, 1), torch.nan).bfloat16(), torch.ones(1, 1, 1, 1).bfloat16()).isnan()


def test_empty_products() -> None:
    x, w = operands((1, 2, 0, 3, 4), torch.float32)
    assert product_along(x, w).shape == (1, 2, 0, 3)
    assert product_along(x.new_ones(1, 1, 2, 0), w.new_ones(1, 1, 3, 0)).tolist() == [[[[0.0] * 3] * 2]]


def test_other_dtypes_and_sizes_that_do_not_fit_are_refused() -> None:
    x, w = operands((1, 1, 2, 3, 4), torch.float32)
    with pytest.raises(AssertionError, match=r"no product of torch\.float16"):
        product_along(x.half(), w.half())
    with pytest.raises(AssertionError, match=r"cannot multiply torch\.float32 with torch\.bfloat16"):
        product_along(x, w.bfloat16())
    with pytest.raises(AssertionError, match=r"cannot multiply \[1, 1, 2, 4\] with \[1, 1, 3, 5\]"):
        product_along(x, torch.zeros(1, 1, 3, 5))


@pytest.mark.parametrize(
    ("compiler", "reason"), [("/no/such/compiler", r"no C\+\+ compiler"), ("false", "cannot be built")]
)
def test_without_a_working_compiler_it_says_so(compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    build.load_invariant_product.cache_clear()
    try:
        with pytest.raises(build.KernelBuildError, match=reason):
            build.load_invariant_product()
    finally:
        build.load_invariant_product.cache_clear()
