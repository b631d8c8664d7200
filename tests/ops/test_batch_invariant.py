"""Replaced operators against torch's own, and what deterministic mode believes of those that it leaves alone."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from expertmesh.kernels.batch_invariant import batch_invariant
from expertmesh.kernels.cpu import build
from expertmesh.kernels.cpu.grouped_linear import grouped_linear
from expertmesh.kernels.cpu.isa import Isa, best_isa

DTYPES = [torch.float32, torch.bfloat16]
POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "sigmoid in place": lambda x: x.clone().sigmoid_(),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x.clone(), inplace=True),
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "softplus, other settings": lambda x: F.softplus(x, beta=0.5, threshold=3),
    "rsqrt": lambda x: torch.rsqrt(x.abs()),
    "sigmoid into": lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
    "power of 10000": lambda x: torch.pow(10000.0, x / 9),
    # Left alone: one routine for every element.
    "exp": torch.exp,
    "exp in place": lambda x: x.clone().exp_(),
    "tanh": torch.tanh,
    "erf": torch.erf,
    "cos": torch.cos,
    "sin": torch.sin,
    "log": lambda x: torch.log(x.abs()),
    "log1p": lambda x: torch.log1p(x.abs()),
    "square": lambda x: x.pow(2),
    "cube": lambda x: x.pow(3),
    "reciprocal": torch.reciprocal,
    "sqrt": lambda x: x.abs().sqrt(),
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "mean": lambda x: x.mean(-1),
    "var": lambda x: x.var(-1),
    "norm": lambda x: x.norm(dim=-1),
    "cumsum": lambda x: x.cumsum(-1),
    "softmax": lambda x: x.softmax(-1),
    "softmax in float32": lambda x: F.softmax(x, -1, dtype=torch.float32),
    "log_softmax": lambda x: x.float().log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "topk": lambda x: x.topk(3, -1).indices,
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def replaced() -> Iterator[None]:
    with batch_invariant(), torch.inference_mode():
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def products() -> dict[str, Callable[[], Tensor]]:
    """Return every way by which a model comes to a product."""
    x, weight, bias = random(3, 5, 48), random(32, 48, seed=1), random(32, seed=2)
    return {
        "linear": lambda: F.linear(x, weight),
        "linear with bias": lambda: F.linear(x, weight, bias),
        "linear of a matrix with bias": lambda: F.linear(x[0], weight, bias),
        "matmul": lambda: x @ weight.T,
        "transposed weight": lambda: x @ weight.T.contiguous(),
        "weight of every second row": lambda: x @ weight[::2, ::2].T.repeat(2, 1),
        "bmm": lambda: torch.bmm(x, x.transpose(1, 2)),
        "baddbmm": lambda: torch.baddbmm(random(3, 5, 5), x, x.transpose(1, 2), beta=0.5, alpha=2),
        "addmm": lambda: torch.addmm(bias, x[0], weight.T, beta=2, alpha=0.5),
        "einsum": lambda: torch.einsum("bth,oh->bto", x, weight),
        "mm into": lambda: torch.mm(x[0], weight.T, out=torch.empty(5, 32)),
        "rotary angles": lambda: random(1, 8, 1) @ torch.arange(7.0).view(1, 1, 7),
        "linear in bfloat16": lambda: F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()),
        "odd sizes in bfloat16": lambda: x.bfloat16() @ weight[:7].bfloat16().T,
        "polar": lambda: torch.view_as_real(torch.polar(torch.ones(4), random(4))),
    }


@pytest.mark.parametrize("name", products())
def test_products_are_torchs_but_for_rounding(name: str) -> None:
    with torch.inference_mode():
        expected = products()[name]()
        with batch_invariant():
            got = products()[name]()
        assert torch.equal(products()[name](), expected), "torch's own operators are back"
    assert got.dtype == expected.dtype
    rtol, atol = (2**-6, 2**-4) if got.dtype == torch.bfloat16 else (1e-5, 1e-4)
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_functions_are_torchs_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    x = torch.cat([random(1000, dtype=dtype), torch.tensor([0.0, 30.0, -30.0], dtype=dtype)])
    expected = POINTWISE[name](x)
    with batch_invariant():
        got = POINTWISE[name](x)
    torch.testing.assert_close(got, expected, rtol=2**-7 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POINTWISE)
def test_an_element_does_not_depend_on_where_it_lies(name: str, dtype: torch.dtype) -> None:
    """Sizes around those of registers, and one that several threads share at odd bounds."""
    function = POINTWISE[name]
    for count, size in ((1, 31), (1, 70), (2, 40001)):
        torch.set_num_threads(count)
        x = random(size, dtype=dtype, seed=size)
        expected = function(torch.cat([x, x.new_ones(128)]))[:size]
        assert torch.equal(function(x), expected)
        assert torch.equal(function(x[7:]), expected[7:])
        assert torch.equal(function(x[-1:].clone()), expected[-1:])


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
@settings(max_examples=10, deadline=None)
@given(num_rows=st.integers(1, 70), width=st.sampled_from([8, 24, 33, 100, 1024]), threads=st.integers(1, 3))
def test_a_row_is_reduced_by_itself(name: str, dtype: torch.dtype, num_rows: int, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    x = random(num_rows, width, dtype=dtype, seed=width)
    row = num_rows // 2
    assert torch.equal(REDUCTIONS[name](x)[row], REDUCTIONS[name](x[row : row + 1].clone())[0])


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    outputs=st.sampled_from([1, 7, 48, 80]),
    inputs=st.sampled_from([24, 64, 160]),
    is_transposed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_a_row_of_a_product_does_not_depend_on_the_others(
    dtype: torch.dtype, num_rows: int, outputs: int, inputs: int, is_transposed: bool, seed: int
) -> None:
    x, weight = random(num_rows, inputs, dtype=dtype, seed=seed), random(outputs, inputs, dtype=dtype, seed=seed + 1)
    weight = weight.T.contiguous().T if is_transposed else weight
    together = F.linear(x, weight)
    assert all(torch.equal(F.linear(x[n : n + 1].clone(), weight)[0], together[n]) for n in (0, seed % num_rows))


def test_the_compiled_bf16_product_is_used_for_any_number_of_rows() -> None:
    """It differs from the other product in its last bits: who chooses by the number of rows gives a row two results."""
    if build.find_compiler() is None or best_isa() < Isa.AVX512_BF16:
        pytest.skip("no compiled bf16 product: no C++ compiler, or no bf16 instructions")
    weight = random(320, 640, dtype=torch.bfloat16)
    with batch_invariant():
        for count in (1, 65, 300):
            x = random(count, 640, dtype=torch.bfloat16, seed=1)
            assert torch.equal(F.linear(x, weight), grouped_linear(x, weight.unsqueeze(0), [count]))
            assert torch.equal(F.linear(x, weight, weight[:, 0]), F.linear(x, weight) + weight[:, 0])


def test_without_a_compiler_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    build.load_invariant_product.cache_clear()
    try:
        with pytest.raises(build.KernelBuildError, match="no C"), batch_invariant():
            pass
    finally:
        build.load_invariant_product.cache_clear()
