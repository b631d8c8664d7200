"""A checkpoint directory's config.json, read without torch or transformers: what is not there is said at once."""

import json
from pathlib import Path
from typing import Any

from expertmesh.cluster.errors import CheckpointError


def read_config_file(directory: Path) -> dict[str, Any]:
    """Return the content of a checkpoint directory's config.json.

    Raises:
        CheckpointError: no such directory, no such file, or no JSON object in it.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no config.json; a checkpoint directory as save_pretrained writes it is needed"
        )
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content
