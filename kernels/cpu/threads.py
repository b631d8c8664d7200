"""How many threads the compiled kernels use: torch's number unless told otherwise.

A worker whose dense half runs in a few long kernels and many tiny operators of torch wants both cores for the first and
one for the second, which cost more to hand out than to do.
"""

import ctypes

import torch

from expertmesh.kernels.cpu.build import load_expert_mlp

_num_threads: int | None = None


def set_num_threads(num_threads: int) -> None:
    """Let the kernels of this process use so many threads."""
    global _num_threads
    _num_threads = num_threads


def num_threads() -> int:
    """Return how many threads a kernel may use."""
    return _num_threads or torch.get_num_threads()


def start_helpers(count: int) -> None:
    """Let the experts' kernel use so many threads more, on the cores that the calling thread may use now.

    They may be cores of other processes: helpers take what those leave idle, and what they do not come to is done by
    the others (kernels/cpu/team.h). Without a compiled kernel this does nothing.
    """
    library = load_expert_mlp()
    if library is not None:
        library.expert_mlp_start(ctypes.c_int(num_threads()), ctypes.c_int(count))
