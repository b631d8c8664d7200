"""Where this machine keeps what was built once: compiled kernels, tokenizers as they are used."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/expertmesh, or ~/.cache/expertmesh; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "expertmesh"
