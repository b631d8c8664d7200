"""How many threads the compiled kernels use: torch's number unless told otherwise.

A worker whose dense half runs in a few long kernels and many tiny operators of torch wants both cores for the first and
one for the second, which cost more to hand out than to do.
"""

import torch

_num_threads: int | None = None


def set_num_threads(num_threads: int) -> None:
    """Let the kernels of this process use so many threads."""
    global _num_threads
    _num_threads = num_threads


def num_threads() -> int:
    """Return how many threads a kernel may use."""
    return _num_threads or torch.get_num_threads()
