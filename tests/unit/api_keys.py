"""Files of keys with known secrets."""

from pathlib import Path
from typing import Any

from expertmesh.actors.gateway.key_book import KeyBook
from expertmesh.cluster.api_keys import PREFIX, ApiKey, Role, format_keys, hash_secret


def secret_of(name: str) -> str:
    """Return the secret of a key: as long as real ones, and easy to find in a text."""
    return f"{PREFIX}{name:S<43}"


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata of a key."""
    return (("authorization", f"Bearer {secret_of(name)}"),)


def key(name: str, role: str = "inference", **fields: Any) -> ApiKey:
    return ApiKey(name=name, role=Role(role), sha256=hash_secret(secret_of(name)), **fields)


def write_keys(path: Path, *keys: ApiKey) -> Path:
    path.write_text(format_keys(keys))
    return path


def book(directory: Path, *keys: ApiKey, **clocks: Any) -> KeyBook:
    return KeyBook(write_keys(directory / "keys.toml", *keys), **clocks)
