"""The tensors of a checkpoint directory: names, and lazy slices that read only the bytes asked for (mmap).

Only safetensors are read, never pickle.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from expertmesh.cluster.errors import CheckpointError, CorruptCheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class TensorFiles:
    """All tensors of a checkpoint by name. Opening reads headers only."""

    def __init__(self, directory: Path) -> None:
        """Open the headers of all files, and remember what they are: one that is exchanged later is not read.

        Raises:
            CheckpointError: the directory holds no safetensors.
            CorruptCheckpointError: a file is missing, truncated or damaged, or lacks a tensor that the index names.
        """
        self.directory = directory
        self._file_of = _tensor_names(directory)
        self._open: dict[str, Any] = {}
        self._identity: dict[str, tuple[int, ...]] = {}
        for name in dict.fromkeys(self._file_of.values()):
            self._open[name] = self._open_file(name)
            self._identity[name] = _identity(directory / name)
        self._check_index()

    def __len__(self) -> int:
        return len(self._file_of)

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self._file_of)

    def slice(self, name: str) -> Any:
        """Return a lazy view of a tensor: indexing it reads those bytes; get_shape() and get_dtype() read nothing.

        Raises:
            CorruptCheckpointError: the file was exchanged since it was opened first.
        """
        file = self._file_of[name]
        if file not in self._open:
            path = self.directory / file
            opened = self._open_file(file)
            if _identity(path) != self._identity[file]:
                raise CorruptCheckpointError(f"{path}: not the file any more that it was when the model was opened")
            self._open[file] = opened  # not before: it would be read the next time
        return self._open[file].get_slice(name)

    def release(self) -> None:
        """Let go of the memory of what was read: pages of a mapped file stay with this process until then.

        Tensors that still refer to a file keep all that was read of it.
        """
        self._open.clear()

    def num_bytes(self) -> int:
        """Return the size of all files in bytes."""
        return sum((self.directory / name).stat().st_size for name in self._identity)

    def _open_file(self, name: str) -> Any:
        path = self.directory / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{path}: named by {INDEX_FILE}, but there is no such file")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            raise CorruptCheckpointError(f"{path}: truncated or damaged ({size} bytes): {error}") from error

    def _check_index(self) -> None:
        present = {name: set(handle.keys()) for name, handle in self._open.items()}
        for tensor, name in self._file_of.items():
            if tensor not in present[name]:
                raise CorruptCheckpointError(
                    f"{self.directory / name}: no tensor {tensor!r}, though {INDEX_FILE} says so"
                )


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _tensor_names(directory: Path) -> Mapping[str, str]:
    """Map each tensor's name to its file, from the index or the single file."""
    index = directory / INDEX_FILE
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptCheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or Path(name).name != name:
                raise CorruptCheckpointError(f"{index}: tensor {tensor!r} is in {name!r}, which is no plain file name")
        return weight_map
    single = directory / SINGLE_FILE
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as handle:
                return dict.fromkeys(handle.keys(), SINGLE_FILE)
        except (SafetensorError, OSError) as error:
            size = single.stat().st_size
            raise CorruptCheckpointError(f"{single}: truncated or damaged ({size} bytes): {error}") from error
    pickled = sorted(p.name for p in directory.glob("*.bin")) + sorted(p.name for p in directory.glob("*.pt"))
    found = f"; found pickled weights {', '.join(pickled[:3])}, which are never read" if pickled else ""
    raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
