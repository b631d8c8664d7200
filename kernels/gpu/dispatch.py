"""Dispatch on a GPU: rows gathered for packets and answers added up, by CUDA kernels that CuPy compiles.

Shape suffixes: T tokens, H hidden, K choices a token, R rows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from expertmesh.kernels.gpu import has

SOURCE = Path(__file__).with_name("dispatch.cu")
_VECTOR_BYTES = 16
_WARP, _WARPS = 32, 8
# Up to these, a kernel that gets its parallelism from within a row; above, one that fills the GPU once.
# By design, not yet by measurement: benchmarks/gpu_kernels.py shows what each costs.
_SMALL_ROWS = 64
_SMALL_TOKENS, _MEDIUM_TOKENS = 32, 512
_BLOCKS_PER_MULTIPROCESSOR = 4  # 64 registers a thread allow no more
_CUDA_TYPE = {torch.float32: "float", torch.bfloat16: "Bfloat16"}


@dataclass(frozen=True)
class Launch:
    """A kernel's name, and its grid and block in blocks and threads."""

    kernel: str
    grid: tuple[int, int]
    block: int


def gather_launch(num_rows: int, num_vectors: int, num_multiprocessors: int) -> Launch:
    """Choose how num_rows rows of num_vectors vectors of 16 bytes are gathered."""
    block = _WARP * _WARPS
    if num_rows <= _SMALL_ROWS:
        return Launch("gather_small", (-(-num_vectors // block), num_rows), block)
    return Launch("gather_large", (_filling(num_rows, num_multiprocessors), 1), block)


def combine_launch(
    dtype: torch.dtype, out_dtype: torch.dtype, num_tokens: int, num_vectors: int, num_multiprocessors: int
) -> Launch:
    """Choose how num_tokens sums of rows of num_vectors vectors of 16 bytes are made."""
    types = f"{_CUDA_TYPE[dtype]}, {_CUDA_TYPE[out_dtype]}"
    parts = -(-num_vectors // _WARP)
    if num_tokens <= _SMALL_TOKENS:
        # A block is one warp: 8 tokens are still spread over the whole GPU.
        return Launch(f"combine_small<{types}>", (parts, num_tokens), _WARP)
    if num_tokens <= _MEDIUM_TOKENS:
        return Launch(f"combine_medium<{types}>", (parts, num_tokens), _WARP * _WARPS)
    return Launch(f"combine_large<{types}>", (_filling(num_tokens * parts, num_multiprocessors), 1), _WARP * _WARPS)


def can_use(*tensors: Tensor) -> bool:
    """Say whether the kernels can read and write these rows: on a GPU, of a dtype they know, in whole vectors.

    Without CuPy they cannot, and torch does their work; `expertmesh doctor` says that it is missing.
    """
    return all(
        rows.is_cuda
        and rows.dtype in _CUDA_TYPE
        and rows.is_contiguous()
        and rows.data_ptr() % _VECTOR_BYTES == 0
        and rows.shape[-1] * rows.element_size() % _VECTOR_BYTES == 0
        for rows in tensors
    ) and has("cupy")


def gather_rows(rows_TH: Tensor, token_R: Tensor) -> Tensor:
    """Return rows_TH[token_R]; token_R is int64 and on the same GPU."""
    out_RH = rows_TH.new_empty((len(token_R), rows_TH.shape[1]))
    num_vectors = rows_TH.shape[1] * rows_TH.element_size() // _VECTOR_BYTES
    if len(token_R):
        launch = gather_launch(len(token_R), num_vectors, _num_multiprocessors(rows_TH.device))
        _run(launch, rows_TH.device, rows_TH, token_R, out_RH, len(token_R), num_vectors)
    return out_RH


def row_addresses(rows_RH: Tensor) -> Tensor:
    """Return the address of each row, int64 [R], on the same GPU."""
    row_bytes = rows_RH.shape[1] * rows_RH.element_size()
    return torch.arange(len(rows_RH), device=rows_RH.device) * row_bytes + rows_RH.data_ptr()


def combine(
    address_TK: Tensor, weight_TK: Tensor | None, out_TH: Tensor, *, dtype: torch.dtype, adds: bool = False
) -> None:
    """Write each token's weighted sum of rows to out_TH, added in float32 in the order of the choices.

    Args:
        address_TK: of the rows, int64, on the GPU; 0: a choice has none. They must live until they were read.
        weight_TK: float32; None: all 1.
        out_TH: float32, or the rows' dtype.
        dtype: of the rows.
        adds: add to what out_TH holds, which is float32 then.
    """
    num_tokens, num_choices = address_TK.shape
    num_vectors = out_TH.shape[1] * dtype.itemsize // _VECTOR_BYTES
    if num_tokens:
        num_multiprocessors = _num_multiprocessors(out_TH.device)
        launch = combine_launch(dtype, out_TH.dtype, num_tokens, num_vectors, num_multiprocessors)
        base_TH = out_TH if adds else None
        _run(launch, out_TH.device, address_TK, weight_TK, base_TH, out_TH, num_tokens, num_choices, num_vectors)


def _filling(num_warps: int, num_multiprocessors: int) -> int:
    """Return how many blocks fill the GPU once, or have work."""
    return min(-(-num_warps // _WARPS), num_multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def kernel_names() -> list[str]:
    """Return the names of all kernels, as C++ calls them."""
    types = [f"{rows}, {sums}" for rows in _CUDA_TYPE.values() for sums in {rows, "float"}]
    sizes = ("small", "medium", "large")
    return ["gather_small", "gather_large", *(f"combine_{size}<{both}>" for size in sizes for both in sorted(types))]


@functools.cache
def _module() -> Any:
    """Compile the source; a user's processes find it in CuPy's cache from the second time on."""
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=("--std=c++17",), name_expressions=kernel_names())


def _run(launch: Launch, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Start a kernel on torch's current stream: addresses, then a number of rows, then smaller numbers."""
    import cupy

    addresses = [a.data_ptr() if isinstance(a, Tensor) else 0 for a in arguments if not isinstance(a, int)]
    count, *sizes = (a for a in arguments if isinstance(a, int))
    values = (*map(np.uint64, addresses), np.int64(count), *map(np.int32, sizes))
    function: Callable[..., None] = _module().get_function(launch.kernel)
    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream):
        function((*launch.grid, 1), (launch.block, 1, 1), values)
