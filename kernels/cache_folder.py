"""Where this machine keeps what was built once: compiled kernels, tokenizers as they are used."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/expertmesh, or ~/.cache/expertmesh; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"


def keep(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place in the cache and put there whole; several processes may do so at once.

    Raises:
        OSError: the cache cannot be written; and whatever write raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        write(written)
        written.rename(path)
