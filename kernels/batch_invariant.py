"""Operators of torch's CPU backend whose result for a row depends on its batch, replaced by ones whose result does not.

Three kinds depend on it. Matrix products choose kernel, blocks and order of summation by the number of rows and of
threads. Vectorised functions compute the last elements of a tensor, or of a thread's part of one, by another routine
than the others. Of these, the ones that differ are rewritten with functions that use one routine throughout (exp, tanh,
erf: measured by the tests). Reductions over the last dimension need nothing: each row is summed alone.

Shape suffixes: M rows, N columns, K what is summed over, B batch.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_invariant_product
from expertmesh.kernels.cpu.grouped_linear import can_multiply, grouped_linear
from expertmesh.kernels.cpu.invariant_product import product_across, product_along


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Replace the operators in this process, for all its threads, while the block lasts.

    Raises:
        KernelBuildError: a product that keeps to one order could not be compiled on this machine.
    """
    load_invariant_product()
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            # That a kernel is replaced is what torch warns of, and what is meant.
            warnings.filterwarnings("ignore", message="Warning only once for all operators", category=UserWarning)
            for name, function in REPLACED.items():
                library.impl(name, function, "CPU")
        yield
    finally:
        library._destroy()


def mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """Multiply two matrices. How is chosen by dtype and layout of b_KN alone, which is a weight."""
    weight_NK = b_KN.T
    if can_multiply(a_MK, weight_NK.unsqueeze(0)):
        return grouped_linear(a_MK, weight_NK.unsqueeze(0), [a_MK.shape[0]])
    return bmm(a_MK.unsqueeze(0), b_KN.unsqueeze(0))[0]


def bmm(a_BMK: Tensor, b_BKN: Tensor) -> Tensor:
    """Multiply matrices of a batch."""
    x_1BMK = a_BMK.contiguous().unsqueeze(0)
    if b_BKN.stride(1) == 1:
        return product_along(x_1BMK, b_BKN.transpose(1, 2).unsqueeze(0))[0]
    return product_across(x_1BMK, (b_BKN if b_BKN.stride(2) == 1 else b_BKN.contiguous()).unsqueeze(0))[0]


def _added(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def add_product(to: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        out = product(a, b) if alpha == 1 else product(a, b) * alpha
        return out + (to if beta == 1 else to * beta)

    return add_product


def _sigmoid(x: Tensor) -> Tensor:
    return (1 / (1 + torch.exp(-x.float()))).to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    wide = x.float()
    return (wide / (1 + torch.exp(-wide))).to(x.dtype)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    wide = x.float()
    if approximate == "tanh":
        inner = torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * (wide * wide * wide)))
    else:
        inner = torch.erf(wide * math.sqrt(0.5))
    return (0.5 * wide * (1 + inner)).to(x.dtype)


def _softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    scaled = x.float() * beta
    return torch.where(scaled > threshold, x.float(), torch.log1p(torch.exp(scaled)) / beta).to(x.dtype)


def _rsqrt(x: Tensor) -> Tensor:
    return (1 / torch.sqrt(x.float())).to(x.dtype)


def _power_of(base: float, x: Tensor) -> Tensor:
    return torch.exp(x.double() * math.log(base)).to(x.dtype if x.is_floating_point() else torch.get_default_dtype())


def _polar(length: Tensor, angle: Tensor) -> Tensor:
    return torch.complex(length * torch.cos(angle), length * torch.sin(angle))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, *rest, **options: x.copy_(function(x, *rest, **options))


def _into(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*arguments: Any, out: Tensor, **options: Any) -> Tensor:
        result = function(*arguments, **options)
        return out.resize_(result.shape).copy_(result)

    return run


_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": _sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "softplus": _softplus,
    "rsqrt": _rsqrt,
}
_PRODUCTS: dict[str, Callable[..., Tensor]] = {"mm": mm, "bmm": bmm, "addmm": _added(mm), "baddbmm": _added(bmm)}
# By overload: what is returned, what is written over its input, what is written to another tensor.
REPLACED: dict[str, Callable[..., Tensor]] = {
    **_PRODUCTS,
    **_POINTWISE,
    "pow.Scalar": _power_of,
    "polar": _polar,
    **{f"{name}_": _in_place(f) for name, f in _POINTWISE.items() if name != "softplus"},
    **{f"{name}.out": _into(f) for name, f in {**_PRODUCTS, **_POINTWISE}.items()},
}
