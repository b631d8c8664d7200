"""Grouped matrix product on a GPU for few rows an expert, in Triton: each touched expert's matrix is read once.

`grouped_mm` makes tiles of at least 64 rows; with a row or two an expert most of that is padding.

Shape suffixes: P rows, I in, O out, S slots, N tiles.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.gpu import has

# Rows of a tile: what a tensor core takes at least.
TILE_ROWS = 16
_TILE_OUT, _TILE_IN = 64, 128


def is_supported(x_PI: Tensor, num_slots: int) -> bool:
    """Say whether `grouped_linear` is for these rows: few an expert, on a GPU, and Triton is there.

    By design, not yet by measurement: benchmarks/gpu_kernels.py shows both sides.
    """
    is_few = x_PI.shape[0] <= TILE_ROWS * num_slots
    return is_few and x_PI.is_cuda and x_PI.dtype == torch.bfloat16 and has("triton")


def grouped_linear(x_PI: Tensor, weight_SOI: Tensor, counts_S: Tensor, *, is_transposed: bool) -> Tensor:
    """Multiply each slot's run of rows with its matrix; nothing waits for the GPU.

    Args:
        x_PI: rows sorted by slot, a floating dtype.
        weight_SOI: [S, O, I], or [S, I, O] where is_transposed, of the same dtype, contiguous.
        counts_S: rows of each slot, int64, on the same device.
        is_transposed: how the matrices lie.

    Returns:
        [P, O], summed in float32, in the dtype of x_PI.
    """
    num_rows, num_in = x_PI.shape
    num_out = weight_SOI.shape[2] if is_transposed else weight_SOI.shape[1]
    out_PO = x_PI.new_empty((num_rows, num_out))
    slot_N, first_N, end_N = _tiles(counts_S, num_rows)
    strides = weight_SOI.stride()
    out_stride, in_stride = (strides[2], strides[1]) if is_transposed else (strides[1], strides[2])
    kernel()[(len(slot_N), -(-num_out // _TILE_OUT))](
        x_PI.contiguous(),
        weight_SOI,
        out_PO,
        slot_N,
        first_N,
        end_N,
        num_in,
        num_out,
        strides[0],
        out_stride,
        in_stride,
        TILE_P=TILE_ROWS,
        TILE_O=_TILE_OUT,
        TILE_I=_TILE_IN,
    )
    return out_PO


def _tiles(counts_S: Tensor, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each tile's slot, first row and end of its slot's rows, int64 [N]; a slot of -1: there is no such tile.

    N depends on the shapes alone, so that nobody has to wait for counts_S.
    """
    num_slots = len(counts_S)
    num_tiles = min(num_rows, num_rows // TILE_ROWS + num_slots)
    tiles_end_S = ((counts_S + TILE_ROWS - 1) // TILE_ROWS).cumsum(0)
    rows_end_S = counts_S.cumsum(0)
    tile_N = torch.arange(num_tiles, device=counts_S.device)
    slot_N = torch.searchsorted(tiles_end_S, tile_N, right=True)
    here_N = slot_N.clamp(max=num_slots - 1)
    tiles_before_N = tiles_end_S[here_N] - (counts_S[here_N] + TILE_ROWS - 1) // TILE_ROWS
    first_N = rows_end_S[here_N] - counts_S[here_N] + (tile_N - tiles_before_N) * TILE_ROWS
    return torch.where(slot_N < num_slots, slot_N, -1), first_N, rows_end_S[here_N]


@functools.cache
def kernel() -> Any:
    """Return the Triton function."""
    import triton
    import triton.language as tl

    def multiply(  # type: ignore[no-untyped-def]  # Triton reads the source, its types are its own
        x,
        weight,
        out,
        slot_N,
        first_N,
        end_N,
        num_in,
        num_out,
        slot_stride,
        out_stride,
        in_stride,
        TILE_P: tl.constexpr,
        TILE_O: tl.constexpr,
        TILE_I: tl.constexpr,
    ):
        tile = tl.program_id(0)
        slot = tl.load(slot_N + tile)
        if slot >= 0:
            row_P = tl.load(first_N + tile) + tl.arange(0, TILE_P)
            has_row_P = row_P < tl.load(end_N + tile)
            out_O = tl.program_id(1) * TILE_O + tl.arange(0, TILE_O)
            has_out_O = out_O < num_out
            x_P = x + row_P[:, None] * num_in
            weight_O = weight + slot * slot_stride + out_O[None, :] * out_stride
            sum_PO = tl.zeros((TILE_P, TILE_O), dtype=tl.float32)
            for start in range(0, num_in, TILE_I):
                in_I = start + tl.arange(0, TILE_I)
                has_in_I = in_I < num_in
                x_PI = tl.load(x_P + in_I[None, :], mask=has_row_P[:, None] & has_in_I[None, :], other=0.0)
                weight_IO = tl.load(
                    weight_O + in_I[:, None] * in_stride, mask=has_in_I[:, None] & has_out_O[None, :], other=0.0
                )
                sum_PO = tl.dot(x_PI, weight_IO, sum_PO, input_precision="ieee")
            at_PO = out + row_P[:, None] * num_out + out_O[None, :]
            tl.store(at_PO, sum_PO.to(out.dtype.element_ty), mask=has_row_P[:, None] & has_out_O[None, :])

    return triton.jit(multiply)
