"""A checkpoint's facts, kept in this machine's cache: inspecting one takes seconds of imports, its headers do not.

Kept by all that they depend on: the checkpoint's JSON files, the headers and sizes of its tensor files, the settings,
the libraries and the sources of this package. What cannot be served is not kept: the reason is found anew.
"""

import hashlib
import importlib.metadata
import json
import logging
import struct
from dataclasses import asdict
from pathlib import Path

from expertmesh.cluster.model_info import CheckpointFacts, ModelInfo
from expertmesh.kernels.cache_folder import cache_folder, keep

_log = logging.getLogger(__name__)
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers")
_SOURCES = ("models", "kernels", "cluster")


def facts_path(directory: Path, dtype: str, max_context: int) -> Path:
    """Return where the facts of a checkpoint directory are kept, or would be."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((directory.resolve().name, dtype, max_context)).encode())
    for library in _LIBRARIES:
        digest.update(importlib.metadata.version(library).encode())
    package = Path(__file__).parent.parent
    sources = [
        path for name in _SOURCES for path in (package / name).rglob("*") if path.suffix in (".py", ".cpp", ".h")
    ]
    for path in (*sorted(sources), *sorted(directory.glob("*.json"))):
        digest.update(f"{path.name} ".encode() + path.read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} ".encode() + _header(path))
    return cache_folder() / f"facts-{digest.hexdigest()}.json"


def kept_facts(path: Path) -> CheckpointFacts | None:
    """Return the facts kept at a path; None: there are none, or they cannot be read."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        info = content.pop("info")
        info |= {name: tuple(info[name]) for name in ("moe_layers", "eos_token_ids")}
        return CheckpointFacts(info=ModelInfo(**info), **content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is damaged and made anew: %r", path, error)
        return None


def keep_facts(facts: CheckpointFacts, path: Path) -> None:
    """Keep facts; where that is not possible it is logged."""
    try:
        keep(path, lambda file: file.write_text(json.dumps(asdict(facts))))
    except OSError as error:
        _log.warning("the checkpoint's facts are not kept for the next start: %s", error)


def _header(path: Path) -> bytes:
    """Return a safetensors file's header: eight bytes of length, then JSON. A damaged one is cut short."""
    with path.open("rb") as file:
        length = file.read(8)
        size = struct.unpack("<Q", length)[0] if len(length) == 8 else 0
        return length + file.read(min(size, path.stat().st_size))
