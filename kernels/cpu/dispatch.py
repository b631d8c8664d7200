"""Dispatch on CPU, compiled: packing a layer's tokens for all shards, reading what came, adding answers, a call each.

Torch and numpy take some 5 us for each of the dozen small steps of which each of these is made.

Shape suffixes: T tokens, H hidden, K choices a token, E experts, S shards, R rows and P pairs of one shard.
"""

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_dispatch

_PAIR_BYTES = 12
_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64


def can_pack(hidden_TH: Tensor) -> bool:
    """Say whether the rows are where these functions can read them, and there is a compiled kernel."""
    return hidden_TH.device.type == "cpu" and hidden_TH.is_contiguous() and load_dispatch() is not None


def pack(
    hidden_TH: Tensor,
    ids_TK: npt.NDArray[np.int64],
    weights_TK: npt.NDArray[np.float32],
    shard_TK: npt.NDArray[np.int32],
    num_shards: int,
) -> list[tuple[int, int, int, Tensor, Tensor]]:
    """Pack tokens for their shards.

    Args:
        hidden_TH: contiguous.
        ids_TK: the experts chosen.
        weights_TK: the router's weights.
        shard_TK: who runs each pair; -1: nobody.
        num_shards: S.

    Returns:
        Of each shard with pairs, rising: its number, numbers of rows and of pairs, the tokens of its rows (int64 [R])
        and its payload (uint8).
    """
    ids_TK, weights_TK, shard_TK = map(np.ascontiguousarray, (ids_TK, weights_TK, shard_TK))
    num_tokens, num_choices = shard_TK.shape
    rows, pairs = (_NUMBER * num_shards)(), (_NUMBER * num_shards)()
    _library().dispatch_sizes(shard_TK.ctypes.data, num_tokens, num_choices, num_shards, rows, pairs)
    row_bytes = hidden_TH.shape[1] * hidden_TH.element_size()
    used = [shard for shard in range(num_shards) if pairs[shard]]
    payloads = {s: torch.empty(rows[s] * row_bytes + pairs[s] * _PAIR_BYTES, dtype=torch.uint8) for s in used}
    tokens = {s: torch.empty(rows[s], dtype=torch.int64) for s in used}
    addresses = _ADDRESS * num_shards
    _library().dispatch_pack(
        hidden_TH.data_ptr(),
        row_bytes,
        ids_TK.ctypes.data,
        weights_TK.ctypes.data,
        shard_TK.ctypes.data,
        num_tokens,
        num_choices,
        num_shards,
        rows,
        pairs,
        addresses(*(payloads[s].data_ptr() if s in payloads else None for s in range(num_shards))),
        addresses(*(tokens[s].data_ptr() if s in tokens else None for s in range(num_shards))),
    )
    return [(s, rows[s], pairs[s], tokens[s], payloads[s]) for s in used]


def can_read(block: Tensor) -> bool:
    """Say whether `read_pairs` can read a block of pairs here."""
    return block.device.type == "cpu" and load_dispatch() is not None


def read_pairs(block: Tensor, num_pairs: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Read a packet's block of pairs.

    Returns:
        Rows and experts, int64 [P], and weights, float32 [P].

    Raises:
        ValueError: a row outside 0 to num_rows - 1, or a negative expert.
    """
    row_P, expert_P = torch.empty(num_pairs, dtype=torch.int64), torch.empty(num_pairs, dtype=torch.int64)
    weight_P = torch.empty(num_pairs)
    fault = _library().dispatch_read(
        block.data_ptr(), num_pairs, num_rows, row_P.data_ptr(), expert_P.data_ptr(), weight_P.data_ptr()
    )
    if fault == 1:
        raise ValueError(f"rows outside 0 to {num_rows - 1}")
    if fault:
        raise ValueError("a negative expert")
    return row_P, expert_P, weight_P


def can_add(out_TH: Tensor, rows_RH: Tensor) -> bool:
    """Say whether `add` can add these here."""
    return (
        out_TH.device.type == "cpu" and rows_RH.dtype in (torch.bfloat16, torch.float32) and load_dispatch() is not None
    )


def add(out_TH: Tensor, rows_RH: Tensor, token_R: Tensor | None) -> None:
    """Add rows, bf16 or float32, to those of out_TH (float32) that token_R names; None: to all. Both contiguous."""
    num_rows, hidden = rows_RH.shape
    tokens = None if token_R is None else token_R.data_ptr()
    is_bf16 = rows_RH.dtype == torch.bfloat16
    _library().dispatch_add(out_TH.data_ptr(), rows_RH.data_ptr(), is_bf16, tokens, num_rows, hidden)


def count(
    ids_TK: npt.NDArray[np.int64],
    is_decode_T: npt.NDArray[np.bool_],
    load_E: npt.NDArray[np.int64],
    decode_E: npt.NDArray[np.int64],
) -> bool:
    """Add the tokens of each expert to load_E, those of generated tokens to decode_E; False: no compiled kernel.

    All contiguous.

    Raises:
        ValueError: an id that is no expert's; nothing was added.
    """
    library = load_dispatch()
    if library is None:
        return False
    num_tokens, num_choices = ids_TK.shape
    addresses = [array.ctypes.data for array in (ids_TK, is_decode_T, load_E, decode_E)]
    sizes = num_tokens, num_choices, len(load_E)
    if _prepared(library).dispatch_count(*addresses[:2], *sizes, *addresses[2:]):
        raise ValueError(f"experts {ids_TK.min()} to {ids_TK.max()} were chosen of {len(load_E)}")
    return True


def _library() -> Any:
    library = load_dispatch()
    assert library is not None, "compiled dispatch without a compiled kernel"
    return _prepared(library)


@functools.cache
def _prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the arguments once: converting each by itself takes as long as the work."""
    library.dispatch_count.argtypes = [_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS]
    library.dispatch_sizes.argtypes = [_ADDRESS, _NUMBER, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS]
    library.dispatch_pack.argtypes = [
        *(_ADDRESS, _NUMBER, _ADDRESS, _ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _NUMBER),
        *(_ADDRESS, _ADDRESS, _ADDRESS, _ADDRESS),
    ]
    library.dispatch_read.argtypes = [_ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _ADDRESS]
    library.dispatch_add.argtypes = [_ADDRESS, _ADDRESS, ctypes.c_int, _ADDRESS, _NUMBER, _NUMBER]
    for name in ("sizes", "pack", "add"):
        getattr(library, f"dispatch_{name}").restype = None
    return library
