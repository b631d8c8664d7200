"""Drawing tokens on CPU, from rows without a filter, in two passes over their scores.

Shape suffixes: N rows, V vocabulary.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from expertmesh.kernels.cpu.build import load_draw
from expertmesh.kernels.cpu.isa import Isa, best_isa
from expertmesh.kernels.cpu.threads import num_threads

_DTYPES = (torch.bfloat16, torch.float32)


def can_draw(scores_NV: Tensor) -> bool:
    """Say whether `draw_rows` can read these scores here."""
    is_readable = scores_NV.device.type == "cpu" and scores_NV.dtype in _DTYPES and scores_NV.is_contiguous()
    return is_readable and load_draw() is not None


def draw_rows(
    scores_NV: Tensor, temperatures: Sequence[float], uniforms: Sequence[float], isa: Isa | None = None
) -> tuple[Tensor, Tensor]:
    """Draw each row's token; see `sampling` for what that means.

    Args:
        scores_NV: bf16 or float32, contiguous.
        temperatures: 0: the first of the most likely tokens.
        uniforms: in (0, 1), what draws the token.
        isa: instruction set; None: the best.

    Returns:
        ids_N, int64, and best_N, float32: the largest score, NaN where any is. A row's id means nothing where it is not
        finite.
    """
    library = load_draw()
    assert library is not None, "draw_rows() without a compiled kernel"
    num_rows, vocab_size = scores_NV.shape
    # One that float32 rounds to 0 would make 0 / 0 of the most likely token, an infinite one NaN of excluded tokens.
    tiny, most = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
    temperature_N = torch.tensor([min(max(t, tiny), most) if t > 0 else 0.0 for t in temperatures])
    uniform_N = torch.tensor(uniforms, dtype=torch.float64)
    ids_N, best_N = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
    addresses = [ctypes.c_void_p(t.data_ptr()) for t in (scores_NV, temperature_N, uniform_N, ids_N, best_N)]
    library.draw_rows(
        addresses[0],
        ctypes.c_int(scores_NV.dtype == torch.bfloat16),
        ctypes.c_int64(num_rows),
        ctypes.c_int64(vocab_size),
        *addresses[1:],
        ctypes.c_int(best_isa() if isa is None else isa),
        ctypes.c_int(num_threads()),
    )
    return ids_N, best_N
