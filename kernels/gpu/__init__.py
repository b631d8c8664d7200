"""GPU kernels, compiled at first use."""

import functools
from importlib.util import find_spec


@functools.cache
def has(package: str) -> bool:
    """Say whether an optional package is installed; kernels that need one that is not leave their work to torch."""
    return find_spec(package) is not None
