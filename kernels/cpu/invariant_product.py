"""Matrix products whose every element is the same to the bit, whatever else is computed beside it.

Shape suffixes: O and B batch dimensions, M rows, N columns, K what is summed over.
"""

import ctypes

import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_invariant_product

# Below this many multiply-adds a thread, waking another one costs more than it does.
_WORK_A_THREAD = 1 << 18


def product_along(x_OBMK: Tensor, w_OBNK: Tensor, *, use_wide: bool = True) -> Tensor:
    """Multiply x with the transpose of w, whose rows lie along what is summed over: a linear layer's weight, keys.

    Args:
        x_OBMK: float32 or bfloat16. Copied if the elements of a row are not neighbours.
        w_OBNK: dtype of x, and likewise.
        use_wide: whether registers of 512 bits may be used; the result is the same.

    Returns:
        [O, B, M, N], dtype of x, summed in float32. An element is a function of its row of x and its row of w alone.

    Raises:
        KernelBuildError: there is no compiled kernel on this machine.
    """
    return _multiply(x_OBMK, w_OBNK, w_OBNK.shape[2], along=True, use_wide=use_wide)


def product_across(x_OBMK: Tensor, w_OBKN: Tensor, *, use_wide: bool = True) -> Tensor:
    """Multiply x with w, whose rows lie across what is summed over: a transposed weight, values.

    As `product_along`, in another order. Where x is zero, it does not matter what is in w, if that is finite.
    """
    return _multiply(x_OBMK, w_OBKN, w_OBKN.shape[3], along=False, use_wide=use_wide)


def _multiply(x: Tensor, w: Tensor, num_columns: int, *, along: bool, use_wide: bool) -> Tensor:
    outer, inner, rows, depth = x.shape
    assert w.shape == ((outer, inner, num_columns, depth) if along else (outer, inner, depth, num_columns)), (
        f"cannot multiply {list(x.shape)} with {list(w.shape)}"
    )
    assert x.dtype == w.dtype, f"cannot multiply {x.dtype} with {w.dtype}"
    assert x.dtype in (torch.float32, torch.bfloat16), f"no product of {x.dtype} that keeps to one order"
    x, w = _with_rows(x), _with_rows(w)
    y_OBMN = x.new_empty((outer, inner, rows, num_columns))
    threads = min(torch.get_num_threads(), 1 + y_OBMN.numel() * depth // _WORK_A_THREAD)
    pointer = ctypes.c_void_p
    load_invariant_product().multiply(
        pointer(x.data_ptr()),
        pointer(w.data_ptr()),
        pointer(y_OBMN.data_ptr()),
        (ctypes.c_int64 * 5)(outer, inner, rows, num_columns, depth),
        (ctypes.c_int64 * 6)(*x.stride()[:3], *w.stride()[:3]),
        ctypes.c_int(x.dtype == torch.bfloat16),
        ctypes.c_int(along),
        ctypes.c_int(use_wide),
        ctypes.c_int(threads),
    )
    return y_OBMN


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()
