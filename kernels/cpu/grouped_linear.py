"""Skinny grouped bf16 products on CPU: each touched slot's weights are read once, in their own layout.

Shape suffixes: P rows sorted by slot, I input, O output, S slots, B blocks of at most 32 rows of one slot.
"""

import ctypes
from functools import cache

import numpy as np
import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_library
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import num_threads

_BLOCK_ROWS = 32
# Above this many rows a slot the product is bound by arithmetic, and torch's blocked GEMM is faster. Measured on
# Sapphire Rapids: above 64 with AMX, between 4 and 8 with dot products.
_MOST_ROWS = {"amx": 64, "avx512": 4}


@cache
def instruction_set() -> str | None:
    """Return "amx", "avx512", or None where only torch's kernels can be used."""
    names = {Isa.AMX: "amx", Isa.AVX512_BF16: "avx512"}
    return None if load_library() is None else names.get(best_isa())


def can_multiply(x_PI: Tensor, weight_SOI: Tensor) -> bool:
    """Say whether `grouped_linear` can do a product, whatever the number of rows."""
    if x_PI.dtype != torch.bfloat16 or x_PI.device.type != "cpu" or weight_SOI.dtype != torch.bfloat16:
        return False
    if weight_SOI.shape[1] % 16 or weight_SOI.shape[2] % 32 or not weight_SOI.is_contiguous():
        return False
    return instruction_set() is not None


def is_supported(x_PI: Tensor, weight_SOI: Tensor, most_rows: int) -> bool:
    """Say whether `grouped_linear` can do a product, and is the faster way, with at most most_rows rows a slot."""
    if not can_multiply(x_PI, weight_SOI):
        return False
    found = instruction_set()
    return found is not None and most_rows <= _MOST_ROWS[found]


def grouped_linear(x_PI: Tensor, weight_SOI: Tensor, counts_S: list[int], isa: str | None = None) -> Tensor:
    """Multiply each slot's run of rows with the transpose of its matrix.

    Args:
        x_PI: bfloat16, sorted by slot.
        weight_SOI: bfloat16, contiguous; O a multiple of 16, I of 32.
        counts_S: rows of each slot; they sum to P.
        isa: "amx" or "avx512"; None: the best there is.

    Returns:
        bfloat16 [P, O], accumulated in float32.
    """
    library, best = load_library(), instruction_set()
    assert library is not None, "grouped_linear() without compiled kernels"
    isa = isa or best
    x_PI = x_PI.contiguous()
    num_rows, width = x_PI.shape
    out_PO = torch.empty((num_rows, weight_SOI.shape[1]), dtype=torch.bfloat16)
    blocks_3B = _blocks(counts_S)
    num_blocks = blocks_3B.shape[1]
    scratch = torch.empty(num_blocks * _BLOCK_ROWS * width // 2 if isa == "amx" else 0, dtype=torch.int32)
    pointer = ctypes.c_void_p
    library.grouped_linear(
        pointer(x_PI.data_ptr()),
        pointer(weight_SOI.data_ptr()),
        pointer(out_PO.data_ptr()),
        ctypes.c_int64(weight_SOI.shape[1]),
        ctypes.c_int64(width),
        ctypes.c_int64(num_blocks),
        *(pointer(row.ctypes.data) for row in blocks_3B),
        pointer(scratch.data_ptr()),
        ctypes.c_int(isa == "amx"),
        ctypes.c_int(num_threads()),
    )
    return out_PO


def _blocks(counts_S: list[int]) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Cut the rows into blocks: rows slot, first row, number of rows."""
    slots, starts, sizes = [], [], []
    start = 0
    for slot, count in enumerate(counts_S):
        for offset in range(0, count, _BLOCK_ROWS):
            slots.append(slot)
            starts.append(start + offset)
            sizes.append(min(_BLOCK_ROWS, count - offset))
        start += count
    return np.array([slots, starts, sizes], dtype=np.int64)
