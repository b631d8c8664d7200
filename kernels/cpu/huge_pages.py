"""Memory in huge pages for weights that are read from end to end in every step.

With 4 KiB pages the hardware asks memory for no more than the page at hand: in 2 MiB pages one core's stream of weights
is an eighth faster (benchmarks/expert_mlp.py).
"""

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


def empty_bf16(sizes: Sequence[int]) -> list[Tensor]:
    """Return uninitialised bf16 tensors, one for each number of elements, none of which may be 0.

    Each has a mapping of its own and gives its memory back by itself. The kernel joins neighbouring mappings, so that
    tensors that are made together share huge pages and need not be multiples of one. Where the kernel has no huge
    pages they are of ordinary ones.
    """
    mappings = []
    for size in sizes:
        mapping = mmap.mmap(-1, size * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # EINVAL: a kernel built without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
        mappings.append(mapping)
    return [torch.frombuffer(mapping, dtype=torch.bfloat16) for mapping in mappings]
